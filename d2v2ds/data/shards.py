"""`open_shards`: memory-mapped random access to a packed folder of audio, images or text. No torch.

Opening costs the same for ten rows and for a hundred million: ``index.json`` is read, ``rows.npy`` is mapped,
and a shard is opened when one of its rows is first asked for. Of a row only the bytes asked for are touched.
The format is that of `d2v2ds.data.schema`; `preprocessing` writes it.
"""

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.data.schema import LAYOUTS, ROW_DTYPE, SAMPLE_DTYPE, TOKEN_DTYPES, Index, read_index, shard_schema
from d2v2ds.errors import MissingExtraError, ShardError

MAX_OPEN_SHARDS = 256
"""Mapped shards kept at a time; each holds one file descriptor (1024 are usual per process)."""

Samples = NDArray[np.int16]
Tokens = NDArray[np.uint16] | NDArray[np.uint32]


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
class AudioLabels:
    """What a row says about its audio, without the audio."""

    id: str
    text: str | None
    label: str | None
    speaker: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLabels:
    """What a row says about its image, without the image."""

    id: str
    label: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLabels:
    """What a row says about its tokens; both are None unless rows are documents."""

    id: str | None
    label: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImage:
    """The bytes of one image file and what decoding needs beside them."""

    data: memoryview
    """The file: a read-only view of the mapped shard."""
    orientation: int
    """EXIF orientation still to be applied, 1 to 8; 1 is upright."""
    width: int
    """Pixels, after `orientation`."""
    height: int


class AudioShards:
    """Rows of a packed folder of audio, by number.

    Args:
        folder: a folder that `preprocessing.pack_audio` has finished.

    Raises:
        ShardError: if the folder is unfinished, of another version or modality, or its files do not fit its index.

    Instances can be pickled and survive a fork; each process maps the shards it uses.
    """

    def __init__(self, folder: Path | str) -> None:
        self._rows = _Rows(Path(folder), "audio")
        self.folder = self._rows.folder
        self.index = self._rows.index
        self._codec: str = self.index.format["codec"]

    def __len__(self) -> int:
        return self.index.rows

    @property
    def sample_rate_hz(self) -> int:
        """Samples per second of every row."""
        rate: int = self.index.format["sample_rate_hz"]
        return rate

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(len(self),) int64, length of every row in samples; memory-mapped."""
        return self._rows.records["size"]

    @property
    def records(self) -> NDArray[np.void]:
        """(len(self),) of `ROW_DTYPE`, where every row lies; memory-mapped."""
        return self._rows.records

    def __getitem__(self, index: int) -> AudioRow:
        """The whole row `index`."""
        labels, (mean, var) = self.read_labels(index), self.read_stats(index)
        return AudioRow(
            index=index,
            id=labels.id,
            samples=self.read_audio(index),
            mean=mean,
            var=var,
            text=labels.text,
            label=labels.label,
            speaker=labels.speaker,
        )

    def read_audio(self, index: int, start: int = 0, stop: int | None = None) -> Samples:
        """Samples `start` to `stop` (exclusive; None: the end) of row `index`, as (stop - start,) int16.

        From pcm16 only these bytes of the file are read; a FLAC stream is decoded from the frame before `start`.
        """
        batch, row = self._rows.locate(index)
        length = int(batch.numbers("num_samples")[row])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"samples {start} to {stop} of a row of {length} samples")
        encoded = batch.payload(row)
        if self._codec == "flac":
            samples = decode_flac(encoded, start, stop, f"{batch.place} row {row}")
            found = start + len(samples)
        else:
            samples = encoded[2 * start : 2 * stop].view(SAMPLE_DTYPE)
            found, stop = len(encoded) // 2, length
        if found != stop:
            raise ShardError(
                f"{batch.place} row {row}: expected {length} samples, found {found}; "
                "run python -m preprocessing.verify on the folder"
            )
        return samples

    def read_stats(self, index: int) -> tuple[float, float]:
        """`AudioRow.mean` and `AudioRow.var` of row `index`, without touching its audio."""
        batch, row = self._rows.locate(index)
        return float(batch.numbers("mean")[row]), float(batch.numbers("var")[row])

    def read_labels(self, index: int) -> AudioLabels:
        """Id, text, label and speaker of row `index`, without touching its audio."""
        return AudioLabels(**self._rows.texts(index, "id", "text", "label", "speaker"))


class ImageShards:
    """Rows of a packed folder of images, by number; see `AudioShards`."""

    def __init__(self, folder: Path | str) -> None:
        self._rows = _Rows(Path(folder), "image")
        self.folder = self._rows.folder
        self.index = self._rows.index

    def __len__(self) -> int:
        return self.index.rows

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(len(self),) int64, pixels of every row (width * height); memory-mapped."""
        return self._rows.records["size"]

    @property
    def records(self) -> NDArray[np.void]:
        """(len(self),) of `ROW_DTYPE`, where every row lies; memory-mapped."""
        return self._rows.records

    def read_image(self, index: int) -> EncodedImage:
        """The encoded image of row `index`; nothing is decoded or copied."""
        batch, row = self._rows.locate(index)
        return EncodedImage(
            data=batch.payload(row).data,
            orientation=int(batch.numbers("orientation")[row]),
            width=int(batch.numbers("width")[row]),
            height=int(batch.numbers("height")[row]),
        )

    def read_labels(self, index: int) -> ImageLabels:
        """Id and label of row `index`, without touching its image."""
        return ImageLabels(**self._rows.texts(index, "id", "label"))


