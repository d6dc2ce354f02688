"""Attention for training on a CPU: one student row at a time, with the gradient of the distance penalty.

No fused CPU kernel returns a gradient for an additive bias, and the explicit path walks several times over
R x H x N x N numbers in main memory. Row by row the same numbers stay in the cache, no bias is ever written out, and
the penalty's gradient is one product per row.
"""

from typing import Any

import torch
from torch import Tensor

from d2v2ds.model.alibi import DistanceBias
from d2v2ds.model.dropout import keep_mask, num_dropped_levels, scale_of


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
        for r in range(q.shape[0]):
            logits = ((q[r] * scale) @ k[r].transpose(1, 2)).float()  # (H, N, N)
            if penalty is not None and places is not None:
                logits.addcmul_(_distance(places, r), penalty[:, None, None], value=-1)
            if padding is not None:
                logits.masked_fill_(padding[r], float("-inf"))
            probs[r] = logits.softmax(-1)
            weights = probs[r] if kept is None else probs[r].mul(kept[r]).mul_(scale_of(dropped_levels))
            torch.bmm(weights, v[r], out=out[r])
        ctx.save_for_backward(q, k, v, penalty, places, probs, kept)
        ctx.dropped_levels = dropped_levels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, penalty, places, probs, kept = ctx.saved_tensors
        scale, kept_scale = q.shape[-1] ** -0.5, scale_of(ctx.dropped_levels)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dpenalty = None if penalty is None else torch.zeros_like(penalty)
        for r in range(q.shape[0]):
            dout = grads[0][r]
            weights, dprobs = probs[r], dout @ v[r].transpose(1, 2)  # (H, N, N)
            if kept is not None:
                weights = weights.mul(kept[r]).mul_(kept_scale)
                dprobs.mul_(kept[r]).mul_(kept_scale)
            torch.bmm(weights.transpose(1, 2), dout, out=dv[r])
            dlogits = torch._softmax_backward_data(dprobs.float(), probs[r].float(), -1, torch.float32)
            if dpenalty is not None:
                dpenalty.sub_(dlogits.flatten(1) @ _distance(places, r).flatten())
            scaled = dlogits.mul_(scale).to(q.dtype)
            torch.bmm(scaled, k[r], out=dq[r])
            torch.bmm(scaled.transpose(1, 2), q[r], out=dk[r])
        return dq, dk, dv, dpenalty, None, None, None


def _distance(places: Tensor, row: int) -> Tensor:
    """(N, N) fp32: |i - j| of one row's places."""
    own = places[min(row, len(places) - 1)]
    return (own[None, :] - own[:, None]).abs_()


def rowwise(q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias | None, dropout_rate: float) -> Tensor:
    """softmax(q k^T / sqrt(Dh) + bias) v with (R, H, N, Dh) in and out."""
    penalty = None if bias is None else bias.penalty
    places = None if bias is None or penalty is None else bias.positions.float()
    padding = None if bias is None else bias.padding
    levels = num_dropped_levels(dropout_rate)
    return _RowwiseAttention.apply(q, k, v, penalty, places, padding, levels)
