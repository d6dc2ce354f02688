"""What `verify` and `inspect` ask of a modality's report, and lines that reports share."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.data.schema import Index

MAX_ROWS = 10_000
"""Rows that are looked at one by one, evenly over the folder."""


class Report(Protocol):
    """Functions of the module `preprocessing.MODALITY.report`."""

    @property
    def batch_faults(self) -> Callable[[pa.RecordBatch, Index, str, int], Iterator[str]]:
        """Faults of the rows of a record batch: (batch, index, name of the shard, number of the first row)."""
        ...

    @property
    def headline(self) -> Callable[[Index], str]:
        """What all rows have in common, a few words."""
        ...

    @property
    def lines(self) -> Callable[[Any], list[str]]:
        """What there is to say of the rows of opened shards; each line begins with a word padded to 10 columns."""
        ...

    @property
    def plot(self) -> Callable[[Any, Path], None]:
        """Draw the figure of opened shards to a PNG file."""
        ...


def fault(where: str, what: str, expected: object, found: object) -> str:
    """One line of `verify`."""
    return f"{where}: {what}: expected {expected}, found {found}"


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` row numbers, evenly over all rows."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)).tolist() if count else []


def percentiles(values: NDArray[Any], least: str, most: str, decimals: int) -> str:
    """Smallest, 5 %, median, 95 % and largest of some values."""
    named = zip((least, "5 %", "median", "95 %", most), (0, 5, 50, 95, 100), strict=True)
    return ", ".join(f"{name} {np.percentile(values, q):.{decimals}f}" for name, q in named)


def sampled_labels(shards: Any) -> tuple[list[Any], str]:
    """`read_labels` of rows spread over a folder, and how to say that these are not all."""
    rows = [shards.read_labels(row) for row in spread(len(shards), MAX_ROWS)]
    return rows, "" if len(rows) == len(shards) else f" (of {len(rows):,} rows)"


def distinct_line(rows: Sequence[Any], name: str, of: str) -> str:
    """How many different values an annotation has."""
    values = {getattr(row, name) for row in rows} - {None}
    return f"{name + 's':<9} {len(values):,}{of}"
