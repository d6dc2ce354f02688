"""The rows of one micro-batch -> `Batch` with its masks.

In: a `MicroBatch` (row numbers and a size). Out: their inputs, brought to one size by the modality's reader, and M
masks for each, drawn for exactly the T tokens that the model makes of them. Runs in the data workers.

A row that cannot be read is left out and reported in `Batch.faults`; how many are too many, the training decides. Which
rows those are depends on the data alone, so every rank and any number of workers make the same batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.data.mixture import DATASET_BITS, Dataset, split_row_numbers
from d2v2ds.data.order import MicroBatch, PlanConfig
from d2v2ds.errors import ShardError
from d2v2ds.masking import MaskConfig, draw_masks, masked_count, visible_positions


class ModelInput(Protocol):
    """What a reader must know of the model; the model's settings of each modality have it."""

    @property
    def input_size(self) -> int | None:
        """Side of an image in pixels; None where inputs have no fixed size."""

    def num_tokens(self, size: int) -> int:
        """T that the model makes of an input of this size."""


STAND_IN_TRIES = 1000
"""Rows that are tried in place of a micro-batch of which none could be read."""
_STAND_IN_CANDIDATES = 10_000
"""Rows of each dataset among which those of a fitting size are looked for."""


@dataclass(frozen=True)
class Examples:
    """The inputs of one micro-batch."""

    source: Tensor
    """(B, ...) as in `Batch.source`."""
    padding: Tensor | None = None
    """As in `Batch.padding`."""


