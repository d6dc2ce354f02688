"""Learning rate and EMA decay as pure functions of the number of finished updates (spec sections 9 and 12)."""

import math
from dataclasses import dataclass

from d2v2ds.errors import below


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Linear warm-up, then half a cosine down to the minimum."""

    peak: float
    """Highest learning rate."""
    warmup_steps: int
    """Optimizer steps of the warm-up."""
    minimum: float = 0.0
    """Learning rate at step 0 and at the last step."""

    def check(self) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        return below(self, "lr.", peak=0, warmup_steps=0, minimum=0)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Decay of the teacher: linear from start to end, then constant."""

    start_decay: float
    """Weight kept by the teacher at the first update."""
    end_decay: float
    """Weight kept once annealed; exactly 1 freezes the teacher, as in the published large audio recipe."""
    anneal_steps: int
    """Optimizer steps from start to end."""

    def check(self) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        problems = []
        for name in ("start_decay", "end_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                problems.append(f"ema.{name} is {getattr(self, name)}, expected 0 to 1")
        if self.anneal_steps < 0:
            problems.append(f"ema.anneal_steps is {self.anneal_steps}, expected 0 or more")
        return problems


def learning_rate(num_updates: int, config: LearningRateConfig, total_steps: int) -> float:
    """The rate used by the next update; the very first update has the minimum, i.e. usually 0.

    Args:
        num_updates: finished optimizer updates.
        config: peak, warm-up, minimum.
        total_steps: updates of the whole run.
    """
    if num_updates < config.warmup_steps:
        return config.minimum + (config.peak - config.minimum) * num_updates / config.warmup_steps
    progress = min((num_updates - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    return config.minimum + 0.5 * (config.peak - config.minimum) * (1.0 + math.cos(math.pi * progress))


def ema_decay(num_updates: int, config: EmaConfig) -> float:
    """The decay of the teacher update that follows optimizer update number `num_updates` (1 or more)."""
    if num_updates >= config.anneal_steps:
        return config.end_decay
    return config.end_decay - (config.end_decay - config.start_decay) * (1.0 - num_updates / config.anneal_steps)