class TextShards:
    """Rows of a packed folder of text, by number; see `AudioShards`."""

    def __init__(self, folder: Path | str) -> None:
        self._rows = _Rows(Path(folder), "text")
        self.folder = self._rows.folder
        self.index = self._rows.index
        name = self.index.format["token_dtype"]
        if name not in TOKEN_DTYPES:
            raise ShardError(f"{self.folder}: token_dtype is {name!r}, expected one of {', '.join(TOKEN_DTYPES)}")
        self._dtype = TOKEN_DTYPES[name]

    def __len__(self) -> int:
        return self.index.rows

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(len(self),) int64, tokens of every row; memory-mapped."""
        return self._rows.records["size"]

    @property
    def records(self) -> NDArray[np.void]:
        """(len(self),) of `ROW_DTYPE`, where every row lies; memory-mapped."""
        return self._rows.records

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        size: int = self.index.format["vocab_size"]
        return size

    @property
    def block_tokens(self) -> int:
        """Tokens of the longest row that the packer makes."""
        tokens: int = self.index.format["block_tokens"]
        return tokens

    @property
    def special(self) -> Mapping[str, int]:
        """Ids of the tokens that are no text, by name: `bos`, `pad`, `eos`, `unk`, and `mask` if there is one."""
        ids: Mapping[str, int] = self.index.format["special"]
        return ids

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the tokens, inside the folder."""
        return self.folder / str(self.index.format["tokenizer_file"])

    def read_tokens(self, index: int) -> Tokens:
        """(size,) tokens of row `index`: a read-only view of the mapped file, in the smallest type that fits."""
        batch, row = self._rows.locate(index)
        start, stop = self._bounds(batch, row, int(self.sizes[index]))
        tokens: Tokens = batch.data[start:stop].view(self._dtype)
        return tokens

    def read_blocks(self, rows: NDArray[np.int64], out: NDArray[np.int64], pad_id: int) -> None:
        """Write whole rows into a batch; what is left of a line is padded.

        Args:
            rows: (B,) numbers of rows.
            out: (B, S) int64, overwritten; S must hold the longest of these rows.
            pad_id: written after the end of a shorter row.
        """
        width = out.shape[1]
        for line, (batch, row, length) in enumerate(self._rows.locate_all(rows)):
            if length > width:
                raise ValueError(f"row {rows[line]} has {length} tokens, the batch has room for {width}")
            start, stop = self._bounds(batch, row, length)
            out[line, :length] = batch.data[start:stop].view(self._dtype)
            if length < width:
                out[line, length:] = pad_id

    def read_labels(self, index: int) -> TextLabels:
        """Id and label of row `index`, without touching its tokens."""
        return TextLabels(**self._rows.texts(index, "id", "label"))

    def _bounds(self, batch: "_Batch", row: int, length: int) -> tuple[int, int]:
        """Where the `length` tokens of a row lie in the bytes of its batch."""
        start, stop = batch.bounds(row)
        if stop - start != length * self._dtype.itemsize:
            raise ShardError(
                f"{batch.place} row {row}: expected {length} tokens of {self._dtype.itemsize} bytes, found "
                f"{stop - start} bytes; run python -m preprocessing.verify on the folder"
            )
        return start, stop


READERS: dict[str, type[AudioShards] | type[ImageShards] | type[TextShards]] = {
    "audio": AudioShards,
    "image": ImageShards,
    "text": TextShards,
}


def open_shards(folder: Path | str) -> AudioShards | ImageShards | TextShards:
    """The reader of whatever a packed folder holds.

    Raises:
        ShardError: if the folder is unfinished, of another version, or its files do not fit its index.
    """
    return READERS[read_index(Path(folder)).modality](folder)


