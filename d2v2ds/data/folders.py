"""Several packed folders of one modality as one, with the row numbers of `d2v2ds.data.mixture`.

In: opened shards and their weights. Out: `JoinedShards`, which finds the folder of a row for every reader, and the
`Dataset`s of a plan. The rows of the first folder keep their numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from d2v2ds.bounds import UserPath
from d2v2ds.data.mixture import DATASET_BITS, Dataset, split_row_numbers
from d2v2ds.errors import ShardError

Folders = UserPath | tuple[UserPath, ...]
"""One packed folder or several."""

Part = TypeVar("Part", bound=Sized)
_LOCAL_ROW = (1 << DATASET_BITS) - 1


class JoinedShards(Generic[Part]):
    """Opened shards of one modality under common row numbers; picklable like them."""

    def __init__(self, parts: Sequence[Part], must_be_equal: Sequence[str] = ()) -> None:
        """
        Args:
            parts: one or more, in the order of their numbers.
            must_be_equal: entries of `Index.format` that must be equal in all folders.

        Raises:
            ShardError: folders differ in such an entry or in modality.
        """
        self.parts = tuple(parts)
        for part in self.parts[1:]:
            _check_same(self.parts[0], part, must_be_equal)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def first(self) -> Part:
        """First folder; it has the values that are equal in all."""
        return self.parts[0]

    def locate(self, index: int) -> tuple[Part, int]:
        """Return the shards that hold a row, and its number in them."""
        dataset = index >> DATASET_BITS
        if not 0 <= dataset < len(self.parts):
            raise IndexError(f"row {index} lies in dataset {dataset} of {len(self.parts)}")
        return self.parts[dataset], index & _LOCAL_ROW

    def split(self, rows: NDArray[np.int64]) -> Iterator[tuple[Part, NDArray[np.int64], NDArray[np.int64] | slice]]:
        """Divide rows by folder: shards, row numbers in them, and their positions among `rows`."""
        if len(self.parts) == 1:
            yield self.parts[0], rows, slice(None)
            return
        datasets, local = split_row_numbers(rows)
        for dataset in np.unique(datasets).tolist():
            inside = np.flatnonzero(datasets == dataset)
            yield self.parts[dataset], local[inside], inside

    def name(self, index: int) -> str:
        """Name a row for a message."""
        _, row = self.locate(index)
        return f"{self.folder_name(index >> DATASET_BITS)} row {row}"

    def folder_name(self, number: int) -> str:
        """Name a folder for a message."""
        return str(getattr(self.parts[number], "folder", "rows in memory"))

    def datasets(
        self, weights: Sequence[float] | None, sizes: Callable[[Any], NDArray[np.int64]] = lambda part: part.sizes
    ) -> list[Dataset]:
        """Describe the folders for a plan.

        Args:
            weights: how often the rows of each folder are drawn; None for equally often. Unused for a single folder.
            sizes: returns the sizes of the rows of one folder, as the plan counts them.
        """
        shares = weights if weights is not None and len(self.parts) > 1 else (1.0,) * len(self.parts)
        return [
            Dataset(sizes=sizes(part), weight=weight, identity=getattr(part, "index", None))  # none for rows in memory
            for part, weight in zip(self.parts, shares, strict=True)
        ]


def only_sizes(datasets: Sequence[Dataset]) -> NDArray[np.int64]:
    """Return (N,) sizes of the rows of the only dataset.

    Raises:
        ValueError: there are several, whose rows are not numbered from 0 to N - 1.
    """
    if len(datasets) != 1:
        raise ValueError(f"expected one dataset, found {len(datasets)}: use `datasets` instead")
    return datasets[0].sizes


def sizes_of(datasets: Sequence[Dataset], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (n,) sizes of some rows."""
    if len(datasets) == 1:
        return np.asarray(datasets[0].sizes[rows])
    numbers, local = split_row_numbers(rows)
    found = np.empty(len(rows), dtype=np.int64)
    for number in np.unique(numbers).tolist():
        inside = numbers == number
        found[inside] = datasets[number].sizes[local[inside]]
    return found


def folders_of(shards: Folders) -> tuple[Path, ...]:
    """Return the folders of a setting as a tuple."""
    return (shards,) if isinstance(shards, Path) else tuple(shards)


def folder_faults(where: str, shards: Folders, weights: tuple[float, ...] | None) -> list[str]:
    """Return one message for each contradiction between folders and weights.

    Args:
        where: section of the settings, such as `data.audio.`.
        shards: one folder or several.
        weights: how often the rows of each are drawn.
    """
    folders, faults = folders_of(shards), []
    if not folders:
        faults.append(f"{where}shards names no folder, expected one or more")
    if doubled := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        faults.append(f"{where}shards names {', '.join(doubled)} more than once; give it a larger weight instead")
    if weights is not None and len(weights) != len(folders):
        faults.append(f"{where}weights has {len(weights)} numbers for {len(folders)} folders of {where}shards")
    if weights is not None and not all(0.0 < weight < math.inf for weight in weights):
        faults.append(f"{where}weights is {list(weights)}, expected numbers above 0")
    return faults


def _check_same(first: Any, other: Any, must_be_equal: Sequence[str]) -> None:
    pairs = {"modality": (first.index.modality, other.index.modality)}
    if first.index.modality == other.index.modality:
        pairs |= {name: (first.index.format[name], other.index.format[name]) for name in must_be_equal}
        pairs["files beside the shards, such as the tokenizer,"] = _files_beside(first), _files_beside(other)
    for name, (one, another) in pairs.items():
        if one != another:
            raise ShardError(
                f"{first.folder} and {other.folder} cannot be read as one dataset: {name} is {one!r} in the first, "
                f"{another!r} in the second; pack one of them again with the settings of the other"
            )


def _files_beside(shards: Any) -> dict[str, str]:
    """Return names and checksums."""
    return {entry.file: entry.crc32 for entry in shards.index.files_beside}
