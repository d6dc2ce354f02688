"""Linear probe and nearest neighbours on frozen features (scikit-learn, extra `eval`)."""

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
    """Inverse strength of logistic regression's L2."""
    neighbours: int = 5
    """Neighbours of the kNN probe, by cosine similarity."""

    def check(self) -> list[str]:
        """Return one message for each setting out of range."""
        faults = [] if 0 < self.c < math.inf else [f"c is {self.c:g}, expected a number above 0"]
        return faults + ([] if self.neighbours >= 1 else [f"neighbours is {self.neighbours}, expected 1 or more"])


@dataclass(frozen=True)
class Score:
    """How well both probes do, 0 to 1, mean over folds."""

    hits: dict[str, NDArray[np.bool_]]
    """Of each fold, (n,) whether logistic regression has each of its tested rows right."""
    knn: float
    """Accuracy of nearest neighbours."""

    @property
    def folds(self) -> dict[str, float]:
        """Logistic regression's accuracy on each tested part."""
        return {name: float(hits.mean()) for name, hits in self.hits.items()}

    @property
    def logistic(self) -> float:
        """Accuracy of logistic regression."""
        return float(np.mean(list(self.folds.values())))

    def to_dict(self) -> dict[str, Any]:
        """Accuracies as plain values."""
        return {"logistic": self.logistic, "knn": self.knn, "folds": self.folds}


@dataclass(frozen=True)
class Gain:
    """What logistic regression on some features has over the same on others, in percentage points."""

    points: float
    standard_error: float
    """Of the points if neither were better, that is, if it were a coin toss which of the two has a row right that they
    disagree on (McNemar's test, each fold for itself). The luck of the run itself, of its seed and of which speakers
    there are comes on top."""


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
    """Which rows are fitted and which are tested."""

    name: str
    fitted: NDArray[np.bool_]
    """(N,)"""
    tested: NDArray[np.bool_]
    """(N,)"""


def leave_one_out(groups: Sequence[str]) -> list[Fold]:
    """Fit on all groups but one, test on that one, in turn.

    Raises:
        ValueError: with fewer than two groups.
    """
    group, names = np.asarray(groups), sorted(set(groups))
    if len(names) < 2:
        raise ValueError(f"leave-one-out needs two groups or more, found {names}")
    return [Fold(name, group != name, group == name) for name in names]


def score(features: Matrix, labels: Sequence[str], folds: Sequence[Fold], config: ProbeConfig) -> Score:
    """Logistic regression and nearest neighbours on features that are standardised by the fitted rows.

    Args:
        features: (N, D); a sparse matrix is taken as it is.
        labels: N classes.
        folds: at least one.
        config: of the probes.

    Raises:
        ConfigError: if too little is left to fit.
        MissingExtraError: without scikit-learn.
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
