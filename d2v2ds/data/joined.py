"""Several packed folders of one modality, read as one under the row numbers of `d2v2ds.data.mixture`.

In: opened shards, and how often the rows of each are seen. Out: `JoinedShards`, which the readers take in place of one
folder's shards, and the `Dataset`s of which a plan is made. The rows of the first folder keep their numbers, so that a
single folder is read as if nothing of this were here.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2v2ds.data.mixture import Dataset, split_row_numbers
from d2v2ds.data.shards import AudioShards, EncodedImage, ImageShards, Samples, TextShards
from d2v2ds.errors import ShardError

MUST_BE_EQUAL = {"audio": ("sample_rate_hz",), "image": (), "text": ("vocab_size", "special")}
"""What of `Index.format` folders that are read as one must have in common."""

Folders = Path | tuple[Path, ...]
"""One packed folder, or several."""


class JoinedShards:
    """Opened shards of one modality under common row numbers; picklable like them.

    Args:
        parts: two or more, in the order of their numbers.

    Raises:
        ShardError: if a model could not read them alike.
    """

    def __init__(self, parts: Sequence[AudioShards] | Sequence[ImageShards] | Sequence[TextShards]) -> None:
        self.parts: tuple[Any, ...] = tuple(parts)
        for part in self.parts[1:]:
            _check_same(self.parts[0], part)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def sample_rate_hz(self) -> int:
        """Of audio: samples per second of every row."""
        rate: int = self.parts[0].sample_rate_hz
        return rate

    @property
    def vocab_size(self) -> int:
        """Of text: ids are below it."""
        size: int = self.parts[0].vocab_size
        return size

    @property
    def block_tokens(self) -> int:
        """Of text: tokens of the longest row."""
        tokens: int = max(part.block_tokens for part in self.parts)
        return tokens

    def locate(self, index: int) -> tuple[Any, int]:
        """The shards that hold a row, and its number in there."""
        dataset, row = split_row_numbers(index)
        if not 0 <= dataset < len(self.parts):
            raise IndexError(f"row {index} lies in dataset {dataset} of {len(self.parts)}")
        return self.parts[int(dataset)], int(row)

    def read_audio(self, index: int, start: int = 0, stop: int | None = None) -> Samples:
        """As `AudioShards.read_audio`."""
        part, row = self.locate(index)
        samples: Samples = part.read_audio(row, start, stop)
        return samples

    def read_stats(self, index: int) -> tuple[float, float]:
        """As `AudioShards.read_stats`."""
        part, row = self.locate(index)
        mean, var = part.read_stats(row)
        return mean, var

    def read_image(self, index: int) -> EncodedImage:
        """As `ImageShards.read_image`."""
        part, row = self.locate(index)
        image: EncodedImage = part.read_image(row)
        return image

    def read_blocks(self, rows: ArrayLike, out: NDArray[np.int64], pad_id: int) -> None:
        """As `TextShards.read_blocks`."""
        datasets, local = split_row_numbers(rows)
        for dataset in np.unique(datasets).tolist():
            inside = np.flatnonzero(datasets == dataset)
            block = np.empty((len(inside), out.shape[1]), dtype=np.int64)
            self.parts[dataset].read_blocks(local[inside], block, pad_id)
            out[inside] = block


def parts_of(shards: Any) -> tuple[Any, ...]:
    """The shards of each folder of a source."""
    return shards.parts if isinstance(shards, JoinedShards) else (shards,)


def place_of(shards: Any, index: int) -> str:
    """How a message names a row."""
    part, row = shards.locate(index) if isinstance(shards, JoinedShards) else (shards, index)
    return f"{part.folder} row {row}"


def datasets_of(
    shards: Any, weights: Sequence[float] | None, sizes: Callable[[Any], NDArray[np.int64]] = lambda part: part.sizes
) -> list[Dataset]:
    """What a plan must know of a source.

    Args:
        shards: one folder's, or `JoinedShards`.
        weights: of the folders; None: all alike. A single folder has none.
        sizes: of the rows of one folder, as the plan counts them.
    """
    parts = parts_of(shards)
    shares = weights if weights is not None and len(parts) > 1 else (1.0,) * len(parts)
    return [
        Dataset(sizes=sizes(part), weight=weight, identity=getattr(part, "index", None))  # rows in memory have no index
        for part, weight in zip(parts, shares, strict=True)
    ]


def only_sizes(datasets: Sequence[Dataset]) -> NDArray[np.int64]:
    """(N,) sizes of the rows of the only dataset.

    Raises:
        ValueError: there are several, whose rows are not numbered from 0 to N - 1.
    """
    if len(datasets) != 1:
        raise ValueError(f"expected one dataset, found {len(datasets)}: ask for `datasets` instead")
    return datasets[0].sizes


def sizes_of(datasets: Sequence[Dataset], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) sizes of some rows."""
    if len(datasets) == 1:
        return np.asarray(datasets[0].sizes[rows])
    numbers, local = split_row_numbers(rows)
    found = np.empty(len(rows), dtype=np.int64)
    for number in np.unique(numbers).tolist():
        inside = numbers == number
        found[inside] = datasets[number].sizes[local[inside]]
    return found


def folders_of(shards: Folders) -> tuple[Path, ...]:
    """The folders that a setting names."""
    return (shards,) if isinstance(shards, Path) else tuple(shards)


def folder_faults(where: str, shards: Folders, weights: tuple[float, ...] | None) -> list[str]:
    """Why folders and weights do not fit each other, as sentences.

    Args:
        where: section of the settings, such as `data.audio.`.
        shards: one folder or several.
        weights: how often the rows of each are seen.
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


def _check_same(first: Any, other: Any) -> None:
    kinds = first.index.modality, other.index.modality
    pairs = {"modality": kinds}
    if kinds[0] == kinds[1]:
        pairs |= {name: (first.index.format[name], other.index.format[name]) for name in MUST_BE_EQUAL[kinds[0]]}
        pairs["files beside the shards, such as the tokenizer,"] = _files_beside(first), _files_beside(other)
    for name, (one, another) in pairs.items():
        if one != another:
            raise ShardError(
                f"{first.folder} and {other.folder} cannot be read as one dataset: {name} is {one!r} in the first, "
                f"{another!r} in the second; pack one of them again with the settings of the other"
            )


def _files_beside(shards: Any) -> dict[str, str]:
    """Names and checksums."""
    return {entry.file: entry.crc32 for entry in shards.index.files_beside}
