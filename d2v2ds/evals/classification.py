"""Scores of a classifier or regressor over a set, with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v2ds.evals import scores
from d2v2ds.tasks.scores import mean_average_precision, pearson, spearman

Score = Callable[[NDArray[np.int64]], float]


@dataclass(frozen=True)
class Outputs:
    """Outputs for every row of a set."""

    logits: NDArray[np.float64]
    """(N, C)."""
    wanted: NDArray[Any]
    """(N,) classes, (N, C) marks, or (N,) numbers."""


def one_class(outputs: Outputs, positive: int = 1) -> dict[str, Score]:
    """Scores for one class per row, as functions of row numbers; of two classes, F1 is that of `positive`."""
    wanted, logits = outputs.wanted.astype(np.int64), outputs.logits
    found, num_classes = logits.argmax(1), logits.shape[1]
    of = positive if num_classes == 2 else None
    names: dict[str, Score] = {
        "accuracy": lambda rows: scores.accuracy(wanted[rows], found[rows]),
        "balanced_accuracy": lambda rows: scores.balanced_accuracy(wanted[rows], found[rows]),
        "f1": lambda rows: scores.f1(wanted[rows], found[rows], of),
        "mcc": lambda rows: scores.mcc(wanted[rows], found[rows]),
    }
    if num_classes > 5:
        hits = scores.top_k_hits(wanted, logits, 5)
        names["top5"] = lambda rows: float(hits[rows].mean())
    return names


def several_labels(outputs: Outputs) -> dict[str, Score]:
    """Mean average precision over classes that have a positive row."""
    return {"map": lambda rows: mean_average_precision(outputs.wanted[rows], outputs.logits[rows])}


def numbers(outputs: Outputs) -> dict[str, Score]:
    """Correlations of numbers."""
    wanted, found = outputs.wanted.astype(np.float64), outputs.logits[:, 0]
    return {
        "pearson": lambda rows: pearson(wanted[rows], found[rows]),
        "spearman": lambda rows: spearman(wanted[rows], found[rows]),
    }


def summarise(names: dict[str, Score], num_rows: int, *, draws: int, seed: int) -> dict[str, Any]:
    """Compute every score times 100, with its 95 % interval over rows."""
    found = {}
    for name, score in names.items():
        low, high = scores.bootstrap(score, num_rows, draws=draws, seed=seed)
        found[name] = {"value": 100 * score(np.arange(num_rows)), "interval": [100 * low, 100 * high]}
    return found


def confusion(outputs: Outputs) -> NDArray[np.int64]:
    """Count (C, C): row = right class, column = found class."""
    size = outputs.logits.shape[1]
    counts = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts, (outputs.wanted.astype(np.int64), outputs.logits.argmax(1)), 1)
    return counts


def worst(outputs: Outputs, ids: Sequence[str], classes: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Return the rows whose right class has the lowest probability."""
    logits, wanted = outputs.logits, outputs.wanted.astype(np.int64)
    logs = logits - logits.max(1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
    own = logs[np.arange(len(wanted)), wanted]
    chosen = [i for i in np.argsort(own, kind="stable")[:count] if logits[i].argmax() != wanted[i]]
    return [
        {
            "id": ids[i],
            "wanted": classes[wanted[i]] if classes else int(wanted[i]),
            "found": classes[logits[i].argmax()] if classes else int(logits[i].argmax()),
            "probability": float(np.exp(own[i])),
        }
        for i in chosen
    ]
