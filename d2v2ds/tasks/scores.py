"""Scores of a validation from sums over all its inputs; `d2v2ds.evaluate` has them with intervals."""

from torch import Tensor


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
