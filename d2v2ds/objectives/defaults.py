"""`ObjectiveDefaults`: members of an `Objective` that has no labels, no teacher and nothing special."""

from collections.abc import Iterator, Mapping

from torch import nn

from d2v2ds.batch import Batch
from d2v2ds.labels import Labelled
from d2v2ds.masking import MaskConfig
from d2v2ds.objectives.protocol import AveragedNetwork, Course, HealthBounds, HealthLimit, Losses, Symptom, Vectors
from d2v2ds.whole_masks import WholeMask


class ObjectiveDefaults:
    """Answers that most objectives give; each overrides those where it has another one."""

    units: Mapping[str, str] = {}
    run_units: Mapping[str, str] = {}
    headline: tuple[str, ...] = ()

    @property
    def kept_numbers(self) -> int:
        """0: sums give all scores of a validation."""
        return 0

    def mask(self, modality: str) -> MaskConfig | WholeMask | None:
        """Return None: nothing is masked."""
        return None

    def labelled(self, modality: str) -> Labelled | None:
        """Return None: there are no labels."""
        return None

    def build_teacher_network(self) -> nn.Module | None:
        """Return None: there is no teacher."""
        return None

    def is_copied(self, name: str) -> bool:
        """Return False: everything is averaged."""
        return False

    def follow(self, teacher: AveragedNetwork | None) -> None:
        """Do nothing."""

    def lr_scale(self, name: str) -> float:
        """Return 1: all parameters have one learning rate."""
        return 1.0

    def held_steps(self, name: str) -> int:
        """Return 0: everything learns from the first step."""
        return 0

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return False for parameters of one dimension, such as biases and norms."""
        return parameter.ndim > 1

    def after_step(self, step_number: int) -> None:
        """Do nothing."""

    def schedules(self, step_number: int) -> dict[str, float]:
        """Return nothing."""
        return {}

    def run_metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def check_validation(self) -> None:
        """Do nothing: no package is needed."""

    def selection(self, values: Mapping[str, float]) -> float | None:
        """Return the validation loss, by which the best checkpoint is chosen."""
        return values.get("valid/loss/total")

    def health_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield nothing."""
        yield from ()

    def held_out_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield nothing."""
        yield from ()

    def health_limits(self, bounds: HealthBounds) -> list[HealthLimit]:
        """Return nothing."""
        return []

    def symptoms(self, course: Course) -> list[Symptom]:
        """Return nothing: the health limits say it."""
        return []
