"""Writes one shard, its sidecar, and at the end ``rows.npy`` and the tables beside it; the same for all modalities.

A shard is written under a temporary name in ``.packing/``, synced and renamed; then its sidecar says that it is
finished. A restart trusts a shard only with its sidecar. The checksum is computed while writing.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2v2ds.data.schema import (
    FIELDS_CRC32,
    NUMBERS,
    PAYLOAD_CRC32,
    ROW_DTYPE,
    ROWS_NAME,
    SKIPPED_NAME,
    TEXTS_CRC32,
    FileEntry,
    Layout,
    ShardEntry,
    shard_name,
    shard_schema,
    write_json,
)
from d2v2ds.io.crc import crc32
from preprocessing.driver.input_files import utf8
from preprocessing.driver.notes import NOTES_NAME
from preprocessing.driver.output_file import BUFFER_BYTES, ChecksumFile, give_buffer, replacing, take_buffer
from preprocessing.driver.progress import Report
from preprocessing.driver.protocol import Notes, Packer, Row
from preprocessing.driver.shard_plan import Noted, Skipped

BATCH_BYTES = BUFFER_BYTES
"""Payload bytes after which a record batch ends; a longer row has a batch of its own."""
PACKING_NAME = ".packing"
"""Folder inside the output that holds temporary files, sidecars and the plan until the index is written."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Everything that one process needs to pack one shard."""

    number: int
    folder: Path
    units: tuple[Any, ...]
    packer: Packer


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A finished shard: its sidecar's contents."""

    entry: ShardEntry
    skipped: tuple[Skipped, ...]
    counts: Mapping[str, int]
    noted: tuple[Noted, ...] = ()


def pack_shard(job: ShardJob, report: Report) -> ShardResult:
    """Pack the units of one shard and write it.

    Raises:
        ShardError: if the disk is full; neither shard nor temporary file is left.
    """
    layout = job.packer.layout
    name = shard_name(layout.name, job.number)
    notes = Notes(report)
    with replacing(job.folder / name, job.folder / PACKING_NAME) as sink:
        writer = ShardWriter(sink, layout, job.packer.format(job.folder), job.number)
        for row in job.packer.rows(job.units, job.folder, notes):
            writer.add(row)
        writer.close()
    with replacing(_sizes_path(job.folder, name), job.folder / PACKING_NAME) as sizes:
        sizes.write(np.array(writer.sizes, dtype=np.int64).tobytes())
    entry = ShardEntry(file=name, rows=len(writer.sizes), size=sum(writer.sizes), bytes=sink.bytes, crc32=sink.crc32)
    result = ShardResult(entry=entry, skipped=tuple(notes.skipped), counts=dict(notes.counts), noted=tuple(notes.noted))
    write_json(_sidecar_path(job.folder, name), asdict(result))
    return result


def finished_shard(folder: Path, modality: str, number: int) -> ShardResult | None:
    """Return the result that the sidecar of a shard stores, or None if the shard is not packed yet."""
    try:
        values = json.loads(_sidecar_path(folder, shard_name(modality, number)).read_text(encoding="utf-8"))
        entry = ShardEntry(**values["entry"])
        if (folder / entry.file).stat().st_size != entry.bytes:
            return None
    except FileNotFoundError:
        return None
    return ShardResult(
        entry=entry,
        skipped=tuple(Skipped(**one) for one in values["skipped"]),
        counts=values["counts"],
        noted=tuple(Noted(**one) for one in values.get("noted", ())),
    )


def _sidecar_path(folder: Path, shard: str) -> Path:
    """Path of the sidecar, which marks a shard as finished until the index is written."""
    return folder / PACKING_NAME / f"{shard}.json"


def _sizes_path(folder: Path, shard: str) -> Path:
    """int64 sizes of a finished shard's rows; the sidecar is written after it."""
    return folder / PACKING_NAME / f"{shard}.sizes"


