"""Run a function on several local gloo ranks, and count the collective calls of a piece of code.

The ranks are forked from the server of `tests/forked.py`: the first launch of a test session takes some five seconds,
later ones one. A test module still does best to return many findings from one launch.
"""

import faulthandler
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from tests.forked import fork

GRACE_S = 3.0
"""How long the other ranks may go on reporting after the first failure."""


class RankError(AssertionError):
    """One or more ranks failed; the message holds their tracebacks, first failure first."""


def run_distributed(function: Callable[..., Any], world: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call `function(*args)` on `world` new processes that share a process group.

    Args:
        function: a function of an importable module.
        world: number of ranks.
        args: picklable arguments, the same for every rank.
        timeout_s: after it, all ranks are killed.

    Returns:
        What each rank returned (picklable), in rank order.

    Raises:
        RankError: if a rank raised, died or did not finish in time.
    """
    from d2v2ds.distributed.comm import free_port

    port = free_port()
    ranks: dict[Connection, tuple[int, BaseProcess]] = {}
    for rank in range(world):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = fork(_rank_main, sender, rank, world, port, function, args, daemon=True)
        sender.close()
        ranks[receiver] = (rank, process)
    try:
        return _collect(ranks, time.monotonic() + timeout_s)
    finally:
        for receiver, (_, process) in ranks.items():
            if process.is_alive():
                process.kill()
            process.join()
            receiver.close()


def _collect(ranks: dict[Connection, tuple[int, BaseProcess]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    open_ends = list(ranks)
    while open_ends:
        ready = wait(open_ends, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            waiting = sorted(ranks[end][0] for end in open_ends)
            _print_stacks([ranks[end][1] for end in open_ends])
            why = "did not report in time" if not failures else "were stopped after the failure above"
            raise RankError("\n".join([*failures, f"ranks {waiting} {why}"]))
        for end in ready:
            assert isinstance(end, Connection)
            open_ends.remove(end)
            rank, process = ranks[end]
            try:
                is_ok, value = end.recv()
            except EOFError:
                process.join()
                is_ok, value = False, f"died without a report, exit code {_exit_code(process)}"
            if is_ok:
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
            else:
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                failures.append(f"rank {rank}: {value}")
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(ranks))]


def _print_stacks(processes: list[BaseProcess]) -> None:
    """Ask hanging ranks to write where they hang to stderr."""
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)


def _exit_code(process: BaseProcess) -> str:
    code = process.exitcode
    return f"{code} ({signal.Signals(-code).name})" if code is not None and code < 0 else str(code)


def _rank_main(
    sender: Connection, rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    from d2v2ds.distributed import comm

    try:
        with comm.process_group():
            value = function(*args)
        packed = io.BytesIO()  # pickled by torch.save: tensors sent as they are would die with this process
        torch.save(value, packed)
        sender.send((True, packed.getvalue()))
    except BaseException:  # noqa: BLE001 - reported to the parent, which raises it
        sender.send((False, traceback.format_exc()))
        sys.exit(1)


def count_collectives(call: Callable[[], Any]) -> int:
    """Collective operations that this rank starts during `call`, whoever starts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("c10d::"))
