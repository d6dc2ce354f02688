"""Lines that the reports of all modalities share: faults, samples of rows, percentiles, labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_ROWS = 10_000
"""Most rows that a report reads one by one, spread evenly over the folder."""


def fault(where: str, what: str, expected: object, found: object) -> str:
    """Return a fault as one line of `verify`."""
    return f"{where}: {what}: expected {expected}, found {found}"


def spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` row numbers, spread evenly over all rows."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)).tolist() if count else []


def percentiles(values: NDArray[Any], least: str, most: str, decimals: int) -> str:
    """Return smallest, 5 %, median, 95 % and largest value as text."""
    named = zip((least, "5 %", "median", "95 %", most), (0, 5, 50, 95, 100), strict=True)
    return ", ".join(f"{name} {np.percentile(values, q):.{decimals}f}" for name, q in named)


def sampled_labels(shards: Any) -> tuple[list[Any], str]:
    """Return the labels of up to `MAX_ROWS` rows, and a remark for the line if these are not all rows."""
    rows = [shards.read_labels(row) for row in spread(len(shards), MAX_ROWS)]
    return rows, "" if len(rows) == len(shards) else f" (of {len(rows):,} rows)"


def distinct_line(rows: Sequence[Any], name: str, of: str) -> str:
    """Return a line with the number of different values of an annotation."""
    values = {getattr(row, name) for row in rows} - {None}
    return f"{name + 's':<9} {len(values):,}{of}"
