"""Attention for training on a CPU: a few student rows at a time, with the gradient of the distance penalty.

No fused CPU kernel returns a gradient for an additive bias, and the explicit path walks several times over
R x H x N x N numbers in main memory. A few rows at a time the same numbers stay in the cache, no bias is ever written
out, and the penalty's gradient is one product per row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from d2v2ds.model.alibi import DistanceBias
from d2v2ds.model.cpu.dropout import margins, num_dropped_levels, scale_of

_CACHED_LOGITS = 1 << 18
"""Logits of the rows that are taken together: 1 MiB in fp32. Long rows come one by one."""


def _slices(probs: Tensor) -> Iterator[slice]:
    """Rows to take together, given (R, H, N, N) probabilities."""
    step = max(1, _CACHED_LOGITS // max(probs[0].numel(), 1)) if len(probs) else 1
    return (slice(start, start + step) for start in range(0, len(probs), step))


class _RowwiseAttention(torch.autograd.Function):
    """Keeps the probabilities with a minus sign where they were dropped: what survived is their positive part.

    With W the probabilities P after dropout and dW their gradient, that of the logits is
    W dW - P sum(W dW), the sum over keys: P dP = W dW wherever an element was kept, and both are 0 elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        penalty: Tensor | None,
        places: Tensor | None,
        padding: Tensor | None,
        dropped_levels: int,
    ) -> Tensor:
        """q, k, v (R, H, N, Dh); penalty (H,) fp32; places (R or 1, N) fp32; padding (R, N) bool."""
        count, heads, length, width = q.shape
        signed = q.new_empty(count, heads, length, k.shape[2])  # (R, H, N, N)
        drawn = margins(signed.shape, dropped_levels) if dropped_levels else None
        out = q.new_empty(count, length, heads, width).transpose(1, 2)  # as the projection that follows reads it
        for rows in _slices(signed):
            logits = ((q[rows] * width**-0.5) @ k[rows].transpose(2, 3)).float()  # (r, H, N, N)
            if penalty is not None and places is not None:
                logits.addcmul_(_distance(places, rows)[:, None], penalty[:, None, None], value=-1)
            if padding is not None:
                logits.masked_fill_(padding[rows, None, None], float("-inf"))
            probs = signed[rows].copy_(torch.softmax(logits, -1, out=logits))
            if drawn is None:
                out[rows] = probs @ v[rows]
            else:
                kept = torch.copysign(probs, drawn[rows], out=probs).relu()
                out[rows] = (kept @ v[rows]).mul_(scale_of(dropped_levels))
        ctx.save_for_backward(q, k, v, penalty, places, signed)
        ctx.dropped_levels = dropped_levels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, penalty, places, signed = ctx.saved_tensors
        count, heads, length, width = q.shape
        # side by side, as the gradient of the layer that made the three wants them
        dq, dk, dv = q.new_empty(count, length, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        dpenalty = None if penalty is None else torch.zeros_like(penalty)
        for rows in _slices(signed):
            dout, weights, probs = grads[0][rows], signed[rows], signed[rows]
            if ctx.dropped_levels:
                dout, weights, probs = dout * scale_of(ctx.dropped_levels), weights.relu(), probs.abs()
            dv[rows] = weights.transpose(2, 3) @ dout
            dlogits = (dout @ v[rows].transpose(2, 3)).float().mul_(weights)  # (r, H, N, N)
            dlogits.addcmul_(probs, dlogits.sum(-1, keepdim=True), value=-1)
            if dpenalty is not None:
                for one, distance in zip(dlogits, _distance(places, rows).expand(len(dlogits), -1, -1), strict=True):
                    dpenalty.sub_(one.flatten(1) @ distance.flatten())
            scaled = dlogits.mul_(width**-0.5).to(q.dtype)
            dq[rows] = scaled @ k[rows]
            dk[rows] = scaled.transpose(2, 3) @ q[rows]
        return dq, dk, dv, dpenalty, None, None, None


def _distance(places: Tensor, rows: slice) -> Tensor:
    """(r or 1, N, N) fp32: |i - j| of some rows' places; one row of places may serve all."""
    own = places[rows] if len(places) > 1 else places
    return (own[:, None, :] - own[:, :, None]).abs_()


def rowwise(q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias | None, dropout_rate: float) -> Tensor:
    """softmax(q k^T / sqrt(Dh) + bias) v with (R, H, N, Dh) in and out."""
    penalty = None if bias is None else bias.penalty
    places = None if bias is None or penalty is None else bias.positions.float()
    padding = None if bias is None else bias.padding
    levels = num_dropped_levels(dropout_rate)
    return _RowwiseAttention.apply(q, k, v, penalty, places, padding, levels)
