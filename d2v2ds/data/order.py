"""Rows of every optimizer step: a pure function of (seed, epoch), independent of ranks and workers.

In: the size of every row of one or several datasets, a `PlanConfig` and a seed. Out: an endless sequence of global
batches, each a fixed number of micro-batches, which `for_rank` divides among any number of ranks. A size is in audio
samples, pixels along the side of an image, or text tokens.

    rows --permute--> windows --cut_micro_batches--> micro-batches --shuffle--> stream --every num_micro--> steps

- A pseudo-random permutation of the rows of an epoch (see `mixture.py`) is cut into windows of at most 65,536 rows.
  Inside a window the rows are sorted by size, cut greedily into micro-batches, and those are shuffled.
- The micro-batches of all windows and epochs form one stream without gaps; a global batch is its next
  `num_micro` elements. Nothing is dropped: the last global batch of an epoch is completed from the
  beginning of the next one, and a dataset smaller than a global batch repeats inside it.
- A position is (epoch, window, micro-batch in the window). Opening one computes one window, for any number of rows.

Order within a window: as in the official fairseq/data/data_utils.py.
Differs from the official code: a global batch is formed before it is split over ranks, and its size is set as a whole,
so that neither the batches nor their order change with the number of ranks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v2ds.data.mixture import Dataset, Mixture
from d2v2ds.data.permutation import permute
from d2v2ds.errors import CheckpointError, ShardError
from d2v2ds.rng import Stream, hash64

WINDOW_ROWS = 65_536
"""Most rows that are sorted by size together."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Settings of grouping rows, made from a modality's settings in seconds, images or tokens."""

    micro_size: int
    """Upper bound of rows x largest size of one micro-batch; sets the memory needed."""
    num_micro: int
    """Micro-batches in one global batch."""
    min_size: int
    """Smallest size of a row; smaller ones are never drawn."""
    max_size: int
    """Largest size of a row; larger ones count as this large."""
    crops: bool
    """True: the rows of a micro-batch are cropped to its smallest. False: they are padded to its largest."""
    whole: bool = False
    """True: rows above `max_size` are never drawn."""
    micro_rows: int | None = None
    """Most rows of one micro-batch, whatever their size; None: `micro_size` alone decides."""

    def room(self, size: int) -> int:
        """Return the most rows of a micro-batch whose largest row has this size."""
        rows = self.micro_size // size
        return rows if self.micro_rows is None else min(rows, self.micro_rows)

    def usable(self, sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Find the rows that are drawn: (n,) sizes -> (n,) bool."""
        enough = sizes >= self.min_size
        return enough & (sizes <= self.max_size) if self.whole else enough

    def accumulation(self, world: int) -> int:
        """Return the micro-batches that each of `world` ranks runs in an optimizer step, fillers included."""
        return math.ceil(self.num_micro / world)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass on one rank."""

    epoch: int
    """Epoch, on which crops, augmentation and masks depend."""
    rows: NDArray[np.int64]
    """(B,) row numbers in the dataset."""
    size: int
    """S, the size to which every row is brought: the smallest row's when cropping, the largest row's when padding; at
    most `PlanConfig.max_size`."""
    weight: float = 1.0
    """0.0 for a filler, which a rank runs but does not count in the loss."""


@dataclass(frozen=True)
class SamplerState:
    """Position in the stream: the next micro-batch."""

    epoch: int = 0
    window: int = 0
    micro: int = 0


@dataclass(frozen=True)
class GlobalBatch:
    """Micro-batches of one optimizer step over all ranks."""

    micro: tuple[MicroBatch, ...]
    state_after: SamplerState
    """Position after this batch; the checkpoint of its step stores it."""


@dataclass(frozen=True)
class EpochEstimate:
    """Amount of one epoch; exact for a dataset of one window, else extrapolated from the first."""

    steps: float
    """Optimizer steps per epoch."""
    size: float
    """Sum of the sizes in an epoch, after cropping or padding."""
    size_per_step: float
    """Sum of the sizes in one global batch, on average."""


class BatchPlan:
    """Sequence of global batches over one dataset, or over a mixture of several."""

    def __init__(self, data: NDArray[np.int64] | Sequence[Dataset], *, config: PlanConfig, seed: int) -> None:
        """
        Args:
            data: datasets, or (N,) sizes of the rows of a single one; may be memory-mapped, is read in windows.
            config: limits of batches and rows.
            seed: of the run.

        Raises:
            ShardError: a dataset has no rows.
        """
        self.config = config
        self.seed = seed
        self.mixture = Mixture([Dataset(sizes=data)] if isinstance(data, np.ndarray) else data, seed)

    def num_windows(self, epoch: int) -> int:
        """Return the number of windows of an epoch."""
        return math.ceil(self.mixture.num_rows(epoch) / WINDOW_ROWS)

    def iter_from(self, state: SamplerState) -> Iterator[GlobalBatch]:
        """Yield all global batches from a position on, without end.

        Raises:
            ShardError: no row of the dataset is large enough to be drawn.
        """
        micro: list[MicroBatch] = []
        for batch, after in self._stream(state):
            micro.append(batch)
            if len(micro) == self.config.num_micro:
                yield GlobalBatch(tuple(micro), after)
                micro = []

    def _stream(self, state: SamplerState) -> Iterator[tuple[MicroBatch, SamplerState]]:
        """Yield each micro-batch with the position of the next one."""
        empty_windows = 0
        # A single usable row may lie in the first window of one epoch and in the last window of the next.
        while empty_windows < 2 * self.num_windows(state.epoch):
            batches = self.window(state.epoch, state.window)
            empty_windows = 0 if batches else empty_windows + 1
            following = self._next_window(state)
            for i in range(state.micro, len(batches)):
                last = i + 1 == len(batches)
                yield batches[i], following if last else replace(state, micro=i + 1)
            state = following
        raise ShardError(
            f"batch plan: expected a row of size {self.config.min_size} or more, found none among "
            f"{self.mixture.num_rows(state.epoch)} rows"
        )

    def _next_window(self, state: SamplerState) -> SamplerState:
        if state.window + 1 < self.num_windows(state.epoch):
            return SamplerState(state.epoch, state.window + 1, 0)
        return SamplerState(state.epoch + 1, 0, 0)

    def window(self, epoch: int, window: int) -> list[MicroBatch]:
        """Return the micro-batches of one window, in order."""
        num_rows, num_windows = self.mixture.num_rows(epoch), self.num_windows(epoch)
        start, stop = (i * num_rows // num_windows for i in (window, window + 1))
        positions = permute(np.arange(start, stop), num_rows, hash64(self.seed, epoch, Stream.ORDER))
        rows = self.mixture.rows(epoch, positions)
        batches = cut_micro_batches(rows, self.mixture.sizes(rows), self.config)
        order = np.argsort(hash64(self.seed, epoch, Stream.SHUFFLE, window, np.arange(len(batches))))
        return [MicroBatch(epoch, *batches[i]) for i in order]

    def estimate_epoch(self) -> EpochEstimate:
        """Estimate steps and amount of one epoch from its first window."""
        batches = self.window(0, 0)
        size = float(sum(len(b.rows) * b.size for b in batches))
        num_windows = self.num_windows(0)
        steps = len(batches) * num_windows / self.config.num_micro
        return EpochEstimate(
            steps=steps,
            size=size * num_windows,
            size_per_step=size / len(batches) * self.config.num_micro if batches else 0.0,
        )

    def state_dict(self, state: SamplerState) -> dict[str, Any]:
        """Return a position and the datasets and settings it refers to, as plain values."""
        return asdict(state) | self._settings() | self.mixture.state_dict()

    def load_state_dict(self, stored: Mapping[str, Any], allow_grown: bool = False) -> SamplerState:
        """Return the position stored by `state_dict`.

        Args:
            stored: from `state_dict`.
            allow_grown: accept datasets with more rows; the current epoch ends without them.

        Raises:
            CheckpointError: the position refers to other datasets or settings.
        """
        differing = [
            f"{name} was {stored.get(name)}, is {value}"
            for name, value in self._settings().items()
            if stored.get(name) != value
        ]
        if differing:
            raise CheckpointError(
                f"data position of the checkpoint does not fit this run: {'; '.join(differing)}; "
                "resume with the same shards and batch settings, or start a new run from the weights"
            )
        state = SamplerState(epoch=stored["epoch"], window=stored["window"], micro=stored["micro"])
        has_begun = (state.window, state.micro) != (0, 0)
        self.mixture.load_state_dict(stored, next_epoch=state.epoch + has_begun, allow_grown=allow_grown)
        return state

    def _settings(self) -> dict[str, int | None]:
        return {
            "seed": self.seed,
            "min_size": self.config.min_size,
            "max_size": self.config.max_size,
            "micro_size": self.config.micro_size,
            "micro_rows": self.config.micro_rows,
        }


def for_rank(batch: GlobalBatch, rank: int, world: int) -> list[MicroBatch]:
    """Return the micro-batches of one rank: every `world`-th, beginning at `rank`.

    If `world` does not divide their number, ranks with fewer get a filler of weight 0 (their first micro-batch again),
    so that all ranks run the same number of forward passes.
    """
    own = list(batch.micro[rank::world])
    if len(own) < math.ceil(len(batch.micro) / world):
        own.append(replace(batch.micro[rank % len(batch.micro)], weight=0.0))
    return own


def cut_micro_batches(
    rows: NDArray[np.int64], sizes: NDArray[np.int64], config: PlanConfig
) -> list[tuple[NDArray[np.int64], int]]:
    """Group rows of similar size: sort by size, largest first, and cut greedily.

    Args:
        rows: (n,) row numbers in random order, which rows of equal size keep.
        sizes: (n,) their sizes.
        config: limits; rows below `min_size` are skipped.

    Returns:
        Groups of (row numbers, size of every row in the batch), largest first.
    """
    usable = config.usable(sizes)
    counted = np.minimum(sizes[usable], config.max_size)
    order = np.argsort(-counted, kind="stable")
    rows, counted = rows[usable][order], counted[order]
    groups = []
    start = 0
    while start < len(rows):
        stop = min(start + config.room(int(counted[start])), len(rows))
        groups.append((rows[start:stop], int(counted[stop - 1 if config.crops else start])))
        start = stop
    return groups
