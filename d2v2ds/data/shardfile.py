"""One memory-mapped Arrow file of a shard folder, with a check of each row. No torch.

In: the path, its entry in the index, and the number of a row. Out: views of that row's bytes, after a check of their
checksums. The check also finds damaged structure: a wrong offset or swapped batches give other checksums. Every fault
of a file raises `ShardError`. A fault of the machine, such as no descriptors left, is tried again and then raises
`MachineError`, which no caller takes for a damaged row.
"""

import os
from bisect import bisect_right
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.data.schema import FIELDS_CRC32, PAYLOAD_CRC32, TEXTS_CRC32, Index, Layout, shard_schema
from d2v2ds.errors import D2V2Error, ShardError
from d2v2ds.io.crc import crc32
from d2v2ds.io.machine_faults import is_machine_fault, reading_error, retried
from d2v2ds.io.read import irregular

WHAT_TO_DO = "copy the file again from where the folder was packed, or pack the folder again"


class ShardFile:
    """One Arrow file; opens each record batch on first use.

    Args:
        folder: of the file.
        index: of the folder.
        layout: of the modality.
        number: of the shard.

    Raises:
        ShardError: the file is absent, cannot be read, or differs from its entry in the index.
        MachineError: the machine is at fault.
    """

    def __init__(self, folder: Path, index: Index, layout: Layout, number: int) -> None:
        entry = index.shards[number]
        self.path = folder / entry.file
        self._number, self._layout, self._bytes = number, layout, entry.bytes
        check_size(self.path, entry.bytes)
        counts = retried(partial(self._open, shard_schema(layout, index.format)))
        if sum(counts) != entry.rows:
            raise ShardError(
                f"shard file {self.path}: expected {entry.rows} rows, found {sum(counts)}; pack the folder again"
            )
        self._starts: list[int] = np.cumsum([0, *counts]).tolist()
        self._batches: dict[int, RowBatch] = {}

    def _open(self, expected: pa.Schema) -> list[int]:
        """Map the file; return the rows of each record batch."""
        try:
            self._source = pa.memory_map(str(self.path))
            self._reader = pa.ipc.open_file(self._source)
            counts = [self._reader.get_batch(batch).num_rows for batch in range(self._reader.num_record_batches)]
            found = self._reader.schema
            differences = "" if found.equals(expected, check_metadata=True) else _differences(expected, found)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._fault(f"shard file {self.path}: expected an Arrow IPC file, found", error) from error
        if differences:
            raise ShardError(f"shard file {self.path}: {differences}; the file belongs to another folder or version")
        return counts

    def _fault(self, what: str, error: Exception) -> D2V2Error:
        """Make the error of a failed read: the machine's, or one of the file that begins with `what`."""
        if isinstance(error, OSError) and is_machine_fault(error):
            return reading_error(f"shard file {self.path}", error, ShardError)
        return ShardError(f"{what}: {error}; {WHAT_TO_DO}")

    def is_whole(self) -> bool:
        """Return True if the mapped file still has all its bytes; reading truncated ones would kill the process."""
        try:
            return os.fstat(self._source.fileno()).st_size == self._bytes
        except OSError:
            return False

    def locate(self, row: int) -> "tuple[RowBatch, int]":
        """Return the record batch that holds a row of this file, and the row's number in it."""
        if row >= self._starts[-1]:
            raise ShardError(f"shard file {self.path}: expected row {row}, found {self._starts[-1]} rows")
        number = bisect_right(self._starts, row) - 1
        batch = self._batches.get(number)
        if batch is None:
            batch = self._batches[number] = retried(partial(self._open_batch, number))
        return batch, row - self._starts[number]

    def _open_batch(self, number: int) -> "RowBatch":
        name = f"shard file {self.path}"
        try:
            batch = self._reader.get_batch(number)
            return RowBatch(batch, self._layout, self._number, self._starts[number], name)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._fault(f"{name} batch {number}", error) from error


