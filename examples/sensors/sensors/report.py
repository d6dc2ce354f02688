"""What `verify` and `inspect` do with sensors: check the samples of every row; durations, annotations, pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2v2ds.data.schema import Index
from d2v2ds.errors import MissingExtraError, ShardError
from preprocessing.driver.report_lines import distinct_line, fault, percentiles, sampled_labels, spread
from sensors.recordings import normalised
from sensors.shards import SensorShards, decode

_NUM_PICTURES = 4
_PICTURE_SECONDS = 10.0
_SPACING = 5.0
"""Standard deviations between the lines of two channels."""


def batch_faults(batch: pa.RecordBatch, index: Index, name: str, first: int) -> Iterator[str]:
    """Rows whose bytes are not the stated channels and samples, or not finite."""
    num_channels = len(index.format["channels"])
    for row in range(batch.num_rows):
        where = f"{name} row {first + row}"
        payload = np.frombuffer(batch.column("samples")[row].as_buffer(), dtype=np.uint8)
        try:
            found = decode(payload, num_channels, batch.column("num_samples")[row].as_py(), where)
        except ShardError as error:
            yield str(error)
            continue
        if not np.isfinite(found.samples).all():
            yield fault(where, "samples", "finite numbers", "NaN or infinity")
        if not (np.isfinite(found.mean).all() and (found.variance >= 0).all() and np.isfinite(found.variance).all()):
            yield fault(where, "mean and variance", "finite numbers", f"{found.mean} and {found.variance}")


def headline(index: Index) -> str:
    """Channels and rate."""
    channels = index.format["channels"]
    return f"{len(channels)} channels ({', '.join(channels)}) at {index.format['sample_rate_hz']:g} Hz"


def lines(shards: SensorShards) -> list[str]:
    """Hours, durations and annotations."""
    found = [f"sensors   {shards.index.totals['hours']:.2f} h"]
    if len(shards):
        found.append("seconds   " + percentiles(shards.sizes / shards.sample_rate_hz, "shortest", "longest", 2))
        rows, of = sampled_labels(shards)
        found += [distinct_line(rows, name, of) for name in ("subject", "label")]
    return found


def plot(shards: SensorShards, path: Path) -> None:
    """Durations of all rows, and the first seconds of some, evenly over the folder.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("--plot needs matplotlib", "eval") from error
    rate = shards.sample_rate_hz
    figure = Figure(figsize=(11, 3 * (1 + _NUM_PICTURES)), layout="constrained")
    axes: Any = figure.subplots(1 + _NUM_PICTURES)
    axes[0].hist(shards.sizes / rate, bins=60)
    axes[0].set(title=f"{len(shards):,} rows, {shards.index.totals['hours']:.2f} h", xlabel="duration (s)")
    for axis, number in zip(axes[1:], spread(len(shards), _NUM_PICTURES), strict=False):
        piece, labels = shards.read(number), shards.read_labels(number)
        samples = normalised(piece.samples, piece.mean, piece.variance)[:, : int(_PICTURE_SECONDS * rate)]  # (C, S)
        places = -_SPACING * np.arange(len(samples))
        axis.plot(np.arange(samples.shape[1]) / rate, samples.T + places, linewidth=0.5, color="black")
        axis.set_yticks(places, shards.channels)
        axis.set(title=f"{labels.id}  {labels.label or ''}", xlabel="time (s)")
    figure.savefig(path, dpi=100)
