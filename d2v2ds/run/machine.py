"""Matrix-product peak of a device, and settings of a process that trains on a CPU. Needs torch alone."""

import ctypes
import os
import time

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 1 << 30


def tune_cpu(processes: int) -> None:
    """Settings of a process that computes on a CPU, to be made before its first large operation.

    Its share of the cores, unless OMP_NUM_THREADS says otherwise; a malloc that keeps large blocks; and no numbers
    below 1e-38, which threads started later inherit. Probabilities far from an ALiBi query are such numbers, and
    products with them take ten times as long: whole fp32 steps of speech took a quarter longer.

    Args:
        processes: that share this machine's cores.
    """
    torch.set_flush_denormal(True)
    keep_large_blocks()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(processes, 1)))


def keep_large_blocks() -> bool:
    """Tell glibc to keep freed blocks of up to 1 GiB instead of returning them to the kernel.

    By default every large activation is a fresh mapping whose pages the kernel clears on first touch, which cost
    a third of the time of small CPU runs. Returns whether it took effect (glibc, and not overridden by the user's
    MALLOC_ environment).
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def matmul_peak_flops(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """Operations per second of a large square matrix product: the best one, all threads of this process.

    Args:
        device: CPU or CUDA.
        dtype: of the factors.
        seconds: how long to try; at least three products after the first, which warms up.
    """
    size = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # a run's random numbers are not touched
    a, b = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 4 or sum(times) < seconds:
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