class Reader(Protocol):
    """Packed folders of one modality as the training sees them. Each modality has one, in its own file; picklable."""

    modality: str
    """The model's name for this input."""
    unit: str
    """What throughput counts, in the plural: seconds, images or tokens."""
    mask: MaskConfig

    @property
    def model(self) -> ModelInput:
        """What the model makes of the inputs."""

    def __len__(self) -> int:
        """Rows of all folders."""

    @property
    def datasets(self) -> list[Dataset]:
        """What a plan is made of."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) of the rows of the only dataset, as the plan counts them."""

    def plan_config(self) -> PlanConfig:
        """How rows are grouped into batches."""

    def units(self, num_rows: int, size: int) -> float:
        """How much `num_rows` inputs of this size are, in `unit`."""

    def read(self, micro: MicroBatch, seed: int) -> Examples:
        """The inputs of a micro-batch, cropped and augmented: a function of (seed, epoch, row) for each row.

        Raises:
            ShardError: at least one row cannot be read.
        """

    def read_whole(self, row: int) -> Tensor:
        """One input as evaluation sees it, without crops by chance or augmentation, and without a batch dimension.

        Raises:
            ShardError: the row cannot be read.
        """

    def faults(self) -> list[str]:
        """Why folder, settings and model do not fit each other, as sentences; empty if they do."""

    def misfits(self) -> list[str]:
        """The part of `faults` that matters to evaluation too: why the model cannot read this folder."""

    def remarks(self) -> list[str]:
        """What fits and may still not be meant, as sentences, to be said at the start."""


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Reads and masks the rows of a micro-batch."""

    reader: Reader
    seed: int

    def __call__(self, micro: MicroBatch) -> Batch:
        """
        Raises:
            ShardError: no row can be read, and none in their place.
            ValueError: the input is too short for the model or for the mask settings.
        """
        micro, examples, faults = self._read(micro)
        mask, num_tokens = self.reader.mask, self.reader.model.num_tokens(micro.size)
        num_masked = masked_count(mask, num_tokens)
        masked = draw_masks(mask, num_tokens, seed=self.seed, epoch=micro.epoch, sample_ids=micro.rows)  # (B, M, T)
        return Batch(
            modality=self.reader.modality,
            source=examples.source,
            padding=examples.padding,
            ids=torch.from_numpy(micro.rows),
            masks=MaskSet(keep=torch.from_numpy(visible_positions(masked)), masked=torch.from_numpy(masked)),
            num_masked=len(micro.rows) * mask.num_masks * num_masked,
            loss_weight=micro.weight,
            faults=faults,
        )

    def _read(self, micro: MicroBatch) -> tuple[MicroBatch, Examples, tuple[str, ...]]:
        """The rows that can be read, their inputs, and why others cannot."""
        try:
            return micro, self.reader.read(micro, self.seed), ()
        except ShardError:
            pass  # some row cannot be read: find out which
        found = [self._fault(micro, row) for row in micro.rows]
        good = micro.rows[[fault is None for fault in found]]
        faults = tuple(fault for fault in found if fault is not None)
        reported = faults if micro.weight else ()  # the rows of a filler are another rank's, which reports them
        micro = replace(micro, rows=good) if len(good) else self._stand_in(micro, faults)
        return micro, self.reader.read(micro, self.seed), reported

    def _fault(self, micro: MicroBatch, row: int) -> str | None:
        """Why a row cannot be read, if it cannot."""
        try:
            self.reader.read(replace(micro, rows=np.array([row])), self.seed)
        except ShardError as error:
            return str(error)
        return None

    def _stand_in(self, micro: MicroBatch, faults: tuple[str, ...]) -> MicroBatch:
        """One other row of weight 0, so that this rank runs the model like all others.

        Raises:
            ShardError: that cannot be read either, however many are tried.
        """
        tried = 0
        for row, size in self._others(micro):
            tried += 1
            other = replace(micro, rows=np.array([row]), size=size, weight=0.0)
            if self._fault(other, row) is None:
                return other
        raise ShardError(f"{faults[-1]}; {tried} other rows of the data were tried, none of them can be read")

    def _others(self, micro: MicroBatch) -> Iterator[tuple[int, int]]:
        """Rows beginning after the last one of a micro-batch, then those of other datasets, and their sizes in a batch.

        The size stays that of the micro-batch, unless no row fits. Rows are spread over each dataset, because those
        beside it may lie in the same damaged file.
        """
        config, datasets = self.reader.plan_config(), self.reader.datasets
        first, last = (int(number) for number in split_row_numbers(micro.rows[-1]))
        for dataset in (first, *(number for number in range(len(datasets)) if number != first)):
            own = int(dataset == first)
            others = len(datasets[dataset].sizes) - own
            count = min(others, _STAND_IN_CANDIDATES)
            rows = ((last + 1) * own + np.arange(count) * (others // max(count, 1))) % (others + own)
            sizes = datasets[dataset].sizes[rows]
            rows, sizes = rows[sizes >= config.min_size], np.minimum(sizes[sizes >= config.min_size], config.max_size)
            sizes = np.minimum(sizes, micro.size) if config.crops else np.maximum(sizes, micro.size)
            order = np.argsort(sizes != micro.size, kind="stable")
            order = order[:: max(1, math.ceil(len(order) * len(datasets) / STAND_IN_TRIES))]
            yield from zip(((dataset << DATASET_BITS) | rows[order]).tolist(), sizes[order].tolist(), strict=True)


def batch_faults(where: str, unit: str, global_batch: float, micro_batch: float, largest_row: float) -> list[str]:
    """Batch limits that contradict each other, as sentences naming both.

    Args:
        where: section of the settings, such as `data.audio.`.
        unit: of the three amounts, in the plural.
        global_batch: of one optimizer step.
        micro_batch: of one forward pass.
        largest_row: the most that one row can be.
    """
    faults = []
    if micro_batch < largest_row:
        faults.append(
            f"{where}micro_batch_{unit} {micro_batch:g} cannot hold one row of {largest_row:g} {unit}; raise the first "
            "or lower the second"
        )
    if global_batch < micro_batch:
        faults.append(
            f"{where}global_batch_{unit} {global_batch:g} is less than micro_batch_{unit} {micro_batch:g}; lower the "
            "second"
        )
    elif micro_batch > 0 and not math.isclose(
        global_batch / micro_batch, round(global_batch / micro_batch), rel_tol=1e-6
    ):
        more = math.ceil(global_batch / micro_batch)
        ways = [f"global_batch_{unit}={count * micro_batch:g}" for count in (more - 1, more)]
        even = global_batch / more
        if even >= largest_row and (isinstance(micro_batch, float) or even.is_integer()):
            ways.append(f"micro_batch_{unit}={even:.9g}")
        faults.append(
            f"{where}global_batch_{unit} {global_batch:g} is no whole number of micro-batches of {micro_batch:g}; "
            f"expected for example {' or '.join(ways)}"
        )
    return faults


def mask_faults(mask: MaskConfig, num_tokens: int, where: str) -> list[str]:
    """Why these masks cannot be drawn, as sentences.

    Args:
        mask: settings.
        num_tokens: T of the smallest input.
        where: which input that is, for the message.
    """
    try:
        mask.check()
        masked_count(mask, num_tokens)
    except ValueError as error:
        return [f"{where}: {error}"]
    return []
