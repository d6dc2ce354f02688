"""Files of recordings -> arrays (C, S): NumPy arrays, CSV and Parquet tables; statistics and sample rate. No torch.

A table has one row for each moment and one column for each channel; columns are found by name. A NumPy array, or a CSV
file without a header line, has no names: its channels are taken in order.
"""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from d2v2ds.errors import MissingExtraError

SUFFIXES = frozenset({".npy", ".csv", ".parquet"})
_CONSTANT = 1e-6
"""A channel whose deviation is below this share of its mean holds nothing but float32 rounding."""

Samples = NDArray[np.float32]
"""(C, S)."""


class BadRecordingError(Exception):
    """A file or an array is no recording of the wanted channels; the text is the reason."""


def check_header(path: Path, channels: Sequence[str]) -> None:
    """Check columns or shape of a file without reading its samples.

    Raises:
        BadRecordingError: the file cannot be opened, or lacks channels.
    """
    with _explained():
        if path.suffix.lower() == ".npy":
            oriented(np.load(path, mmap_mode="r", allow_pickle=False), len(channels))
        else:
            _columns(_names(path), channels)


def read_recording(path: Path, channels: Sequence[str]) -> Samples:
    """Read a whole file.

    Args:
        path: with one of `SUFFIXES`.
        channels: names of the channels to read.

    Returns:
        (C, S) float32, channels in the given order.

    Raises:
        BadRecordingError: the file cannot be read, lacks channels, or has samples that are not finite.
    """
    with _explained():
        if path.suffix.lower() == ".npy":
            return checked(np.load(path, allow_pickle=False), channels)
        table = _read_table(path, _columns(_names(path), channels))
        return checked(np.stack([column.to_numpy().astype(np.float32) for column in table.columns]), channels)


def checked(array: NDArray[Any], channels: Sequence[str]) -> Samples:
    """Turn an array into (C, S) float32 with finite samples.

    Raises:
        BadRecordingError: the shape does not fit the channels, or samples are not finite.
    """
    samples = np.ascontiguousarray(oriented(array, len(channels)), dtype=np.float32)
    if bad := [name for name, channel in zip(channels, samples, strict=True) if not np.isfinite(channel).all()]:
        raise BadRecordingError(f"missing, NaN or infinite samples in {', '.join(bad)}")
    return samples


def oriented(array: NDArray[Any], num_channels: int) -> NDArray[Any]:
    """View an array (C, S), (S, C), or (S,) of one channel, as (C, S).

    Raises:
        BadRecordingError: the array is something else.
    """
    if array.dtype.kind not in "iuf":
        raise BadRecordingError(f"expected numbers, found {array.dtype}")
    if array.ndim == 1 and num_channels == 1:
        return array[None]
    if array.ndim != 2 or num_channels not in array.shape:
        raise BadRecordingError(f"expected {num_channels} channels as (C, S) or (S, C), found {array.shape}")
    if array.shape == (num_channels, num_channels):
        raise BadRecordingError(f"shape {array.shape} does not tell channels from samples")
    return array if array.shape[0] == num_channels else array.T


def resample(samples: Samples, from_hz: float, to_hz: float) -> Samples:
    """Bring (C, S) from one sample rate to another.

    Raises:
        MissingExtraError: soxr is not installed.
    """
    if from_hz == to_hz:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise MissingExtraError("another sample rate needs soxr", "audio") from error
    return np.ascontiguousarray(soxr.resample(np.ascontiguousarray(samples.T), from_hz, to_hz).T)


def mean_and_variance(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(C,) means and (C,) biased variances over time."""
    channels = [channel.astype(np.float64) for channel in samples]
    return np.array([channel.mean() for channel in channels]), np.array([channel.var() for channel in channels])


def normalised(samples: Samples, mean: NDArray[np.float64], variance: NDArray[np.float64]) -> Samples:
    """Bring every channel to zero mean and unit variance by the statistics of its recording.

    No constant is added to the variance: EEG in volts has variances of 1e-10. A constant channel becomes zero.
    """
    deviation = np.sqrt(variance)
    is_constant = deviation <= _CONSTANT * np.abs(mean)
    scale = np.where(is_constant, 0.0, 1.0 / np.where(is_constant, 1.0, deviation))
    result: Samples = ((samples - mean[:, None]) * scale[:, None]).astype(np.float32)
    return result


# --- tables -----------------------------------------------------------------------------------------------------------


def _names(path: Path) -> list[str] | int:
    """Names of a table's columns; their number if the file has no names."""
    if path.suffix.lower() == ".parquet":
        return list(pa.parquet.read_schema(path).names)
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = next(csv.reader(file), [])
    return len(first) if all(map(_is_number, first)) else first


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _columns(names: list[str] | int, channels: Sequence[str]) -> list[str]:
    """Names under which pyarrow knows the columns of the channels."""
    if isinstance(names, int):
        if names != len(channels):
            raise BadRecordingError(f"expected {len(channels)} columns, found {names}, without a header line")
        return [f"f{number}" for number in range(names)]
    if absent := [name for name in channels if name not in names]:
        raise BadRecordingError(f"expected columns {', '.join(absent)}, found {', '.join(names)}")
    return list(channels)


def _read_table(path: Path, columns: list[str]) -> pa.Table:
    if path.suffix.lower() == ".parquet":
        return pa.parquet.read_table(path, columns=columns, use_threads=False)
    return pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(autogenerate_column_names=isinstance(_names(path), int), use_threads=False),
        convert_options=pa.csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.float32())
        ),
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Turn the errors of the libraries into the reason why a file cannot be packed."""
    try:
        yield
    except OSError as error:
        raise BadRecordingError(f"unreadable: {error.strerror or error}") from error
    except (pa.ArrowException, ValueError, TypeError, EOFError) as error:
        raise BadRecordingError(f"damaged, or no table of numbers: {error}") from error
