"""Scores of a validation, from sums over all its inputs or from the outputs for each of them.

`d2v2ds.evaluate` has them with intervals. scikit-learn and SciPy compute what needs all outputs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.errors import MissingExtraError

Numbers = NDArray[np.float64]


def confusion_scores(confusion: Tensor, positive: int = 1) -> dict[str, float]:
    """Compute scores from (C, C) counts: row = right class, column = found class.

    Returns:
        `balanced_accuracy`, `f1` and `mcc`, on the scale 0 to 1. With two classes `f1` is that of class 1, else the
        mean over classes that occur.
    """
    counts = confusion.double()
    right, wanted, found, total = counts.diag(), counts.sum(1), counts.sum(0), counts.sum()
    occurs = wanted > 0
    f1 = 2 * right / (wanted + found).clamp(min=1)
    covariance = total * right.sum() - (wanted * found).sum()
    spread = (total**2 - (wanted**2).sum()) * (total**2 - (found**2).sum())
    return {
        "balanced_accuracy": float((right / wanted.clamp(min=1))[occurs].mean()),
        "f1": float(f1[positive] if len(f1) == 2 else f1[occurs].mean()),
        "mcc": float(covariance / spread.sqrt()) if spread > 0 else 0.0,
    }


def correlation(moments: Tensor, count: float) -> float:
    """Compute Pearson's correlation from the sums of x, y, x x, x y and y y over `count` pairs; 0 without spread."""
    x, y, xx, xy, yy = moments.double().tolist()
    spread = (count * xx - x * x) * (count * yy - y * y)
    return (count * xy - x * y) / spread**0.5 if spread > 0 else 0.0


def sklearn_metrics() -> Any:
    """Import scikit-learn's metrics.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from sklearn import metrics
    except ImportError as error:
        raise MissingExtraError("scores need scikit-learn", "eval") from error
    return metrics


def pearson(wanted: Numbers, found: Numbers) -> float:
    """Pearson's correlation, -1 to 1; 0 without spread."""
    a, b = wanted - wanted.mean(), found - found.mean()
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 0 else 0.0


def spearman(wanted: Numbers, found: Numbers) -> float:
    """Spearman's rank correlation, -1 to 1; equal numbers share their mean rank."""
    from scipy.stats import rankdata  # comes with scikit-learn

    return pearson(rankdata(wanted), rankdata(found))


def average_precision(wanted: NDArray[Any], scores: NDArray[Any]) -> Numbers:
    """Average precision of every class, (N, C), (N, C) -> (C,), 0 to 1; 0 for a class without positives.

    sum_k (R_k - R_(k-1)) P_k over thresholds, without interpolation. One class at a time is copied.
    """
    compute = sklearn_metrics().average_precision_score
    columns = zip(wanted.T, scores.T, strict=True)
    return np.array([compute(own, found.astype(np.float64)) if own.any() else 0.0 for own, found in columns])


def mean_average_precision(wanted: NDArray[Any], scores: NDArray[Any]) -> float:
    """Mean of `average_precision` over classes that have a positive row, 0 to 1; NaN without one or for such scores."""
    occurs = wanted.any(0)
    if not occurs.any() or not np.isfinite(scores).all():
        return float("nan")
    return float(average_precision(wanted, scores)[occurs].mean())
