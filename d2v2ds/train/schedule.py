"""Learning rate as a pure function of the number of finished optimizer steps."""

import math
from dataclasses import dataclass

from d2v2ds.bounds import CountOrZero, PositiveOrZero


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Linear warm-up, then half a cosine down to the minimum."""

    peak: PositiveOrZero
    """Highest learning rate."""
    warmup_steps: CountOrZero
    """Optimizer steps of the warm-up."""
    minimum: PositiveOrZero = 0.0
    """Learning rate at step 0 and at the last step."""


def learning_rate(finished_steps: int, config: LearningRateConfig, total_steps: int) -> float:
    """Return the learning rate of the next update; the first update has the minimum, usually 0.

    Args:
        finished_steps: finished optimizer steps, skipped ones included; 0 before the first.
        config: peak, warm-up, minimum.
        total_steps: updates of the whole run.
    """
    if finished_steps < config.warmup_steps:
        return config.minimum + (config.peak - config.minimum) * finished_steps / config.warmup_steps
    progress = min((finished_steps - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    return config.minimum + 0.5 * (config.peak - config.minimum) * (1.0 + math.cos(math.pi * progress))
