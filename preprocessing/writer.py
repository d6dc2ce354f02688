"""Writes one shard, its sidecar, and at the end ``rows.npy``, ``skipped.tsv`` and ``index.json``.

A shard is written under a temporary name in ``.packing/``, synced and renamed; then its sidecar says that it is
finished. A restart trusts a shard only with its sidecar. The checksum is computed while writing.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

from d2v2ds.data.schema import (
    ROW_DTYPE,
    ROWS_NAME,
    SAMPLE_DTYPE,
    SKIPPED_NAME,
    Codec,
    FileEntry,
    ShardEntry,
    audio_schema,
    shard_name,
    write_json,
)
from preprocessing.diskfile import BUFFER_BYTES, ChecksumFile, give_buffer, replacing, take_buffer
from preprocessing.plan import SAMPLE_RATE_HZ, PackSettings, Skipped, Unit
from preprocessing.sources import Report, utf8
from preprocessing.waveform import BadAudioError, Decoder, Samples, cut_points, mean_and_variance

BATCH_BYTES = BUFFER_BYTES
"""Audio bytes after which a record batch ends; a longer row has a batch of its own."""
PACKING_NAME = ".packing"
"""Folder inside the output that holds temporary files, sidecars and the plan until the index is written."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Everything that one process needs to pack one shard."""

    number: int
    folder: Path
    units: tuple[Unit, ...]
    settings: PackSettings


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A finished shard: its sidecar's contents."""

    entry: ShardEntry
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example before it is stored."""

    id: str
    samples: Samples
    text: str | None
    label: str | None
    speaker: str | None
    source: str
    start_sample: int


def pack_shard(job: ShardJob, report: Report) -> ShardResult:
    """Decode the files of one shard and write it.

    Raises:
        ShardError: if the disk is full; neither shard nor temporary file is left.
    """
    name = shard_name("audio", job.number)
    decoder = Decoder(SAMPLE_RATE_HZ)
    skipped: list[Skipped] = []
    num_samples: list[int] = []
    with replacing(job.folder / name, job.folder / PACKING_NAME) as sink:
        writer = ShardWriter(sink, job.settings.codec)
        for unit in job.units:
            for row in _rows_of(unit, decoder, job.settings, skipped):
                writer.add(row)
                num_samples.append(len(row.samples))
            report(len(unit.clips), unit.samples)
        writer.close()
    with replacing(_lengths_path(job.folder, job.number), job.folder / PACKING_NAME) as lengths:
        lengths.write(np.array(num_samples, dtype=np.int64).tobytes())
    entry = ShardEntry(file=name, rows=len(num_samples), samples=sum(num_samples), bytes=sink.bytes, crc32=sink.crc32)
    result = ShardResult(entry=entry, skipped=tuple(skipped))
    write_json(_sidecar_path(job.folder, job.number), asdict(result))
    return result


def finished_shard(folder: Path, number: int) -> ShardResult | None:
    """What the sidecar says of a shard, or None if the shard still has to be packed."""
    try:
        values = json.loads(_sidecar_path(folder, number).read_text(encoding="utf-8"))
        entry = ShardEntry(**values["entry"])
        if (folder / entry.file).stat().st_size != entry.bytes:
            return None
    except FileNotFoundError:
        return None
    return ShardResult(entry=entry, skipped=tuple(Skipped(**one) for one in values["skipped"]))


def _sidecar_path(folder: Path, number: int) -> Path:
    """Where a finished shard is noted until the index is written."""
    return folder / PACKING_NAME / f"{shard_name('audio', number)}.json"


def _lengths_path(folder: Path, number: int) -> Path:
    """int64 lengths of a finished shard's rows; the sidecar is written after it."""
    return folder / PACKING_NAME / f"{shard_name('audio', number)}.lengths"


