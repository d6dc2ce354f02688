"""Transformer block of prenets, shared trunk and teacher.

It is post-norm, as in every published configuration. The official code (examples/data2vec/models/modalities/modules.py)
also has a pre-norm branch that drops the residual stream; no published configuration uses it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.bounds import Rate, Share, Width, WidthRatio
from d2v2ds.model.alibi import DistanceBias
from d2v2ds.model.attention import Attention, AttentionPath
from d2v2ds.model.cpu.dropout import add_dropped, dropout


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
        """Dropped fraction of the samples; a task that fine-tunes sets it."""

    def forward(self, branch: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, D), with zeros for dropped samples and the others divided by their share."""
        if not self.training or not self.rate:
            return branch
        return branch * self.factors(branch)[:, None, None]

    def factors(self, branch: Tensor) -> Tensor:
        """Draw (R,): 0 or 1 / (1 - rate)."""
        kept = torch.rand(len(branch), device=branch.device) >= self.rate
        return kept.to(branch.dtype) / (1.0 - self.rate)


class Block(nn.Module):
    """Attention and feed-forward, each added to its input and then normalised."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.attn = Attention(
            config.width,
            config.num_heads,
            attention_dropout=config.attention_dropout,
            path=config.attention_path,
        )
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention_output_dropout = config.attention_output_dropout
        self.mlp_dropout = config.mlp_dropout
        self.attention_drop_path, self.mlp_drop_path = DropPath(), DropPath()

    def forward(self, x: Tensor, bias: DistanceBias | None) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: (R, N, D).
            bias: added to the attention logits.

        Returns:
            The block's output (R, N, D), and `ffn_target` (R, N, D): the feed-forward output before residual, dropout
            and norm, from which the teacher's targets are made.
        """
        attended = self.attention_drop_path(self.attn(x, bias))
        x = self.norm1(add_dropped(x, attended, self.attention_output_dropout, self.training))
        ffn_target = self.mlp(x)
        out = add_dropped(x, self.mlp_drop_path(ffn_target), self.mlp_dropout, self.training)
        return self.norm2(out), ffn_target
