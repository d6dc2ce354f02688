"""`open_shards`: memory-mapped random access to a packed folder of audio, images or text. No torch.

Opening costs the same for ten rows and for a hundred million: ``index.json`` is read, ``rows.npy`` is mapped,
and a shard is opened when one of its rows is first asked for. What is given out of a row was checked against the row's
checksums (`shardfile.py`): of its audio, image or tokens all bytes, of its texts only where they are asked for.
The format is that of `d2v2ds.data.schema`; `preprocessing` writes it.
"""

import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v2ds.data.codecs.flac import STREAMINFO_BYTES, decode_mono16, parse_streaminfo
from d2v2ds.data.schema import ROW_DTYPE, SAMPLE_DTYPE, TOKEN_DTYPES, read_index
from d2v2ds.data.shardfile import RowBatch, ShardFile, check_size
from d2v2ds.errors import MissingExtraError, ShardError

MAX_OPEN_SHARDS = 256
"""Mapped shards kept at a time; each holds one file descriptor (1024 are usual per process)."""

_MOST = 2 / 3
"""Of a recording: from this part on decoding all of it the fast way is faster than only the part that is wanted."""
_HEADER_ALIGNMENT = 64
"""Of the header of a NumPy array."""

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

        Nothing is copied from pcm16; a FLAC stream is decoded from the frame before `start`.

        Raises:
            ShardError: the row is damaged, or its file cannot be read.
        """
        batch, row = self._rows.locate(index)
        length = self._rows.check_size(index, batch.number(row, "num_samples"))
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"samples {start} to {stop} of a row of {length} samples")
        encoded = batch.payload(row)
        if self._codec == "flac":
            samples = decode_flac(encoded, start, stop, batch.where(row))
            found = start + len(samples)
        else:
            samples = encoded[2 * start : 2 * stop].view(SAMPLE_DTYPE)
            found, stop = len(encoded) // 2, length
        if found != stop:
            raise ShardError(
                f"{batch.where(row)}: expected {length} samples, found {found}; "
                "run python -m preprocessing.verify on the folder"
            )
        return samples

    def read_stats(self, index: int) -> tuple[float, float]:
        """`AudioRow.mean` and `AudioRow.var` of row `index`, without touching its audio."""
        batch, row = self._rows.locate(index)
        return batch.number(row, "mean"), batch.number(row, "var")

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
        data = batch.payload(row).data
        orientation, width, height = (batch.number(row, name) for name in ("orientation", "width", "height"))
        self._rows.check_size(index, width * height)
        return EncodedImage(data=data, orientation=orientation, width=width, height=height)

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
            start, stop = self._bounds(batch, row, length)
            if length > width:
                raise ValueError(f"row {rows[line]} has {length} tokens, the batch has room for {width}")
            out[line, :length] = batch.data[start:stop].view(self._dtype)
            if length < width:
                out[line, length:] = pad_id

    def read_labels(self, index: int) -> TextLabels:
        """Id and label of row `index`, without touching its tokens."""
        return TextLabels(**self._rows.texts(index, "id", "label"))

    def _bounds(self, batch: RowBatch, row: int, length: int) -> tuple[int, int]:
        """Where the `length` tokens of a row lie in the bytes of its batch."""
        start, stop = batch.bounds(row)
        if stop - start != length * self._dtype.itemsize:
            raise ShardError(
                f"{batch.where(row)}: expected {length} tokens of {self._dtype.itemsize} bytes, found "
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
        self.index = read_index(folder)
        if self.index.modality != modality:
            raise ShardError(f"{folder}: modality is {self.index.modality!r}, this reader expects {modality!r}")
        self._map()

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
        """String columns of row `index` by name."""
        batch, row = self.locate(index)
        texts = batch.texts(row)
        return {name: texts[name] for name in columns}

    def locate(self, index: int) -> tuple[RowBatch, int]:
        """The record batch that holds row `index`, and the row's number inside it."""
        if not 0 <= index < self.index.rows:
            raise IndexError(f"{self.folder}: row {index} of {self.index.rows}")
        number, row, _ = self.records[index].item()
        return self._shard(number, row, index).locate(row)

    def check_size(self, index: int, size: int) -> int:
        """The size of row `index`, of which its shard says `size`.

        Raises:
            ShardError: ``rows.npy``, from which batches are planned, has another one.
        """
        expected = int(self.records["size"][index])
        if size != expected:
            raise ShardError(
                f"{self.folder}: size of row {index}: expected {expected} of {self.index.rows_file.file}, found {size} "
                "in its shard; run python -m preprocessing.verify on the folder"
            )
        return size

    def locate_all(self, rows: NDArray[np.int64]) -> Iterator[tuple[RowBatch, int, int]]:
        """`locate` of many rows at once, several times as fast; with the size of each."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.index.rows:
            raise IndexError(f"{self.folder}: rows {rows.min()} to {rows.max()} of {self.index.rows}")
        records = self.records[rows]
        for index, (number, row, size) in zip(rows.tolist(), records.tolist(), strict=True):
            yield *self._shard(number, row, index).locate(row), size

    def _map_records(self) -> NDArray[np.void]:
        """Map ``rows.npy`` without reading it. Its header is not needed: the index says what it would."""
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
        try:
            return np.memmap(path, dtype=ROW_DTYPE, mode="r", offset=header, shape=(num_rows,))
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: expected {entry.bytes} bytes, found: {error}; pack the folder again") from error

    def _shard(self, number: int, row: int, index: int) -> ShardFile:
        """The file of a shard, and a check that row `index` of the folder is row `row` of it."""
        if number >= len(self.index.shards) or self._starts[number] + row != index:
            raise ShardError(
                f"{self.folder / self.index.rows_file.file}: row {index} cannot be row {row} of shard {number}; run "
                "python -m preprocessing.verify on the folder"
            )
        shard = self._open.get(number)
        if shard is None or not shard.is_whole():  # a file that was put back is opened anew
            shard = self._open[number] = ShardFile(self.folder, self.index, number)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return shard


def decode_flac(encoded: NDArray[np.uint8], start: int, stop: int, place: str) -> Samples:
    """Samples `start` to `stop` of one FLAC stream; fewer if the stream ends before.

    Where most of it is wanted all of it is decoded, the fast way, which begins at the beginning.

    Args:
        encoded: the stream's bytes.
        start: first sample.
        stop: one past the last.
        place: how a message names the row.

    Raises:
        ShardError: if the stream is damaged.
    """
    info = parse_streaminfo(bytes(encoded[:STREAMINFO_BYTES]))
    if info is not None and stop - start > _MOST * info.frames:
        whole = decode_mono16(bytes(encoded), info.sample_rate_hz)
        if whole is not None:
            return whole[start:stop]
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("shards of codec flac need soundfile", "audio") from error
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
