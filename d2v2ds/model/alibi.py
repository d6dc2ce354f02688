"""ALiBi: attention logits that fall with distance (arXiv 2108.12409), with a learned scale.

The bias of two tokens is -slope_h * max(scale_h, 0) * |i - j|; i and j are their positions in the *unmasked* sequence.
It is computed from the positions of the visible tokens alone. The official code computes it for all T x T pairs first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def alibi_slopes(num_heads: int) -> list[float]:
    """Return one slope for each head (arXiv 2108.12409).

    For a power of two the slopes are 2^(-8 i / H), i = 1..H. Otherwise the slopes of the largest power
    of two below H come first, then every second slope of the list for twice that power.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    doubled = [2.0 ** (-8.0 * (i + 1) / (2 * power)) for i in range(2 * power)]
    return slopes + doubled[0::2][: num_heads - power]


def dense_bias(
    positions: Tensor,
    penalty: Tensor | None,
    padding: Tensor | None,
    table: Tensor | None = None,
    num_free: int = 0,
) -> Tensor | None:
    """Compute the bias of every pair of tokens.

    Args:
        positions: (R, N) int64.
        penalty: (H,) fp32 or None.
        padding: (R, N) bool or None.
        table: (H, N, N) or None.
        num_free: first tokens, which have no position: no penalty is between them and others.

    Returns:
        (R, H, N, N) fp32, or (R, 1, N, N) with padding alone, or None if there is nothing.
    """
    bias = None if table is None else table.float()[None]  # (1, H, N, N)
    if penalty is not None:
        points = positions.float()
        distance = (points[:, None, :] - points[:, :, None]).abs_()  # (R, N, N)
        distance[:, :num_free] = 0
        distance[:, :, :num_free] = 0
        falling = distance[:, None] * -penalty[None, :, None, None]  # (R, H, N, N)
        bias = falling if bias is None else bias + falling
    if padding is not None:
        if bias is None:
            bias = positions.new_zeros(positions.shape[0], 1, 1, positions.shape[1], dtype=torch.float32)
            bias = bias.expand(-1, -1, positions.shape[1], -1)
        bias = bias.masked_fill(padding[:, None, None, :], float("-inf"))
    return bias


@dataclass(frozen=True, kw_only=True)
class DistanceBias:
    """Terms added to the attention logits: a distance penalty, padded keys, a learned table, or several of them.

    `dense` serves the explicit and SDPA paths and is shared by every block; the rowwise path and FlexAttention
    compute the same values on the fly from `positions` and `penalty` and need no `dense`.
    """

    positions: Tensor
    """(R, N) int64, position of each token in the unmasked sequence."""
    penalty: Tensor | None
    """(H,) fp32, penalty per token of distance, >= 0; None without ALiBi."""
    padding: Tensor | None
    """(R, N) bool, True = this key is padding; None if nothing is padded."""
    table: Tensor | None = None
    """(H, N, N), learned bias of each pair of tokens, alike for all rows."""
    num_free: int = 0
    """First tokens, which have no position; only dense paths know them."""
    dense: Tensor | None
    """(R or 1, H or 1, N, N) fp32, already negative, -inf at padded keys."""

    @property
    def needs_dense(self) -> bool:
        """True if only dense paths compute this bias in training on a CPU."""
        return self.table is not None or (self.num_free > 0 and self.penalty is not None)

    def to_dense(self) -> Tensor | None:
        """Return `dense`; compute it if it is None."""
        if self.dense is not None:
            return self.dense
        return dense_bias(self.positions, self.penalty, self.padding, self.table, self.num_free)


class Alibi(nn.Module):
    """Learned scale of one modality's ALiBi; computes in fp32 for any dtype of the parameter.

    A scale below zero gives no bias and no gradient, as in the official code.
    """

    slopes: Tensor

    def __init__(self, num_heads: int, *, learned: bool, per_head: bool, num_layers: int | None) -> None:
        """
        Args:
            num_heads: H.
            learned: whether the scale is trained.
            per_head: one scale for each head instead of one for all.
            num_layers: number of blocks (prenet and shared) if every block has its own scale, else None.
        """
        super().__init__()
        self.num_heads = num_heads
        self.scale = nn.Parameter(
            torch.ones(num_layers or 1, num_heads if per_head else 1), requires_grad=learned
        )  # (L or 1, H or 1)

    def forward(self) -> Tensor:
        """Return (L or 1, H) fp32: penalty per token of distance, of each block or of all."""
        slopes = torch.tensor(alibi_slopes(self.num_heads), dtype=torch.float32, device=self.scale.device)
        return self.scale.float().clamp(min=0) * slopes
