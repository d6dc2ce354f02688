"""`ArrowShards`: memory-mapped random access to a packed folder of audio. No torch.

Opening costs the same for ten rows and for a hundred million: ``index.json`` is read, ``rows.npy`` is mapped,
and a shard is opened when one of its rows is first asked for. Of a row only the bytes asked for are touched.
The format is that of `d2v2ds.data.schema`; `preprocessing` writes it.
"""

import io
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.data.schema import ROW_DTYPE, SAMPLE_DTYPE, Index, audio_schema, read_index
from d2v2ds.errors import MissingExtraError, ShardError

MAX_OPEN_SHARDS = 256
"""Mapped shards kept at a time; each holds one file descriptor (1024 are usual per process)."""

Samples = NDArray[np.int16]


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioRow:
    """One row of a shard."""

    index: int
    """Number of the row in its folder."""
    id: str
    samples: Samples
    """(S,) int16, mono; from pcm16 a read-only view of the mapped file."""
    mean: float
    """Mean of `samples` / 32768 over the whole row."""
    var: float
    """Biased variance of the same: what layer norm over the waveform divides by (plus its eps)."""
    text: str | None
    label: str | None
    speaker: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLabels:
    """What a row says about its audio, without the audio."""

    id: str
    text: str | None
    label: str | None
    speaker: str | None


class ArrowShards:
    """Rows of a packed folder, by number.

    Args:
        folder: a folder that `preprocessing.pack_audio` has finished.

    Raises:
        ShardError: if the folder is unfinished, of another version, or its files do not fit its index.

    Instances can be pickled and survive a fork; each process maps the shards it uses.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.index: Index = read_index(self.folder)
        if self.index.modality != "audio":
            raise ShardError(f"{self.folder}: modality is {self.index.modality!r}, this reader expects 'audio'")
        self._rows = self._map_rows()
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return self.index.rows

    @property
    def sample_rate_hz(self) -> int:
        """Samples per second of every row."""
        return self.index.sample_rate_hz

    @property
    def num_samples(self) -> NDArray[np.int64]:
        """(len(self),) int64, length of every row in samples; memory-mapped."""
        return self._rows["num_samples"]

    @property
    def records(self) -> NDArray[np.void]:
        """(len(self),) of `ROW_DTYPE`, where every row lies; memory-mapped."""
        return self._rows

    def __getitem__(self, index: int) -> AudioRow:
        """The whole row `index`."""
        batch, row = self._locate(index)
        labels = batch.labels(row)
        return AudioRow(
            index=index,
            id=labels.id,
            samples=batch.read_audio(row, 0, None),
            mean=float(batch.mean[row]),
            var=float(batch.var[row]),
            text=labels.text,
            label=labels.label,
            speaker=labels.speaker,
        )

    def read_audio(self, index: int, start: int = 0, stop: int | None = None) -> Samples:
        """Samples `start` to `stop` (exclusive; None: the end) of row `index`, as (stop - start,) int16.

        From pcm16 only these bytes of the file are read; a FLAC stream is decoded from the frame before `start`.
        """
        batch, row = self._locate(index)
        return batch.read_audio(row, start, stop)

    def read_stats(self, index: int) -> tuple[float, float]:
        """`AudioRow.mean` and `AudioRow.var` of row `index`, without touching its audio."""
        batch, row = self._locate(index)
        return float(batch.mean[row]), float(batch.var[row])

    def read_labels(self, index: int) -> RowLabels:
        """Id, text, label and speaker of row `index`, without touching its audio."""
        batch, row = self._locate(index)
        return batch.labels(row)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self.index = state["index"]
        self._rows = self._map_rows()
        self._open = OrderedDict()

    def _map_rows(self) -> NDArray[np.void]:
        """Map ``rows.npy`` without reading it."""
        entry = self.index.rows_file
        path = self.folder / entry.file
        check_size(path, entry.bytes)
        try:
            rows: NDArray[np.void] = np.load(path, mmap_mode="r" if self.index.rows else None)
        except ValueError as error:
            raise ShardError(f"{path}: expected a NumPy array, found {error}; pack the folder again") from error
        if rows.dtype != ROW_DTYPE or rows.shape != (self.index.rows,):
            raise ShardError(
                f"{path}: expected {self.index.rows} records of {ROW_DTYPE}, found {rows.shape} of {rows.dtype}; "
                "pack the folder again"
            )
        return rows

    def _locate(self, index: int) -> "tuple[_Batch, int]":
        """The record batch that holds row `index`, and the row's number inside it."""
        if not 0 <= index < self.index.rows:
            raise IndexError(f"{self.folder}: row {index} of {self.index.rows}")
        record = self._rows[index]
        number = int(record["shard"])
        shard = self._open.get(number)
        if shard is None:
            shard = self._open_shard(number)
        self._open.move_to_end(number)
        return shard.locate(int(record["row"]))

    def _open_shard(self, number: int) -> "_Shard":
        if number >= len(self.index.shards):
            raise ShardError(
                f"{self.folder / self.index.rows_file.file}: a row lies in shard {number}, the index lists "
                f"{len(self.index.shards)} shards; run python -m preprocessing.verify on the folder"
            )
        entry = self.index.shards[number]
        path = self.folder / entry.file
        check_size(path, entry.bytes)
        shard = self._open[number] = _Shard(path, self.index, entry.rows)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard


