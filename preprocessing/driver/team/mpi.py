"""`MpiTeam`: the ranks of an MPI job."""

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from d2v2ds.errors import D2V2Error
from preprocessing.driver.exit_codes import exit_code
from preprocessing.driver.progress import Report, Throttle
from preprocessing.driver.team.protocol import Job, Result, Work

_POLL_S = 0.01
FORWARDING_SECONDS = 1.0
"""Pause between a rank's last message and its abort: launchers drop output that they have not yet passed on."""


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
            throttle = Throttle(lambda files, size: self._world.send(("progress", (files, size)), dest=0, tag=tag))
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
            """Receive what other ranks have sent.

            Messages of one rank arrive in the order in which it sent them, so none is left behind its last one: MPI may
            kill a rank that ends while its messages are on their way.
            """
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
