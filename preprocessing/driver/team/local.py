"""`LocalTeam`: this process and its children."""

import errno
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from d2v2ds.errors import ConfigError, D2V2Error, MachineError
from d2v2ds.io.machine_faults import ADVICE, is_out_of_memory
from preprocessing.driver.exit_codes import EXIT_FAILED
from preprocessing.driver.progress import Report, Throttle
from preprocessing.driver.team.protocol import Job, Result, Work

_PATIENCE_S = 5.0
"""Time that workers get to remove their temporary files before they are killed."""


class LocalTeam:
    """This process and up to `workers` children, which start with the first work for them and stay for more.

    Leaving the ``with`` block ends them; so does the end of this process, however it comes.
    """

    is_leader = True

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ConfigError(f"--workers {workers}: expected at least 1")
        self.size = workers
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def share(self, decide: Callable[[], Result]) -> Result:
        return decide()

    def map(self, work: Work[Job, Result], jobs: Sequence[Job], report: Report) -> list[Result]:
        size = min(self.size, len(jobs))
        if size <= 1:
            return [work(job, report) for job in jobs]
        try:
            return self._deal(work, list(enumerate(jobs)), size, report)
        except BaseException:
            self._end(kill=True)
            raise

    def _deal(
        self, work: Work[Job, Result], jobs: Sequence[tuple[int, Job]], size: int, report: Report
    ) -> list[Result]:
        while len(self._workers) < size:
            self._workers.append(_start_worker())
        results: list[Any] = [None] * len(jobs)
        working = {connection: rank for rank, (_, connection) in enumerate(self._workers[:size])}
        for connection, rank in working.items():
            with suppress(BrokenPipeError):  # it has ended already: found out below
                connection.send((work, jobs[rank::size]))
        while working:
            for ready in wait(list(working)):
                assert isinstance(ready, Connection)
                rank = working[ready]
                try:
                    kind, value = ready.recv()
                except (EOFError, ConnectionResetError):
                    process, _ = self._workers[rank]
                    process.join()
                    raise D2V2Error(
                        f"worker {rank} ended with exit code {process.exitcode} before its work was done "
                        "(-9 often means that memory ran out: use fewer --workers); run the same command again, "
                        "finished shards are kept"
                    ) from None
                if kind == "progress":
                    report(*value)
                elif kind == "result":
                    results[value[0]] = value[1]
                elif kind == "error":
                    raise value
                else:
                    del working[ready]
        return results

    def _end(self, kill: bool) -> None:
        for process, connection in self._workers:
            connection.close()  # a child that waits for work ends with this
            if kill:
                process.terminate()
        deadline = time.monotonic() + _PATIENCE_S
        for process, _ in self._workers:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()  # one that has ended takes no notice
            process.join()
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kill=error is not None)


def _start_worker() -> tuple[BaseProcess, Connection]:
    # spawn: a forked child would inherit the locks of Arrow's threads
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_worker, args=(theirs,), daemon=True)
    resource_tracker.ensure_running()  # `start` would call it, and it unblocks the signal
    # inherited, while the child imports too: the parent hears Ctrl-C and ends its children
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # so that the end of the child ends the pipe
    return process, ours


def _run_worker(connection: Connection) -> None:
    """Run jobs in a child process until the pipe closes; without parent the next report or wait ends it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_FAILED))  # leave no temporary file behind
    report = Throttle(lambda files, size: connection.send(("progress", (files, size))))
    while True:
        try:
            work, jobs = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            for number, job in jobs:
                result = work(job, report.add)
                report.flush()
                connection.send(("result", (number, result)))
            connection.send(("done", None))
        except BrokenPipeError:
            sys.exit(EXIT_FAILED)
        except (D2V2Error, OSError) as error:
            with suppress(BrokenPipeError):  # an error of another worker was first, and nobody listens any more
                connection.send(("error", error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fault = MachineError(f"a worker: {error or 'MemoryError'}; {ADVICE[errno.ENOMEM]}")
            with suppress(BrokenPipeError):
                connection.send(("error", fault))
