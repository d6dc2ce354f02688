"""Dropout whose random numbers do not cost more than the layer they follow.

PyTorch draws one Bernoulli sample at a time on a CPU: about 5 ns an element, which is 6 % of a whole
speech step. Fifteen random bits an element are enough for a dropout rate and several times as cheap.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 15


def num_dropped_levels(rate: float) -> int:
    """How many of the 32768 values of a random draw mean "dropped"."""
    return round(rate * _LEVELS)


def scale_of(dropped_levels: int) -> float:
    """What kept elements are multiplied with."""
    return _LEVELS / (_LEVELS - dropped_levels)


def keep_mask(shape: torch.Size, dropped_levels: int) -> Tensor:
    """(shape) bool on the CPU, True = kept, each element dropped with probability dropped_levels / 32768."""
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_()  # 63 random bits each
    levels = words.view(torch.int16)[:count].view(shape).bitwise_and_(_LEVELS - 1)
    return levels >= dropped_levels


class _CpuDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped_levels: int) -> Tensor:
        kept = keep_mask(x.shape, dropped_levels)
        ctx.save_for_backward(kept)
        ctx.scale = scale_of(dropped_levels)
        return x.mul(kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grads[0].mul(kept).mul_(ctx.scale), None


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero elements with probability `rate` and scale the others to keep the mean.

    Args:
        x: any shape.
        rate: fraction dropped, 0 <= rate < 1; on a CPU it is rounded to a multiple of 1/32768.
        training: False returns `x`.

    Returns:
        The shape and dtype of `x`.
    """
    if not training or rate == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    return _CpuDropout.apply(x, num_dropped_levels(rate))
