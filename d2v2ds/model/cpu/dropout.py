"""Dropout with cheap random numbers on a CPU.

PyTorch draws one Bernoulli sample at a time there. Fifteen random bits for each element are precise enough for a
dropout rate and much faster.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 15


def num_dropped_levels(rate: float) -> int:
    """Number of the 32768 values of a random draw that drop an element."""
    return round(rate * _LEVELS)


def kept_scale(dropped_levels: int) -> float:
    """Factor on kept elements."""
    return _LEVELS / (_LEVELS - dropped_levels)


def random_signs(shape: torch.Size, dropped_levels: int) -> Tensor:
    """Draw (shape) int16 on the CPU; an element is negative (dropped) with probability dropped_levels / 32768."""
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_()  # 63 random bits each
    levels = words.view(torch.int16)[:count].view(shape).bitwise_and_(_LEVELS - 1)
    return levels - dropped_levels


class _CpuDropout(torch.autograd.Function):
    """Computes x * kept * scale, or base + x * kept * scale, in one pass forward and one backward.

    `kept` has the dtype of `x`, because a product with booleans converts them first, every time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor | None, dropped_levels: int) -> Tensor:
        kept = torch.ge(random_signs(x.shape, dropped_levels), 0, out=torch.empty_like(x))
        ctx.save_for_backward(kept)
        ctx.scale = kept_scale(dropped_levels)
        return torch.addcmul(x.new_zeros(()) if base is None else base, x, kept, value=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (kept,) = ctx.saved_tensors
        grad = grads[0]
        dx = torch.addcmul(grad.new_zeros(()), grad, kept, value=ctx.scale)
        return dx, grad if ctx.needs_input_grad[1] else None, None


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
    return _CpuDropout.apply(x, None, num_dropped_levels(rate))


def add_dropped(base: Tensor, x: Tensor, rate: float, training: bool) -> Tensor:
    """Return base + dropout(x), both of one shape: the end of a residual branch."""
    if not training or rate == 0.0 or x.device.type != "cpu":
        return base + dropout(x, rate, training)
    return _CpuDropout.apply(x, base, num_dropped_levels(rate))
