"""Which clips make which optimizer step: a pure function of (seed, epoch), independent of ranks and workers.

In: the length of every clip, a `BatchConfig` and a seed. Out: an endless sequence of global batches, each a
fixed number of micro-batches, which `for_rank` deals out to any number of ranks.

    rows --permute--> windows --cut_micro_batches--> micro-batches --shuffle--> stream --every num_micro--> steps

- A pseudo-random permutation of all rows is cut into windows of at most 65,536 rows. Inside a window the
  clips are sorted by length, cut greedily into micro-batches, and the micro-batches are shuffled.
- The micro-batches of all windows and epochs form one stream without gaps; a global batch is its next
  `num_micro` elements. Nothing is dropped: the last global batch of an epoch is completed from the
  beginning of the next one, and a dataset smaller than a global batch repeats inside it.
- A position is (epoch, window, micro-batch in the window). Opening one costs one window, however many rows
  the dataset has.

Order within a window: spec section 14. A dataset of one window has exactly the reference's order.
Differs from fairseq: a global batch is formed before it is split over ranks, and its size is stated in
seconds, so that neither the batches nor their order change with the number of ranks.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from d2v2ds.errors import CheckpointError, ShardError
from d2v2ds.masking import Stream, hash64, mix64

WINDOW_ROWS = 65_536
"""Most rows that are sorted by length together."""
_FEISTEL_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much audio one optimizer step and one forward pass see."""

    global_batch_seconds: float
    """Audio per optimizer step over all ranks (seconds, an upper limit; before the M masks multiply it)."""
    micro_batch_seconds: float
    """Audio per forward pass on one rank (seconds, an upper limit); decides the memory needed."""
    min_seconds: float = 2.0
    """Shorter clips are never drawn (seconds)."""
    max_seconds: float = 20.0
    """Longer clips are cropped to this, at a random offset (seconds)."""

    def check(self) -> None:
        """Refuse limits that contradict each other.

        Raises:
            ValueError: names both fields and their values.
        """
        if not 0.0 < self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"min_seconds {self.min_seconds} must be positive and at most max_seconds {self.max_seconds}"
            )
        if self.micro_batch_seconds < self.max_seconds:
            raise ValueError(
                f"micro_batch_seconds {self.micro_batch_seconds} cannot hold one clip of max_seconds "
                f"{self.max_seconds}; raise the first or lower the second"
            )
        if self.global_batch_seconds < self.micro_batch_seconds:
            raise ValueError(
                f"global_batch_seconds {self.global_batch_seconds} is less than micro_batch_seconds "
                f"{self.micro_batch_seconds}; lower the second"
            )

    @property
    def num_micro(self) -> int:
        """Micro-batches in one global batch."""
        return math.ceil(self.global_batch_seconds / self.micro_batch_seconds - 1e-9)

    def accumulation(self, world: int) -> int:
        """Micro-batches that each of `world` ranks runs per optimizer step, fillers included."""
        return math.ceil(self.num_micro / world)


@dataclass(frozen=True)
class MicroBatch:
    """The clips of one forward pass on one rank."""

    epoch: int
    """Decides crops and masks."""
    rows: NDArray[np.int64]
    """(B,) row numbers in the dataset."""
    num_samples: int
    """S, the length to which every clip is cropped: the shortest clip, at most the configured maximum."""
    weight: float = 1.0
    """0.0 for a filler, which keeps a rank busy but must not count in the loss."""


