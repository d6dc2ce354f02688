"""Regression loss (arXiv 2212.07525, section 3) and the variances logged with it. Pure functions."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v2ds.bounds import Count, PositiveOrZero


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Settings of the loss. The functions below return a SUM over channels and masked tokens; `train/step.py` divides
    it by the number of masked tokens of all ranks. Learning rate, clipping and loss values depend on that scale."""

    scale: float | None = None
    """Factor on every element; None stands for 1 / sqrt(D)."""
    beta: PositiveOrZero = 0.0
    """0: squared error. Above 0: smooth L1, quadratic below this difference."""
    cls_weight: PositiveOrZero = 0.0
    """Weight of the error between the last extra token and the mean target; 0 switches it off."""
    utterance: Literal["last", "mean", "frames"] = "last"
    """Prediction of the mean target: the last extra token; the mean over all of them (emotion2vec's chunk embedding,
    with 10); or, without any, the mean over the student's visible tokens (its global embedding)."""
    cls_rows: Count | None = None
    """Rows (samples x masks) over which `cls_weight` sums, for a loss that does not depend on the micro-batch.
    None sums over the rows of each micro-batch, as the official code does. Published: 256 (16 images x 16)."""

    def factor(self, width: int) -> float:
        """Factor on every element for targets of D channels."""
        return self.scale if self.scale is not None else width**-0.5

    def check(self, num_extra_tokens: int) -> list[str]:
        """Return a message if a CLS loss has no token to predict from."""
        if self.cls_weight and not num_extra_tokens and self.utterance != "frames":
            return [f"loss.cls_weight is {self.cls_weight}, but there are no extra tokens to predict from"]
        return []


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
    scale = config.factor(pred.shape[-1])
    if config.beta == 0.0:
        return F.mse_loss(pred, target, reduction="sum") * scale
    return F.smooth_l1_loss(pred, target, beta=config.beta, reduction="sum") * scale


def cls_loss(pred: Tensor, target: Tensor, num_masked: int, config: LossConfig) -> Tensor:
    """Compute the error of the CLS prediction, times the masked tokens, because `train/step.py` divides by them.

    Args:
        pred: (R, D) encoder output at the last extra token.
        target: (R, D) fp32, mean over tokens of each row's target.
        num_masked: masked tokens of this micro-batch.
        config: weight and form.

    Returns:
        Scalar fp32, to be added to the regression loss.
    """
    rows = 1.0 if config.cls_rows is None else config.cls_rows / len(pred)
    return regression_loss(pred, target, config) * (config.cls_weight * rows * num_masked)


def utterance_prediction(encoded: Tensor, num_extra: int, config: LossConfig) -> Tensor:
    """Take the prediction of the mean target: (R, E + K, D), E = `num_extra` tokens in front -> (R, D)."""
    if config.utterance == "last":
        return encoded[:, num_extra - 1]
    return (encoded[:, :num_extra] if config.utterance == "mean" else encoded[:, num_extra:]).mean(1)


def channel_moments(x: Tensor) -> Tensor:
    """Return (2, D) fp64, sum and sum of squares over U of x (U, D); sums of several rows and ranks add up."""
    x = x.detach().float()
    return torch.stack((x.sum(0), x.square().sum(0))).double()


def mean_channel_std(moments: Tensor, count: int) -> float:
    """Return the mean over channels of sqrt(unbiased variance + 1e-6), official names `pred_var` and `target_var`.

    Args:
        moments: (2, D), from `channel_moments`, summed over ranks.
        count: U over all ranks.
    """
    return float((channel_variances(moments, count) + 1e-6).sqrt().mean())


def channel_variances(moments: Tensor, count: int) -> Tensor:
    """Return (D,) unbiased variances from `channel_moments` (2, D) of `count` vectors."""
    total, squares = moments
    return ((squares - total * total / count) / max(count - 1, 1)).clamp(min=0)
