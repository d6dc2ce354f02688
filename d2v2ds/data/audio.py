"""One row of an audio shard -> one normalised crop.

In: int16 samples in the shard and the mean and variance of the whole recording that the packer stored beside
them. Out: float32 with zero mean and unit variance *over the whole recording*, of which a crop is returned.

The reference normalises the recording before it crops (spec section 14); the stored statistics give the same
numbers while only the crop is read and decoded.
"""

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2v2ds.data.schema import SAMPLE_SCALE
from d2v2ds.masking import Stream, hash64, to_unit_interval

LAYER_NORM_EPS = 1e-5
"""Added to the variance of the recording, as layer norm does."""


class AudioSource(Protocol):
    """What decoding needs of a dataset; `ArrowShards` has it."""

    @property
    def num_samples(self) -> NDArray[np.int64]:
        """(N,) lengths in samples."""

    def read_audio(self, index: int, start: int = 0, stop: int | None = None) -> NDArray[np.int16]:
        """Samples `start` to `stop` (exclusive) of a row."""

    def read_stats(self, index: int) -> tuple[float, float]:
        """Mean and biased variance of a whole row, in units of full scale."""


def decode(source: AudioSource, row: int, start: int, out: NDArray[np.float32]) -> None:
    """Read one crop, normalised by its whole recording, into a given buffer.

    Args:
        source: the dataset.
        row: row number.
        start: first sample of the crop.
        out: (S,) float32, filled with samples start to start + S.

    Raises:
        ShardError: the row cannot be read.
    """
    mean, var = source.read_stats(row)
    scale = 1.0 / np.sqrt(var + LAYER_NORM_EPS)
    out[:] = source.read_audio(row, start, start + len(out))
    out *= np.float32(scale / SAMPLE_SCALE)
    out -= np.float32(mean * scale)


def crop_starts(
    num_samples: NDArray[np.int64], crop_samples: int, *, seed: int, epoch: int, rows: ArrayLike
) -> NDArray[np.int64]:
    """Random first samples of crops, a pure function of (seed, epoch, row).

    Args:
        num_samples: (B,) lengths of the recordings, each at least `crop_samples`.
        crop_samples: S, length of every crop.
        seed: of the run.
        epoch: in which the rows are seen.
        rows: (B,) row numbers.

    Returns:
        (B,) int64, uniform over the places where a crop fits.
    """
    chance = to_unit_interval(hash64(seed, epoch, Stream.CROP, rows))  # (B,)
    return (chance * (num_samples - crop_samples + 1)).astype(np.int64)
