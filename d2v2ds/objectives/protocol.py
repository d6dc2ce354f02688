"""`Objective`: protocol between an algorithm and the rooms that run it: step, loop, validation and checkpoints.

An objective builds a network around a trunk (decoders or heads, losses) and defines the masks of a micro-batch, the
action after an applied step, metrics and health statistics. It receives an engine and, if it has one, a teacher; it
imports neither DeepSpeed nor files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.labels import Labelled
from d2v2ds.masking import MaskConfig
from d2v2ds.whole_masks import WholeMask


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Result of one micro-batch."""

    sums: dict[str, Tensor]
    """Losses summed over this rank's items, scalar fp32 with gradient, by name; the same names on every rank."""
    count: float
    """Items that the sums cover, such as masked tokens; known without a device sync."""
    statistics: dict[str, Tensor]
    """Further sums without gradient, fp64 of any shape; added over micro-batches, steps and ranks."""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """Values of each row, (B, ...), in validation: for scores that sums cannot give, such as rank correlations. They
    are joined over micro-batches and ranks."""
    output: Any
    """Output that only the objective's own health statistics read."""


@dataclass(frozen=True)
class Totals:
    """Sums of `Losses` over micro-batches, steps and ranks."""

    sums: Mapping[str, float]
    count: float
    statistics: Mapping[str, Tensor]
    """fp64 on the CPU."""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """`Losses.kept` of all rows, (N, ...) on the CPU, in the order of ranks."""


@dataclass(frozen=True)
class Vectors:
    """Vectors for health statistics."""

    name: str
    """Prefix of the metrics: `NAME/effective_rank` and so on."""
    vectors: Tensor
    """(U, D)."""
    positions: Tensor
    """(U,) int64 position of each in its sequence."""
    length: int
    """T, tokens of the sequence."""
    reports_std: bool = False
    """Report the standard deviation too."""


@dataclass(frozen=True)
class HealthLimit:
    """Bound that a health statistic crosses when a run collapses."""

    metric: str
    least: float | None
    most: float | None
    cause: str
    """Likely cause, and the setting to change."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """Course of a run since its start, for a diagnosis; metrics are those of the run's records."""

    step: int
    """Finished steps at the newest record."""
    values: Mapping[str, float]
    """Newest record."""
    first_step: int
    first: Mapping[str, float]
    """First record; empty after a resume."""
    lowest: Mapping[str, float]
    """Lowest value of every metric in the records before the newest."""
    lr_share: float
    """Learning rate over the highest of the schedule."""


@dataclass(frozen=True)
class Symptom:
    """Sign that a run will not learn what it should."""

    kind: str
    """Name of the rule; a run reports each once until it has gone."""
    sentence: str
    """Value, and the likely cause with what to do."""


class HealthBounds(Protocol):
    """Bounds from the configuration, such as `train.guard.HealthConfig`."""

    @property
    def min_effective_rank(self) -> float: ...

    @property
    def max_position_share(self) -> float: ...

    @property
    def min_std(self) -> float: ...


class AveragedNetwork(Protocol):
    """Network whose weights average the trained one's, such as `distributed.teacher.Teacher`."""

    def __call__(self, *args: Any) -> Any:
        """Run the network in eval mode and without gradient. Collective."""

    def update(self, decay: float, *, again: bool = False) -> None:
        """Set average = decay * average + (1 - decay) * trained; `again` allows another update for the same step."""

    def student_distance(self) -> float:
        """Return |trained - average| / |trained| over all ranks. Collective."""


class Objective(Protocol):
    """Algorithm of a run, one object on each rank. It has no weights: those belong to the engine."""

    units: Mapping[str, str]
    """Metrics of one modality: name without the modality -> unit and reduction over ranks."""
    run_units: Mapping[str, str]
    """Metrics of the run as a whole, in the same form."""

    headline: tuple[str, ...]
    """Metrics that the log of a validation shows beside the loss."""

    @property
    def kept_numbers(self) -> int:
        """Numbers of a row that validation keeps in `Losses.kept`, labels not counted; 0 if it keeps nothing."""

    def mask(self, modality: str) -> MaskConfig | WholeMask | None:
        """Masks of this modality's micro-batches: several that remove tokens, or one of the whole input; None for
        none."""

    def labelled(self, modality: str) -> Labelled | None:
        """Return the demands of a fine-tuning task on the inputs of this modality; None in pretraining."""

    def build_network(self, *, activation_checkpointing: bool) -> nn.Module:
        """Build the trained network; `initialise` draws its weights."""

    def initialise(self, network: nn.Module, seed: int) -> None:
        """Draw all parameters of a network of `build_network`, before ZeRO-3 partitions it."""

    def build_teacher_network(self) -> nn.Module | None:
        """Build the teacher's network, with the parameter names of the trained one; None if there is no teacher."""

    def is_copied(self, name: str) -> bool:
        """Return True for a parameter that the teacher copies at each update, in place of averaging it."""

    def follow(self, teacher: AveragedNetwork | None) -> None:
        """Set the sharded average of `build_teacher_network`."""

    def losses(self, network: Callable[..., Any], batch: Batch, step: int | None) -> Losses:
        """Run one micro-batch.

        Args:
            network: the engine around `build_network`.
            batch: on the device.
            step: number of finished steps; None in validation, which drops no layers.
        """

    def flops(self, modality: str, num_samples: int, size: int) -> float:
        """Count algorithmic operations of B inputs of this size: forward and backward, teacher included."""

    def describe(self, modality: str, num_tokens: int) -> str:
        """Describe in words how an input of T tokens is masked.

        Raises:
            ValueError: the masks cannot be drawn for so many tokens.
        """

    def lr_scale(self, name: str) -> float:
        """Return the learning rate of a parameter of the network over that of the step."""

    def held_steps(self, name: str) -> int:
        """Return how many optimizer steps leave a parameter of the network as it is at the start."""

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return False for a parameter without weight decay, where `optim.decay_vectors` is off."""

    def count(self, batch: Batch) -> float:
        """Return `Losses.count` of a micro-batch: the items that the mean loss is over."""

    def after_step(self, step_number: int) -> None:
        """Run after an optimizer step that was applied, for example to update a teacher.

        Args:
            step_number: 1 for the first; skipped steps count, but this is not called after one.
        """

    def schedules(self, step_number: int) -> dict[str, float]:
        """Return the values of the objective's schedules at an optimizer step, for the metrics."""

    def run_metrics(self) -> dict[str, float]:
        """Measure the metrics of the run as a whole for one record. Collective."""

    def metrics(self, modality: str, totals: Totals) -> dict[str, float]:
        """Compute the metrics of one modality, less `loss/NAME`, from sums over all ranks."""

    def check_validation(self) -> None:
        """Check that the packages of a validation are there, and that it gives the scores that settings ask for.

        Raises:
            ConfigError: it does not give such a score.
            MissingExtraError: a package is not installed.
        """

    def selection(self, values: Mapping[str, float]) -> float | None:
        """Return the value by which the best checkpoint is chosen, the lower the better; None without validation.

        Args:
            values: metrics of a record.
        """

    def health_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield the vectors whose statistics show a collapse."""

    def held_out_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield the vectors whose effective rank validation reports."""

    def health_limits(self, bounds: HealthBounds) -> list[HealthLimit]:
        """Return the limits of this objective's health statistics."""

    def symptoms(self, course: Course) -> list[Symptom]:
        """Diagnose a run from its metrics; empty while nothing is amiss."""