class _Rows:
    """Where the rows of a folder lie; it finds the record batch of a row, whatever the modality."""

    def __init__(self, folder: Path, modality: str) -> None:
        self.folder = folder
        self.index: Index = read_index(folder)
        if self.index.modality != modality:
            raise ShardError(f"{folder}: modality is {self.index.modality!r}, this reader expects {modality!r}")
        self.records = self._map_records()
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self.index = state["index"]
        self.records = self._map_records()
        self._open = OrderedDict()

    def texts(self, index: int, *columns: str) -> dict[str, Any]:
        """String columns of row `index` by name."""
        batch, row = self.locate(index)
        return {name: batch.text(name, row) for name in columns}

    def locate(self, index: int) -> "tuple[_Batch, int]":
        """The record batch that holds row `index`, and the row's number inside it."""
        if not 0 <= index < self.index.rows:
            raise IndexError(f"{self.folder}: row {index} of {self.index.rows}")
        number, row, _ = self.records[index].item()
        return self._shard(number).locate(row)

    def locate_all(self, rows: NDArray[np.int64]) -> "Iterator[tuple[_Batch, int, int]]":
        """`locate` of many rows at once, several times as fast; with the size of each."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.index.rows:
            raise IndexError(f"{self.folder}: rows {rows.min()} to {rows.max()} of {self.index.rows}")
        records = self.records[rows]
        for number, row, size in records.tolist():
            yield *self._shard(number).locate(row), size

    def _map_records(self) -> NDArray[np.void]:
        """Map ``rows.npy`` without reading it."""
        entry = self.index.rows_file
        path = self.folder / entry.file
        check_size(path, entry.bytes)
        try:
            records: NDArray[np.void] = np.load(path, mmap_mode="r" if self.index.rows else None)
        except ValueError as error:
            raise ShardError(f"{path}: expected a NumPy array, found {error}; pack the folder again") from error
        if records.dtype != ROW_DTYPE or records.shape != (self.index.rows,):
            raise ShardError(
                f"{path}: expected {self.index.rows} records of {ROW_DTYPE}, found {records.shape} of "
                f"{records.dtype}; pack the folder again"
            )
        return records

    def _shard(self, number: int) -> "_Shard":
        shard = self._open.get(number)
        if shard is None:
            shard = self._open_shard(number)
        self._open.move_to_end(number)
        return shard

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
        self._payload = LAYOUTS[index.modality].payload
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            counts = [self._reader.get_batch(number).num_rows for number in range(self._reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            raise ShardError(
                f"shard file {path}: expected an Arrow IPC file, found: {error}; run python -m preprocessing.verify "
                "on the folder"
            ) from error
        expected, found = shard_schema(index.modality, index.format), self._reader.schema
        if not found.equals(expected, check_metadata=True):
            wanted, had = (str(schema).splitlines() for schema in (expected, found))
            raise ShardError(
                f"shard file {path}: expected {[line for line in wanted if line not in had]} in its schema, found "
                f"{[line for line in had if line not in wanted]}; the file belongs to another folder or version"
            )
        if sum(counts) != rows:
            raise ShardError(f"shard file {path}: expected {rows} rows, found {sum(counts)}; pack the folder again")
        self._starts: list[int] = np.cumsum([0, *counts]).tolist()
        self._batches: dict[int, _Batch] = {}

    def locate(self, row: int) -> "tuple[_Batch, int]":
        if row >= self._starts[-1]:
            raise ShardError(f"shard file {self._path}: expected row {row}, found {self._starts[-1]} rows")
        number = bisect_right(self._starts, row) - 1
        batch = self._batches.get(number)
        if batch is None:
            batch = self._batches[number] = _Batch(
                self._reader.get_batch(number), self._payload, f"shard file {self._path} batch {number}"
            )
        return batch, row - self._starts[number]


class _Batch:
    """NumPy views of one record batch, so that a row costs no Arrow object."""

    def __init__(self, batch: pa.RecordBatch, payload: str, place: str) -> None:
        column = batch.column(payload)
        _, offsets, data = column.buffers()
        self.place = place
        """How a message names the batch."""
        self.data = np.frombuffer(data, dtype=np.uint8)
        """(bytes,) payloads of all rows, one after another."""
        self._offsets = np.frombuffer(offsets, dtype=np.int64, count=len(column) + 1)
        self._batch = batch
        self._numbers: dict[str, NDArray[Any]] = {}
        self._texts: dict[str, pa.Array] = {}

    def bounds(self, row: int) -> tuple[int, int]:
        """Where the payload of a row begins and ends in `data`."""
        return self._offsets.item(row), self._offsets.item(row + 1)

    def payload(self, row: int) -> NDArray[np.uint8]:
        """(bytes,) of one row, not copied."""
        start, stop = self.bounds(row)
        return self.data[start:stop]

    def numbers(self, name: str) -> NDArray[Any]:
        """(rows,) a numeric column."""
        values = self._numbers.get(name)
        if values is None:
            values = self._numbers[name] = self._batch.column(name).to_numpy()
        return values

    def text(self, name: str, row: int) -> str | None:
        """One value of a string column."""
        column = self._texts.get(name)
        if column is None:
            column = self._texts[name] = self._batch.column(name)
        value: str | None = column[row].as_py()
        return value


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
