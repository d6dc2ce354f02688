"""Targets: the average of the teacher's top layers (arXiv 2212.07525, section 3). Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v2ds.bounds import Count, Share
from d2v2ds.model.block import TargetLayer

NormKind = Literal["instance", "layer", "batch"]
"""instance: each channel of a sample over its tokens; layer: each token over its channels;
batch: each channel over all tokens of all samples. All are without gain and bias."""


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Settings of the targets."""

    num_layers: Count
    """Top shared blocks averaged; prenet blocks are never targets."""
    layer: TargetLayer = "feed_forward"
    """Tensor of a block; all published data2vec 2.0 models have `feed_forward`."""
    layer_norms: tuple[NormKind, ...]
    """Normalisation of each layer before the average."""
    final_norms: tuple[NormKind, ...] = ()
    """Normalisation of the average."""
    norm_eps: Share = 1e-5
    """Epsilon of these norms; 1e-6 in BAT (arXiv 2602.16305)."""

    def check(self, shared_depth: int) -> list[str]:
        """Return a message if there are fewer shared blocks than layers to average."""
        if self.num_layers > shared_depth:
            return [f"target.num_layers is {self.num_layers}, expected 1 to shared_depth ({shared_depth})"]
        return []


def instance_norm(x: Tensor, eps: float) -> Tensor:
    """Normalise (B, T, D) to zero mean and unit (biased) variance over T, padded tokens included."""
    if x.shape[1] < 2:
        raise ValueError(f"instance norm over tokens needs at least 2 of them, found {tuple(x.shape)} (B, T, D)")
    var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + eps)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Normalise (B, T, D) to zero mean and unit variance over D."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def batch_norm(x: Tensor, eps: float) -> Tensor:
    """Normalise (B, T, D) to zero mean and unit (biased) variance over B and T."""
    var, mean = torch.var_mean(x, dim=(0, 1), keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + eps)


NORMS: dict[NormKind, Callable[[Tensor, float], Tensor]] = {
    "instance": instance_norm,
    "layer": layer_norm,
    "batch": batch_norm,
}


def make_targets(layers: Sequence[Tensor], config: TargetConfig) -> Tensor:
    """Average the last layers in fp32.

    Args:
        layers: (B, T, D) of every shared block, in order; see `Trunk.target_layers`.
        config: number of layers and norms.

    Returns:
        (B, T, D) fp32.
    """
    total: Tensor | None = None
    for layer in layers[-config.num_layers :]:
        x = layer.float()
        for kind in config.layer_norms:
            x = NORMS[kind](x, config.norm_eps)
        total = x if total is None else total + x
    assert total is not None
    total = total / config.num_layers
    for kind in config.final_norms:
        total = NORMS[kind](total, config.norm_eps)
    return total
