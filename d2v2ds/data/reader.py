"""`Reader`: packed folders of one modality as training and evaluation see them, and checks that all readers share."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.data.folders import Folders
from d2v2ds.data.mixture import Dataset
from d2v2ds.data.order import MicroBatch, PlanConfig
from d2v2ds.masking import MaskConfig, masked_count


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a modality's amounts are counted in, and how metrics call them."""

    name: str
    """In the plural: seconds, images, tokens. Batch settings and throughput count in it."""
    label: str
    """With what is counted: seconds of audio."""
    total_metric: str
    """Metric of the amount seen since the run began, such as data/hours."""
    total_size: float = 1.0
    """Units in one of that metric."""
    total_help: str
    """Unit and reduction of that metric."""
    speed_metric: str
    """Metric of the throughput."""
    speed_help: str
    """Unit and reduction of that metric."""
    larger: tuple[tuple[float, str], ...] = ()
    """Larger units for people, largest first: how many of this one make one, and its name."""


class DataSettings(Protocol):
    """Settings of one modality's data; every modality has a frozen dataclass with these members."""

    @property
    def shards(self) -> Folders:
        """Packed folder, or several."""

    @property
    def weights(self) -> tuple[float, ...] | None:
        """How often the rows of each folder are seen, relative to the others."""

    @property
    def loss_weight(self) -> float:
        """Weight of this modality's mean loss in a joint run."""

    @property
    def num_micro(self) -> int:
        """Micro-batches of one optimizer step, over all ranks."""

    @property
    def global_batch(self) -> float:
        """Amount of one optimizer step over all ranks, in the modality's unit."""

    def largest_samples(self, network: Any) -> tuple[float, int]:
        """Samples of one optimizer step if all have the greatest size, and that size."""

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""


class TokenCounter(Protocol):
    """What every reader asks of the network's settings."""

    def num_tokens(self, size: int) -> int:
        """T that the network makes of an input of this size."""


@dataclass(frozen=True)
class Examples:
    """Inputs of one micro-batch."""

    source: Tensor
    """(B, ...) as in `Batch.source`."""
    padding: Tensor | None = None
    """As in `Batch.padding`."""


class Reader(Protocol):
    """Packed folders of one modality. Picklable: data workers get a copy."""

    modality: str
    """Name of the modality."""
    unit: Unit
    """What throughput counts."""
    mask: MaskConfig | None
    """Masks to be drawn for every input; None for none."""

    @property
    def network(self) -> TokenCounter:
        """Settings of the network that reads the inputs."""

    def __len__(self) -> int:
        """Rows of all folders."""

    @property
    def datasets(self) -> list[Dataset]:
        """Folders, for a plan."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) sizes of the rows of the only folder, as the plan counts them."""

    def plan_config(self) -> PlanConfig:
        """How rows are grouped into batches."""

    def units(self, num_rows: int, size: int) -> float:
        """Amount of `num_rows` inputs of this size, in `unit`."""

    def read(self, micro: MicroBatch, seed: int) -> Examples:
        """Read the inputs of a micro-batch, cropped and augmented: a function of (seed, epoch, row) for each row.

        Raises:
            ShardError: at least one row cannot be read.
        """

    def read_whole(self, row: int) -> Tensor:
        """Read one input as evaluation sees it, without random crops or augmentation, and without batch dimension.

        Raises:
            ShardError: the row cannot be read.
        """

    def faults(self) -> list[str]:
        """Return one message for each way in which folder, settings and network do not fit each other."""

    def misfits(self) -> list[str]:
        """Return the part of `faults` that matters to evaluation too: why the network cannot read this folder."""

    def remarks(self) -> list[str]:
        """Return messages about what fits but may not be meant; they are logged at the start."""


def batch_faults(where: str, unit: str, global_batch: float, micro_batch: float, largest_row: float) -> list[str]:
    """Return one message for each pair of batch limits that contradict each other.

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


def mask_faults(mask: MaskConfig | None, num_tokens: int, where: str) -> list[str]:
    """Return a message if these masks cannot be drawn.

    Args:
        mask: settings; None draws nothing.
        num_tokens: T of the smallest input.
        where: which input that is, for the message.
    """
    if mask is None:
        return []
    try:
        masked_count(mask, num_tokens)
    except ValueError as error:
        return [f"{where}: {error}"]
    return []
