"""Adam as the official code of data2vec computes it (fairseq/optim/adam.py): decoupled decay on every parameter, norms
and biases included, and epsilon added to sqrt(v) *before* bias correction. Settings switch to the rules of MAE."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2v2ds.bounds import Positive, PositiveOrZero, Rate

Decays = Callable[[str, nn.Parameter], bool]
LrScale = Callable[[str], float]
HeldSteps = Callable[[str], int]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of the optimizer."""

    betas: tuple[Rate, Rate]
    """Decay of the first and second moment."""
    eps: Positive
    """Added to sqrt(v)."""
    early_eps: bool = True
    """Add it before bias correction, as fairseq does; False: behind it, as torch does (MAE, BEiT)."""
    weight_decay: PositiveOrZero
    """Decoupled, times the learning rate."""
    decay_vectors: bool = True
    """Decay all parameters: the exclusions in the published files of data2vec have no effect. False: those that the
    objective names, all but biases and norms and the like (MAE, BEiT)."""
    clip_norm: PositiveOrZero = 0.0
    """Maximum global gradient norm; 0 switches clipping off."""


def parameter_groups(
    network: nn.Module,
    lr_scale: LrScale,
    held_steps: HeldSteps,
    *,
    decay_vectors: bool = True,
    decays: Decays = lambda name, parameter: parameter.ndim > 1,
) -> list[dict[str, Any]]:
    """Divide the trained parameters of a network into groups of one learning rate, one first step and one decay.

    Args:
        network: before the engine is built.
        lr_scale: name of a parameter -> its learning rate over that of the step.
        held_steps: name of a parameter -> first optimizer steps that leave it as it is.
        decay_vectors: False gives some parameters groups with `weight_decay` 0.
        decays: name and parameter -> False for those parameters; by default those of one dimension.

    Returns:
        Groups for a torch optimizer with `name`, `lr_scale` and `held_steps`, in the order of their first parameters.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            scale, held = lr_scale(name), held_steps(name)
            has_decay = decay_vectors or decays(name, parameter)
            key = f"x{scale:g}" + (f" after {held}" if held else "") + ("" if has_decay else " without decay")
            new = {"params": [], "name": key, "lr_scale": scale, "held_steps": held}
            new |= {} if has_decay else {"weight_decay": 0.0}
            groups.setdefault(key, new)["params"].append(parameter)
    return list(groups.values())


class EarlyEpsilonAdam(torch.optim.AdamW):
    """`torch.optim.AdamW` with fairseq's use of epsilon, unless `OptimConfig.early_eps` is False.

    torch divides by sqrt(v) / sqrt(1 - b2^t) + eps, the official code by (sqrt(v) + eps) / sqrt(1 - b2^t). An epsilon
    of eps / sqrt(1 - b2^t) makes the two equal, so torch's fused kernels can be used.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, config: OptimConfig) -> None:
        super().__init__(
            params, lr=lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        self.unscaled_eps, self.early_eps = config.eps, config.early_eps

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient.

        A group with `is_held` has learning rate 0 and gradients of zero: its moments stay zero, and it counts no steps.
        """
        for group in self.param_groups if self.early_eps else ():
            group["eps"] = self.unscaled_eps / (1.0 - group["betas"][1] ** self._next_step(group)) ** 0.5
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"] if group.get("is_held") else ():
                if state := self.state.get(parameter):
                    state["step"].zero_()
        return result

    def _next_step(self, group: dict[str, Any]) -> int:
        for parameter in group["params"]:
            state = self.state.get(parameter)
            if state:
                return int(state["step"]) + 1
        return 1
