"""`AveragedTeacher`: what objectives with a teacher that averages the trained network have in common."""

from collections.abc import Mapping

from d2v2ds.objectives.data2vec2_metrics import RUN_UNITS
from d2v2ds.objectives.defaults import ObjectiveDefaults
from d2v2ds.objectives.ema import EmaConfig, ema_decay
from d2v2ds.objectives.protocol import AveragedNetwork


class AveragedTeacher(ObjectiveDefaults):
    """Members of an `Objective` that updates its teacher after every applied step."""

    run_units: Mapping[str, str] = RUN_UNITS

    def __init__(self, ema: EmaConfig) -> None:
        """
        Args:
            ema: decay of the teacher.
        """
        self.ema = ema
        self._teacher: AveragedNetwork | None = None

    def follow(self, teacher: AveragedNetwork | None) -> None:
        """Set the sharded teacher."""
        self._teacher = teacher

    @property
    def teacher(self) -> AveragedNetwork:
        """Sharded teacher.

        Raises:
            RuntimeError: `follow` was not called.
        """
        if self._teacher is None:
            raise RuntimeError(f"{type(self).__name__}: expected a teacher, found none; call follow(teacher) first")
        return self._teacher

    def after_step(self, step_number: int) -> None:
        """Update the teacher, once per applied optimizer step."""
        self.teacher.update(ema_decay(step_number, self.ema))

    def schedules(self, step_number: int) -> dict[str, float]:
        """Return the decay of the teacher."""
        return {"ema/decay": ema_decay(step_number, self.ema)}

    def run_metrics(self) -> dict[str, float]:
        """Return the distance of student and teacher. Collective."""
        return {"ema/student_distance": self.teacher.student_distance()}
