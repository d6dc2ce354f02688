"""`verify` and `inspect` for audio: check every row against its audio; durations, levels, log-mel pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.data.schema import Index
from d2v2ds.errors import MissingExtraError, ShardError
from d2v2ds.modalities.audio.shards import SAMPLE_DTYPE, SAMPLE_SCALE, AudioRow, AudioShards, decode_flac
from preprocessing.audio.waveform import Samples, mean_and_variance
from preprocessing.driver.report_lines import MAX_ROWS, distinct_line, fault, percentiles, sampled_labels, spread

_NUM_PICTURES = 4
_PICTURE_SECONDS = 8.0
_MEL_BINS = 80


def batch_faults(batch: pa.RecordBatch, index: Index, name: str, first: int) -> Iterator[str]:
    """Rows whose audio does not decode to the stated length, mean and variance."""
    codec = index.format["codec"]
    for row in range(batch.num_rows):
        where = f"{name} row {first + row}"
        length = batch.column("num_samples")[row].as_py()
        encoded = np.frombuffer(batch.column("audio")[row].as_buffer(), dtype=np.uint8)
        try:
            samples: Samples = (
                decode_flac(encoded, 0, length + 1, where) if codec == "flac" else encoded.view(SAMPLE_DTYPE)
            )
        except (ShardError, ValueError) as error:
            yield fault(where, "audio", f"{length} samples of {codec}", error)
            continue
        if len(samples) != length:
            yield fault(where, "audio", f"{length} samples", f"{len(samples)} samples")
            continue
        found = tuple(batch.column(column)[row].as_py() for column in ("mean", "var"))
        if found != (expected := mean_and_variance(samples)):
            yield fault(where, "mean and variance", expected, found)


def headline(index: Index) -> str:
    """Rate and codec."""
    return f"{index.format['sample_rate_hz']} Hz, codec {index.format['codec']}"


def lines(shards: AudioShards) -> list[str]:
    """Hours, durations and annotations."""
    found = [f"audio     {shards.index.totals['hours']:.2f} h"]
    if len(shards):
        found.append("seconds   " + percentiles(shards.sizes / shards.sample_rate_hz, "shortest", "longest", 2))
        rows, of = sampled_labels(shards)
        found += [distinct_line(rows, name, of) for name in ("speaker", "label")]
        found.append(f"text      {np.mean([row.text is not None for row in rows]):.0%} of the rows{of}")
    return found


def levels_dbfs(shards: AudioShards) -> NDArray[np.float64]:
    """RMS level of up to ten thousand rows, in dB below full scale; silence counts as -100."""
    stats = np.array([shards.read_stats(row) for row in spread(len(shards), MAX_ROWS)])
    power = stats[:, 1] + stats[:, 0] ** 2
    levels: NDArray[np.float64] = 10 * np.log10(np.maximum(power, 1e-10))
    return levels


def log_mel(row: AudioRow, sample_rate_hz: int) -> NDArray[np.float32]:
    """(frames, 80) log-mel energies of the first seconds of a row, every 10 ms."""
    try:
        import kaldi_native_fbank
    except ImportError as error:
        raise MissingExtraError("--plot needs kaldi-native-fbank", "audio") from error
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = sample_rate_hz
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = _MEL_BINS
    fbank = kaldi_native_fbank.OnlineFbank(options)
    samples = row.samples[: int(_PICTURE_SECONDS * sample_rate_hz)].astype(np.float32) / SAMPLE_SCALE
    fbank.accept_waveform(sample_rate_hz, samples.tolist())
    fbank.input_finished()
    frames = [fbank.get_frame(number) for number in range(fbank.num_frames_ready)]
    return np.array(frames, dtype=np.float32).reshape(-1, _MEL_BINS)


def plot(shards: AudioShards, path: Path) -> None:
    """Durations of all rows, levels of (at most) some ten thousand, log-mel pictures of four.

    Raises:
        MissingExtraError: without matplotlib or kaldi-native-fbank.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("--plot needs matplotlib", "eval") from error
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes: Any = figure.subplots(1 + _NUM_PICTURES // 2, 2)
    axes[0, 0].hist(shards.sizes / shards.sample_rate_hz, bins=60)
    hours = shards.index.totals["hours"]
    axes[0, 0].set(title=f"{len(shards):,} rows, {hours:.2f} h", xlabel="duration (s)", ylabel="rows")
    if len(shards):
        axes[0, 1].hist(levels_dbfs(shards), bins=60)
    axes[0, 1].set(title="levels", xlabel="RMS (dB below full scale)", ylabel="rows")
    for axis in axes[1:].flat:
        axis.set_axis_off()
    for axis, number in zip(axes[1:].flat, spread(len(shards), _NUM_PICTURES), strict=False):
        row = shards[number]
        picture = log_mel(row, shards.sample_rate_hz)
        axis.set_axis_on()
        axis.imshow(picture.T, origin="lower", aspect="auto", extent=(0, len(picture) / 100, 0, _MEL_BINS))
        axis.set(title=f"{row.id}  {(row.text or '')[:40]}", xlabel="time (s)", ylabel="mel band")
        axis.title.set_fontsize(8)
    figure.savefig(path, dpi=100)
