"""Totals and a picture of a shard folder: ``python -m preprocessing.inspect DIR [--plot report.png]``.

The figure shows the durations of all rows, the levels of (at most) some ten thousand, and log-mel pictures of four.
Exit codes: 0, or 2 if the folder cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v2ds.data.schema import SAMPLE_SCALE, SKIPPED_NAME, Index
from d2v2ds.data.shards import ArrowShards, AudioRow
from d2v2ds.errors import D2V2Error, MissingExtraError

EXIT_UNREADABLE = 2
_MAX_ROWS = 10_000
_NUM_PICTURES = 4
_PICTURE_SECONDS = 8.0
_MEL_BINS = 80


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figure")
    options = parser.parse_args(arguments)
    try:
        shards = ArrowShards(options.folder)
        print(summary(options.folder, shards))
        if options.plot:
            plot(shards, options.plot)
            print(f"figure: {options.plot}")
    except D2V2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    return 0


def summary(folder: Path, shards: ArrowShards) -> str:
    """The totals, several lines."""
    index: Index = shards.index
    size = sum(entry.bytes for entry in index.shards)
    lines = [
        f"{folder}: {index.modality}, {index.sample_rate_hz} Hz, codec {index.codec}",
        f"  rows      {index.rows:,} in {len(index.shards)} shards, {size / (1 << 20):,.1f} MiB",
        f"  audio     {index.hours:.2f} h",
        f"  files     {index.files:,}, of these skipped {index.files_skipped:,} (reasons in {SKIPPED_NAME})",
    ]
    if index.rows:
        seconds = shards.num_samples / index.sample_rate_hz
        named = zip(("shortest", "5 %", "median", "95 %", "longest"), (0, 5, 50, 95, 100), strict=True)
        lines.append("  seconds   " + ", ".join(f"{name} {np.percentile(seconds, q):.2f}" for name, q in named))
        rows = [shards.read_labels(row) for row in _spread(index.rows, _MAX_ROWS)]
        of = "" if len(rows) == index.rows else f" (of {len(rows):,} rows)"
        for name in ("speaker", "label"):
            values = {getattr(row, name) for row in rows} - {None}
            lines.append(f"  {name + 's':<9} {len(values):,}{of}")
        lines.append(f"  text      {np.mean([row.text is not None for row in rows]):.0%} of the rows{of}")
    return "\n".join(lines)


def levels_dbfs(shards: ArrowShards) -> NDArray[np.float64]:
    """RMS level of up to ten thousand rows, in dB below full scale; silence counts as -100."""
    stats = np.array([shards.read_stats(row) for row in _spread(len(shards), _MAX_ROWS)])
    power = stats[:, 1] + stats[:, 0] ** 2
    levels: NDArray[np.float64] = 10 * np.log10(np.maximum(power, 1e-10))
    return levels


def log_mel(row: AudioRow, sample_rate_hz: int) -> NDArray[np.float32]:
    """(frames, 80) log-mel energies of the first seconds of a row, every 10 ms."""
    try:
        import kaldi_native_fbank
    except ImportError as error:
        raise MissingExtraError("--plot needs kaldi-native-fbank: pip install 'd2v2ds[audio]'") from error
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


def plot(shards: ArrowShards, path: Path) -> None:
    """Draw the figure.

    Raises:
        MissingExtraError: without matplotlib or kaldi-native-fbank.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("--plot needs matplotlib: pip install 'd2v2ds[eval]'") from error
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes: Any = figure.subplots(1 + _NUM_PICTURES // 2, 2)
    axes[0, 0].hist(shards.num_samples / shards.sample_rate_hz, bins=60)
    axes[0, 0].set(title=f"{len(shards):,} rows, {shards.index.hours:.2f} h", xlabel="duration (s)", ylabel="rows")
    if len(shards):
        axes[0, 1].hist(levels_dbfs(shards), bins=60)
    axes[0, 1].set(title="levels", xlabel="RMS (dB below full scale)", ylabel="rows")
    for axis in axes[1:].flat:
        axis.set_axis_off()
    for axis, number in zip(axes[1:].flat, _spread(len(shards), _NUM_PICTURES), strict=False):
        row = shards[number]
        picture = log_mel(row, shards.sample_rate_hz)
        axis.set_axis_on()
        axis.imshow(picture.T, origin="lower", aspect="auto", extent=(0, len(picture) / 100, 0, _MEL_BINS))
        axis.set(title=f"{row.id}  {(row.text or '')[:40]}", xlabel="time (s)", ylabel="mel band")
        axis.title.set_fontsize(8)
    figure.savefig(path, dpi=100)


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` row numbers, evenly over all rows."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)).tolist() if count else []


if __name__ == "__main__":
    sys.exit(main())
