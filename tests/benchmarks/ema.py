"""Speed of `Teacher.update` against the machine's copy bandwidth, measured in the same run with the same threads.

    python -m tests.benchmarks.ema [--world 2] [--million 310] [--stage 3] [--dtype bf16]

One update has to move, for each element, the average twice (read, write), the master once and the working copy once:
14 bytes in bf16, 12 in fp32. The yardstick is a copy of as many bytes between large fp32 tensors (read and written
bytes both counted). Goal: 80 % of it. With more than one thread a rank on a machine that others use as well, set
OMP_WAIT_POLICY=PASSIVE: threads that spin at the end of each chunk would be measured otherwise.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.ds_config import load_ds_config, merge_ds_config
from d2v2ds.distributed.engine import build_student_engine
from d2v2ds.distributed.teacher import Teacher

SHIPPED = {
    (0, "fp32"): "zero0_fp32_debug",
    (1, "bf16"): "zero1_bf16",
    (2, "bf16"): "zero2_bf16",
    (3, "bf16"): "zero3_bf16",
}
WIDTH = 1024
BLOCK_ELEMENTS = 12 * WIDTH * WIDTH + 13 * WIDTH


class Block(nn.Module):
    """Parameters of one transformer block of width 1024; never run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)


class Network(nn.Module):
    """As many blocks as asked for."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))


def best_time(call: Callable[[], Any], repeats: int) -> float:
    """Shortest of several calls, in seconds; all ranks start each call together."""
    times = []
    for _ in range(repeats):
        comm.barrier()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth(nbytes: int, device: torch.device) -> tuple[float, Callable[[], Tensor]]:
    """A copy that reads and writes `nbytes` in all, as a call to be timed."""
    source = torch.ones(nbytes // 8, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return 2.0 * source.numel() * source.element_size(), lambda: target.copy_(source)


def measure(million: int, stage: int, dtype: str, threads: int, rounds: int = 5) -> dict[str, float]:
    """One engine, one teacher; copies and updates in turn, so that both see the same disturbances."""
    torch.set_num_threads(threads)
    depth = max(1, round(million * 1e6 / BLOCK_ELEMENTS))
    with torch.device("meta"):
        student, network = Network(depth), Network(depth)
    student, network = student.to_empty(device="cpu"), network.to_empty(device="cpu")
    for param in student.parameters():
        param.data.fill_(0.5)
    run = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    config = merge_ds_config(load_ds_config(SHIPPED[stage, dtype]), run)
    engine = build_student_engine(student, torch.optim.SGD(student.parameters(), lr=0.1), config, [Block])
    teacher = Teacher(network, engine)
    elements = sum(shard.numel for shard in teacher.shards().values())
    per_element = 14 if zero.compute_dtype(engine) == torch.bfloat16 else 12
    moved = float(elements * per_element)

    def update() -> None:
        engine.global_steps += 1  # the teacher refuses a second update for one step
        teacher.update(0.999)

    copied, copy = copy_bandwidth(min(int(moved), 2 << 30), comm.device())
    copy_s = update_s = float("inf")
    for _ in range(rounds):
        copy_s = min(copy_s, best_time(copy, 3))
        update_s = min(update_s, best_time(update, 3))
    engine.destroy()
    return {
        "elements": float(elements),
        "copy GB/s": copied / copy_s / 1e9,
        "update ms": update_s * 1e3,
        "update GB/s": moved / update_s / 1e9,
        "share": (moved / update_s) / (copied / copy_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=1, help="local ranks")
    parser.add_argument("--million", type=int, default=310, help="elements of the model in millions")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank")
    options = parser.parse_args()
    from tests.ranks import run_distributed

    arguments = (options.million, options.stage, options.dtype, options.threads)
    rows = run_distributed(measure, options.world, *arguments, timeout_s=900)
    print(f"EMA update, stage {options.stage} {options.dtype}, {options.threads} thread(s) a rank")
    print(
        f"{'rank':>4} {'elements':>12} {'copy GB/s':>10} {'update GB/s':>12} {'update ms':>10} {'share':>7}  goal 80 %"
    )
    for rank, row in enumerate(rows):
        print(
            f"{rank:>4} {row['elements']:>12.0f} {row['copy GB/s']:>10.2f} {row['update GB/s']:>12.2f} "
            f"{row['update ms']:>10.1f} {row['share']:>7.1%}"
        )


if __name__ == "__main__":
    main()
