"""Heads: features of the last block -> outputs of a task. Each is one module behind a trunk."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.bounds import Positive, Rate, Share
from d2v2ds.model.cpu.dropout import dropout

PatchPooling = Literal["mean", "cls"]
FramePooling = Literal["linear_softmax", "mean", "mean_sigmoid", "max", "mean_features"]


@dataclass(frozen=True, kw_only=True)
class PatchHeadConfig:
    """Settings of a head for images: pooled patches, norm, linear layer."""

    kind: Literal["patches"] = "patches"
    pooling: PatchPooling = "mean"
    """Mean over the patches without extra tokens, or the first extra token."""
    norm: bool = True
    """Normalise the pooled vector."""
    norm_eps: Share = 1e-6
    """Epsilon of that norm."""
    init_std: Positive = 0.02
    """Standard deviation of the first weights (MAE: 2e-5)."""

    def build(self, width: int, num_outputs: int) -> "PatchHead":
        """Build the head."""
        return PatchHead(self, width, num_outputs)


@dataclass(frozen=True, kw_only=True)
class SentenceHeadConfig:
    """Settings of a head for sentences: first token, dense layer, tanh, linear layer."""

    kind: Literal["sentence"] = "sentence"
    dropout: Rate = 0.0
    """Dropped fraction before each of the two layers."""

    def build(self, width: int, num_outputs: int) -> "SentenceHead":
        """Build the head."""
        return SentenceHead(self, width, num_outputs)


@dataclass(frozen=True, kw_only=True)
class FrameHeadConfig:
    """Settings of a head for recordings: a linear layer on every frame, then pooling."""

    kind: Literal["frames"] = "frames"
    pooling: FramePooling = "linear_softmax"
    """How the frames of a recording become one value for each class: shares weighted by themselves, mean of logits,
    mean of shares, largest logit, or mean of features before the linear layer."""
    pool_padding: bool = False
    """True: padded frames, with features zero, are part of the pooling, as in the official code."""
    dropout: Rate = 0.0
    """Dropped fraction before the linear layer."""

    def build(self, width: int, num_outputs: int) -> "FrameHead":
        """Build the head."""
        return FrameHead(self, width, num_outputs)


HeadConfig = PatchHeadConfig | SentenceHeadConfig | FrameHeadConfig
"""Settings of any head that classifies; `kind` chooses."""


class OutputLayer(nn.Linear):
    """Linear layer that computes in fp32 whatever the precision of its weights and inputs, and returns fp32.

    An output in bf16 has three digits: numbers and logits that differ by less would be equal. The rest of the network
    takes hundreds of times as many operations.
    """

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


class PatchHead(nn.Module):
    """(B, E + T, D) -> (B, C) by the mean of all patches, or by a CLS token."""

    def __init__(self, config: PatchHeadConfig, width: int, num_outputs: int) -> None:
        super().__init__()
        self.pooling, self.init_std = config.pooling, config.init_std
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.norm else nn.Identity()
        self.proj = OutputLayer(width, num_outputs)

    def forward(self, features: Tensor, num_extra: int, padding: Tensor | None) -> Tensor:
        """
        Args:
            features: (B, E + T, D).
            num_extra: E.
            padding: None; images have none.
        """
        return self.proj(self.norm(self.pool(features, num_extra)))

    def pool(self, features: Tensor, num_extra: int) -> Tensor:
        """(B, E + T, D) -> (B, D)."""
        return features[:, 0] if self.pooling == "cls" else features[:, num_extra:].mean(1)

    def draw(self) -> None:
        """Draw the weights: truncated normal."""
        nn.init.trunc_normal_(self.proj.weight, std=self.init_std)
        nn.init.zeros_(self.proj.bias)


class SentenceHead(nn.Module):
    """(B, T, D) -> (B, C) by the first token."""

    def __init__(self, config: SentenceHeadConfig, width: int, num_outputs: int) -> None:
        super().__init__()
        self.rate = config.dropout
        self.dense = nn.Linear(width, width)
        self.proj = OutputLayer(width, num_outputs)

    def forward(self, features: Tensor, num_extra: int, padding: Tensor | None) -> Tensor:
        """See `PatchHead.forward`; `padding` is not read, for the first token is never padding."""
        first = dropout(features[:, num_extra], self.rate, self.training)
        hidden = torch.tanh(self.dense(first))
        return self.proj(dropout(hidden, self.rate, self.training))

    def draw(self) -> None:
        """Draw the weights from torch's default distribution."""
        self.dense.reset_parameters()
        self.proj.reset_parameters()


