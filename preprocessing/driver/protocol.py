"""Interfaces between the driver and a modality: `Packer`, and for `verify` and `inspect` `FolderReport`.

A packer is a class in ``pack_MODALITY.py``. `packing.py` calls, in this order: `check`, `scan` (every process; finds
the input and makes the plan), `make_beside` (the leader; files that belong to the folder, such as a tokenizer), `rows`
(one process per shard), `totals`. Packers travel to other processes by pickle: they hold settings, not open files.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from d2v2ds.data.schema import Index, Layout
from preprocessing.driver.progress import Measure, Report
from preprocessing.driver.shard_plan import Noted, Plan, Skipped
from preprocessing.driver.team.protocol import Team

Buffer = Any
"""Bytes, a memoryview or a contiguous array: whatever `memoryview` takes."""


@dataclass(slots=True)
class Row:
    """One example before it is stored."""

    payload: Buffer
    """Bytes of the payload column; copied when the row is added, so the memory may be used for the next row."""
    values: Mapping[str, Any]
    """All other columns by name."""


@dataclass(slots=True)
class Notes:
    """Results of packing a shard beside its rows."""

    report: Report
    """Call it with (files, planned size) when they are packed."""
    skipped: list[Skipped] = field(default_factory=list)
    """Files that turned out bad."""
    counts: Counter[str] = field(default_factory=Counter)
    """Sums that `Packer.totals` wants, by any names."""
    noted: list[Noted] = field(default_factory=list)
    """Files that lost something and are in the shards all the same."""

    def note(self, kind: str, detail: str, *, order: int, source: str, lost: float = 1.0) -> None:
        """Note a file that is in the shards, but not as it was; arguments as in `Noted`.

        Args:
            kind: a word or two, the same for all such files.
            detail: how much of this file.
            order: position of the file among all input files.
            source: name of the file in the shards.
            lost: share of the file that is lost, 0 to 1; 0 only counts the file.
        """
        self.noted.append(Noted(order=order, source=source, kind=kind, detail=detail, lost=lost))


class Settings(Protocol):
    """The options that change the bytes of a shard folder."""

    @property
    def shard_bytes(self) -> int:
        """Planned size of a shard."""
        ...

    def check(self) -> None:
        """Raise a `ConfigError` that names every setting that cannot work."""
        ...

    def as_json(self) -> dict[str, Any]:
        """The settings as they stand in ``index.json``."""
        ...


class Packer(Protocol):
    """One modality's way from input to rows."""

    @property
    def layout(self) -> Layout:
        """Columns of the shards; its name is that of the modality."""
        ...

    @property
    def settings(self) -> Settings: ...

    @property
    def measure(self) -> Measure:
        """Units in which progress prints `Unit.size`."""
        ...

    def scan(self, team: Team, inputs: Sequence[Path]) -> Plan:
        """Find the input and decide what goes into which shard. All processes call it and get the same plan.

        Raises:
            ConfigError: if inputs and settings do not fit.
        """
        ...

    def make_beside(self, folder: Path, plan: Plan) -> tuple[str, ...]:
        """Write what belongs beside the shards into the unfinished folder and return the names.

        A restart calls it again: what is already there and whole should stay.
        """
        ...

    def format(self, folder: Path) -> dict[str, Any]:
        """`Index.format` of the folder; `make_beside` has been called."""
        ...

    def rows(self, units: Sequence[Any], folder: Path, notes: Notes) -> Iterator[Row]:
        """The rows of one shard from its units, in order. It depends on nothing but units, settings and folder."""
        ...

    def totals(self, size: int, counts: Mapping[str, int]) -> dict[str, Any]:
        """`Index.totals` from the sum of all rows' sizes and the sums of all shards' `Notes.counts`."""
        ...

    def describe(self, index: Index) -> str:
        """Return the amount in a folder, such as its hours, for the last line of a packing."""
        ...

    def versions(self) -> dict[str, str]:
        """Libraries that decide the bytes, beside numpy and pyarrow."""
        ...


class FolderReport(Protocol):
    """Functions of ``MODALITY/report.py``, which `verify` and `inspect` call."""

    @property
    def batch_faults(self) -> Callable[[pa.RecordBatch, Index, str, int], Iterator[str]]:
        """Yield the faults of a record batch: (batch, index, name of the shard, number of its first row)."""
        ...

    @property
    def headline(self) -> Callable[[Index], str]:
        """Return what all rows have in common, in a few words."""
        ...

    @property
    def lines(self) -> Callable[[Any], list[str]]:
        """Return lines about the rows of opened shards; each begins with a word padded to 10 columns."""
        ...

    @property
    def plot(self) -> Callable[[Any, Path], None]:
        """Draw the figure of opened shards to a PNG file."""
        ...
