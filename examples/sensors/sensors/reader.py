"""Settings of the data, and rows of shards -> normalised crops (B, C, S).

In: samples of a row, and mean and variance of its whole recording, which the packer stored beside them. Out: float32
with zero mean and unit variance in each channel *over the whole recording*, of which a crop is returned. So a quiet
hour of a night stays quiet beside a loud one.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2v2ds.bounds import Positive
from d2v2ds.data.folders import sizes_of
from d2v2ds.data.order import MicroBatch, PlanConfig
from d2v2ds.data.reader import DataSettings, Examples, Reader, Unit, mask_faults
from d2v2ds.modalities.audio.reader import crop_starts
from sensors.network import SensorNetwork
from sensors.recordings import normalised
from sensors.shards import SensorShards


@dataclass(frozen=True, kw_only=True)
class SensorDataConfig(DataSettings):
    """Settings of the section `data.sensors`; a `DataSettings` of d2v2ds."""

    modality = "sensors"
    unit = "seconds"

    global_batch_seconds: Positive
    """Recording time per optimizer step over all ranks, whatever the number of channels (seconds, an upper limit); a
    multiple of the next."""
    micro_batch_seconds: Positive
    """Recording time per forward pass on one rank (seconds, an upper limit); decides the memory needed."""
    min_seconds: Positive = 2.0
    """Shorter rows are never drawn (seconds)."""
    max_seconds: Positive = 10.0
    """Longer rows are cropped to this, at a random offset (seconds)."""

    @property
    def largest_row(self) -> float:
        """Longest crop (seconds)."""
        return self.max_seconds

    def largest_samples(self, network: Any) -> tuple[float, int]:
        """Crops of the greatest length in one optimizer step, and that length in samples."""
        return self.global_batch / self.max_seconds, round(self.max_seconds * network.sample_rate_hz)

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        faults = super().check()
        if self.min_seconds > self.max_seconds:
            limits = f"min_seconds {self.min_seconds} must be at most max_seconds {self.max_seconds}"
            faults.append(f"data.sensors.{limits}")
        return faults


SECONDS = Unit(
    name="seconds",
    label="seconds of recordings",
    total_metric="data/sensor_hours",
    total_size=3600.0,
    total_help="recording time seen since the run began; sum over ranks, hours, not multiplied by channels or masks",
    speed_metric="perf/sensor_seconds_per_s",
    speed_help="recording time per second of wall time; sum over ranks",
    larger=((3600, "hours of recordings"), (60, "minutes of recordings")),
)


class SensorReader(Reader[SensorShards]):
    """Packed folders of recordings as crops of equal length."""

    modality = "sensors"
    unit = SECONDS

    config: SensorDataConfig
    network: SensorNetwork

    def plan_config(self) -> PlanConfig:
        """Limits in samples."""
        config = self.config
        return PlanConfig(
            micro_size=self._samples(config.micro_batch_seconds),
            num_micro=config.num_micro,
            min_size=self._samples(config.min_seconds),
            max_size=self._samples(config.max_seconds),
            crops=True,
        )

    def _samples(self, seconds: float) -> int:
        return round(seconds * self.network.sample_rate_hz)

    def units(self, num_rows: int, size: int) -> float:
        """Seconds."""
        return num_rows * size / self.network.sample_rate_hz

    def read(self, micro: MicroBatch, seed: int) -> Examples:
        """Crops (B, C, S) float32, each at an offset of its own: a function of (seed, epoch, row)."""
        lengths = sizes_of(self.datasets, micro.rows)  # (B,)
        starts = crop_starts(lengths, micro.size, seed=seed, epoch=micro.epoch, rows=micro.rows)
        pairs = zip(micro.rows.tolist(), starts.tolist(), strict=True)
        return Examples(torch.stack([self._read(row, start, start + micro.size) for row, start in pairs]))

    def read_whole(self, row: int) -> Tensor:
        """(C, S) float32, the whole row."""
        return self._read(row, 0, None)

    def _read(self, row: int, start: int, stop: int | None) -> Tensor:
        shards, local = self.shards.locate(row)
        piece = shards.read(local, start, stop)
        return torch.from_numpy(normalised(piece.samples, piece.mean, piece.variance))

    def misfits(self) -> list[str]:
        """Return one message for each reason why the network cannot read these shards."""
        first, network, faults = self.shards.first, self.network, []
        if first.sample_rate_hz != network.sample_rate_hz:
            faults.append(
                f"data.sensors.shards: sample_rate_hz is {first.sample_rate_hz:g}, model.modalities.sensors."
                f"sample_rate_hz is {network.sample_rate_hz:g}; change the setting, or repack with --resample"
            )
        if len(first.channels) != network.num_channels:
            faults.append(
                f"data.sensors.shards: {len(first.channels)} channels ({', '.join(first.channels)}), model.modalities."
                f"sensors.num_channels is {network.num_channels}; change the setting, or repack with --channels"
            )
        return faults

    def faults(self) -> list[str]:
        """Return one message for each way in which shards, settings and network do not fit each other."""
        config, faults = self.config, self.misfits()
        shortest = self._samples(config.min_seconds)
        tokens = self.network.num_tokens(shortest)
        if self.mask is not None and not self.mask.is_for_sequences:
            faults.append(
                f"objective.modalities.sensors.mask.kind is {self.mask.kind!r}, expected 'block_1d' or 'random'"
            )
        elif tokens < 2:
            needed = bisect_left(range(1 << 30), 2, key=self.network.num_tokens)
            faults.append(
                f"data.sensors.min_seconds {config.min_seconds}: {shortest} samples make {tokens} tokens, expected 2 "
                f"or more; the front end needs {needed} samples for that"
            )
        else:
            faults += mask_faults(self.mask, tokens, f"sensors mask, for min_seconds {config.min_seconds}")
        for number, part in enumerate(self.shards.parts):
            if (longest := int(part.sizes.max(initial=0))) < shortest:
                faults.append(
                    f"{self.shards.folder_name(number)}: the longest row has {self.units(1, longest):.2f} s, shorter "
                    f"than data.sensors.min_seconds {config.min_seconds}; lower it"
                )
        return faults
