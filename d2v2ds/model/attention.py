"""Self-attention with an additive distance bias: one function, four implementations.

`explicit` computes all logits; tests compare the others with it. `rowwise` is for training on a CPU. `sdpa` is
PyTorch's fused attention with a float bias. `flex` is FlexAttention, which computes the bias inside the kernel.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.model.alibi import DistanceBias
from d2v2ds.model.cpu.attention import rowwise
from d2v2ds.model.cpu.dropout import dropout

AttentionPath = Literal["auto", "explicit", "rowwise", "sdpa", "flex"]
"""Implementation of attention. `auto`: rowwise for training on a CPU, SDPA otherwise."""

DENSE_PATHS = ("explicit", "sdpa")
"""Paths that read `DistanceBias.dense`."""


def resolve_path(path: AttentionPath, device: torch.device) -> AttentionPath:
    """Replace `auto` by the implementation it stands for on this device."""
    if path != "auto":
        return path
    return "rowwise" if device.type == "cpu" and torch.is_grad_enabled() else "sdpa"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: DistanceBias | None,
    *,
    dropout_rate: float = 0.0,
    path: AttentionPath = "auto",
) -> Tensor:
    """Compute softmax(q k^T / sqrt(Dh) + bias) v.

    Args:
        q, k, v: (R, H, N, Dh).
        bias: distance penalty and padded keys, or None.
        dropout_rate: dropped fraction of the probabilities; 0 outside training.
        path: implementation; `flex` cannot drop probabilities.

    Returns:
        (R, H, N, Dh).
    """
    return PATHS[resolve_path(path, q.device)](q, k, v, bias, dropout_rate)


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias | None, dropout_rate: float) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (R, H, N, N)
    dense = None if bias is None else bias.to_dense()
    if dense is not None:
        logits = logits + dense  # fp32 for any dtype of q
    probs = logits.float().softmax(dim=-1).to(v.dtype)
    return dropout(probs, dropout_rate, training=True) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias | None, dropout_rate: float) -> Tensor:
    dense = None if bias is None else bias.to_dense()
    mask = None if dense is None else dense.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_rate)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias | None, dropout_rate: float) -> Tensor:
    if dropout_rate:
        raise ValueError(
            f"attention path 'flex': attention_dropout is {dropout_rate}, but the kernel cannot drop "
            "probabilities; set model.attention_dropout=0 or use path 'sdpa'"
        )
    from torch.nn.attention.flex_attention import flex_attention

    run: Any = _compiled_flex() if q.device.type == "cuda" else flex_attention
    if bias is None:
        return run(q, k, v)
    positions, penalty, padding = bias.positions.float(), bias.penalty, bias.padding
    shared = positions.shape[0] == 1  # one row of positions serves every sample

    def score(logit: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if penalty is not None:
            place = row * 0 if shared else row
            logit = logit - penalty[head] * (positions[place, query] - positions[place, key]).abs()
        if padding is not None:
            logit = torch.where(padding[row, key], float("-inf"), logit)
        return logit

    return run(q, k, v, score_mod=score)


PATHS: dict[str, Callable[[Tensor, Tensor, Tensor, DistanceBias | None, float], Tensor]] = {
    "explicit": _explicit,
    "rowwise": rowwise,
    "sdpa": _sdpa,
    "flex": _flex,
}


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int, *, attention_dropout: float, path: AttentionPath) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.path = path
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: DistanceBias | None) -> Tensor:
        """(R, N, D) -> (R, N, D)."""
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (R, H, N, Dh)
        rate = self.attention_dropout if self.training else 0.0
        x = attend(q, k, v, bias, dropout_rate=rate, path=self.path)
        x = x.transpose(1, 2).reshape(rows, length, width)  # (R, N, D)
        return self.proj(x)