def check_size(path: Path, expected: int) -> None:
    """Raise a `ShardError` if a file is missing or its size in bytes is not what the index says."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(
            f"shard file {path}: expected {expected} bytes, found no such file; copy it again from where the folder "
            "was packed, or pack the folder again"
        ) from None
    if found != expected:
        raise ShardError(
            f"shard file {path}: expected {expected} bytes, found {found}; the file was cut off or overwritten: "
            "copy it again from where the folder was packed, or pack the folder again"
        )


class _Shard:
    """One mapped Arrow file; its record batches are looked at when they are first needed."""

    def __init__(self, path: Path, index: Index, rows: int) -> None:
        self._path = path
        self._codec = index.codec
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            counts = [self._reader.get_batch(number).num_rows for number in range(self._reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            raise ShardError(
                f"shard file {path}: expected an Arrow IPC file, found: {error}; run python -m preprocessing.verify "
                "on the folder"
            ) from error
        expected, found = audio_schema(index.codec, index.sample_rate_hz), self._reader.schema
        if not found.equals(expected, check_metadata=True):
            wanted, had = (str(schema).splitlines() for schema in (expected, found))
            raise ShardError(
                f"shard file {path}: expected {[line for line in wanted if line not in had]} in its schema, found "
                f"{[line for line in had if line not in wanted]}; the file belongs to another folder or version"
            )
        if sum(counts) != rows:
            raise ShardError(f"shard file {path}: expected {rows} rows, found {sum(counts)}; pack the folder again")
        self._starts = np.cumsum([0, *counts])
        self._batches: dict[int, _Batch] = {}

    def locate(self, row: int) -> "tuple[_Batch, int]":
        if row >= self._starts[-1]:
            raise ShardError(f"shard file {self._path}: expected row {row}, found {self._starts[-1]} rows")
        number = int(self._starts.searchsorted(row, side="right")) - 1
        batch = self._batches.get(number)
        if batch is None:
            batch = self._batches[number] = _Batch(
                self._reader.get_batch(number), self._codec, f"shard file {self._path} batch {number}"
            )
        return batch, row - int(self._starts[number])


class _Batch:
    """NumPy views of one record batch, so that a row costs no Arrow object."""

    def __init__(self, batch: pa.RecordBatch, codec: str, place: str) -> None:
        audio = batch.column("audio")
        _, offsets, data = audio.buffers()
        self._place = place
        self._codec = codec
        self._offsets = np.frombuffer(offsets, dtype=np.int64, count=len(audio) + 1)
        self._data = np.frombuffer(data, dtype=np.uint8)
        self._columns = {name: batch.column(name) for name in ("id", "text", "label", "speaker")}
        self._num_samples = batch.column("num_samples").to_numpy()
        self.mean = batch.column("mean").to_numpy()
        self.var = batch.column("var").to_numpy()

    def labels(self, row: int) -> RowLabels:
        return RowLabels(**{name: column[row].as_py() for name, column in self._columns.items()})

    def read_audio(self, row: int, start: int, stop: int | None) -> Samples:
        length = int(self._num_samples[row])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"samples {start} to {stop} of a row of {length} samples")
        encoded = self._data[self._offsets[row] : self._offsets[row + 1]]
        if self._codec == "flac":
            samples = decode_flac(encoded, start, stop, f"{self._place} row {row}")
            found = start + len(samples)
        else:
            samples = encoded[2 * start : 2 * stop].view(SAMPLE_DTYPE)
            found, stop = len(encoded) // 2, length
        if found != stop:
            raise ShardError(
                f"{self._place} row {row}: expected {length} samples, found {found}; "
                "run python -m preprocessing.verify on the folder"
            )
        return samples


def decode_flac(encoded: NDArray[np.uint8], start: int, stop: int, place: str) -> Samples:
    """Samples `start` to `stop` of one FLAC stream; fewer if the stream ends before.

    Args:
        encoded: the stream's bytes.
        start: first sample.
        stop: one past the last.
        place: how a message names the row.

    Raises:
        ShardError: if the stream is damaged.
    """
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("shards of codec flac need soundfile: pip install 'd2v2ds[audio]'") from error
    try:
        with soundfile.SoundFile(io.BytesIO(encoded.data)) as stream:
            if start:
                stream.seek(start)
            samples: Samples = stream.read(stop - start, dtype="int16")
    except soundfile.LibsndfileError as error:
        raise ShardError(
            f"{place}: expected a FLAC stream, found: {error.error_string}; run python -m preprocessing.verify on the "
            "folder"
        ) from error
    return samples