class FrameHead(nn.Module):
    """(B, T, D) -> (B, C) logits of recordings, pooled over frames."""

    def __init__(self, config: FrameHeadConfig, width: int, num_outputs: int) -> None:
        super().__init__()
        self.pooling, self.pool_padding, self.rate = config.pooling, config.pool_padding, config.dropout
        self.proj = OutputLayer(width, num_outputs)

    def forward(self, features: Tensor, num_extra: int, padding: Tensor | None) -> Tensor:
        """
        Args:
            features: (B, E + T, D).
            num_extra: E.
            padding: (B, T) bool, True = pad, or None.
        """
        frames = features[:, num_extra:]  # (B, T, D)
        if padding is not None:
            frames = frames.masked_fill(padding[..., None], 0)
        frames = dropout(frames, self.rate, self.training)
        hidden = None if padding is None or self.pool_padding else padding[..., None]  # (B, T, 1)
        if self.pooling == "mean_features":
            return self.proj(_mean(frames, hidden))
        return _POOLINGS[self.pooling](self.proj(frames), hidden)

    def draw(self) -> None:
        """Draw the weights from torch's default distribution."""
        self.proj.reset_parameters()


class TokenHead(nn.Module):
    """(B, T, D) -> (B, T, V): dropout and a linear layer on every token."""

    def __init__(self, width: int, num_outputs: int, rate: float) -> None:
        """
        Args:
            width: D.
            num_outputs: V.
            rate: dropped fraction before the layer.
        """
        super().__init__()
        self.rate = rate
        self.proj = OutputLayer(width, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(dropout(features, self.rate, self.training))

    def draw(self) -> None:
        """Draw the weights: Xavier uniform."""
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)


def _mean(values: Tensor, hidden: Tensor | None) -> Tensor:
    """(B, T, C), hidden (B, T, 1) -> (B, C)."""
    if hidden is None:
        return values.mean(1)
    return values.masked_fill(hidden, 0).sum(1) / (~hidden).sum(1)


def _log_sigmoid(logits: Tensor) -> Tensor:
    """ln sigmoid as -softplus(-x), which ONNX has; its logarithm of a sigmoid is -inf from about -18 on."""
    return -F.softplus(-logits)


def _log_sum(values: Tensor, hidden: Tensor | None) -> Tensor:
    """Logarithm of the sum of exp over frames, without hidden ones."""
    return (values if hidden is None else values.masked_fill(hidden, -math.inf)).logsumexp(1)


def _linear_softmax(logits: Tensor, hidden: Tensor | None) -> Tensor:
    """Logit of sum(s^2) / sum(s), s = sigmoid(logits) (arXiv 1810.09050), in log space."""
    log_share, log_rest = _log_sigmoid(logits), _log_sigmoid(-logits)
    return _log_sum(2 * log_share, hidden) - _log_sum(log_share + log_rest, hidden)


def _mean_sigmoid(logits: Tensor, hidden: Tensor | None) -> Tensor:
    """Logit of the mean of sigmoids."""
    return _log_sum(_log_sigmoid(logits), hidden) - _log_sum(_log_sigmoid(-logits), hidden)


def _max(logits: Tensor, hidden: Tensor | None) -> Tensor:
    return (logits if hidden is None else logits.masked_fill(hidden, -math.inf)).amax(1)


_POOLINGS: dict[FramePooling, Callable[[Tensor, Tensor | None], Tensor]] = {
    "linear_softmax": _linear_softmax,
    "mean": _mean,
    "mean_sigmoid": _mean_sigmoid,
    "max": _max,
}
