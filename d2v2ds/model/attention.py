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


def resolve_path(path: AttentionPath, device: torch.device, *, needs_dense: bool = False) -> AttentionPath:
    """Replace `auto` by the implementation it stands for on this device.

    Args:
        path: from the settings.
        device: of the input.
        needs_dense: the bias is one that `rowwise` does not compute, see `DistanceBias.needs_dense`.
    """
    if path == "auto":
        path = "rowwise" if device.type == "cpu" and torch.is_grad_enabled() else "sdpa"
    return "explicit" if path == "rowwise" and needs_dense else path


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
    needs_dense = bias is not None and bias.needs_dense
    return PATHS[resolve_path(path, q.device, needs_dense=needs_dense)](q, k, v, bias, dropout_rate)


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
    positions, penalty, padding, table = bias.positions.float(), bias.penalty, bias.padding, bias.table
    shared = positions.shape[0] == 1  # one row of positions serves every sample

    def score(logit: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if penalty is not None:
            place = row * 0 if shared else row
            logit = logit - penalty[head] * (positions[place, query] - positions[place, key]).abs()
        if table is not None:
            logit = logit + table[head, query, key]
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


class QueryValueBias(nn.Module):
    """Biases of queries and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(width))
        self.values = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every bias to zero."""
        nn.init.zeros_(self.queries)
        nn.init.zeros_(self.values)

    def forward(self, qkv: Tensor) -> Tensor:
        """(R, N, 3D) -> (R, N, 3D)."""
        return qkv + torch.cat((self.queries, torch.zeros_like(self.queries), self.values))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        attention_dropout: float,
        path: AttentionPath,
        has_key_bias: bool = True,
        has_gate: bool = False,
    ) -> None:
        """
        Args:
            width: D.
            num_heads: H.
            attention_dropout: dropped fraction of the probabilities in training.
            path: implementation.
            has_key_bias: False leaves out the bias of the keys.
            has_gate: multiply the channels of all heads by a sigmoid of a projection of the input.
        """
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.path = path
        self.qkv = nn.Linear(width, 3 * width, bias=has_key_bias)
        if not has_key_bias:
            self.bias = QueryValueBias(width)
        if has_gate:
            self.gate = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: DistanceBias | None) -> Tensor:
        """(R, N, D) -> (R, N, D)."""
        rows, length, width = x.shape
        projected = self.qkv(x)
        if hasattr(self, "bias"):
            projected = self.bias(projected)
        qkv = projected.view(rows, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (R, H, N, Dh)
        rate = self.attention_dropout if self.training else 0.0
        mixed = attend(q, k, v, bias, dropout_rate=rate, path=self.path)
        mixed = mixed.transpose(1, 2).reshape(rows, length, width)  # (R, N, D)
        if hasattr(self, "gate"):
            mixed = mixed * self.gate(x).sigmoid()
        return self.proj(mixed)
