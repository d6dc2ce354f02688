"""One program on many processes: local workers, or the ranks of an MPI job.

A program is written for a `Team`: every process runs the same lines, `share` lets the leader decide something for
all, and `map` deals jobs out by a fixed rule, job i to process i modulo their number. What a job writes must not
depend on who runs it; then the number of processes changes nothing but the time.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from d2v2ds.errors import ConfigError, D2V2Error, MissingExtraError
from preprocessing.driver.progress import Report

Job = TypeVar("Job")
Result = TypeVar("Result")
Work = Callable[[Job, Report], Result]

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
"""Of every command here: what a shell makes of Ctrl-C."""
_REPORT_PERIOD_S = 0.5
_POLL_S = 0.01
_PATIENCE_S = 5.0
"""For workers that are to end: time to remove their temporary files, unless something has stopped them."""
_TASK_VARIABLES = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
_LAUNCHER_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")

FORWARDING_SECONDS = 1.0
"""Pause between a rank's last message and its abort: launchers drop output that they have not yet passed on."""


class Team(Protocol):
    """Processes that work on one output folder."""

    is_leader: bool
    """True in exactly one process: the one that prints and writes the index."""
    size: int

    def share(self, decide: Callable[[], Result]) -> Result:
        """Call `decide` in the leader; every process gets its result, or raises its error."""
        ...

    def map(self, work: Work[Job, Result], jobs: Sequence[Job], report: Report) -> list[Result]:
        """Results in the order of the jobs, for the leader; other processes get an empty list."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def choose_team(workers: int | None, use_mpi: bool, environment: Mapping[str, str] = os.environ) -> Team:
    """The ranks of the MPI job this process belongs to, else local workers.

    Args:
        workers: local processes; None takes one per usable core.
        use_mpi: ask for MPI even where no launcher shows.
        environment: where launchers leave their traces.

    Raises:
        ConfigError: if the scheduler started more tasks than the MPI world has, or workers are asked of MPI ranks.
    """
    tasks = _scheduled_tasks(environment)
    if not (use_mpi or tasks > 1 or any(name in environment for name in _LAUNCHER_VARIABLES)):
        return LocalTeam(len(os.sched_getaffinity(0)) if workers is None else workers)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library to load
        raise MissingExtraError(
            f"started by an MPI launcher or with --mpi, and MPI is missing ({error})", "mpi"
        ) from error
    world = MPI.COMM_WORLD
    check_world(tasks, world.size)
    if world.size == 1 and not use_mpi:
        return LocalTeam(len(os.sched_getaffinity(0)) if workers is None else workers)
    if workers is not None and workers > 1:
        raise ConfigError(f"--workers {workers} under MPI: expected one process per rank; start more ranks instead")
    return MpiTeam(world)


def check_world(tasks: int, world_size: int) -> None:
    """Raise a `ConfigError` if a scheduler started `tasks` processes that do not see each other."""
    if tasks > world_size:
        raise ConfigError(
            f"the scheduler reports {tasks} tasks, this process sees an MPI world of {world_size}: the tasks would "
            "all pack the same files.\n"
            "  Start with an MPI plugin that fits the MPI library: srun --mpi=pmi2 python -m preprocessing.pack_audio"
            " ... (`srun --mpi=list` names the plugins),\n"
            "  or with the library's own launcher: mpirun -n N python -m ...,\n"
            "  or ask for one task and use local workers: --ntasks=1 --cpus-per-task=N and --workers N"
        )


def _scheduled_tasks(environment: Mapping[str, str]) -> int:
    counts = [environment.get(name, "") for name in _TASK_VARIABLES]
    return max((int(count) for count in counts if count.isdigit()), default=1)


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
    """The life of a child process. If its parent is gone, the next report or the wait for work ends it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_FAILED))  # leave no temporary file behind
    report = _Throttle(lambda files, size: connection.send(("progress", (files, size))))
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


class MpiTeam:
    """The ranks of an MPI job; rank 0 leads. An error on one rank ends all of them."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self.size: int = world.size
        self.is_leader: bool = world.rank == 0
        self._agreed = False
        self._round = 0

    def share(self, decide: Callable[[], Result]) -> Result:
        outcome: tuple[bool, Any] = (True, None)
        if self.is_leader:
            try:
                outcome = (True, decide())
            except D2V2Error as error:
                outcome = (False, error)
        self._meet()
        good, value = self._world.bcast(outcome, root=0)
        if not good:
            self._agreed = True
            raise value
        result: Result = value
        return result

    def map(self, work: Work[Job, Result], jobs: Sequence[Job], report: Report) -> list[Result]:
        self._round += 1  # a quick rank may already be at the next call of `map`
        tag = self._round
        mine = list(enumerate(jobs))[self._world.rank :: self.size]
        if not self.is_leader:
            throttle = _Throttle(lambda files, size: self._world.send(("progress", (files, size)), dest=0, tag=tag))
            done = [(number, work(job, throttle.add)) for number, job in mine]
            throttle.flush()
            self._world.send(("done", done), dest=0, tag=tag)
            return []

        working = self.size - 1
        gathered: list[tuple[int, Result]] = []

        def add(files: int, size: int) -> None:
            report(files, size)
            listen()

        def listen() -> None:
            """Take what other ranks have sent by now. Messages of one rank arrive in the order in which it sent them,
            so behind its last one nothing is left: MPI may kill a rank that ends with messages on their way."""
            nonlocal working
            while self._world.iprobe(tag=tag):
                kind, value = self._world.recv(tag=tag)
                if kind == "progress":
                    report(*value)
                else:
                    gathered.extend(value)
                    working -= 1

        own = [(number, work(job, add)) for number, job in mine]
        gathered.extend(own)
        while working:
            listen()
            time.sleep(_POLL_S)
        return [result for _, result in sorted(gathered, key=lambda pair: pair[0])]

    def _meet(self) -> None:
        """A barrier that sleeps: MPI's own would burn the cores on which other ranks still work."""
        request = self._world.Ibarrier()
        while not request.Test():
            time.sleep(_POLL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._agreed:
            return
        if isinstance(error, D2V2Error):
            print(f"error on rank {self._world.rank}: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(kind, error, trace)
            sys.stderr.flush()
        time.sleep(FORWARDING_SECONDS)
        self._world.Abort(exit_code(error))


def exit_code(error: BaseException) -> int:
    """What the process returns to its caller for an error: 2 wrong input or settings, 4 files, else 1."""
    if isinstance(error, (ConfigError, MissingExtraError)):
        return 2
    return 4 if isinstance(error, (D2V2Error, OSError)) else EXIT_FAILED


class _Throttle:
    """Adds up reports and passes them on a few times a second."""

    def __init__(self, send: Report) -> None:
        self._send = send
        self._files = self._size = 0
        self._sent = time.monotonic()

    def add(self, files: int, size: int) -> None:
        self._files += files
        self._size += size
        if time.monotonic() - self._sent >= _REPORT_PERIOD_S:
            self.flush()

    def flush(self) -> None:
        if self._files:
            self._send(self._files, self._size)
            self._files = self._size = 0
        self._sent = time.monotonic()
