"""`Objective`: what a run optimises. Step, loop, validation and checkpoints know nothing but this protocol.

An objective owns a network around a trunk (decoders or heads, losses) and everything that belongs to its algorithm:
which masks a micro-batch needs, what happens after an applied step, which metrics and health statistics it reports.
It gets an engine and, if it asks for one, a teacher from outside; it imports neither DeepSpeed nor files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.masking import MaskConfig


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What one micro-batch gave."""

    sums: dict[str, Tensor]
    """Losses summed over this rank's items, scalar fp32 with gradient, by name; the same names on every rank."""
    count: int
    """Items that the sums cover, such as masked tokens; known without asking a device."""
    statistics: dict[str, Tensor]
    """Further sums without gradient, fp64 of any shape; added over micro-batches, steps and ranks."""
    output: Any
    """The objective's own output, for its health statistics; nobody else reads it."""


@dataclass(frozen=True)
class Totals:
    """Sums of `Losses` over micro-batches, steps and ranks."""

    sums: Mapping[str, float]
    count: float
    statistics: Mapping[str, Tensor]
    """fp64 on the CPU."""


@dataclass(frozen=True)
class Vectors:
    """A set of vectors whose richness shows whether a run is healthy."""

    name: str
    """Metrics are named after it: `NAME/effective_rank` and so on."""
    vectors: Tensor
    """(U, D)."""
    positions: Tensor
    """(U,) int64 position of each in its sequence."""
    length: int
    """T, tokens of the sequence."""
    reports_std: bool = False
    """Whether the metrics have their standard deviation too."""


@dataclass(frozen=True)
class HealthLimit:
    """A bound that a health statistic crosses when a run collapses."""

    metric: str
    least: float | None
    most: float | None
    cause: str
    """Likely cause, and what to change."""


class HealthBounds(Protocol):
    """Bounds that the configuration gives; `train.guard.HealthConfig` has them."""

    @property
    def min_effective_rank(self) -> float: ...

    @property
    def max_position_share(self) -> float: ...

    @property
    def min_std(self) -> float: ...


class AveragedNetwork(Protocol):
    """A network whose weights follow the trained one's; `distributed.teacher.Teacher` is one."""

    def __call__(self, *args: Any) -> Any:
        """Output in eval mode and without gradient. Collective."""

    def update(self, decay: float) -> None:
        """Move the weights: average = decay * average + (1 - decay) * trained."""

    def student_distance(self) -> float:
        """|trained - average| / |trained| over all ranks. Collective."""


class Objective(Protocol):
    """What a run optimises; one object per run and rank. It carries no weights: those are the engine's."""

    units: Mapping[str, str]
    """Metrics of this objective: name -> unit and reduction over ranks. Those of one modality come without its name."""
    run_units: Mapping[str, str]
    """Metrics of the run as a whole, likewise."""

    def mask(self, modality: str) -> MaskConfig | None:
        """Masks that a micro-batch of this modality needs; None for none."""

    def build_network(self, *, activation_checkpointing: bool) -> nn.Module:
        """Build the network that is trained, without drawing its weights in any order that matters."""

    def initialise(self, network: nn.Module, seed: int) -> None:
        """Draw all parameters of a network of `build_network`, whole and before it is partitioned."""

    def build_teacher_network(self) -> nn.Module | None:
        """Build the network of the teacher, its parameters named like the trained ones; None if there is no teacher."""

    def follow(self, teacher: AveragedNetwork | None) -> None:
        """Take the sharded average of `build_teacher_network`."""

    def losses(self, network: Callable[..., Any], batch: Batch, step: int | None) -> Losses:
        """Run one micro-batch.

        Args:
            network: the engine around `build_network`.
            batch: on the device.
            step: number of finished steps; None in validation, which drops no layers.
        """

    def flops(self, modality: str, num_samples: int, size: int) -> float:
        """Algorithmic operations of B inputs of this size: forward and backward, teacher included."""

    def describe(self, modality: str, num_tokens: int) -> str:
        """Describe for a person what happens to an input of T tokens.

        Raises:
            ValueError: the masks cannot be drawn for so many tokens.
        """

    def count(self, batch: Batch) -> int:
        """Items of a micro-batch that the mean loss is taken over; the same number as `Losses.count`."""

    def after_step(self, num_updates: int) -> None:
        """Act after optimizer step number `num_updates`, if it was applied: update a teacher, or nothing."""

    def schedules(self, num_updates: int) -> dict[str, float]:
        """Values of the objective's own schedules at optimizer step number `num_updates`, for the metrics."""

    def run_metrics(self) -> dict[str, float]:
        """Metrics of the run as a whole, measured for each record. Collective."""

    def metrics(self, modality: str, totals: Totals) -> dict[str, float]:
        """Metrics of one modality beside `loss/NAME`, from sums over all ranks."""

    def health_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Sets of vectors that tell a healthy run from a collapsed one."""

    def held_out_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Sets of vectors whose richness validation reports."""

    def health_limits(self, bounds: HealthBounds) -> list[HealthLimit]:
        """Bounds of this objective's health statistics."""
