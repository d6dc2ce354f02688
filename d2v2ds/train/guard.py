"""Checks on a running job: steps that are not finite, and collapse."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from d2v2ds.errors import CollapseError, NonFiniteError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When to warn and when to stop."""

    max_nonfinite_steps: int = 10
    """Skipped steps in a row (loss or gradient not finite) that end the run."""
    min_effective_rank: float = 8.0
    """Floor of the targets' effective rank; healthy small runs have 50 to 58 of 192, collapsed ones 2 to 5."""
    max_position_share: float = 0.2
    """Ceiling of the fraction of the targets' variance that follows the position; healthy 0.01 to 0.04."""
    min_std: float = 0.05
    """Floor of the standard deviation of targets and predictions (the reference stops at 0.1 and 0.01)."""
    warm_up_steps: int = 100
    """Optimizer steps before a collapse is looked for."""
    stop_on_collapse: bool = False
    """Raise `CollapseError` instead of warning."""


class Guard:
    """Counts bad steps and names collapses. Every rank feeds it the same numbers, so every rank decides alike."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.nonfinite_in_a_row = 0
        self.nonfinite_total = 0

    def after_step(self, step: int, applied: bool) -> None:
        """Count a skipped step.

        Raises:
            NonFiniteError: too many in a row.
        """
        if applied:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        self.nonfinite_total += 1
        logger.warning("step %d skipped: gradient is not finite (%d in a row)", step, self.nonfinite_in_a_row)
        if self.nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            raise NonFiniteError(
                f"step {step}: {self.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite; "
                "lower lr.peak, set optim.clip_norm, or look at the inputs; the last checkpoint is intact"
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
        prefixes = [name.removesuffix("target/std") for name in values if name.endswith("target/std")]
        alarms = [alarm for prefix in prefixes or [""] for alarm in self._alarms(values, prefix)]
        for alarm in alarms:
            logger.warning("step %d: possible collapse: %s", step, alarm)
        if alarms and self.config.stop_on_collapse:
            raise CollapseError(f"step {step}: " + "; ".join(alarms))
        return alarms

    def _alarms(self, values: Mapping[str, float], prefix: str) -> list[str]:
        """The crossed floors of one modality; a prefix such as `audio/` says of which."""
        low_rank = "the targets have become a code of few dimensions; raise the EMA decay, lower lr.peak"
        floors = [
            ("target/effective_rank", self.config.min_effective_rank, low_rank),
            ("local/effective_rank", min(self.config.min_effective_rank, 1.5), "the local encoder has collapsed"),
            ("target/std", self.config.min_std, "the targets hardly vary between tokens"),
            ("pred/std", min(self.config.min_std, 0.01), "the predictions hardly vary between tokens"),
        ]
        alarms = [
            f"{prefix}{name} is {values[prefix + name]:.3g}, floor {floor:.3g}: {cause}"
            for name, floor, cause in floors
            if prefix + name in values and values[prefix + name] < floor
        ]
        name, ceiling = f"{prefix}target/position_share", self.config.max_position_share
        if name in values and values[name] > ceiling:
            alarms.append(
                f"{name} is {values[name]:.3g}, ceiling {ceiling:.3g}: the targets have become a code of position; "
                "for small runs set share_local_encoder=false in the model's settings of the modality"
            )
        return alarms

    def state_dict(self) -> dict[str, int]:
        """What a resumed run goes on counting from."""
        return {"nonfinite_in_a_row": self.nonfinite_in_a_row, "nonfinite_total": self.nonfinite_total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The counterpart of `state_dict`."""
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self.nonfinite_total = state["nonfinite_total"]
