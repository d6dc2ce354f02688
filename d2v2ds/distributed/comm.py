"""Start and stop the process group, on GPUs or on a laptop, under any launcher or none.

Knows three ways of being started: with RANK, LOCAL_RANK and WORLD_SIZE in the environment (`deepspeed`,
`torchrun`), by `srun` (SLURM_PROCID, SLURM_LOCALID, SLURM_NTASKS), and plainly as one process. Without a GPU it
picks the CPU accelerator and gloo, and keeps DeepSpeed from compiling anything.
"""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import deepspeed
import torch
import torch.distributed as torch_dist
from deepspeed.utils import logger as deepspeed_logger

from d2v2ds.errors import ConfigError, D2V2Error, MachineError
from d2v2ds.io.machine_faults import advice, is_machine_fault

DEFAULT_TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


def free_port() -> int:
    """A TCP port on the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher_environment(environ: dict[str, str]) -> dict[str, str]:
    """The rendezvous variables this process lacks, from whatever started it.

    An existing RANK always wins: a script started by hand inside a Slurm job sees SLURM_PROCID too.

    Args:
        environ: the process environment, only read.

    Returns:
        The variables to add, among RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: if the launcher gave some of these variables but not enough of them.
    """
    found = dict(environ)
    if "RANK" not in found:
        if "SLURM_PROCID" in found:
            tasks = found.get("SLURM_STEP_NUM_TASKS", found.get("SLURM_NTASKS", "1"))
            found.update(RANK=found["SLURM_PROCID"], LOCAL_RANK=found.get("SLURM_LOCALID", "0"), WORLD_SIZE=tasks)
        else:
            found.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if found.get("WORLD_SIZE") == "1":
        found.setdefault("LOCAL_RANK", "0")
        found.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in found:
            found["MASTER_PORT"] = str(free_port())
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in found]
    if missing:
        raise ConfigError(
            f"process group: expected {', '.join(needed)} in the environment, {', '.join(missing)} not set; "
            "start with `deepspeed` or `torchrun`, or under srun export MASTER_ADDR=$(scontrol show hostnames "
            '"$SLURM_JOB_NODELIST" | head -n1) and MASTER_PORT first'
        )
    return {name: found[name] for name in needed if environ.get(name) != found[name]}


def initialise(timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Create the default process group: nccl where CUDA is available, else gloo.

    Args:
        timeout: how long a collective waits for a rank that does not answer.

    Raises:
        ConfigError: if the launcher's environment is incomplete, or there are fewer GPUs than ranks.
        MachineError: if the ranks cannot reach each other.
    """
    os.environ.update(launcher_environment(dict(os.environ)))
    use_cuda = torch.cuda.is_available()
    deepspeed_logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames: one warning per call and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if use_cuda:
        torch.cuda.set_device(device())
    else:
        # The shared-memory operator would be compiled here (80 s and a compiler); plain gloo needs neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if use_cuda else "gloo", auto_mpi_discovery=False, timeout=timeout, verbose=False
        )
    except torch_dist.DistError as error:
        said = str(error).partition("\n")[0]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise MachineError(
            f"rank {os.environ['RANK']}: no connection at {where}: {said}; if another run there has the port, choose "
            "one with `--master_port` of the launcher or MASTER_PORT"
        ) from error


def shutdown() -> None:
    """Destroy the process group if there is one. Without it a process may die with SIGABRT at its exit."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


@contextmanager
def process_group(timeout: timedelta = DEFAULT_TIMEOUT) -> Iterator[None]:
    """`initialise` on entry, `shutdown` on every way out."""
    initialise(timeout)
    try:
        yield
    finally:
        shutdown()


def rank() -> int:
    """This process's number among all; 0 without a process group."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world() -> int:
    """Number of processes; 1 without a process group."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """Device on which this rank computes: the only GPU that it sees (`--gpus-per-task=1`), or that of its local rank.

    Raises:
        ConfigError: it sees several GPUs, and fewer than there are ranks on this node.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count, number = torch.cuda.device_count(), local_rank()
    if number >= count > 1 or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ConfigError(
            f"local rank {number}: expected a GPU for each rank of this node, found {count} visible "
            f"(CUDA_VISIBLE_DEVICES {visible}); start as many ranks as GPUs"
        )
    return torch.device("cuda", 0 if count == 1 else number)


def barrier() -> None:
    """Wait for every rank."""
    if world() > 1:
        torch_dist.barrier()


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """The sum over ranks of each number, in float64, the same on every rank."""
    if world() == 1:
        return [float(value) for value in values]
    sums = torch.tensor(list(values), dtype=torch.float64, device=device())  # (len(values),)
    torch_dist.all_reduce(sums)
    return [float(value) for value in sums.tolist()]


def broadcast_object(value: T) -> T:
    """Rank 0's picklable object, on every rank."""
    if world() == 1:
        return value
    holder: list[object] = [value]
    torch_dist.broadcast_object_list(holder, src=0, device=device())
    return cast(T, holder[0])


def on_rank0(action: Callable[[], object]) -> str:
    """Let rank 0 touch the disk while the others wait.

    Returns:
        What went wrong, on every rank; empty if nothing did.
    """
    fault = ""
    if rank() == 0:
        try:
            action()
        except OSError as error:
            fault = f"rank 0: {error}; {advice(error)}"
        except D2V2Error as error:
            fault = f"rank 0: {error}"
    return broadcast_object(fault)


def require_on_rank0(action: Callable[[], object], where: str) -> None:
    """Let rank 0 touch the disk while the others wait, where a run cannot go on without.

    Raises:
        MachineError, ConfigError: on every rank, if it failed; by whose fault it did.
    """
    together(action if rank() == 0 else lambda: None, where)


def together(action: Callable[[], T], where: str = "") -> T:
    """Do something on every rank that may fail on some: then all of them raise. Collective.

    Args:
        action: local, without collective calls.
        where: beginning of the messages of system errors.

    Raises:
        MachineError, ConfigError or whatever error of the project the action raised: the same on every rank.
    """
    value: T | None = None
    fault: D2V2Error | None = None
    place = f"{where}: rank {rank()}" if where else f"rank {rank()}"
    try:
        value = action()
    except D2V2Error as error:
        fault = error
    except MemoryError:
        fault = MachineError(f"{place}: no memory left; lower the number of workers or the batch sizes")
    except OSError as error:
        said = f"{place}: {error}"
        fault = MachineError(f"{said}; {advice(error)}") if is_machine_fault(error) else ConfigError(said)
    faults = [found for found in gather_objects(fault) if found is not None]
    if faults:
        raise next((found for found in faults if isinstance(found, MachineError)), faults[0])
    return cast(T, value)


def side_store(timeout: timedelta = timedelta(seconds=10)) -> torch_dist.Store:
    """A key-value store beside the process group, which any thread may use at any time. Collective to make.

    It lives in rank 0's process; its calls raise RuntimeError when that one does not answer within the timeout.
    """
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store: torch_dist.Store | None = None
    if rank() == 0:
        store = torch_dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    port = broadcast_object(store.port if isinstance(store, torch_dist.TCPStore) else 0)
    if store is None:
        store = torch_dist.TCPStore(host, port, is_master=False, timeout=timeout)
    return store


def gather_objects(value: T) -> list[T]:
    """Every rank's picklable object, in rank order, on every rank."""
    if world() == 1:
        return [value]
    holder: list[object] = [None] * world()
    torch_dist.all_gather_object(holder, value)
    return cast(list[T], holder)
