"""Speech: its settings of data, and one row of an audio shard -> one normalised crop.

In: int16 samples in the shard and the mean and variance of the whole recording that the packer stored beside
them. Out: float32 with zero mean and unit variance *over the whole recording*, of which a crop is returned.

The reference normalises the recording before it crops (spec section 14); the stored statistics give the same
numbers while only the crop is read and decoded.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from d2v2ds.data.collate import Examples, ModelInput, batch_faults, mask_faults
from d2v2ds.data.joined import Folders, datasets_of, folder_faults, only_sizes, parts_of, sizes_of
from d2v2ds.data.mixture import Dataset
from d2v2ds.data.order import MicroBatch, PlanConfig
from d2v2ds.data.schema import SAMPLE_SCALE
from d2v2ds.errors import below
from d2v2ds.masking import MaskConfig, Stream, hash64, to_unit_interval
from d2v2ds.shapes import AUDIO_NORM_EPS


@dataclass(frozen=True, kw_only=True)
class AudioDataConfig:
    """Which recordings, how much of them at a time, and how they are masked."""

    shards: Folders
    """Folder written by `preprocessing.pack_audio`, or several of them."""
    mask: MaskConfig
    """Masks over the tokens of a clip."""
    weights: tuple[float, ...] | None = None
    """How often the rows of each of several folders are seen, relative to those of the others; None: all alike."""
    loss_weight: float = 1.0
    """Of the speech loss in a joint run; each modality's loss is a mean over its masked tokens."""
    sample_rate_hz: int = 16000
    """Rate the model is built for; shards of another rate are refused."""
    global_batch_seconds: float
    """Audio per optimizer step over all ranks (seconds, an upper limit; before the M masks multiply it); a
    multiple of the next."""
    micro_batch_seconds: float
    """Audio per forward pass on one rank (seconds, an upper limit); decides the memory needed."""
    min_seconds: float = 2.0
    """Shorter clips are never drawn (seconds)."""
    max_seconds: float = 20.0
    """Longer clips are cropped to this, at a random offset (seconds)."""

    @property
    def num_micro(self) -> int:
        """Micro-batches of one optimizer step, over all ranks."""
        return round(self.global_batch_seconds / self.micro_batch_seconds)

    def check(self) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        where = "data.audio."
        faults = below(self, where, sample_rate_hz=1, loss_weight=0)
        if not 0.0 < self.min_seconds <= self.max_seconds:
            faults.append(
                f"{where}min_seconds {self.min_seconds} must be positive and at most max_seconds {self.max_seconds}"
            )
        amounts = (self.global_batch_seconds, self.micro_batch_seconds, self.max_seconds)
        faults += folder_faults(where, self.shards, self.weights)
        return faults + batch_faults(where, "seconds", *amounts)


class AudioSource(Protocol):
    """What decoding needs of a dataset; `AudioShards` has it."""

    @property
    def sample_rate_hz(self) -> int:
        """Samples per second of every row."""

    def __len__(self) -> int:
        """N."""

    def read_audio(self, index: int, start: int = 0, stop: int | None = None) -> NDArray[np.int16]:
        """Samples `start` to `stop` (exclusive) of a row."""

    def read_stats(self, index: int) -> tuple[float, float]:
        """Mean and biased variance of a whole row, in units of full scale."""


class AudioReader:
    """A packed folder of recordings as clips of equal length; a `Reader` of `d2v2ds.data.collate`."""

    modality = "audio"
    unit = "seconds"

    def __init__(self, shards: AudioSource, config: AudioDataConfig, model: ModelInput) -> None:
        self.shards, self.config, self.model = shards, config, model
        self.mask = config.mask

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def datasets(self) -> list[Dataset]:
        """The folders, with lengths in samples."""
        return datasets_of(self.shards, self.config.weights)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) lengths in samples of the only folder."""
        return only_sizes(self.datasets)

    def plan_config(self) -> PlanConfig:
        """Limits in samples."""
        config, rate = self.config, self.config.sample_rate_hz
        return PlanConfig(
            micro_size=round(config.micro_batch_seconds * rate),
            num_micro=config.num_micro,
            min_size=round(config.min_seconds * rate),
            max_size=round(config.max_seconds * rate),
            crops=True,
        )

    def units(self, num_rows: int, size: int) -> float:
        """Seconds."""
        return num_rows * size / self.config.sample_rate_hz

    def read(self, micro: MicroBatch, seed: int) -> Examples:
        """Waveforms (B, S) float32, each at an offset of its own."""
        lengths = sizes_of(self.datasets, micro.rows)  # (B,)
        starts = crop_starts(lengths, micro.size, seed=seed, epoch=micro.epoch, rows=micro.rows)
        waveforms = torch.empty(len(micro.rows), micro.size)  # (B, S)
        for row, start, out in zip(micro.rows.tolist(), starts.tolist(), waveforms.numpy(), strict=True):
            decode(self.shards, row, start, out)
        return Examples(waveforms)

    def read_whole(self, row: int) -> Tensor:
        """(S,) float32, the whole recording."""
        waveform = torch.empty(int(sizes_of(self.datasets, np.array([row]))[0]))
        decode(self.shards, row, 0, waveform.numpy())
        return waveform

    def misfits(self) -> list[str]:
        """Why the model cannot read these shards, as sentences."""
        found, wanted = self.shards.sample_rate_hz, self.config.sample_rate_hz
        if found == wanted:
            return []
        return [
            f"data.audio.shards: sample_rate_hz is {found}, data.audio.sample_rate_hz is {wanted}; "
            "repack with --resample"
        ]

    def remarks(self) -> list[str]:
        """Nothing that fits is worth a word."""
        return []

    def faults(self) -> list[str]:
        """Why shards, settings and model do not fit, as sentences."""
        config, rate, faults = self.config, self.config.sample_rate_hz, self.misfits()
        if config.mask.kind == "block_2d":
            faults.append("data.audio.mask.kind is 'block_2d', speech needs 'block_1d' or 'random'")
        shortest = round(config.min_seconds * rate)
        tokens = self.model.num_tokens(shortest)
        if tokens < 2:
            needed = bisect_left(range(1 << 30), 2, key=self.model.num_tokens)
            faults.append(
                f"data.audio.min_seconds {config.min_seconds}: {shortest} samples make {tokens} tokens, expected 2 or "
                f"more; the front end needs {needed} samples for that"
            )
        elif config.mask.kind != "block_2d":
            faults += mask_faults(
                config.mask, tokens, f"data.audio.mask, for clips of data.audio.min_seconds {config.min_seconds}"
            )
        for part in parts_of(self.shards):
            pieces = (part.sizes[i : i + 65536] for i in range(0, len(part), 65536))  # the first one answers, as a rule
            if not any((piece >= shortest).any() for piece in pieces):
                longest, of = part.sizes[:].max(initial=0) / rate, "" if part is self.shards else f" of {part.folder}"
                faults.append(
                    f"data.audio.shards: the longest clip{of} has {longest:.2f} s, shorter than data.audio.min_seconds "
                    f"{config.min_seconds}; lower it, or join short clips of one speaker when packing (--join-seconds)"
                )
        return faults


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
