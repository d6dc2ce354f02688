"""Format of a shard folder: names, columns, dtypes and JSON. pyarrow and numpy only, no torch.

A folder holds ``audio-00000.arrow``, ``audio-00001.arrow``, ... (Arrow IPC files, one row per example; other
modalities by their own names), ``rows.npy`` (one fixed-size record per row), ``skipped.tsv`` and, written last of all,
``index.json``. A folder without an index is an unfinished folder. `preprocessing/README.md` documents the bytes.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.bounds import Amount
from d2v2ds.errors import ShardError
from d2v2ds.io import durable, read
from d2v2ds.io.crc import crc32
from d2v2ds.io.machine_faults import retried

SCHEMA_VERSION = 1
INDEX_NAME = "index.json"
ROWS_NAME = "rows.npy"
SKIPPED_NAME = "skipped.tsv"

ROW_DTYPE = np.dtype([("shard", "<u4"), ("row", "<u4"), ("size", "<i8")])
"""Record of ``rows.npy``: number of the shard, row inside it, size of the row (`Layout.size`)."""

PAYLOAD_CRC32 = "crc32"
"""Column with the CRC-32 (as in zlib and gzip) of the row's payload."""
TEXTS_CRC32 = "texts_crc32"
"""Column with `Layout.texts_crc32` of the row, checked when its texts are read."""
FIELDS_CRC32 = "fields_crc32"
"""Column with `Layout.fields_crc32` of the row."""
NUMBERS: dict[pa.DataType, str] = {
    pa.int8(): "<b",
    pa.int32(): "<i",
    pa.uint32(): "<I",
    pa.int64(): "<q",
    pa.float64(): "<d",
}
"""Formats of numeric columns, as `struct` and NumPy name them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Columns of one modality's shards."""

    name: str
    """Name of the modality, and prefix of the shards' names."""
    fields: tuple[pa.Field, ...]
    """Columns without the checksums."""
    payload: str
    """Column with the bytes of the example."""
    size: tuple[str, ...]
    """Columns whose product is the size of a row in ``rows.npy``."""
    total: str
    """Name in `Index.totals` of the sum of all sizes."""
    format: frozenset[str]
    """Names in `Index.format`."""

    @cached_property
    def columns(self) -> tuple[pa.Field, ...]:
        """All columns of a shard, in order."""
        return (*self.fields, *_CHECKSUMS)

    @cached_property
    def numbers(self) -> dict[str, str]:
        """Numeric columns that `fields_crc32` covers, in order, with the value of `NUMBERS`; they hold no nulls."""
        kinds = {one.name: NUMBERS[one.type] for one in self.columns if one.type in NUMBERS}
        del kinds[FIELDS_CRC32]
        return kinds

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """String columns, in order."""
        return tuple(one.name for one in self.columns if one.type == pa.large_string())

    @cached_property
    def packing(self) -> struct.Struct:
        """Number of the shard, number of the row inside it, then `numbers`; little-endian without gaps."""
        return struct.Struct("<II" + "".join(kind[1:] for kind in self.numbers.values()))

    def fields_crc32(self, shard: int, row: int, numbers: Iterable[Any]) -> int:
        """Compute the checksum of a row's position and numbers, which include the checksums of its payload and texts.

        It shows if damage to the structure of a file gives another row, or a part of one, as this row.

        Args:
            shard: number of the shard.
            row: number of the row inside it.
            numbers: values of `numbers`.
        """
        return crc32(self.packing.pack(shard, row, *numbers))

    def texts_crc32(self, texts: Iterable[bytes | None]) -> int:
        """Compute the checksum of a row's texts.

        Args:
            texts: values of `texts`, UTF-8; None for null.
        """
        # 0xfe and 0xff do not occur in UTF-8
        return crc32(b"".join([b"\xfe" if text is None else text + b"\xff" for text in texts]))


def column(name: str, kind: pa.DataType, nullable: bool = False) -> pa.Field:
    """Describe one column of a layout."""
    return pa.field(name, kind, nullable=nullable)


_CHECKSUMS = tuple(column(name, pa.uint32()) for name in (PAYLOAD_CRC32, TEXTS_CRC32, FIELDS_CRC32))


def shard_schema(layout: Layout, format: Mapping[str, Any]) -> pa.Schema:
    """Return the Arrow schema of a shard; its metadata identifies a shard without its index.

    Args:
        layout: of the modality.
        format: `Index.format`.
    """
    values = {"schema_version": SCHEMA_VERSION, "modality": layout.name, **format}
    metadata = {
        f"d2v2ds.{name}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in values.items()
    }
    return pa.schema(layout.columns, metadata=metadata)


