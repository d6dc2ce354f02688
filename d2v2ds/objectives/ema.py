"""Decay of the teacher as a pure function of the optimizer step number (arXiv 2212.07525, section 3)."""

from dataclasses import dataclass

from d2v2ds.bounds import Amount, Share


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Decay of the teacher: linear from start to end, then constant."""

    start_decay: Share
    """Weight kept by the teacher at the first update."""
    end_decay: Share
    """Weight kept once annealed; exactly 1 freezes the teacher, as in the published large audio recipe."""
    anneal_steps: Amount
    """Optimizer steps from start to end."""

    def scaled(self, ratio: float) -> dict[str, float]:
        """Return the settings of a global batch `ratio` times as large, equivalent per sample (arXiv 2307.13813)."""
        return {
            "ema.start_decay": self.start_decay**ratio,
            "ema.end_decay": self.end_decay**ratio,
            "ema.anneal_steps": round(self.anneal_steps / ratio),
        }


def ema_decay(step_number: int, config: EmaConfig) -> float:
    """Return the decay of the teacher update that follows an optimizer step: 1 for the first, skipped steps counted."""
    if step_number >= config.anneal_steps:
        return config.end_decay
    return config.end_decay - (config.end_decay - config.start_decay) * (1.0 - step_number / config.anneal_steps)
