"""The shard contract: names, columns, dtypes and the JSON of a shard folder. pyarrow and numpy only, no torch.

A folder holds ``audio-00000.arrow``, ``audio-00001.arrow``, ... (Arrow IPC files, one row per example),
``rows.npy`` (one fixed-size record per row), ``skipped.tsv`` and, written last of all, ``index.json``.
A folder without an index is an unfinished folder. `preprocessing/README.md` documents the bytes.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from d2v2ds.errors import ShardError

SCHEMA_VERSION = 1
INDEX_NAME = "index.json"
ROWS_NAME = "rows.npy"
SKIPPED_NAME = "skipped.tsv"

Codec = Literal["pcm16", "flac"]
CODECS: tuple[Codec, ...] = ("pcm16", "flac")

ROW_DTYPE = np.dtype([("shard", "<u4"), ("row", "<u4"), ("num_samples", "<i8")])
"""One record of ``rows.npy``: number of the shard, row inside it, length of the waveform in samples."""

SAMPLE_DTYPE = np.dtype("<i2")
"""A stored waveform: 16-bit little-endian, one channel; divided by `SAMPLE_SCALE` it lies in [-1, 1)."""
SAMPLE_SCALE = 32768

_AUDIO_FIELDS = [
    pa.field("id", pa.large_string(), nullable=False),  # unique in the folder
    pa.field("audio", pa.large_binary(), nullable=False),  # bytes of SAMPLE_DTYPE, or one FLAC stream
    pa.field("num_samples", pa.int64(), nullable=False),
    pa.field("mean", pa.float64(), nullable=False),  # of the stored samples / SAMPLE_SCALE, over the whole row
    pa.field("var", pa.float64(), nullable=False),  # biased variance of the same
    pa.field("text", pa.large_string()),
    pa.field("label", pa.large_string()),
    pa.field("speaker", pa.large_string()),
    pa.field("source", pa.large_string(), nullable=False),  # path below the input; joined clips: one a line
    pa.field("start_sample", pa.int64(), nullable=False),  # first sample of the row in its recording, at the row's rate
]


def audio_schema(codec: Codec, sample_rate_hz: int) -> pa.Schema:
    """The Arrow schema of an audio shard; its metadata describes a shard that has lost its index."""
    metadata = {
        "d2v2ds.schema_version": str(SCHEMA_VERSION),
        "d2v2ds.modality": "audio",
        "d2v2ds.codec": codec,
        "d2v2ds.sample_rate_hz": str(sample_rate_hz),
    }
    return pa.schema(_AUDIO_FIELDS, metadata=metadata)


def shard_name(modality: str, number: int) -> str:
    """``audio-00017.arrow``; numbers above 99999 simply take more digits."""
    return f"{modality}-{number:05d}.arrow"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the index knows of one shard."""

    file: str
    rows: int
    samples: int
    """Sum of the rows' lengths, in samples."""
    bytes: int
    crc32: str
    """CRC-32 (that of zlib and gzip) of the whole file, eight hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What the index knows of a file beside the shards."""

    file: str
    bytes: int
    crc32: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """The contents of ``index.json``."""

    schema_version: int = SCHEMA_VERSION
    modality: str
    sample_rate_hz: int
    codec: Codec
    settings: Mapping[str, Any]
    """The packer's options that change the bytes of the folder."""
    files: int
    """Input files, the skipped ones included."""
    files_skipped: int
    plan_sha256: str
    """Fingerprint of the list of input files, their headers and annotations."""
    rows: int
    samples: int
    hours: float
    rows_file: FileEntry
    shards: tuple[ShardEntry, ...]
    created_by: Mapping[str, Any] = field(default_factory=dict)
    """Command, date, worker count and library versions: the only part that may differ between equal folders."""


def write_index(folder: Path, index: Index) -> None:
    """Write ``index.json`` so that it is either absent or whole, even after a power cut."""
    write_json(folder / INDEX_NAME, asdict(index))


def read_index(folder: Path) -> Index:
    """Read ``index.json`` of a finished folder.

    Raises:
        ShardError: if the folder is unfinished, or its index is damaged or of another schema version.
    """
    path = folder / INDEX_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"{folder}: expected a finished shard folder, found no {INDEX_NAME}; packing writes it last, so run "
            "the same packing command again (finished shards are kept), or correct the path"
        ) from None
    except ValueError as error:
        raise ShardError(f"{path}: expected JSON, found {error}; run the packing command again") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise ShardError(
            f"{path}: schema_version is {version!r}, this version of d2v2ds reads {SCHEMA_VERSION}; "
            "pack the folder again, or install the version that wrote it"
        )
    try:
        values["rows_file"] = FileEntry(**values["rows_file"])
        values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
        return Index(**values)
    except (KeyError, TypeError) as error:
        raise ShardError(
            f"{path}: expected the fields of schema version {SCHEMA_VERSION}, found {error}; pack the folder again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name beside `path`, sync it, and rename it into place."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    move_into_place(temporary, path)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a synced file and sync its folder, so that the new name survives a power cut."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_crc32(path: Path) -> str:
    """CRC-32 of a file, as `ShardEntry.crc32`."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"