class ShardWriter:
    """Collects rows into record batches of limited bytes and writes them as an Arrow IPC file."""

    def __init__(self, sink: ChecksumFile, codec: Codec) -> None:
        self._codec = codec
        self._schema = audio_schema(codec, SAMPLE_RATE_HZ)
        self._writer = pa.ipc.new_file(sink, self._schema)
        self._spare = take_buffer()
        self._buffer = np.frombuffer(self._spare, dtype=np.uint8)
        self._used = 0
        self._offsets = [0]
        self._values: dict[str, list[Any]] = {name: [] for name in self._schema.names if name != "audio"}

    def add(self, row: Row) -> None:
        """Copy one row into the batch; its samples may be overwritten afterwards."""
        mean, var = mean_and_variance(row.samples)
        stored = row.samples.astype(SAMPLE_DTYPE, copy=False)
        encoded = encode_flac(row.samples) if self._codec == "flac" else stored.view(np.uint8)
        if self._used + len(encoded) > BATCH_BYTES:
            self._flush()
        if len(encoded) > len(self._buffer):
            self._buffer = np.empty(len(encoded), dtype=np.uint8)
        self._buffer[self._used : self._used + len(encoded)] = encoded
        self._used += len(encoded)
        self._offsets.append(self._used)
        stored_values = {
            "id": row.id,
            "num_samples": len(row.samples),
            "mean": mean,
            "var": var,
            "text": row.text,
            "label": row.label,
            "speaker": row.speaker,
            "source": row.source,
            "start_sample": row.start_sample,
        }
        for name, values in self._values.items():
            values.append(stored_values[name])

    def close(self) -> None:
        """Write the last batch and the Arrow footer."""
        self._flush()
        self._writer.close()
        give_buffer(self._spare)

    def _flush(self) -> None:
        if self._offsets == [0]:
            return
        offsets = np.array(self._offsets, dtype=np.int64)
        audio = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(),
            len(offsets) - 1,
            [None, pa.py_buffer(offsets), pa.py_buffer(self._buffer[: self._used])],
        )
        columns = [
            audio if field.name == "audio" else _column(self._values[field.name], field.type) for field in self._schema
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._used = 0
        self._offsets = [0]
        for values in self._values.values():
            values.clear()


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow array from its buffers. `pa.array` would import pandas where it is installed: 0.3 s per process."""
    count = len(values)
    if kind != pa.large_string():
        numbers = np.array(values, dtype=np.int64 if kind == pa.int64() else np.float64)
        return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(numbers)])
    encoded = [(value or "").encode() for value in values]
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum([len(value) for value in encoded], out=offsets[1:])
    valid = np.array([value is not None for value in values])
    bits = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    buffers = [bits, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(kind, count, buffers)


def encode_flac(samples: Samples) -> np.ndarray:
    """One FLAC stream of (S,) int16 samples, as bytes."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return np.frombuffer(stream.getbuffer(), dtype=np.uint8)


def write_rows(folder: Path, shards: Sequence[ShardEntry]) -> FileEntry:
    """Write ``rows.npy`` from the lengths noted with each shard."""
    total = sum(entry.rows for entry in shards)
    with replacing(folder / ROWS_NAME, folder / PACKING_NAME) as sink:
        header = {"descr": np.lib.format.dtype_to_descr(ROW_DTYPE), "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(sink, header)
        for number, entry in enumerate(shards):
            records = np.empty(entry.rows, dtype=ROW_DTYPE)
            records["shard"] = number
            records["row"] = np.arange(entry.rows)
            records["num_samples"] = np.fromfile(_lengths_path(folder, number), dtype=np.int64)
            sink.write(records.tobytes())
    return FileEntry(file=ROWS_NAME, bytes=sink.bytes, crc32=sink.crc32)


def write_skipped(folder: Path, skipped: Sequence[Skipped]) -> None:
    """Write ``skipped.tsv``: one line per file that is not in the shards."""
    with replacing(folder / SKIPPED_NAME, folder / PACKING_NAME) as sink:
        sink.write(b"path\treason\n")
        for one in skipped:
            source = one.source.replace("\t", "\\t").replace("\n", "\\n")
            sink.write(utf8(f"{source}\t{one.reason}\n").encode())


def _rows_of(unit: Unit, decoder: Decoder, settings: PackSettings, skipped: list[Skipped]) -> Iterator[Row]:
    """The rows of one unit; files that turn out bad are noted in `skipped`."""
    if len(unit.clips) > 1:
        yield from _joined_row(unit, decoder, skipped)
        return
    clip = unit.clips[0]
    try:
        samples = decoder.decode(clip.path)
    except BadAudioError as error:
        skipped.append(Skipped(order=unit.order, source=clip.source, reason=str(error)))
        return
    bounds = [0, len(samples)]
    if settings.max_seconds:
        longest, shortest = (round(s * SAMPLE_RATE_HZ) for s in (settings.max_seconds, settings.min_seconds))
        bounds = cut_points(samples, longest, shortest, SAMPLE_RATE_HZ)
    pieces = len(bounds) - 1
    for piece, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        yield Row(
            id=clip.id if pieces == 1 else f"{clip.id}#{piece:04d}",
            samples=samples[start:stop],
            text=clip.text if pieces == 1 else None,  # which words fall into which piece is not known
            label=clip.label,
            speaker=clip.speaker,
            source=clip.source,
            start_sample=start,
        )


def _joined_row(unit: Unit, decoder: Decoder, skipped: list[Skipped]) -> Iterator[Row]:
    """One row of several clips of one speaker, without those that do not decode."""
    parts, clips = [], []
    for clip in unit.clips:
        try:
            parts.append(decoder.decode(clip.path).copy())
            clips.append(clip)
        except BadAudioError as error:
            skipped.append(Skipped(order=unit.order, source=clip.source, reason=str(error)))
    if not clips:
        return
    texts = [clip.text for clip in clips]
    labels = {clip.label for clip in clips}
    yield Row(
        id=f"{unit.clips[0].id}+{len(unit.clips) - 1}",
        samples=np.concatenate(parts),
        text=" ".join(text for text in texts if text) if all(texts) else None,
        label=labels.pop() if len(labels) == 1 else None,
        speaker=clips[0].speaker,
        source="\n".join(clip.source for clip in clips),
        start_sample=0,
    )
