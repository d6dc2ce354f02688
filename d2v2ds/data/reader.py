"""`Reader`: packed folders of one modality as inputs, and checks that all readers share."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.batch import Labels
from d2v2ds.bounds import PositiveOrZero
from d2v2ds.data.folders import Folders, JoinedShards, Part, folder_faults, only_sizes
from d2v2ds.data.mixture import Dataset
from d2v2ds.data.order import MicroBatch, PlanConfig
from d2v2ds.errors import ShardError
from d2v2ds.labels import Labelled, join_labels
from d2v2ds.masking import MaskConfig
from d2v2ds.whole_masks import WholeMask

AnyMask = MaskConfig | WholeMask
"""Masks that an objective may ask for: several of each input with tokens removed, or one of the whole input."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Unit of a modality's amounts, and its metrics."""

    name: str
    """Plural of the unit, as in batch settings and throughput: seconds, images, tokens."""
    label: str
    """Unit with its noun, such as seconds of audio."""
    total_metric: str
    """Metric of the amount read since the run began, such as data/hours."""
    total_size: float = 1.0
    """Units in one of that metric, such as 3600 seconds."""
    total_help: str
    """Unit and reduction of that metric."""
    speed_metric: str
    """Metric of the throughput."""
    speed_help: str
    """Unit and reduction of that metric."""
    larger: tuple[tuple[float, str], ...] = ()
    """Larger units for messages, largest first: number of these units in one, and name."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Settings of one modality's data; each modality derives its own, with `global_batch_UNIT`, `micro_batch_UNIT`."""

    modality: ClassVar[str]
    """Name of the modality."""
    unit: ClassVar[str]
    """Plural of its unit."""

    shards: Folders
    """Folder written by the packer, or several of them."""
    weights: tuple[float, ...] | None = None
    """Frequency of each folder's rows relative to the others'; None: all alike."""
    loss_weight: PositiveOrZero = 1.0
    """Weight of this modality's loss in a joint run; each modality's loss is a mean over its masked tokens."""

    @property
    def global_batch(self) -> float:
        """Amount of one optimizer step over all ranks, in the modality's unit."""
        amount: float = getattr(self, f"global_batch_{self.unit}")
        return amount

    @property
    def micro_batch(self) -> float:
        """Amount of one forward pass on one rank, in the modality's unit."""
        amount: float = getattr(self, f"micro_batch_{self.unit}")
        return amount

    @property
    def num_micro(self) -> int:
        """Micro-batches of one optimizer step, over all ranks."""
        return round(self.global_batch / self.micro_batch)

    @property
    def largest_row(self) -> float:
        """Amount of one row, at most."""
        return 1

    def largest_samples(self, network: Any) -> tuple[float, int]:
        """Return the samples of one optimizer step if all have the largest size, and that size."""
        raise NotImplementedError

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        where = f"data.{self.modality}."
        faults = folder_faults(where, self.shards, self.weights)
        return faults + batch_faults(where, self.unit, self.global_batch, self.micro_batch, self.largest_row)


@dataclass(frozen=True)
class Examples:
    """Inputs of one micro-batch."""

    source: Tensor
    """(B, ...) as in `Batch.source`."""
    padding: Tensor | None = None
    """As in `Batch.padding`."""


class Reader(Generic[Part]):
    """Packed folders of one modality as inputs; each modality derives its own. Picklable: data workers get a copy."""

    modality: str
    """Name of the modality."""
    unit: Unit
    """Unit of amounts and throughput."""
    config: Any
    network: Any
    can_be_whole: ClassVar[bool] = False
    """True if `read` pads whole inputs where `labelled` is set, so that the modality can be fine-tuned."""
    labelled: Labelled | None = None
    """Demands of a fine-tuning task; None in pretraining and inference."""
    augments: bool = True
    """False: inputs are read as in evaluation, without random crops and flips; for the validation of a task."""

    def __init__(self, shards: JoinedShards[Part], config: Any, network: Any, mask: AnyMask | None) -> None:
        """
        Args:
            shards: packed folders.
            config: a `DataSettings`.
            network: settings of the network that reads the inputs; it has `num_tokens(size)`.
            mask: of every input; None for none.
        """
        self.shards, self.config, self.network, self.mask = shards, config, network, mask

    def __len__(self) -> int:
        """Return the number of rows of all folders."""
        return len(self.shards)

    @property
    def datasets(self) -> list[Dataset]:
        """Folders, with the sizes of all rows, for a plan."""
        return self.shards.datasets(self.config.weights)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) sizes of the rows of the only folder, as the plan counts them."""
        return only_sizes(self.datasets)

    def plan_config(self) -> PlanConfig:
        """Return the settings of grouping rows into batches."""
        raise NotImplementedError

    def units(self, num_rows: int, size: int) -> float:
        """Return the amount of `num_rows` inputs of this size, in `unit`."""
        raise NotImplementedError

    def read(self, micro: MicroBatch, seed: int) -> Examples:
        """Read the inputs of a micro-batch, cropped and augmented; each is a function of (seed, epoch, row).

        Raises:
            ShardError: at least one row cannot be read.
        """
        raise NotImplementedError

    def read_whole(self, row: int) -> Tensor:
        """Read one input without random crops, augmentation and batch dimension, for evaluation.

        Raises:
            ShardError: the row cannot be read.
        """
        raise NotImplementedError

    def read_labels(self, rows: NDArray[np.int64]) -> Labels | None:
        """Read the labels of rows; None without a task.

        Raises:
            ShardError: a row has no label, or one that the task cannot read.
        """
        if self.labelled is None:
            return None
        encoder, found = self.labelled.encoder, []
        for row in rows.tolist():
            value = self.annotation(row, encoder.column)
            if value is None or not value.strip():
                raise ShardError(f"{self.shards.name(row)}: expected a {encoder.column}, found none")
            try:
                found.append(encoder.encode([value]))
            except ValueError as error:
                raise ShardError(f"{self.shards.name(row)}: {encoder.column}: {error}") from error
        return join_labels(found)

    def annotation(self, row: int, column: str) -> str | None:
        """Read one annotation of a row, such as its transcript; None if it has none.

        Raises:
            ShardError: the row cannot be read.
        """
        part, local = self.shards.locate(row)
        found: str | None = getattr(part.read_labels(local), column, None)  # type: ignore[attr-defined]
        return found

    def faults(self) -> list[str]:
        """Return one message for each contradiction between folder, settings and network."""
        raise NotImplementedError

    def misfits(self) -> list[str]:
        """Return the `faults` that keep the network from reading this folder, also in evaluation; none here."""
        return []

    def remarks(self) -> list[str]:
        """Return messages about settings that work but may be a mistake, for the log of the start; none here."""
        return []


def batch_faults(where: str, unit: str, global_batch: float, micro_batch: float, largest_row: float) -> list[str]:
    """Return one message for each pair of batch limits that contradict each other.

    Args:
        where: section of the settings, such as `data.audio.`.
        unit: of the three amounts, in the plural.
        global_batch: of one optimizer step.
        micro_batch: of one forward pass.
        largest_row: of one row, at most.
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


def mask_faults(mask: AnyMask | None, num_tokens: int, where: str) -> list[str]:
    """Return a message if these masks cannot be drawn.

    Args:
        mask: settings; None for no masks.
        num_tokens: T of the smallest input.
        where: name of that input, for the message.
    """
    fault = "" if mask is None else mask.fault(num_tokens)
    return [f"{where}: {fault}"] if fault else []
