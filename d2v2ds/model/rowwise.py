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
from d2v2ds.model.dropout import keep_mask, num_dropped_levels, scale_of

_CACHED_LOGITS = 1 << 18
"""Logits of the rows that are taken together: 1 MiB in fp32. Long rows come one by one."""


def _slices(probs: Tensor) -> Iterator[slice]:
    """Rows to take together, given (R, H, N, N) probabilities."""
    step = max(1, _CACHED_LOGITS // max(probs[0].numel(), 1)) if len(probs) else 1
    return (slice(start, start + step) for start in range(0, len(probs), step))


class _RowwiseAttention(torch.autograd.Function):
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
        probs = q.new_empty(*q.shape[:3], k.shape[2])  # (R, H, N, N), before dropout
        kept = keep_mask(probs.shape, dropped_levels) if dropped_levels else None
        out = torch.empty_like(q)
        scale = q.shape[-1] ** -0.5
        for rows in _slices(probs):
            logits = ((q[rows] * scale) @ k[rows].transpose(2, 3)).float()  # (r, H, N, N)
            if penalty is not None and places is not None:
                logits.addcmul_(_distance(places, rows)[:, None], penalty[:, None, None], value=-1)
            if padding is not None:
                logits.masked_fill_(padding[rows, None, None], float("-inf"))
            probs[rows] = logits.softmax(-1)
            weights = probs[rows] if kept is None else probs[rows].mul(kept[rows]).mul_(scale_of(dropped_levels))
            out[rows] = weights @ v[rows]
        ctx.save_for_backward(q, k, v, penalty, places, probs, kept)
        ctx.dropped_levels = dropped_levels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, penalty, places, probs, kept = ctx.saved_tensors
        scale, kept_scale = q.shape[-1] ** -0.5, scale_of(ctx.dropped_levels)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dpenalty = None if penalty is None else torch.zeros_like(penalty)
        for rows in _slices(probs):
            dout = grads[0][rows]
            weights, dprobs = probs[rows], dout @ v[rows].transpose(2, 3)  # (r, H, N, N)
            if kept is not None:
                weights = weights.mul(kept[rows]).mul_(kept_scale)
                dprobs.mul_(kept[rows]).mul_(kept_scale)
            dv[rows] = weights.transpose(2, 3) @ dout
            dlogits = torch._softmax_backward_data(dprobs.float(), probs[rows].float(), -1, torch.float32)
            if dpenalty is not None:
                for one, distance in zip(dlogits, _distance(places, rows).expand(len(dlogits), -1, -1), strict=True):
                    dpenalty.sub_(one.flatten(1) @ distance.flatten())
            scaled = dlogits.mul_(scale).to(q.dtype)
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
