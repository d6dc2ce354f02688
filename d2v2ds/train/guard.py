"""Checks on a running job: steps that are not finite, rows that cannot be read, and collapse."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from d2v2ds.bounds import Bounds, Count, CountOrZero, PositiveOrZero
from d2v2ds.errors import CollapseError, DamagedDataError, NonFiniteError
from d2v2ds.objectives.protocol import HealthLimit

logger = logging.getLogger(__name__)

_COUNTS = ("nonfinite_in_a_row", "nonfinite_total", "damaged_rows")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Limits at which a run warns and stops."""

    max_nonfinite_steps: Count = 10
    """Skipped steps in a row (loss or gradient not finite) after which the run goes back to its last good checkpoint,
    and on with the data that follows."""
    max_rollbacks: CountOrZero = 3
    """Returns to one and the same checkpoint; the next one ends the run instead."""
    max_damaged_rows: CountOrZero = 100
    """Rows that could not be read and were left out, counted over the whole run, that end it."""
    min_effective_rank: PositiveOrZero = 8.0
    """Floor of the targets' effective rank; healthy small runs have 50 to 58 of 192, collapsed ones 2 to 5."""
    max_position_share: PositiveOrZero = 0.2
    """Ceiling of the fraction of the targets' variance that follows the position; healthy 0.01 to 0.04."""
    min_std: PositiveOrZero = 0.05
    """Floor of the standard deviation of targets and predictions (the reference stops at 0.1 and 0.01)."""
    warm_up_steps: CountOrZero = 100
    """Optimizer steps before a collapse is looked for."""
    stop_on_collapse: bool = False
    """Raise `CollapseError` instead of warning."""
    late_factor: Annotated[float, Bounds(ge=1)] = 10.0
    """A step that takes this many times the median of the last ones is looked into: which rank is late, and where."""
    late_seconds: Annotated[float, Bounds(ge=0.1)] = 60.0
    """But never before so many seconds."""


class Guard:
    """Counts bad steps and names collapses. Every rank feeds it the same numbers, so every rank decides alike."""

    def __init__(self, config: HealthConfig, limits: Sequence[HealthLimit]) -> None:
        """
        Args:
            config: when to warn and when to stop.
            limits: bounds of the objective's health statistics.
        """
        self.config, self._limits = config, limits
        self.nonfinite_in_a_row = 0
        self.nonfinite_total = 0
        self.damaged_rows = 0

    def after_step(self, step: int, applied: bool) -> bool:
        """Count a skipped step.

        Returns:
            Whether the run should go back to its last good checkpoint.
        """
        if applied:
            self.nonfinite_in_a_row = 0
            return False
        self.nonfinite_in_a_row += 1
        self.nonfinite_total += 1
        logger.warning("step %d skipped: gradient is not finite (%d in a row)", step, self.nonfinite_in_a_row)
        return self.nonfinite_in_a_row >= self.config.max_nonfinite_steps

    def after_rollback(self, step: int, rollbacks: int) -> None:
        """Begin to count anew at a checkpoint.

        Args:
            step: at which the run stood.
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
        """Message of a run that ends after too many steps that are not finite."""
        return (
            f"step {step}: {self.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite, {when}; "
            "lower lr.peak, set optim.clip_norm, or look at the inputs named in bad_batches.jsonl"
        )

    def after_reading(self, damaged: int) -> None:
        """Count rows that were left out of the last step, on all ranks together.

        Raises:
            DamagedDataError: too many over the whole run.
        """
        self.damaged_rows += damaged
        if self.damaged_rows > self.config.max_damaged_rows:
            raise DamagedDataError(
                f"{self.damaged_rows} rows could not be read and were left out so far, health.max_damaged_rows allows "
                f"{self.config.max_damaged_rows}; the warnings above name them: run python -m preprocessing.verify on "
                "the folder, copy its shards again, and start the same command"
            )

    def check_health(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Compare health statistics with their floors.

        Args:
            step: of the statistics.
            values: metrics by name.

        Returns:
            One sentence for each crossed floor: value, floor, likely cause.

        Raises:
            CollapseError: if a floor is crossed and the run asks to stop there.
        """
        if step < self.config.warm_up_steps:
            return []
        alarms = [alarm for limit in self._limits for alarm in _crossed(limit, values)]
        for alarm in alarms:
            logger.warning("step %d: possible collapse: %s", step, alarm)
        if alarms and self.config.stop_on_collapse:
            raise CollapseError(f"step {step}: " + "; ".join(alarms))
        return alarms

    def state_dict(self) -> dict[str, int]:
        """Counters that a resumed run continues from."""
        return {name: getattr(self, name) for name in _COUNTS}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The counterpart of `state_dict`."""
        for name in _COUNTS:
            setattr(self, name, state[name])


def _crossed(limit: HealthLimit, values: Mapping[str, float]) -> list[str]:
    """Return one message for each statistic that crosses a limit, of every modality; validation has no limits."""
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
