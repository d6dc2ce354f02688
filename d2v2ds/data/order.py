"""Which rows make which optimizer step: a pure function of (seed, epoch), independent of ranks and workers.

In: the size of every row of one or several datasets, a `PlanConfig` and a seed. Out: an endless sequence of global
batches, each a fixed number of micro-batches, which `for_rank` deals out to any number of ranks. A size counts what the
modality counts: audio samples, pixels along the side of an image, text tokens.

    rows --permute--> windows --cut_micro_batches--> micro-batches --shuffle--> stream --every num_micro--> steps

- A pseudo-random permutation of the rows of an epoch (`mixture.py` says which) is cut into windows of at most 65,536
  rows. Inside a window the rows are sorted by size, cut greedily into micro-batches, and those are shuffled.
- The micro-batches of all windows and epochs form one stream without gaps; a global batch is its next
  `num_micro` elements. Nothing is dropped: the last global batch of an epoch is completed from the
  beginning of the next one, and a dataset smaller than a global batch repeats inside it.
- A position is (epoch, window, micro-batch in the window). Opening one costs one window, however many rows
  the dataset has.

Order within a window: spec section 14. A dataset of one window has exactly the reference's order.
Differs from fairseq: a global batch is formed before it is split over ranks, and its size is stated as a whole, so
that neither the batches nor their order change with the number of ranks.
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
"""Most rows that are sorted by length together."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How rows are grouped; made from the settings of a modality, which state it in seconds, images or tokens."""

    micro_size: int
    """Rows x largest size of one micro-batch stays within this; decides the memory needed."""
    num_micro: int
    """Micro-batches in one global batch."""
    min_size: int
    """Smaller rows are never drawn."""
    max_size: int
    """Larger rows count as this large."""
    crops: bool
    """True: the rows of a micro-batch are cropped to its smallest. False: they are padded to its largest."""

    def accumulation(self, world: int) -> int:
        """Micro-batches that each of `world` ranks runs per optimizer step, fillers included."""
        return math.ceil(self.num_micro / world)


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass on one rank."""

    epoch: int
    """Decides crops, augmentation and masks."""
    rows: NDArray[np.int64]
    """(B,) row numbers in the dataset."""
    size: int
    """S, the size that every row is brought to: of the smallest row if the plan crops, else of the largest, and at
    most the configured maximum."""
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
    size: float
    """Sum of the sizes seen per epoch, after cropping or padding."""
    size_per_step: float
    """The same of one global batch."""


class BatchPlan:
    """The sequence of global batches over one dataset, or over a mixture of several."""

    def __init__(self, data: NDArray[np.int64] | Sequence[Dataset], *, config: PlanConfig, seed: int) -> None:
        """
        Args:
            data: the datasets, or (N,) the sizes of the rows of the only one; may be memory-mapped, only windows of
                them are read.
            config: limits of batches and rows.
            seed: of the run.

        Raises:
            ShardError: a dataset has no rows.
        """
        self.config = config
        self.seed = seed
        self.mixture = Mixture([Dataset(sizes=data)] if isinstance(data, np.ndarray) else data, seed)

    def num_windows(self, epoch: int) -> int:
        """Windows that an epoch is cut into."""
        return math.ceil(self.mixture.num_rows(epoch) / WINDOW_ROWS)

    def iter_from(self, state: SamplerState) -> Iterator[GlobalBatch]:
        """All global batches from a position on, without end.

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
        """Each micro-batch with the position of the next one."""
        empty_windows = 0
        while empty_windows < 2 * self.num_windows(
            state.epoch
        ):  # an only row may lie in the first window, then in the last
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
        """The micro-batches of one window, in the order in which they are seen."""
        num_rows, num_windows = self.mixture.num_rows(epoch), self.num_windows(epoch)
        start, stop = (i * num_rows // num_windows for i in (window, window + 1))
        places = permute(np.arange(start, stop), num_rows, hash64(self.seed, epoch, Stream.ORDER))
        rows = self.mixture.rows(epoch, places)
        batches = cut_micro_batches(rows, self.mixture.sizes(rows), self.config)
        order = np.argsort(hash64(self.seed, epoch, Stream.SHUFFLE, window, np.arange(len(batches))))
        return [MicroBatch(epoch, *batches[i]) for i in order]

    def estimate_epoch(self) -> EpochEstimate:
        """Steps and amount of one epoch, from its first window."""
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
        """A position, with everything that gives it its meaning, as a few plain values."""
        return asdict(state) | self._settings() | self.mixture.state_dict()

    def load_state_dict(self, stored: Mapping[str, Any], allow_grown: bool = False) -> SamplerState:
        """The position stored by `state_dict`.

        Args:
            stored: what that returned.
            allow_grown: whether datasets may have got more rows since. The epoch under way ends without them.

        Raises:
            CheckpointError: the stored position counts micro-batches of another dataset or another plan.
        """
        if "datasets" not in stored:
            raise CheckpointError(
                "data position of the checkpoint was stored by an earlier version, which counted rows otherwise; start "
                "a new run from the weights"
            )
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

    def _settings(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "min_size": self.config.min_size,
            "max_size": self.config.max_size,
            "micro_size": self.config.micro_size,
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
    rows: NDArray[np.int64], sizes: NDArray[np.int64], config: PlanConfig
) -> list[tuple[NDArray[np.int64], int]]:
    """Group rows of similar size: sort by size, largest first, and cut greedily.

    Args:
        rows: (n,) row numbers in random order, which decides between rows of equal size.
        sizes: (n,) their sizes.
        config: limits; rows below `min_size` are left out.

    Returns:
        Groups of (row numbers, size that every row is brought to), largest first.
    """
    usable = sizes >= config.min_size
    counted = np.minimum(sizes[usable], config.max_size)
    order = np.argsort(-counted, kind="stable")
    rows, counted = rows[usable][order], counted[order]
    groups = []
    start = 0
    while start < len(rows):
        stop = min(start + config.micro_size // int(counted[start]), len(rows))
        groups.append((rows[start:stop], int(counted[stop - 1 if config.crops else start])))
        start = stop
    return groups
