"""Scores of a model from its outputs for a whole set: scikit-learn, SciPy and rapidfuzz compute them."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from d2v2ds.tasks.scores import sklearn_metrics

Numbers = NDArray[np.float64]
Classes = NDArray[np.int64]


def accuracy(wanted: Classes, found: Classes) -> float:
    """Share of right classes, (N,), (N,) -> 0 to 1."""
    return float(np.mean(wanted == found))


def balanced_accuracy(wanted: Classes, found: Classes) -> float:
    """Mean over classes that occur of the share of right ones, 0 to 1."""
    classes = np.unique(wanted)
    return float(np.mean([np.mean(found[wanted == one] == one) for one in classes]))


def top_k_hits(wanted: Classes, scores: Numbers, k: int) -> NDArray[np.bool_]:
    """Find the rows whose class is among the k with the highest scores: (N,), (N, C) -> (N,)."""
    best = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
    hits: NDArray[np.bool_] = (best == wanted[:, None]).any(1)
    return hits


def f1(wanted: Classes, found: Classes, positive: int | None = None) -> float:
    """F1 of one class, or the mean over classes that occur, 0 to 1."""
    labels = [positive] if positive is not None else np.unique(wanted)
    return float(sklearn_metrics().f1_score(wanted, found, labels=labels, average="macro", zero_division=0.0))


def mcc(wanted: Classes, found: Classes) -> float:
    """Matthews correlation, -1 to 1; 0 if one side has a single class."""
    return float(sklearn_metrics().matthews_corrcoef(wanted, found))


def error_rate(errors: Sequence[int], wanted: Sequence[int]) -> float:
    """Errors per 100 wanted words or letters over a whole set."""
    return 100.0 * sum(errors) / max(sum(wanted), 1)


def bootstrap(
    score: Callable[[NDArray[np.int64]], float], num_rows: int, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Compute the 95 % interval of a score by drawing rows with replacement (Efron 1979, percentiles).

    Args:
        score: row numbers, with repeats -> score.
        num_rows: N.
        draws: sets that are drawn.
        seed: of the draws.

    Returns:
        Percentiles 2.5 and 97.5.
    """
    rng = np.random.default_rng(seed)
    values = [score(rng.integers(num_rows, size=num_rows)) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
