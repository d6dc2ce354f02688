"""Learning rate as a pure function of the number of finished updates."""

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


def learning_rate(num_updates: int, config: LearningRateConfig, total_steps: int) -> float:
    """Return the learning rate of the next update; the first update has the minimum, usually 0.

    Args:
        num_updates: finished optimizer updates.
        config: peak, warm-up, minimum.
        total_steps: updates of the whole run.
    """
    if num_updates < config.warmup_steps:
        return config.minimum + (config.peak - config.minimum) * num_updates / config.warmup_steps
    progress = min((num_updates - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    return config.minimum + 0.5 * (config.peak - config.minimum) * (1.0 + math.cos(math.pi * progress))
