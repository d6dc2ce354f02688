"""Speech: its settings of data, and one row of an audio shard -> one normalised crop.

In: int16 samples in the shard and the mean and variance of the whole recording that the packer stored beside
them. Out: float32 with zero mean and unit variance *over the whole recording*, of which a crop is returned.

The official code normalises the recording before it crops; the stored statistics give the same
numbers while only the crop is read and decoded.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from d2v2ds.bounds import Count, Positive
from d2v2ds.data.folders import sizes_of
from d2v2ds.data.order import MicroBatch, PlanConfig
from d2v2ds.data.reader import DataSettings, Examples, Reader, Unit, mask_faults
from d2v2ds.modalities.audio.shards import SAMPLE_SCALE, AudioShards
from d2v2ds.rng import Stream, hash64, to_unit_interval
from d2v2ds.shapes import AUDIO_NORM_EPS


@dataclass(frozen=True, kw_only=True)
class AudioDataConfig(DataSettings):
    """Settings for reading recordings: folders, batch sizes and masks."""

    modality = "audio"
    unit = "seconds"

    sample_rate_hz: Count = 16000
    """Rate the model is built for; shards of another rate are refused."""
    global_batch_seconds: Positive
    """Audio per optimizer step over all ranks (seconds, an upper limit; before the M masks multiply it); a
    multiple of the next."""
    micro_batch_seconds: Positive
    """Audio per forward pass on one rank (seconds, an upper limit); decides the memory needed."""
    min_seconds: Positive = 2.0
    """Shorter clips are never drawn (seconds)."""
    max_seconds: Positive = 20.0
    """Longer clips are cropped to this, at a random offset (seconds); in fine-tuning they are never drawn."""

    @property
    def largest_row(self) -> float:
        """Longest crop (seconds)."""
        return self.max_seconds

    def largest_samples(self, network: Any) -> tuple[float, int]:
        """Clips of the greatest length in one optimizer step, and that length in samples."""
        return self.global_batch / self.max_seconds, round(self.max_seconds * self.sample_rate_hz)

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        faults = super().check()
        if self.min_seconds > self.max_seconds:
            limits = f"min_seconds {self.min_seconds} must be at most max_seconds {self.max_seconds}"
            faults.append(f"data.audio.{limits}")
        return faults


SECONDS = Unit(
    name="seconds",
    label="seconds of audio",
    total_metric="data/hours",
    total_size=3600.0,
    total_help="audio seen since the run began; sum over ranks, hours, not multiplied by masks",
    speed_metric="perf/audio_seconds_per_s",
    speed_help="audio seconds per second of wall time; sum over ranks",
    larger=((3600, "hours of audio"), (60, "minutes of audio")),
)


class AudioReader(Reader[AudioShards]):
    """Packed folders of recordings as clips of equal length."""

    modality = "audio"
    unit = SECONDS
    can_be_whole = True

    config: AudioDataConfig

    def plan_config(self) -> PlanConfig:
        """Limits in samples."""
        config, rate = self.config, self.config.sample_rate_hz
        return PlanConfig(
            micro_size=round(config.micro_batch_seconds * rate),
            num_micro=config.num_micro,
            min_size=round(config.min_seconds * rate),
            max_size=round(config.max_seconds * rate),
            crops=self.labelled is None,
            whole=self.labelled is not None,
        )

    def units(self, num_rows: int, size: int) -> float:
        """Seconds."""
        return num_rows * size / self.config.sample_rate_hz

    def read(self, micro: MicroBatch, seed: int) -> Examples:
        """Waveforms (B, S) float32: crops, each at an offset of its own, or whole recordings, padded with zeros."""
        lengths = sizes_of(self.datasets, micro.rows)  # (B,)
        if self.labelled is not None:
            return self._read_padded(micro, lengths)
        starts = crop_starts(lengths, micro.size, seed=seed, epoch=micro.epoch, rows=micro.rows)
        waveforms = torch.empty(len(micro.rows), micro.size)  # (B, S)
        for row, start, out in zip(micro.rows.tolist(), starts.tolist(), waveforms.numpy(), strict=True):
            decode(*self.shards.locate(row), start, out)
        return Examples(waveforms)

    def _read_padded(self, micro: MicroBatch, lengths: NDArray[np.int64]) -> Examples:
        waveforms = torch.zeros(len(micro.rows), micro.size)  # (B, S)
        for row, length, out in zip(micro.rows.tolist(), lengths.tolist(), waveforms.numpy(), strict=True):
            decode(*self.shards.locate(row), 0, out[:length])
        padding = torch.arange(micro.size) >= torch.from_numpy(lengths)[:, None]
        return Examples(waveforms, padding if padding.any() else None)

    def read_whole(self, row: int) -> Tensor:
        """(S,) float32, the whole recording."""
        waveform = torch.empty(int(sizes_of(self.datasets, np.array([row]))[0]))
        decode(*self.shards.locate(row), 0, waveform.numpy())
        return waveform

    def remarks(self) -> list[str]:
        """Report recordings that fine-tuning leaves out."""
        if self.labelled is None:
            return []
        limits, out, seconds = self.plan_config(), 0, 0.0
        for part in self.shards.parts:
            for start in range(0, len(part), 65536):
                sizes = part.sizes[start : start + 65536]
                unused = sizes[~limits.usable(sizes)]
                out, seconds = out + len(unused), seconds + float(unused.sum()) / self.config.sample_rate_hz
        if not out:
            return []
        return [
            f"data.audio: {out} of {len(self)} recordings ({seconds / 3600:.2f} hours) are never drawn: shorter than "
            f"min_seconds {self.config.min_seconds:g} or longer than max_seconds {self.config.max_seconds:g}"
        ]

    def misfits(self) -> list[str]:
        """Return a message if the network cannot read these shards."""
        found, wanted = self.shards.first.sample_rate_hz, self.config.sample_rate_hz
        if found == wanted:
            return []
        return [
            f"data.audio.shards: sample_rate_hz is {found}, data.audio.sample_rate_hz is {wanted}; "
            "repack with --resample"
        ]

    def faults(self) -> list[str]:
        """Return one message for each way in which shards, settings and network do not fit."""
        config, rate, faults = self.config, self.config.sample_rate_hz, self.misfits()
        has_grid_mask = self.mask is not None and not self.mask.is_for_sequences
        if self.mask is not None and has_grid_mask:
            faults.append(
                f"objective.modalities.audio.mask.kind is {self.mask.kind!r}, speech needs 'block_1d', 'random' or "
                "'spans'"
            )
        shortest = round(config.min_seconds * rate)
        tokens = self.network.num_tokens(shortest)
        if tokens < 2:
            needed = bisect_left(range(1 << 30), 2, key=self.network.num_tokens)
            faults.append(
                f"data.audio.min_seconds {config.min_seconds}: {shortest} samples make {tokens} tokens, expected 2 or "
                f"more; the front end needs {needed} samples for that"
            )
        elif not has_grid_mask:
            faults += mask_faults(
                self.mask,
                tokens,
                f"objective.modalities.audio.mask, for clips of data.audio.min_seconds {config.min_seconds}",
            )
        for number, part in enumerate(self.shards.parts):
            pieces = (part.sizes[i : i + 65536] for i in range(0, len(part), 65536))  # the first one answers, as a rule
            if not any((piece >= shortest).any() for piece in pieces):
                longest, of = (
                    part.sizes[:].max(initial=0) / rate,
                    "" if len(self.shards.parts) == 1 else f" of {self.shards.folder_name(number)}",
                )
                faults.append(
                    f"data.audio.shards: the longest clip{of} has {longest:.2f} s, shorter than data.audio.min_seconds "
                    f"{config.min_seconds}; lower it, or join short clips of one speaker when packing (--join-seconds)"
                )
        return faults


def decode(source: AudioShards, row: int, start: int, out: NDArray[np.float32]) -> None:
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
    scale = 1.0 / np.sqrt(var + AUDIO_NORM_EPS)
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