def row_sizes(layout: Layout, batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Return (rows,) int64 sizes of the rows of a record batch, as in ``rows.npy``."""
    sizes = np.ones(batch.num_rows, dtype=np.int64)
    for name in layout.size:
        sizes *= batch.column(name).to_numpy()
    return sizes


def shard_name(modality: str, number: int) -> str:
    """Return a name such as ``audio-00017.arrow``; numbers above 99999 have more digits."""
    return f"{modality}-{number:05d}.arrow"


_STRICT = {"extra": "forbid"}
"""Rule for pydantic, which checks an index that it reads."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """Entry of the index for one shard."""

    __pydantic_config__ = _STRICT

    file: str
    rows: Amount
    size: Amount
    """Sum of the rows' sizes: samples, pixels or tokens."""
    bytes: Amount
    crc32: str
    """CRC-32 (as in zlib and gzip) of the whole file, eight hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Entry of the index for a file that is not a shard."""

    __pydantic_config__ = _STRICT

    file: str
    bytes: Amount
    crc32: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """Contents of ``index.json``."""

    __pydantic_config__ = _STRICT

    schema_version: int = SCHEMA_VERSION
    modality: str
    format: Mapping[str, Any]
    """Properties that all rows share, by names of `Layout.format`, such as codec and rate of audio."""
    settings: Mapping[str, Any]
    """Options of the packer that change the bytes of the folder."""
    files: Amount
    """Number of input files, skipped ones included; each member of an archive counts."""
    files_skipped: Amount
    plan_sha256: str
    """Fingerprint of the list of input files, their headers and annotations."""
    rows: Amount
    totals: Mapping[str, Any]
    """Sums over all rows; `Layout.total` is the name of the sum of sizes."""
    rows_file: FileEntry
    files_beside: tuple[FileEntry, ...] = ()
    """Other files that belong to the folder, such as a tokenizer."""
    shards: tuple[ShardEntry, ...]
    notes: Mapping[str, Mapping[str, int | float]] = field(default_factory=dict)
    """Kind of note -> ``files`` that have it and the share of the folder that is ``lost``; ``notes.tsv`` names them."""
    created_by: Mapping[str, Any] = field(default_factory=dict)
    """Command, date, worker count and library versions: the only part that may differ between equal folders."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.shards)

    def digest(self, num_shards: int) -> str:
        """Return a hash of the rows of the first `num_shards` shards, which a folder keeps when it grows."""
        entries = "".join(f"{entry.rows}:{entry.crc32}\n" for entry in self.shards[:num_shards])
        return hashlib.sha256(entries.encode()).hexdigest()

    def checksums(self) -> dict[str, Any]:
        """Return plain values that differ where the content of two folders differs."""
        return {
            "rows": self.rows,
            "shards": self.digest(self.num_shards),
            "rows file": self.rows_file.crc32,
            "beside": [entry.crc32 for entry in self.files_beside],
        }


def write_index(folder: Path, index: Index) -> None:
    """Write ``index.json`` atomically, also in case of a power cut."""
    write_json(folder / INDEX_NAME, asdict(index))


def read_index(folder: Path) -> Index:
    """Read ``index.json`` of a finished folder.

    Raises:
        ShardError: if the folder is unfinished, or its index is damaged or of another schema version.
    """
    path = folder / INDEX_NAME
    if not retried(lambda: read.is_there(path, ShardError)):
        raise ShardError(
            f"{folder}: expected a finished shard folder, found no {INDEX_NAME}; packing writes it last, so run "
            "the same packing command again (finished shards are kept), or correct the path"
        )
    values = retried(lambda: read.read_json(path, ShardError))
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ShardError(
            f"{path}: schema_version is {version!r}, this version of d2v2ds reads {SCHEMA_VERSION}; "
            "pack the folder again, or install the version that wrote it"
        )
    index = read.validate(Index, values, path, ShardError)
    for name in (*(one.file for one in index.shards), *(one.file for one in (index.rows_file, *index.files_beside))):
        read.check_name(name, path, ShardError)
    rows = sum(entry.rows for entry in index.shards)
    if rows != index.rows:
        raise ShardError(f"{path}: expected {index.rows} rows in all shards, found {rows}; pack the folder again")
    return index


def read_beside(folder: Path, entry: FileEntry) -> bytes:
    """Read a file that belongs to a packed folder, such as a tokenizer, and check that it is the one packed.

    Raises:
        ShardError: it is missing, leads out of the folder, or has other bytes.
    """
    path = folder / entry.file
    if not read.is_inside(path, folder):
        raise ShardError(f"{path}: expected a file of the folder, found a link out of it; pack the folder again")
    data = read.read_bytes(path, ShardError, limit=entry.bytes)
    if f"{crc32(data):08x}" != entry.crc32:
        raise ShardError(f"{path}: damaged, its checksum differs from {INDEX_NAME}; pack the folder again")
    return data


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name beside `path`, sync it, and rename it into place."""
    durable.replace_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def file_crc32(path: Path) -> str:
    """Return the CRC-32 of a file, as in `ShardEntry.crc32`."""
    return f"{read.crc32_of(path, ShardError):08x}"
