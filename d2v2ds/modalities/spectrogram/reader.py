"""Spectrograms: their settings of data, and rows of an audio shard -> features of a fixed number of frames.

In: packed recordings (`preprocessing.pack_audio`), at 16 kHz. Out: float32 (B, F, S), F mel bins of S frames, computed
here, in the data workers. There is no padding mask in pretraining: what is added behind a short recording is an input
like any other, as published.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.bounds import Count, Positive
from d2v2ds.data.folders import sizes_of
from d2v2ds.data.mixture import Dataset
from d2v2ds.data.order import MicroBatch, PlanConfig
from d2v2ds.data.reader import DataSettings, Examples, Reader, Unit, mask_faults
from d2v2ds.modalities.audio.shards import SAMPLE_SCALE, AudioShards
from d2v2ds.modalities.spectrogram.features import HOP, SAMPLE_RATE_HZ, FbankFeatures, Features
from d2v2ds.modalities.spectrogram.network import SpectrogramNetwork
from d2v2ds.rng import Stream, hash64, to_unit_interval


@dataclass(frozen=True, kw_only=True)
class SpectrogramDataConfig(DataSettings):
    """Settings for reading recordings as spectrograms: folders, batch sizes and features."""

    modality = "spectrogram"
    unit = "clips"

    global_batch_clips: Count
    """Clips per optimizer step over all ranks (count; before the M masks multiply it)."""
    micro_batch_clips: Count
    """Clips per forward pass on one rank (count); decides the memory needed."""
    features: Features = FbankFeatures()
    """Features and their normalisation."""
    crop: Literal["first", "random"] = "first"
    """Part of a recording that is longer than the network's `target_length`: its beginning, as published, or one at a
    random place."""
    shift: bool = False
    """Rotate the samples of a clip by a random number, its end in front of its beginning, as in BAT."""
    min_seconds: Positive = 0.625
    """Shorter recordings are never drawn (seconds); 10,000 samples in the manifests of EAT."""

    def largest_samples(self, network: Any) -> tuple[float, int]:
        """Clips of one optimizer step, and their frames."""
        return self.global_batch, network.target_length


CLIPS = Unit(
    name="clips",
    label="clips",
    total_metric="data/clips",
    total_help="clips seen since the run began; sum over ranks, not multiplied by masks",
    speed_metric="perf/clips_per_s",
    speed_help="clips per second of wall time; sum over ranks",
)


class SpectrogramReader(Reader[AudioShards]):
    """Packed folders of recordings as spectrograms of one length; whole ones where nothing is masked or learned."""

    modality = "spectrogram"
    unit = CLIPS
    can_be_whole = True

    config: SpectrogramDataConfig
    network: SpectrogramNetwork

    @property
    def is_for_evaluation(self) -> bool:
        """True if recordings keep their length: nothing is masked, and no task asks for batches."""
        return self.mask is None and self.labelled is None

    @property
    def datasets(self) -> list[Dataset]:
        """The folders; sizes are frames: the network's `target_length`, 0 for recordings that are too short."""
        return self._whole if self.is_for_evaluation else self._of_one_length

    @cached_property
    def _of_one_length(self) -> list[Dataset]:
        length = np.int64(self.network.target_length)

        def sizes(part: AudioShards) -> NDArray[np.int64]:
            usable = np.asarray(part.sizes) >= self._shortest
            return np.broadcast_to(length, (len(part),)) if usable.all() else np.where(usable, length, np.int64(0))

        return self.shards.datasets(self.config.weights, sizes)

    @cached_property
    def _whole(self) -> list[Dataset]:
        patch, count = self.network.patch_size, self.config.features.num_frames

        def sizes(part: AudioShards) -> NDArray[np.int64]:
            frames = np.array([count(size) for size in part.sizes[:].tolist()], dtype=np.int64)
            return np.maximum(1, -(-frames // patch)) * patch

        return self.shards.datasets(self.config.weights, sizes)

    @property
    def _shortest(self) -> int:
        """Samples of the shortest recording that is drawn."""
        return max(round(self.config.min_seconds * SAMPLE_RATE_HZ), self.config.features.num_samples(1))

    def plan_config(self) -> PlanConfig:
        """Limits in frames."""
        config, length = self.config, self.network.target_length
        return PlanConfig(
            micro_size=config.micro_batch_clips * length,
            num_micro=config.num_micro,
            min_size=length,
            max_size=length,
            crops=False,
        )

    def units(self, num_rows: int, size: int) -> float:
        """Clips."""
        return float(num_rows)

    @cached_property
    def _samples(self) -> list[Dataset]:
        """The folders with the samples of each recording."""
        return self.shards.datasets(self.config.weights)

    def read(self, micro: MicroBatch, seed: int) -> Examples:
        """Features (B, F, S) float32, S = `micro.size` frames."""
        wanted = self.config.features.num_samples(micro.size)
        lengths = sizes_of(self._samples, micro.rows)  # (B,)
        starts = np.zeros(len(lengths), dtype=np.int64)
        if self.config.crop == "random" and self.augments:
            chance = to_unit_interval(hash64(seed, micro.epoch, Stream.CROP, micro.rows))  # (B,)
            starts = (chance * (np.maximum(lengths - wanted, 0) + 1)).astype(np.int64)
        turns = to_unit_interval(hash64(seed, micro.epoch, Stream.AUGMENT, micro.rows))  # (B,)
        source = torch.full((len(lengths), self.network.mel_bins, micro.size), self.config.features.fill)
        for out, row, start, turn in zip(source, micro.rows.tolist(), starts.tolist(), turns.tolist(), strict=True):
            found = self._features(row, start, start + wanted, turn if self.config.shift and self.augments else 0.0)
            out[:, : found.shape[1]] = found[:, : micro.size]
        return Examples(source)

    def _features(self, row: int, start: int, stop: int | None, turn: float) -> Tensor:
        """Read samples `start` to `stop` of a row, turned by a share of their number, as (F, frames).

        Raises:
            ShardError: the row cannot be read.
        """
        shards, local = self.shards.locate(row)
        length = int(shards.sizes[local])
        samples = shards.read_audio(local, start, length if stop is None else min(stop, length))
        waveform = torch.from_numpy(samples.astype(np.float32) / SAMPLE_SCALE)
        if turn:
            waveform = waveform.roll(int(turn * len(waveform)))
        return self.config.features.compute(waveform, shards.read_stats(local)[0], self.network.mel_bins)

    def read_whole(self, row: int) -> Tensor:
        """(F, S) float32, the whole recording up to a whole number of patches."""
        shards, local = self.shards.locate(row)
        if self.config.features.num_frames(int(shards.sizes[local])):
            found = self._features(row, 0, None, 0.0)
        else:
            found = torch.empty(self.network.mel_bins, 0)
        return padded(found, self.network, self.config.features)

    def misfits(self) -> list[str]:
        """Return a message if features cannot be computed at the rate of these shards."""
        found = self.shards.first.sample_rate_hz
        if found == SAMPLE_RATE_HZ:
            return []
        return [
            f"data.spectrogram.shards: sample_rate_hz is {found}, spectrograms are computed at {SAMPLE_RATE_HZ}; "
            "repack with --resample"
        ]

    def faults(self) -> list[str]:
        """Return one message for each way in which shards, settings and network do not fit."""
        faults, network = self.misfits(), self.network
        where = "objective.modalities.spectrogram.mask"
        if self.mask is not None and not self.mask.is_for_grids:
            faults.append(
                f"{where}.kind is {self.mask.kind!r}, spectrograms need 'block_2d', 'random' or, on a square grid, "
                "'grid_blocks'"
            )
        else:
            tokens = network.num_tokens(network.target_length)
            faults += mask_faults(self.mask, tokens, f"{where}, for {network.target_length} frames")
        for number, part in enumerate(self.shards.parts):
            if not (np.asarray(part.sizes) >= self._shortest).any():
                of = "" if len(self.shards.parts) == 1 else f" of {self.shards.folder_name(number)}"
                longest = part.sizes[:].max(initial=0) / SAMPLE_RATE_HZ
                faults.append(
                    f"data.spectrogram.shards: the longest clip{of} has {longest:.2f} s, expected "
                    f"{self._shortest / SAMPLE_RATE_HZ:.3f} s or more (data.spectrogram.min_seconds); lower it"
                )
        return faults

    def remarks(self) -> list[str]:
        """Report recordings that are never drawn, and how much of the others is cut off or added."""
        short = cut = added = kept = 0
        wanted = self.config.features.num_samples(self.network.target_length)
        for part in self.shards.parts:
            sizes = np.asarray(part.sizes)
            usable = sizes[sizes >= self._shortest]
            short += len(sizes) - len(usable)
            cut += int(np.maximum(usable - wanted - HOP, 0).sum())
            added += int(np.maximum(wanted - usable, 0).sum())
            kept += len(usable) * wanted
        remarks = []
        if short:
            remarks.append(
                f"data.spectrogram: {short} of {len(self)} recordings are never drawn: shorter than min_seconds "
                f"{self.config.min_seconds:g}"
            )
        if added > kept / 2:
            remarks.append(
                f"data.spectrogram: {added / kept:.0%} of all frames are padding, which is masked and predicted like "
                "sound; lower model.modalities.spectrogram.target_length, or join clips when packing (--join-seconds)"
            )
        if cut > kept / 2:
            remarks.append(
                f"data.spectrogram: {cut / SAMPLE_RATE_HZ / 3600:.2f} hours lie behind target_length "
                f"{self.network.target_length}; they are {'never seen' if self.config.crop == 'first' else 'cropped'}"
            )
        return remarks


def padded(features: Tensor, network: SpectrogramNetwork, settings: Features) -> Tensor:
    """Pad (F, S) at the end to whole patches, at least one."""
    frames = max(1, -(-features.shape[1] // network.patch_size)) * network.patch_size
    return torch.nn.functional.pad(features, (0, frames - features.shape[1]), value=settings.fill)