@dataclass(frozen=True)
class SamplerState:
    """A position in the stream: the next micro-batch to be seen."""

    epoch: int = 0
    window: int = 0
    micro: int = 0


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches of one optimizer step over all ranks."""

    micro: tuple[MicroBatch, ...]
    state_after: SamplerState
    """Where the stream stands once this batch is used; stored in the checkpoint of that step."""


@dataclass(frozen=True)
class EpochEstimate:
    """What one epoch amounts to; exact for a dataset of one window, else extrapolated from the first."""

    steps: float
    """Optimizer steps per epoch."""
    hours: float
    """Audio seen per epoch, after cropping (hours)."""
    seconds_per_step: float
    """Audio in one global batch (seconds), at most `global_batch_seconds` rounded up to whole micro-batches."""


class BatchPlan:
    """The sequence of global batches over one dataset."""

    def __init__(self, num_samples: NDArray[np.int64], *, sample_rate_hz: int, config: BatchConfig, seed: int) -> None:
        """
        Args:
            num_samples: (N,) clip lengths in samples; may be memory-mapped, only windows of it are read.
            sample_rate_hz: turns the seconds of `config` into samples.
            config: limits of batches and clips.
            seed: of the run.

        Raises:
            ValueError: the configuration contradicts itself.
            ShardError: the dataset has no rows.
        """
        config.check()
        if len(num_samples) == 0:
            raise ShardError("batch plan: expected at least one clip, the dataset has none; pack some audio first")
        self.config = config
        self.seed = seed
        self.sample_rate_hz = sample_rate_hz
        self.num_samples = np.asarray(num_samples)
        self.num_rows = len(num_samples)
        self.num_windows = math.ceil(self.num_rows / WINDOW_ROWS)
        self.min_samples = round(config.min_seconds * sample_rate_hz)
        self.max_samples = round(config.max_seconds * sample_rate_hz)
        self.micro_samples = round(config.micro_batch_seconds * sample_rate_hz)

    def iter_from(self, state: SamplerState) -> Iterator[GlobalBatch]:
        """All global batches from a position on, without end.

        Raises:
            ShardError: no clip of the dataset is long enough to be drawn.
        """
        micro: list[MicroBatch] = []
        for batch, after in self._stream(state):
            micro.append(batch)
            if len(micro) == self.config.num_micro:
                yield GlobalBatch(tuple(micro), after)
                micro = []

    def _stream(self, state: SamplerState) -> Iterator[tuple[MicroBatch, SamplerState]]:
        """Each micro-batch with the position of the next one."""
        empty_windows = 0
        while empty_windows < 2 * self.num_windows:  # an only clip may lie in the first window, then in the last
            batches = self.window(state.epoch, state.window)
            empty_windows = 0 if batches else empty_windows + 1
            following = self._next_window(state)
            for i in range(state.micro, len(batches)):
                last = i + 1 == len(batches)
                yield batches[i], following if last else replace(state, micro=i + 1)
            state = following
        raise ShardError(
            f"batch plan: no clip lasts {self.config.min_seconds} s; expected at least one among {self.num_rows} rows; "
            "lower min_seconds or join short clips when packing"
        )

    def _next_window(self, state: SamplerState) -> SamplerState:
        if state.window + 1 < self.num_windows:
            return SamplerState(state.epoch, state.window + 1, 0)
        return SamplerState(state.epoch + 1, 0, 0)

    def window(self, epoch: int, window: int) -> list[MicroBatch]:
        """The micro-batches of one window, in the order in which they are seen."""
        start, stop = (i * self.num_rows // self.num_windows for i in (window, window + 1))
        rows = permute(np.arange(start, stop), self.num_rows, hash64(self.seed, epoch, Stream.ORDER))
        batches = cut_micro_batches(
            rows,
            self._lengths(rows),
            min_samples=self.min_samples,
            max_samples=self.max_samples,
            micro_samples=self.micro_samples,
        )
        order = np.argsort(hash64(self.seed, epoch, Stream.SHUFFLE, window, np.arange(len(batches))))
        return [MicroBatch(epoch, *batches[i]) for i in order]

    def _lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Clip lengths of some rows, read in file order: twice as fast from a cold disk."""
        order = np.argsort(rows)
        lengths = np.empty(len(rows), dtype=np.int64)
        lengths[order] = self.num_samples[rows[order]]
        return lengths

    def count_short_rows(self) -> int:
        """Clips below `min_seconds`, which are never drawn. Reads all lengths, a piece at a time."""
        pieces = range(0, self.num_rows, 1 << 22)
        return sum(int(np.count_nonzero(self.num_samples[i : i + (1 << 22)] < self.min_samples)) for i in pieces)

    def estimate_epoch(self) -> EpochEstimate:
        """Steps and hours of one epoch, from its first window."""
        batches = self.window(0, 0)
        seconds = sum(len(b.rows) * b.num_samples for b in batches) / self.sample_rate_hz
        steps = len(batches) * self.num_windows / self.config.num_micro
        return EpochEstimate(
            steps=steps,
            hours=seconds * self.num_windows / 3600,
            seconds_per_step=seconds / len(batches) * self.config.num_micro if batches else 0.0,
        )

    def state_dict(self, state: SamplerState) -> dict[str, int]:
        """A position, with everything that gives it its meaning, as plain integers."""
        return asdict(state) | self._identity()

    def load_state_dict(self, stored: Mapping[str, int]) -> SamplerState:
        """The position stored by `state_dict`.

        Raises:
            CheckpointError: the stored position counts micro-batches of another dataset or another plan.
        """
        differing = [
            f"{name} was {stored.get(name)}, is {value}"
            for name, value in self._identity().items()
            if stored.get(name) != value
        ]
        if differing:
            raise CheckpointError(
                f"data position of the checkpoint does not fit this run: {'; '.join(differing)}; "
                "resume with the same shards and batch settings, or start a new run from the weights"
            )
        return SamplerState(epoch=stored["epoch"], window=stored["window"], micro=stored["micro"])

    def _identity(self) -> dict[str, int]:
        return {
            "num_rows": self.num_rows,
            "seed": self.seed,
            "min_samples": self.min_samples,
            "max_samples": self.max_samples,
            "micro_samples": self.micro_samples,
        }


