"""`Team`: the processes that run one program, local workers or the ranks of an MPI job.

Every process runs the same lines: `share` lets the leader decide something for all, and `map` deals jobs out by a fixed
rule, job i to process i modulo their number. What a job writes must not depend on who runs it; then the number of
processes changes nothing but the time.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

from preprocessing.driver.progress import Report

Job = TypeVar("Job")
Result = TypeVar("Result")
Work = Callable[[Job, Report], Result]


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
