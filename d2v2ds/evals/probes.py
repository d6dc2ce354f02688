"""Probes on frozen features: logistic regression and nearest neighbours (scikit-learn, extra `eval`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v2ds.errors import ConfigError, MissingExtraError

Matrix = Any
"""(N, D) features: a NumPy array, or a sparse matrix of SciPy."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of both probes."""

    c: float = 1.0
    """Inverse strength of logistic regression's L2 penalty."""
    neighbours: int = 5
    """Neighbours of the kNN probe, by cosine similarity."""

    def check(self) -> list[str]:
        """Return one message for each setting out of range."""
        faults = [] if 0 < self.c < math.inf else [f"c is {self.c:g}, expected a number above 0"]
        return faults + ([] if self.neighbours >= 1 else [f"neighbours is {self.neighbours}, expected 1 or more"])


@dataclass(frozen=True)
class Score:
    """Accuracies of both probes, 0 to 1, mean over folds."""

    hits: dict[str, NDArray[np.bool_]]
    """(n,) for each fold: True if logistic regression predicts a tested row correctly."""
    knn: float
    """Accuracy of nearest neighbours."""

    @property
    def folds(self) -> dict[str, float]:
        """Accuracy of logistic regression on each fold."""
        return {name: float(hits.mean()) for name, hits in self.hits.items()}

    @property
    def logistic(self) -> float:
        """Accuracy of logistic regression."""
        return float(np.mean(list(self.folds.values())))

    def to_dict(self) -> dict[str, Any]:
        """Return the accuracies as plain values."""
        return {"logistic": self.logistic, "knn": self.knn, "folds": self.folds}


@dataclass(frozen=True)
class Gain:
    """Difference of logistic regression's accuracy between two sets of features, in percentage points."""

    points: float
    standard_error: float
    """Standard error of `points` if both were equally good, from the rows on which the two disagree (McNemar's test in
    each fold). It does not include the variance over seeds and over the choice of speakers."""


def gain(features: Score, others: Score) -> Gain:
    """Compare two scores of the same rows in the same folds, row by row."""
    differences = [features.hits[name].astype(float) - others.hits[name] for name in features.hits]
    variances = [np.square(fold).sum() / len(fold) ** 2 for fold in differences]
    return Gain(
        points=100 * (features.logistic - others.logistic),
        standard_error=100 * math.sqrt(sum(variances)) / len(differences),
    )


@dataclass(frozen=True)
class Fold:
    """Fitted and tested rows."""

    name: str
    fitted: NDArray[np.bool_]
    """(N,) True for rows to fit on."""
    tested: NDArray[np.bool_]
    """(N,) True for rows to test on."""


def leave_one_out(groups: Sequence[str]) -> list[Fold]:
    """Return one fold for each group: fit on all others, test on that one.

    Raises:
        ValueError: there are fewer than two groups.
    """
    group, names = np.asarray(groups), sorted(set(groups))
    if len(names) < 2:
        raise ValueError(f"leave-one-out needs two groups or more, found {names}")
    return [Fold(name, group != name, group == name) for name in names]


def score(features: Matrix, labels: Sequence[str], folds: Sequence[Fold], config: ProbeConfig) -> Score:
    """Fit and test both probes on features that are standardised by the fitted rows.

    Args:
        features: (N, D); a sparse matrix is not standardised.
        labels: N classes.
        folds: at least one.
        config: of the probes.

    Raises:
        ConfigError: too few rows or classes are left to fit.
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("probes need scikit-learn", "eval") from error
    wanted = np.asarray(labels)
    hits, knn = {}, []
    for fold in folds:
        classes = len(set(wanted[fold.fitted]))
        if classes < 2 or fold.fitted.sum() < config.neighbours:
            raise ConfigError(
                f"without {fold.name}, {fold.fitted.sum()} rows of {classes} classes are left; expected "
                f"{config.neighbours} rows and two classes or more"
            )
        x, y = features[fold.fitted], features[fold.tested]
        if isinstance(features, np.ndarray):
            scaler = StandardScaler().fit(x)
            x, y = scaler.transform(x), scaler.transform(y)
        classifier = LogisticRegression(C=config.c, max_iter=1000).fit(x, wanted[fold.fitted])
        hits[fold.name] = classifier.predict(y) == wanted[fold.tested]
        neighbours = KNeighborsClassifier(config.neighbours, metric="cosine").fit(x, wanted[fold.fitted])
        knn.append(float(neighbours.score(y, wanted[fold.tested])))
    return Score(hits, float(np.mean(knn)))