def for_rank(batch: GlobalBatch, rank: int, world: int) -> list[MicroBatch]:
    """The micro-batches of one rank: every `world`-th, from its own number on.

    Where `world` does not divide their number, a rank without an own one at the end gets a filler of weight
    0 (its first micro-batch again), so that all ranks run the same number of forward passes.
    """
    own = list(batch.micro[rank::world])
    if len(own) < math.ceil(len(batch.micro) / world):
        own.append(replace(batch.micro[rank % len(batch.micro)], weight=0.0))
    return own


def cut_micro_batches(
    rows: NDArray[np.int64], num_samples: NDArray[np.int64], *, min_samples: int, max_samples: int, micro_samples: int
) -> list[tuple[NDArray[np.int64], int]]:
    """Group clips of similar length: sort by length, longest first, and cut greedily.

    Args:
        rows: (n,) row numbers in random order, which decides between clips of equal length.
        num_samples: (n,) their lengths.
        min_samples: shorter clips are left out.
        max_samples: longer clips count as this long.
        micro_samples: clips x longest clip of a group stays within this.

    Returns:
        Groups of (row numbers, length of the shortest clip), longest first.
    """
    usable = num_samples >= min_samples
    lengths = np.minimum(num_samples[usable], max_samples)
    order = np.argsort(-lengths, kind="stable")
    rows, lengths = rows[usable][order], lengths[order]
    groups = []
    start = 0
    while start < len(rows):
        stop = min(start + micro_samples // int(lengths[start]), len(rows))
        groups.append((rows[start:stop], int(lengths[stop - 1])))
        start = stop
    return groups


def permute(positions: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of 0..size-1 sends given positions, in O(1) each.

    A Feistel network permutes the smallest square power of two that holds `size`; a value outside the range
    is sent through it again until it falls inside, which keeps the whole a permutation (cycle walking).

    Args:
        positions: (n,) integers below `size`.
        size: length of the permuted sequence.
        key: (1,) chooses the permutation.

    Returns:
        (n,) int64 below `size`.
    """
    half_bits = max(2, math.ceil((size - 1).bit_length() / 2))
    half, low, high = np.uint64(half_bits), np.uint64((1 << half_bits) - 1), np.uint64(64 - half_bits)
    round_keys = hash64(key, np.arange(_FEISTEL_ROUNDS))

    def network(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> half, values & low
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) >> high)
        return (left << half) | right

    values = network(positions.astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = network(values[outside])
    return values.astype(np.int64)
