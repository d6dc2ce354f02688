"""Transformer block of prenets, shared trunk and teacher.

data2vec 2.0 is post-norm in every published configuration. Its official code
(examples/data2vec/models/modalities/modules.py) also has a pre-norm branch that drops the residual stream; no published
configuration uses it. The pre-norm block here keeps the stream, as data2vec 1.0 for images and MAE do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.bounds import Positive, Rate, Share, Width, WidthRatio
from d2v2ds.model.alibi import DistanceBias
from d2v2ds.model.attention import Attention, AttentionPath
from d2v2ds.model.cpu.dropout import add_dropped, dropout

TargetLayer = Literal["attention", "feed_forward", "feed_forward_residual", "block"]
"""Tensor of a block from which targets are made (arXiv 2202.03555, section 5.3, "target layers"): the output of the
attention, of the feed-forward layers, of these with their residual, or of the whole block. Pre-norm blocks have no norm
behind the last residual, so that the last two are one."""


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Settings that all blocks of a model share."""

    width: Width
    """D, width of the model."""
    num_heads: Width
    """H, number of heads; divides the width."""
    mlp_ratio: WidthRatio = 4.0
    """Width of the feed-forward layer over D."""
    norm_eps: Share = 1e-5
    """Epsilon of the block norms (audio and text 1e-5, images 1e-6)."""
    attention_dropout: Rate = 0.1
    """Dropped fraction of attention probabilities."""
    attention_output_dropout: Rate = 0.1
    """Dropped fraction after the attention projection (official name: `encoder_dropout`)."""
    activation_dropout: Rate = 0.0
    """Dropped fraction after GELU, and again after the second feed-forward layer."""
    mlp_dropout: Rate = 0.1
    """Dropped fraction of the feed-forward output in the residual branch (official name: `post_mlp_drop`)."""
    attention_path: AttentionPath = "auto"
    """Implementation of attention."""
    pre_norm: bool = False
    """Normalise the input of attention and feed-forward, and not their sum with the residual; a norm then follows the
    last block of the trunk. data2vec 1.0 for images (arXiv 2202.03555) and MAE (arXiv 2111.06377)."""
    layer_scale: Positive | None = None
    """First value of a learned factor on each channel of both branches (arXiv 2103.17239); None for no factors."""
    key_bias: bool = True
    """Add a bias to the keys. It shifts all logits of a query alike: without it the output is the same, with fewer
    parameters, as in BEiT (arXiv 2106.08254)."""
    attention_gate: bool = False
    """Multiply the attention's channels by a sigmoid of a projection of its input (arXiv 2602.16305)."""

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        problems = []
        if self.width % self.num_heads:
            problems.append(f"block: width {self.width} is not divisible by num_heads {self.num_heads}")
        if self.attention_path == "flex" and self.attention_dropout:
            problems.append(
                f"block: attention_path 'flex' cannot drop probabilities, attention_dropout is {self.attention_dropout}"
            )
        return problems


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, int(config.width * config.mlp_ratio))
        self.fc2 = nn.Linear(int(config.width * config.mlp_ratio), config.width)
        self.activation_dropout = config.activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, D)."""
        x = dropout(F.gelu(self.fc1(x)), self.activation_dropout, self.training)
        return dropout(self.fc2(x), self.activation_dropout, self.training)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch for whole samples in training."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0
        """Dropped fraction of the samples; see `set_drop_path`."""

    def forward(self, branch: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, D), with zeros for dropped samples and the others divided by their share."""
        if not self.training or not self.rate:
            return branch
        return branch * self.factors(branch)[:, None, None]

    def factors(self, branch: Tensor) -> Tensor:
        """Draw (R,): 0 or 1 / (1 - rate)."""
        kept = torch.rand(len(branch), device=branch.device) >= self.rate
        return kept.to(branch.dtype) / (1.0 - self.rate)


class LayerScale(nn.Module):
    """Learned factor on each channel."""

    def __init__(self, width: int, first: float) -> None:
        super().__init__()
        self.first = first
        self.factors = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to its first value."""
        nn.init.constant_(self.factors, self.first)

    def forward(self, x: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, D)."""
        return x * self.factors


class Block(nn.Module):
    """Attention and feed-forward, each added to its input; norms behind the sums, or in front of the two."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.attn = Attention(
            config.width,
            config.num_heads,
            attention_dropout=config.attention_dropout,
            path=config.attention_path,
            has_key_bias=config.key_bias,
            has_gate=config.attention_gate,
        )
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention_output_dropout = config.attention_output_dropout
        self.mlp_dropout = config.mlp_dropout
        self.pre_norm = config.pre_norm
        if config.layer_scale is not None:
            self.attention_scale = LayerScale(config.width, config.layer_scale)
            self.mlp_scale = LayerScale(config.width, config.layer_scale)
        self.attention_drop_path, self.mlp_drop_path = DropPath(), DropPath()

    def forward(
        self, x: Tensor, bias: DistanceBias | None, target: TargetLayer = "feed_forward"
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: (R, N, D).
            bias: added to the attention logits.
            target: tensor that is returned beside the output.

        Returns:
            The block's output (R, N, D), and the tensor (R, N, D) from which a teacher's targets are made: a branch is
            taken before dropout, residual and norm, and behind its layer scale.
        """
        attended = self._scaled("attention_scale", self.attn(self.norm1(x) if self.pre_norm else x, bias))
        x = add_dropped(x, self.attention_drop_path(attended), self.attention_output_dropout, self.training)
        x = x if self.pre_norm else self.norm1(x)
        fed = self._scaled("mlp_scale", self.mlp(self.norm2(x) if self.pre_norm else x))
        total = add_dropped(x, self.mlp_drop_path(fed), self.mlp_dropout, self.training)
        out = total if self.pre_norm else self.norm2(total)
        if target == "feed_forward":
            return out, fed
        return out, {"attention": attended, "feed_forward_residual": total, "block": out}[target]

    def _scaled(self, name: str, branch: Tensor) -> Tensor:
        return getattr(self, name)(branch) if hasattr(self, name) else branch


def set_drop_path(blocks: Sequence[Block], rate: float, shared_depth: int) -> None:
    """Set the stochastic depth of prenet and shared blocks, in that order.

    The official code spreads the rates over the shared depth alone: v = linspace(0, rate, shared); prenet blocks have
    linspace(v[0], v[prenet - 1], prenet), the others linspace(v[prenet], v[shared - 1], shared).
    """
    for block, own in zip(blocks, drop_path_rates(len(blocks) - shared_depth, shared_depth, rate), strict=True):
        block.attention_drop_path.rate = block.mlp_drop_path.rate = own


def drop_path_rates(prenet_depth: int, shared_depth: int, rate: float) -> list[float]:
    """Return the rate of every block, prenet first; see `set_drop_path`."""
    spread = _line(0.0, rate, shared_depth)

    def at(index: int) -> float:
        return spread[min(max(index, 0), shared_depth - 1)]

    prenet = _line(at(0), at(prenet_depth - 1), prenet_depth)
    return prenet + _line(at(prenet_depth), at(shared_depth - 1), shared_depth)


def _line(first: float, last: float, count: int) -> list[float]:
    """Return numbers at equal distances."""
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]
