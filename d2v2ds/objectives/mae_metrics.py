"""Metrics and health limits of MAE: names and units."""

from d2v2ds.objectives.protocol import HealthBounds, HealthLimit

UNITS = {
    "loss/regression": "mean squared error within a patch; global sum over the interval / global masked patches",
    "mask/fraction": "masked patches / patches; global",
    "target/std": "standard deviation of the targets at masked patches, mean over pixels; over the interval and all "
    "ranks",
    "target/explained": "1 - loss / variance of the targets, mean over pixels: share predicted",
    "pred/std": "standard deviation of the predictions, mean over pixels; over the interval and all ranks",
    "local/std": "standard deviation of local features, mean over channels; mean over ranks",
    "context/std": "standard deviation of the encoder's output; mean over ranks",
    "optim/grad_norm/decoder": "norm of the decoder's gradient before clipping; every log_every_steps-th step; global",
}


def health_limits(bounds: HealthBounds) -> list[HealthLimit]:
    """Return the limits of statistics that show a collapse; targets are pixels and cannot collapse."""
    return [
        HealthLimit(
            "local/effective_rank", min(bounds.min_effective_rank, 1.5), None, "the local encoder has collapsed"
        ),
        HealthLimit("pred/std", min(bounds.min_std, 0.01), None, "the predictions hardly vary between patches"),
    ]
