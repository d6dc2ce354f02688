"""Checks on a running job: steps that are not finite, rows that cannot be read, collapse, and a diagnosis."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from d2v2ds.bounds import Bounds, Count, CountOrZero, PositiveOrZero
from d2v2ds.errors import CollapseError, DamagedDataError, NonFiniteError
from d2v2ds.objectives.protocol import Course, HealthLimit, Symptom

logger = logging.getLogger(__name__)

COUNTS = ("nonfinite_in_a_row", "nonfinite_total", "damaged_rows")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Limits at which a run warns or stops."""

    max_nonfinite_steps: Count = 10
    """Skipped steps in a row (loss or gradient not finite) after which the run loads its last good checkpoint and skips
    their data."""
    max_rollbacks: CountOrZero = 3
    """Rollbacks to the same checkpoint; one more ends the run."""
    max_damaged_rows: CountOrZero = 100
    """Skipped rows that could not be read, over the whole run; one more ends it."""
    min_effective_rank: PositiveOrZero = 8.0
    """Floor of the targets' effective rank; RESULTS.md lists values of healthy and collapsed runs."""
    max_position_share: PositiveOrZero = 0.2
    """Ceiling of the fraction of the targets' variance that the position explains."""
    min_std: PositiveOrZero = 0.05
    """Floor of the standard deviation of targets and predictions (the official code stops at 0.1 and 0.01)."""
    warm_up_steps: CountOrZero = 100
    """Optimizer steps before the first check for collapse, and before the first diagnosis of a fine-tuning run."""
    stop_on_collapse: bool = False
    """Raise `CollapseError` instead of warning."""
    late_factor: Annotated[float, Bounds(ge=1)] = 10.0
    """Multiple of the median step time after which the run reports which rank is late, and where."""
    late_seconds: Annotated[float, Bounds(ge=0.1)] = 60.0
    """Least time of a late step (seconds)."""


class Guard:
    """Counts bad steps and detects collapse. Every rank passes it the same numbers, so all ranks decide alike."""

    def __init__(
        self,
        config: HealthConfig,
        limits: Sequence[HealthLimit],
        symptoms: Callable[[Course], list[Symptom]] = lambda course: [],
        lr_peak: float = math.inf,
    ) -> None:
        """
        Args:
            config: limits of the run.
            limits: bounds of the objective's health statistics.
            symptoms: the objective's diagnosis.
            lr_peak: highest learning rate of the run.
        """
        self.config, self._limits = config, limits
        self._symptoms, self._lr_peak = symptoms, lr_peak
        self._first: tuple[int, Mapping[str, float]] | None = None
        self._lowest: dict[str, float] = {}
        self._reported: set[str] = set()
        self._is_resumed = False
        self.nonfinite_in_a_row = 0
        self.nonfinite_total = 0
        self.damaged_rows = 0

    def after_step(self, step: int, applied: bool) -> bool:
        """Count a skipped step.

        Returns:
            True if the run should load its last good checkpoint.
        """
        if applied:
            self.nonfinite_in_a_row = 0
            return False
        self.nonfinite_in_a_row += 1
        self.nonfinite_total += 1
        logger.warning("step %d skipped: gradient is not finite (%d in a row)", step, self.nonfinite_in_a_row)
        return self.nonfinite_in_a_row >= self.config.max_nonfinite_steps

    def after_rollback(self, step: int, rollbacks: int) -> None:
        """Reset the count of skipped steps in a row.

        Args:
            step: before the rollback.
            rollbacks: to this checkpoint, this one included.

        Raises:
            NonFiniteError: too many.
        """
        if rollbacks > self.config.max_rollbacks:
            raise NonFiniteError(
                self.nonfinite(step, f"after {self.config.max_rollbacks} returns to one checkpoint, which is intact")
            )
        self.nonfinite_in_a_row = 0

    def nonfinite(self, step: int, when: str) -> str:
        """Return the message of a run that ends because of steps that are not finite."""
        return (
            f"step {step}: {self.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite, {when}; "
            "lower lr.peak, set optim.clip_norm, or look at the inputs named in bad_batches.jsonl"
        )

    def after_reading(self, damaged: int) -> None:
        """Count the rows that were skipped in the last step on all ranks.

        Raises:
            DamagedDataError: too many over the whole run.
        """
        self.damaged_rows += damaged
        if self.damaged_rows > self.config.max_damaged_rows:
            raise DamagedDataError(
                f"{self.damaged_rows} rows could not be read and were skipped so far, health.max_damaged_rows allows "
                f"{self.config.max_damaged_rows}; the warnings above name them: run python -m preprocessing.verify on "
                "the folder, copy its shards again, and start the same command"
            )

    def check_health(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Compare health statistics with their limits.

        Args:
            step: of the statistics.
            values: metrics by name.

        Returns:
            One message for each crossed limit: value, limit, likely cause.

        Raises:
            CollapseError: a limit is crossed and `stop_on_collapse` is set.
        """
        if step < self.config.warm_up_steps:
            return []
        alarms = [alarm for limit in self._limits for alarm in _crossed(limit, values)]
        for alarm in alarms:
            logger.warning("step %d: possible collapse: %s", step, alarm)
        if alarms and self.config.stop_on_collapse:
            raise CollapseError(f"step {step}: " + "; ".join(alarms))
        return alarms

    def diagnose(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Note a record, and warn of each symptom that is new since the record before.

        Args:
            step: of the record.
            values: metrics by name.

        Returns:
            The sentences.
        """
        if self._first is None:
            self._first = step, {} if self._is_resumed else values
        first_step, first = self._first
        course = Course(
            step=step,
            values=values,
            first_step=first_step,
            first=first,
            lowest=dict(self._lowest),
            lr_share=values.get("optim/lr", 0.0) / (self._lr_peak or math.inf),
        )
        for name, value in values.items():
            self._lowest[name] = min(value, self._lowest.get(name, value))
        if step < self.config.warm_up_steps:
            return []
        found = {symptom.kind: symptom.sentence for symptom in self._symptoms(course)}
        new = [sentence for kind, sentence in found.items() if kind not in self._reported]
        self._reported = set(found)
        for sentence in new:
            logger.warning("step %d: diagnosis: %s", step, sentence)
        return new

    def state_dict(self) -> dict[str, int]:
        """Return the counts, for a checkpoint."""
        return {name: getattr(self, name) for name in COUNTS}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Set the counts from `state_dict`, and forget what a diagnosis compares with."""
        self._first, self._lowest, self._is_resumed = None, {}, True
        for name in COUNTS:
            setattr(self, name, state[name])


def _crossed(limit: HealthLimit, values: Mapping[str, float]) -> list[str]:
    """Return one message for each statistic of any modality that crosses a limit; validation has no limits."""
    found = []
    for name, value in values.items():
        prefix, matches, _ = name.rpartition(limit.metric)
        if not matches or prefix + limit.metric != name or "valid/" in prefix:
            continue
        if limit.least is not None and value < limit.least:
            found.append(f"{name} is {value:.3g}, floor {limit.least:.3g}: {limit.cause}")
        if limit.most is not None and value > limit.most:
            found.append(f"{name} is {value:.3g}, ceiling {limit.most:.3g}: {limit.cause}")
    return found
