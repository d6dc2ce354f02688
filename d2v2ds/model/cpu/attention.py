"""Attention for training on a CPU: a few student rows at a time, with the gradient of the distance penalty.

No fused CPU kernel returns a gradient for an additive bias, and the explicit path reads R x H x N x N numbers several
times from main memory. The numbers of a few rows stay in the cache, and no dense bias is needed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from d2v2ds.model.alibi import DistanceBias
from d2v2ds.model.cpu.dropout import kept_scale, num_dropped_levels, random_signs

_CACHED_LOGITS = 1 << 18
"""Logits computed at a time: 1 MiB in fp32, but at least one row."""


def _slices(probs: Tensor) -> Iterator[slice]:
    """Split the rows of (R, H, N, N) probabilities into those computed at a time."""
    step = max(1, _CACHED_LOGITS // max(probs[0].numel(), 1)) if len(probs) else 1
    return (slice(start, start + step) for start in range(0, len(probs), step))


class _RowwiseAttention(torch.autograd.Function):
    """Attention that saves its probabilities P for the backward, negated where they were dropped.

    With W the probabilities after dropout and dW their gradient, that of the logits is W dW - P sum(W dW), the sum over
    keys: P dP = W dW where an element was kept, and both are 0 where it was dropped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        penalty: Tensor | None,
        positions: Tensor | None,
        padding: Tensor | None,
        dropped_levels: int,
    ) -> Tensor:
        """q, k, v (R, H, N, Dh); penalty (H,) fp32; positions (R or 1, N) fp32; padding (R, N) bool."""
        count, heads, length, width = q.shape
        signed = q.new_empty(count, heads, length, k.shape[2])  # (R, H, N, N)
        drawn = random_signs(signed.shape, dropped_levels) if dropped_levels else None
        out = q.new_empty(count, length, heads, width).transpose(1, 2)  # the memory order that the projection reads
        for rows in _slices(signed):
            logits = ((q[rows] * width**-0.5) @ k[rows].transpose(2, 3)).float()  # (r, H, N, N)
            if penalty is not None and positions is not None:
                logits.addcmul_(_distance(positions, rows)[:, None], penalty[:, None, None], value=-1)
            if padding is not None:
                logits.masked_fill_(padding[rows, None, None], float("-inf"))
            probs = signed[rows].copy_(torch.softmax(logits, -1, out=logits))
            if drawn is None:
                out[rows] = probs @ v[rows]
            else:
                kept = torch.copysign(probs, drawn[rows], out=probs).relu()
                out[rows] = (kept @ v[rows]).mul_(kept_scale(dropped_levels))
        ctx.save_for_backward(q, k, v, penalty, positions, signed)
        ctx.dropped_levels = dropped_levels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, penalty, positions, signed = ctx.saved_tensors
        count, heads, length, width = q.shape
        # one tensor, which the backward of the qkv layer reads without a copy
        dq, dk, dv = q.new_empty(count, length, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        dpenalty = None if penalty is None else torch.zeros_like(penalty)
        for rows in _slices(signed):
            dout, weights, probs = grads[0][rows], signed[rows], signed[rows]
            if ctx.dropped_levels:
                dout, weights, probs = dout * kept_scale(ctx.dropped_levels), weights.relu(), probs.abs()
            dv[rows] = weights.transpose(2, 3) @ dout
            dlogits = (dout @ v[rows].transpose(2, 3)).float().mul_(weights)  # (r, H, N, N)
            dlogits.addcmul_(probs, dlogits.sum(-1, keepdim=True), value=-1)
            if dpenalty is not None:
                distances = _distance(positions, rows).expand(len(dlogits), -1, -1)
                for one, distance in zip(dlogits, distances, strict=True):
                    dpenalty.sub_(one.flatten(1) @ distance.flatten())
            scaled = dlogits.mul_(width**-0.5).to(q.dtype)
            dq[rows] = scaled @ k[rows]
            dk[rows] = scaled.transpose(2, 3) @ q[rows]
        return dq, dk, dv, dpenalty, None, None, None


def _distance(positions: Tensor, rows: slice) -> Tensor:
    """Compute |i - j| of some rows' positions, (r or 1, N, N) fp32; one row of positions may serve all."""
    own = positions[rows] if len(positions) > 1 else positions
    return (own[:, None, :] - own[:, :, None]).abs_()


def rowwise(q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias | None, dropout_rate: float) -> Tensor:
    """Compute softmax(q k^T / sqrt(Dh) + bias) v with (R, H, N, Dh) in and out."""
    penalty = None if bias is None else bias.penalty
    positions = None if bias is None or penalty is None else bias.positions.float()
    padding = None if bias is None else bias.padding
    levels = num_dropped_levels(dropout_rate)
    return _RowwiseAttention.apply(q, k, v, penalty, positions, padding, levels)
