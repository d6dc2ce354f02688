"""Learning rate as a pure function of the number of finished optimizer steps.

The shapes are those of the official code: half a cosine, three stages ("tri-stage", arXiv 1904.08779), a polynomial.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from d2v2ds.bounds import Count, CountOrZero, Positive, PositiveOrZero, Share

_LOG_FLOOR = 1e-30


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Linear warm-up, then the decay of a shape."""

    peak: PositiveOrZero
    """Highest learning rate."""
    warmup_steps: CountOrZero
    """Optimizer steps of the warm-up."""
    minimum: PositiveOrZero = 0.0
    """Learning rate at the last step; of a cosine also at step 0."""
    shape: Literal["cosine", "tri_stage", "polynomial"] = "cosine"
    """Half a cosine to the minimum; a plateau, then an exponential; or (1 - progress)^power, from a warm-up that begins
    at 0."""
    hold_steps: CountOrZero = 0
    """Tri-stage: steps of the plateau."""
    decay_steps: Count | None = None
    """Tri-stage: steps of the decay; None: the rest of the run."""
    start_scale: Share = 0.01
    """Tri-stage: learning rate at step 0 over the peak."""
    final_scale: Share = 0.01
    """Tri-stage: learning rate at the end over the peak."""
    power: Positive = 1.0
    """Polynomial: exponent."""


def learning_rate(finished_steps: int, config: LearningRateConfig, total_steps: int, scale: float = 1.0) -> float:
    """Return the learning rate of the next update.

    Args:
        finished_steps: finished optimizer steps, skipped ones included; 0 before the first.
        config: settings.
        total_steps: updates of the whole run.
        scale: of the peak, for a group of parameters. The minimum is not scaled; a peak below it is a constant rate,
            as in the official code.
    """
    peak = config.peak * scale
    return _SHAPES[config.shape](finished_steps, config, total_steps, peak, min(config.minimum, peak))


def _cosine(n: int, config: LearningRateConfig, total: int, peak: float, least: float) -> float:
    if n < config.warmup_steps:
        return least + (peak - least) * n / config.warmup_steps
    progress = min((n - config.warmup_steps) / max(total - config.warmup_steps, 1), 1.0)
    return least + 0.5 * (peak - least) * (1.0 + math.cos(math.pi * progress))


def _tri_stage(n: int, config: LearningRateConfig, total: int, peak: float, least: float) -> float:
    warm, start = config.warmup_steps, config.start_scale * peak
    if n < warm:
        return start + (peak - start) * n / warm
    begin = warm + config.hold_steps
    decay = config.decay_steps or max(total - begin, 1)
    if n < begin:
        return peak
    if n <= begin + decay:
        return peak * math.exp(math.log(max(config.final_scale, _LOG_FLOOR)) * (n - begin) / decay)
    return config.final_scale * peak


def _polynomial(n: int, config: LearningRateConfig, total: int, peak: float, least: float) -> float:
    if config.warmup_steps and n <= config.warmup_steps:
        return peak * n / config.warmup_steps
    if n >= total:
        return least
    progress = (n - config.warmup_steps) / max(total - config.warmup_steps, 1)
    return least + (peak - least) * math.pow(1.0 - progress, config.power)


_Shape = Callable[[int, LearningRateConfig, int, float, float], float]
_SHAPES: dict[str, _Shape] = {
    "cosine": _cosine,
    "tri_stage": _tri_stage,
    "polynomial": _polynomial,
}