class ShardWriter:
    """Collects rows into record batches of limited bytes and writes them as an Arrow IPC file."""

    def __init__(self, sink: ChecksumFile, layout: Layout, format: Mapping[str, Any], number: int) -> None:
        self._layout, self._number = layout, number
        self._schema = shard_schema(layout, format)
        self._writer = pa.ipc.new_file(sink, self._schema)
        self._spare = take_buffer()
        self._buffer = self._spare
        self._used = 0
        self._offsets = [0]
        self._checksums: list[int] = []
        self._values: list[Mapping[str, Any]] = []
        self.sizes: list[int] = []
        """Sizes of all rows written so far, as in ``rows.npy``."""

    def add(self, row: Row) -> None:
        """Copy one row's payload into the batch; it may be overwritten afterwards, the values may not."""
        payload = memoryview(row.payload).cast("B")
        if self._used + len(payload) > BATCH_BYTES:
            self._flush()
        if len(payload) > len(self._buffer):
            self._buffer = memoryview(bytearray(len(payload)))
        self._checksums.append(crc32(payload))  # here, where the bytes still lie in the processor's cache
        self._buffer[self._used : self._used + len(payload)] = payload
        self._used += len(payload)
        self._offsets.append(self._used)
        self._values.append(row.values)

    def close(self) -> None:
        """Write the last batch and the Arrow footer."""
        self._flush()
        self._writer.close()
        give_buffer(self._spare)

    def _flush(self) -> None:
        if not self._values:
            return
        offsets = np.array(self._offsets, dtype=np.int64)
        payload = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(),
            len(offsets) - 1,
            [None, pa.py_buffer(offsets), pa.py_buffer(self._buffer[: self._used])],
        )
        values = self._columns()
        columns = [
            payload if field.name == self._layout.payload else _column(values[field.name], field.type)
            for field in self._schema
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self.sizes.extend(map(math.prod, zip(*(values[name] for name in self._layout.size), strict=True)))
        self._used = 0
        self._offsets = [0]
        self._checksums.clear()
        self._values.clear()

    def _columns(self) -> dict[str, list[Any]]:
        """The rows of the batch by columns, texts as UTF-8, with their checksums. Columns are faster than rows."""
        layout, first = self._layout, len(self.sizes)
        columns: dict[str, list[Any]] = {PAYLOAD_CRC32: self._checksums}
        for name in layout.texts:
            texts = [values[name] for values in self._values]
            columns[name] = [None if text is None else text.encode() for text in texts]
        texts_by_row = list(zip(*(columns[name] for name in layout.texts), strict=True))
        checksums = {texts: layout.texts_crc32(texts) for texts in set(texts_by_row)}  # blocks of a file have the same
        columns[TEXTS_CRC32] = [checksums[texts] for texts in texts_by_row]
        for name in layout.numbers.keys() - columns.keys():
            columns[name] = [values[name] for values in self._values]
        numbers_by_row = zip(*(columns[name] for name in layout.numbers), strict=True)
        columns[FIELDS_CRC32] = [
            layout.fields_crc32(self._number, row, numbers) for row, numbers in enumerate(numbers_by_row, start=first)
        ]
        return columns


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow array of numbers or UTF-8 from its buffers.

    `pa.array` would import pandas where it is installed: 0.3 s per process.
    """
    count = len(values)
    if kind in NUMBERS:
        return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(np.array(values, dtype=NUMBERS[kind]))])
    encoded = [value or b"" for value in values]
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum([len(value) for value in encoded], out=offsets[1:])
    valid = np.array([value is not None for value in values])
    bits = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    buffers = [bits, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(kind, count, buffers)


def write_rows(folder: Path, shards: Sequence[ShardEntry]) -> FileEntry:
    """Write ``rows.npy`` from the sizes noted with each shard."""
    total = sum(entry.rows for entry in shards)
    with replacing(folder / ROWS_NAME, folder / PACKING_NAME) as sink:
        header = {"descr": np.lib.format.dtype_to_descr(ROW_DTYPE), "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(sink, header)
        for number, entry in enumerate(shards):
            records = np.empty(entry.rows, dtype=ROW_DTYPE)
            records["shard"] = number
            records["row"] = np.arange(entry.rows)
            records["size"] = np.fromfile(_sizes_path(folder, entry.file), dtype=np.int64)
            sink.write(records.tobytes())
    return FileEntry(file=ROWS_NAME, bytes=sink.bytes, crc32=sink.crc32)


def write_skipped(folder: Path, skipped: Sequence[Skipped]) -> None:
    """Write ``skipped.tsv``: one line per file that is not in the shards."""
    _write_table(folder, SKIPPED_NAME, ("path", "reason"), ((one.source, one.reason) for one in skipped))


def write_notes(folder: Path, noted: Sequence[Noted]) -> None:
    """Write ``notes.tsv``: one line per note on a file that is in the shards."""
    lines = ((one.source, one.kind, one.detail, f"{one.lost:.6g}") for one in noted)
    _write_table(folder, NOTES_NAME, ("path", "note", "detail", "lost"), lines)


def _write_table(folder: Path, name: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Write tab-separated lines; tabs and line ends in a field are escaped."""
    with replacing(folder / name, folder / PACKING_NAME) as sink:
        for fields in (header, *lines):
            escaped = (text.replace("\t", "\\t").replace("\n", "\\n") for text in fields)
            sink.write(utf8("\t".join(escaped) + "\n").encode())
