"""`Shards`: memory-mapped random access to the rows of a packed folder. No torch.

Opening reads ``index.json`` and maps ``rows.npy``, so it takes the same time for any number of rows. A shard is opened
when one of its rows is first read. Every read checks checksums (`shardfile.py`): those of the payload, or of the texts.
A modality adds a subclass with its layout and a function that reads a row. `preprocessing` writes the format, which
`d2v2ds.data.schema` defines.
"""

import errno
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from d2v2ds.data.schema import INDEX_NAME, ROW_DTYPE, Layout, read_index
from d2v2ds.data.shardfile import RowBatch, ShardFile, check_size
from d2v2ds.errors import D2V2Error, MachineError, ShardError
from d2v2ds.io.machine_faults import reading_error, retried, say_once
from d2v2ds.io.read import is_there

MAX_OPEN_SHARDS = 256
"""Most shards mapped at a time; each needs one file descriptor, and 1024 is a usual limit of a process."""
_SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors of the machine that closing shards may end."""
_HEADER_ALIGNMENT = 64
"""Alignment of the header of a NumPy array."""


class Shards:
    """Rows of a packed folder, by number.

    Args:
        folder: a finished packed folder.

    Raises:
        ShardError: the folder is unfinished, of another version or modality, or its files differ from its index.
        MachineError: the machine is at fault; also of every function that reads rows.

    Instances can be pickled and survive a fork; each process maps the shards it uses.
    """

    layout: ClassVar[Layout]
    """Columns of the shards."""
    labels: ClassVar[type]
    """Dataclass that `read_labels` returns; its fields are string columns of the layout."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if self.index.modality != self.layout.name:
            raise ShardError(
                f"{folder}: expected a folder of {self.layout.name}, found modality {self.index.modality!r}"
            )
        if absent := sorted(self.layout.format - set(self.index.format)):
            raise ShardError(
                f"{self.folder}: expected {', '.join(absent)} in 'format' of its index, found "
                f"{sorted(self.index.format)}"
            )
        if odd := {name: value for name, value in self.index.totals.items() if not _is_amount(value)}:
            raise ShardError(f"{self.folder}: expected numbers as 'totals' of its index, found {odd!r:.200}")
        self._map()

    def __len__(self) -> int:
        return self.index.rows

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(len(self),) int64 size of every row, as its layout defines it; memory-mapped."""
        return self.records["size"]

    @property
    def annotations(self) -> list[str]:
        """Names of the fields of `read_labels`, less the id."""
        return [field.name for field in fields(self.labels) if field.name != "id"]

    def read_labels(self, index: int) -> Any:
        """Return id and annotations of row `index`, without reading its payload.

        Raises:
            ShardError: the row is damaged, or its file cannot be read.
        """
        return self.labels(**self.texts(index, *(field.name for field in fields(self.labels))))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self.index = state["index"]
        self._map()

    def _map(self) -> None:
        self.records = self._map_records()
        self._starts: list[int] = np.cumsum([0, *(entry.rows for entry in self.index.shards)]).tolist()
        self._open: OrderedDict[int, ShardFile] = OrderedDict()

    def texts(self, index: int, *columns: str) -> dict[str, Any]:
        """Return string columns of row `index` by name."""
        batch, row = self.locate(index)
        texts = batch.texts(row)
        return {name: texts[name] for name in columns}

    def locate(self, index: int) -> tuple[RowBatch, int]:
        """Return the record batch that holds row `index`, and the row's number in it."""
        if not 0 <= index < self.index.rows:
            raise IndexError(f"{self.folder}: row {index} of {self.index.rows}")
        number, row, _ = self.records[index].item()
        return self._shard(number, row, index).locate(row)

    def check_size(self, index: int, size: int) -> int:
        """Return `size`, the size of row `index` in its shard.

        Raises:
            ShardError: it differs from that in ``rows.npy``, from which batches are planned.
        """
        expected = int(self.records["size"][index])
        if size != expected:
            raise ShardError(
                f"{self.folder}: size of row {index}: expected {expected} of {self.index.rows_file.file}, found {size} "
                "in its shard; run python -m preprocessing.verify on the folder"
            )
        return size

    def locate_all(self, rows: NDArray[np.int64]) -> Iterator[tuple[RowBatch, int, int]]:
        """Locate many rows, faster than one by one; yield `locate` of each, and its size in ``rows.npy``."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.index.rows:
            raise IndexError(f"{self.folder}: rows {rows.min()} to {rows.max()} of {self.index.rows}")
        records = self.records[rows]
        for index, (number, row, size) in zip(rows.tolist(), records.tolist(), strict=True):
            yield *self._shard(number, row, index).locate(row), size

    def _map_records(self) -> NDArray[np.void]:
        """Map ``rows.npy`` without reading it; the index replaces its header."""
        entry, num_rows = self.index.rows_file, self.index.rows
        path = self.folder / entry.file
        check_size(path, entry.bytes)
        if not num_rows:
            return np.empty(0, dtype=ROW_DTYPE)  # nothing can be mapped
        header = entry.bytes - num_rows * ROW_DTYPE.itemsize
        if header <= 0 or header % _HEADER_ALIGNMENT:
            raise ShardError(
                f"{path}: expected the header of a NumPy array and {num_rows} records of {ROW_DTYPE.itemsize} bytes, "
                f"found {entry.bytes} bytes; pack the folder again"
            )
        return retried(partial(_map_array, path, header, num_rows))

    def _shard(self, number: int, row: int, index: int) -> ShardFile:
        """Return the file of a shard; check that row `index` of the folder is row `row` of it."""
        if number >= len(self.index.shards) or self._starts[number] + row != index:
            raise ShardError(
                f"{self.folder / self.index.rows_file.file}: row {index} cannot be row {row} of shard {number}; run "
                "python -m preprocessing.verify on the folder"
            )
        shard = self._open.get(number)
        if shard is None or not shard.is_whole():  # opens a replaced file again
            shard = self._open[number] = self._open_shard(number)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return shard

    def _open_shard(self, number: int) -> ShardFile:
        """Map a shard; if the process has no descriptors or memory left for it, without all others."""
        try:
            return ShardFile(self.folder, self.index, self.layout, number)
        except ShardError as error:
            if not self._is_gone():
                raise
            raise MachineError(f"{self.folder}: the folder was moved, removed or unmounted; bring it back") from error
        except MachineError as error:
            if not self._open or not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _SCARCE:
                raise
        say_once("open shards", "this process may not map %d shards at a time; it opens some again", len(self._open))
        self._open.clear()
        return ShardFile(self.folder, self.index, self.layout, number)

    def _is_gone(self) -> bool:
        """Return True if the folder is not where it was when it was opened."""
        try:
            return not is_there(self.folder / INDEX_NAME, ShardError)
        except D2V2Error:
            return False  # it is there, and cannot be read


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _map_array(path: Path, header: int, num_rows: int) -> NDArray[np.void]:
    """Map the records of ``rows.npy`` behind its header."""
    try:
        return np.memmap(path, dtype=ROW_DTYPE, mode="r", offset=header, shape=(num_rows,))
    except OSError as error:
        raise reading_error(path, error, ShardError) from error
    except ValueError as error:
        raise ShardError(f"{path}: expected {num_rows} records, found: {error}; pack the folder again") from error
