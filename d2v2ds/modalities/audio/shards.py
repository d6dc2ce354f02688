"""Rows of packed recordings: columns of their shards, and memory-mapped access. No torch."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.data.codecs.flac import LARGEST_RATIO, STREAMINFO_BYTES, decode_mono16, parse_streaminfo
from d2v2ds.data.schema import Layout, column
from d2v2ds.data.shards import Shards
from d2v2ds.errors import MissingExtraError, ShardError

Codec = Literal["pcm16", "flac"]
CODECS: tuple[Codec, ...] = ("pcm16", "flac")

SAMPLE_DTYPE = np.dtype("<i2")
"""A stored waveform: 16-bit little-endian, one channel; divided by `SAMPLE_SCALE` it lies in [-1, 1)."""
SAMPLE_SCALE = 32768
_MOST = 2 / 3
"""Share of a recording from which decoding all of it the fast way beats decoding only the part that is wanted."""

Samples = NDArray[np.int16]

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"})
"""Suffixes of sound files in folders; the content decides the format."""

AUDIO_LAYOUT = Layout(
    name="audio",
    fields=(
        column("id", pa.large_string()),  # unique in the folder
        column("audio", pa.large_binary()),  # bytes of SAMPLE_DTYPE, or one FLAC stream
        column("num_samples", pa.int64()),
        column("mean", pa.float64()),  # of the stored samples / SAMPLE_SCALE, over the whole row
        column("var", pa.float64()),  # biased variance of the same
        column("text", pa.large_string(), nullable=True),
        column("label", pa.large_string(), nullable=True),
        column("speaker", pa.large_string(), nullable=True),
        column("source", pa.large_string()),  # path below the input; joined clips: one a line
        column("start_sample", pa.int64()),  # first sample of the row in its recording, at the row's rate
    ),
    payload="audio",
    size=("num_samples",),
    total="samples",
    format=frozenset({"codec", "sample_rate_hz"}),
)


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
    """Annotations of a row."""

    id: str
    label: str | None
    speaker: str | None
    text: str | None


class AudioShards(Shards):
    """Rows of a folder that `preprocessing.pack_audio` has finished, by number."""

    layout = AUDIO_LAYOUT
    labels = AudioLabels

    @property
    def sample_rate_hz(self) -> int:
        """Samples per second of every row."""
        rate: int = self.index.format["sample_rate_hz"]
        return rate

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
        batch, row = self.locate(index)
        length = self.check_size(index, batch.number(row, "num_samples"))
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"samples {start} to {stop} of a row of {length} samples")
        encoded = batch.payload(row)
        if self.index.format["codec"] == "flac":
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
        batch, row = self.locate(index)
        return batch.number(row, "mean"), batch.number(row, "var")


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
    if stop > max(1, len(encoded)) * LARGEST_RATIO:
        raise ShardError(f"{place}: expected a FLAC stream of {stop:,} samples, found {len(encoded):,} bytes")
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