class RowBatch:
    """NumPy views of one record batch: no Arrow object for each row, and no reads beyond a buffer.

    Args:
        batch: of the layout's columns.
        layout: of the modality.
        shard: number of the shard.
        first: number of the first row in its shard.
        name: of the file, for messages.

    Raises:
        ValueError: a buffer is too short for the rows.
    """

    def __init__(self, batch: pa.RecordBatch, layout: Layout, shard: int, first: int, name: str) -> None:
        self._layout, self._shard, self._first, self._name = layout, shard, first, name
        rows = batch.num_rows
        _, offsets, data = batch.column(layout.payload).buffers()
        self._offsets, self.data = _view(offsets, "<i8", rows + 1), _view(data, "u1")
        """(bytes,) payloads of all rows, one after another."""
        numbers = {
            name: _view(batch.column(name).buffers()[1], kind, rows)
            for name, kind in (*layout.numbers.items(), (FIELDS_CRC32, "<u4"))
        }
        *self._fields, self._fields_crc32 = [values.item for values in numbers.values()]
        self._columns = {name: number for number, name in enumerate(layout.numbers)}
        self._texts = {name: _Texts(batch.column(name), rows) for name in layout.texts}

    def where(self, row: int) -> str:
        """Return the name of a row for messages."""
        return f"{self._name} row {self._first + row}"

    def numbers(self, row: int) -> list[Any]:
        """Return the checked numeric columns of a row, in the layout's order.

        Raises:
            ShardError: their checksum is wrong.
        """
        values = [value(row) for value in self._fields]
        found = self._layout.fields_crc32(self._shard, self._first + row, values)
        if found != self._fields_crc32(row):
            self._fail(row, "columns", self._fields_crc32(row), found)
        return values

    def number(self, row: int, name: str) -> Any:
        """Return one of `numbers`."""
        return self.numbers(row)[self._columns[name]]

    def bounds(self, row: int) -> tuple[int, int]:
        """Return start and stop of a row's payload in `data`, after a check of its bytes and numbers.

        Raises:
            ShardError: a checksum is wrong.
        """
        expected = self.number(row, PAYLOAD_CRC32)
        start, stop = self._offsets.item(row), self._offsets.item(row + 1)
        if not 0 <= start <= stop <= len(self.data):
            raise ShardError(
                f"{self.where(row)}: expected a place inside the {len(self.data)} bytes of its batch, found bytes "
                f"{start} to {stop}; {WHAT_TO_DO}"
            )
        found = crc32(self.data[start:stop].data)
        if found != expected:
            self._fail(row, self._layout.payload, expected, found)
        return start, stop

    def payload(self, row: int) -> NDArray[np.uint8]:
        """Return the (bytes,) of one row without a copy, checked like `bounds`."""
        start, stop = self.bounds(row)
        return self.data[start:stop]

    def texts(self, row: int) -> dict[str, str | None]:
        """Return the checked string columns of a row by name.

        Raises:
            ShardError: their checksum is wrong.
        """
        expected = self.number(row, TEXTS_CRC32)
        encoded = {name: texts.encoded(row) for name, texts in self._texts.items()}
        found = self._layout.texts_crc32(encoded.values())
        if found != expected:
            self._fail(row, "texts", expected, found)
        return {name: None if text is None else text.decode() for name, text in encoded.items()}

    def _fail(self, row: int, what: str, expected: int, found: int) -> None:
        raise ShardError(
            f"{self.where(row)}: expected {what} of CRC-32 {expected:08x}, found {found:08x}: bytes were changed; "
            f"{WHAT_TO_DO}"
        )


class _Texts:
    """String column."""

    def __init__(self, column: pa.Array, rows: int) -> None:
        valid, offsets, data = column.buffers()
        self._valid = None if valid is None else _view(valid, "u1", (rows + 7) // 8)
        self._offsets, self._data = _view(offsets, "<i8", rows + 1), _view(data, "u1")

    def encoded(self, row: int) -> bytes | None:
        """Return the UTF-8 of a row; offsets outside the buffer give other bytes, so another checksum."""
        if self._valid is not None and not self._valid.item(row >> 3) >> (row & 7) & 1:
            return None
        start, stop = self._offsets.item(row), self._offsets.item(row + 1)
        return self._data[max(start, 0) : max(stop, 0)].tobytes()


def check_size(path: Path, expected: int) -> None:
    """Check that a file has the size in bytes that the index states.

    Raises:
        ShardError: it is missing, no regular file, or of another size.
        MachineError: the machine is at fault.
    """
    facts = retried(partial(_facts, path, expected))
    if fault := irregular(facts.st_mode):
        raise ShardError(f"shard file {path}: expected a file, found {fault}; {WHAT_TO_DO}")
    if facts.st_size != expected:
        raise ShardError(
            f"shard file {path}: expected {expected} bytes, found {facts.st_size}; the file was cut off or "
            f"overwritten: {WHAT_TO_DO}"
        )


def _facts(path: Path, expected: int) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        if is_machine_fault(error):
            raise reading_error(f"shard file {path}", error, ShardError) from error
        raise ShardError(
            f"shard file {path}: expected {expected} bytes, found: {error.strerror}; {WHAT_TO_DO}"
        ) from error


def _view(buffer: pa.Buffer | None, kind: str, count: int = -1) -> NDArray[Any]:
    """Return the first values of a buffer; raise ValueError if it has fewer."""
    return np.frombuffer(b"" if buffer is None else buffer, dtype=kind, count=count)


def _differences(expected: pa.Schema, found: pa.Schema) -> str:
    wanted, had = (str(schema).splitlines() for schema in (expected, found))
    return (
        f"expected {[line for line in wanted if line not in had]} in its schema, found "
        f"{[line for line in had if line not in wanted]}"
    )
