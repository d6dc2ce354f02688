"""Rows of packed recordings: columns of their shards, the bytes of a row, and memory-mapped access. No torch.

The payload of a row is what its reader needs together: mean and variance of every channel over the *whole recording*,
of which the row may be a piece, then the samples, channel by channel.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.data.schema import Layout, column
from d2v2ds.data.shards import Shards
from d2v2ds.errors import ShardError

_STATISTIC = np.dtype("<f8")
_SAMPLE = np.dtype("<f4")
BYTES_PER_SAMPLE = _SAMPLE.itemsize

SENSORS_LAYOUT = Layout(
    name="sensors",
    fields=(
        column("id", pa.large_string()),  # unique in the folder
        column("samples", pa.large_binary()),  # means (C,), variances (C,), samples (C, S)
        column("num_samples", pa.int64()),  # S
        column("label", pa.large_string(), nullable=True),
        column("subject", pa.large_string(), nullable=True),
        column("source", pa.large_string()),  # path below the input
        column("start_sample", pa.int64()),  # first sample of the row in its recording
    ),
    payload="samples",
    size=("num_samples",),
    total="samples",
    format=frozenset({"channels", "sample_rate_hz"}),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SensorLabels:
    """Id and annotations of a row."""

    id: str
    label: str | None
    subject: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Samples of a row, and the statistics of the recording that they come from."""

    samples: NDArray[np.float32]
    """(C, S)."""
    mean: NDArray[np.float64]
    """(C,)."""
    variance: NDArray[np.float64]
    """(C,) biased."""


class SensorShards(Shards):
    """Rows of a folder that `sensors.pack` has finished, by number."""

    layout = SENSORS_LAYOUT
    labels = SensorLabels

    @property
    def channels(self) -> list[str]:
        """Names of the channels of every row, in order."""
        return list(self.index.format["channels"])

    @property
    def sample_rate_hz(self) -> float:
        """Samples per second of every row."""
        return float(self.index.format["sample_rate_hz"])

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Piece:
        """Samples `start` to `stop` (exclusive; None: the end) of row `index`; nothing is copied.

        Raises:
            ShardError: the row is damaged, or its file cannot be read.
        """
        batch, row = self.locate(index)
        length = self.check_size(index, batch.number(row, "num_samples"))
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"samples {start} to {stop} of a row of {length} samples")
        whole = decode(batch.payload(row), len(self.channels), length, batch.where(row))
        return Piece(samples=whole.samples[:, start:stop], mean=whole.mean, variance=whole.variance)


def encode(piece: Piece) -> NDArray[np.uint8]:
    """Bytes of a row."""
    statistics = np.concatenate([piece.mean, piece.variance]).astype(_STATISTIC)
    samples = np.ascontiguousarray(piece.samples, dtype=_SAMPLE)
    return np.concatenate([statistics.view(np.uint8), samples.reshape(-1).view(np.uint8)])


def decode(payload: NDArray[np.uint8], num_channels: int, num_samples: int, place: str) -> Piece:
    """Undo `encode`, without a copy.

    Args:
        payload: bytes of a row.
        num_channels: C.
        num_samples: S.
        place: name of the row, for the message.

    Raises:
        ShardError: the number of bytes is not that of such a row.
    """
    split = 2 * num_channels * _STATISTIC.itemsize
    if len(payload) != split + num_channels * num_samples * _SAMPLE.itemsize:
        raise ShardError(
            f"{place}: expected {num_channels} channels of {num_samples} samples, found {len(payload)} bytes; "
            "run python -m preprocessing.verify on the folder"
        )
    mean, variance = payload[:split].view(_STATISTIC).reshape(2, num_channels)
    return Piece(samples=payload[split:].view(_SAMPLE).reshape(num_channels, -1), mean=mean, variance=variance)
