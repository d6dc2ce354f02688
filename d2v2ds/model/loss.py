"""The regression loss and the variances logged beside it (spec section 8). Pure functions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss is a SUM over channels and masked tokens; its gradient is divided by the number of masked
    tokens of all ranks. Learning rate, clipping and loss values only make sense on that scale."""

    scale: float | None = None
    """Factor on every element; None stands for 1 / sqrt(D)."""
    beta: float = 0.0
    """0: squared error. Above: smooth L1 that is quadratic below this difference."""


def regression_loss(pred: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """Sum over masked tokens and channels.

    Args:
        pred: (U, D) predictions at masked tokens.
        target: (U, D) fp32.
        config: scale and form.

    Returns:
        Scalar fp32, not divided by anything.
    """
    pred = pred.float()
    scale = config.scale if config.scale is not None else pred.shape[-1] ** -0.5
    if config.beta == 0.0:
        return F.mse_loss(pred, target, reduction="sum") * scale
    return F.smooth_l1_loss(pred, target, beta=config.beta, reduction="sum") * scale


def channel_moments(x: Tensor) -> Tensor:
    """Sums from which variances over all rows and ranks follow by addition.

    Args:
        x: (U, D).

    Returns:
        (2, D) fp64: sum and sum of squares over U.
    """
    x = x.detach().float()
    return torch.stack((x.sum(0), x.square().sum(0))).double()


def mean_channel_std(moments: Tensor, count: int) -> float:
    """Mean over channels of sqrt(unbiased variance + 1e-6), `pred_var` and `target_var` of the reference.

    Args:
        moments: (2, D), from `channel_moments`, summed over ranks.
        count: U over all ranks.
    """
    return float((channel_variances(moments, count) + 1e-6).sqrt().mean())


def channel_variances(moments: Tensor, count: int) -> Tensor:
    """(D,) unbiased variances from `channel_moments` (2, D) of `count` vectors."""
    total, squares = moments
    return ((squares - total * total / count) / max(count - 1, 1)).clamp(min=0)
