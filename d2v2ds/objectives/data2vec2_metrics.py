"""Metrics and health limits of data2vec 2.0: names, units, and their computation from summed statistics."""

from typing import Any

import torch

from d2v2ds.objectives.loss import channel_moments, channel_variances, mean_channel_std
from d2v2ds.objectives.protocol import HealthBounds, HealthLimit, Losses, Totals

RUN_UNITS = {
    "ema/decay": "weight kept by the teacher, 0 to 1; same on all ranks",
    "ema/student_distance": "|student - teacher| / |student|; norms over all ranks",
}
UNITS = {
    "loss/regression": "sum over channels per masked token; global sum over the interval / global masked tokens",
    "loss/cls": "CLS loss on the same scale, weight included",
    "mask/fraction": "masked tokens / tokens; global",
    "target/std": "standard deviation of the targets at masked tokens, mean over channels; over the interval and all "
    "ranks (official name: target_var)",
    "target/explained": "1 - loss / (loss scale x sum of the targets' channel variances): share predicted",
    "pred/std": "standard deviation of the predictions; over the interval and all ranks (official name: pred_var)",
    "local/std": "standard deviation of local features, mean over channels; mean over ranks",
    "context/std": "standard deviation of the last shared block's output; mean over ranks",
    "optim/grad_norm/decoder": "norm of the decoder's gradient before clipping; every log_every_steps-th step; global",
}


def prediction_losses(out: Any, num_masked: int, num_tokens: int) -> Losses:
    """Return the result of a micro-batch with the statistics that `prediction_metrics` reads.

    Args:
        out: the network's output, with `losses`, `pred` and `wanted` (U, D).
        num_masked: U.
        num_tokens: of all rows, masked or not.
    """
    moments = torch.stack((channel_moments(out["pred"]), channel_moments(out["wanted"])))  # (2, 2, D)
    tokens = torch.tensor(float(num_tokens), dtype=torch.float64)
    statistics = {"moments": moments, "tokens": tokens}
    return Losses(sums=out["losses"], count=num_masked, statistics=statistics, output=out)


def prediction_metrics(totals: Totals, loss_factor: float | None) -> dict[str, float]:
    """Return the variation of predictions and targets, and the predicted share of the targets' variance.

    Args:
        totals: over all ranks; statistics `moments` (2, 2, D), of predictions and of targets, and `tokens`.
        loss_factor: factor on the squared errors of the loss; None if the loss is not a sum of squares.
    """
    pred, target = totals.statistics["moments"]
    num_masked = int(totals.count)
    values = {
        "mask/fraction": totals.count / float(totals.statistics["tokens"]),
        "pred/std": mean_channel_std(pred, num_masked),
        "target/std": mean_channel_std(target, num_masked),
    }
    if loss_factor is not None:
        variance = loss_factor * float(channel_variances(target, num_masked).sum())
        values["target/explained"] = 1.0 - totals.sums["regression"] / totals.count / max(variance, 1e-12)
    return values


def health_limits(bounds: HealthBounds) -> list[HealthLimit]:
    """Return the limits of statistics that show a collapse; variance alone does not, because of instance norm."""
    low_rank = "the targets use few dimensions; raise the EMA decay, lower lr.peak"
    position = (
        "the targets encode little but the position; for small runs set share_local_encoder=false in the objective's "
        "settings of the modality"
    )
    return [
        HealthLimit("target/effective_rank", bounds.min_effective_rank, None, low_rank),
        HealthLimit(
            "local/effective_rank", min(bounds.min_effective_rank, 1.5), None, "the local encoder has collapsed"
        ),
        HealthLimit("target/std", bounds.min_std, None, "the targets hardly vary between tokens"),
        HealthLimit("pred/std", min(bounds.min_std, 0.01), None, "the predictions hardly vary between tokens"),
        HealthLimit("target/position_share", None, bounds.max_position_share, position),
    ]
