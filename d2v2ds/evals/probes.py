"""Linear probe and nearest neighbours on frozen features (scikit-learn, extra `eval`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2v2ds.errors import ConfigError, MissingExtraError

NEIGHBOURS = 5
"""Of the kNN probe, by cosine similarity."""


@dataclass(frozen=True)
class Score:
    """Accuracies, mean over folds, 0 to 1."""

    logistic: float
    knn: float
    folds: dict[str, float]
    """Logistic regression's accuracy on each left-out group."""


def leave_one_out(features: NDArray[np.float32], labels: Sequence[str], groups: Sequence[str]) -> Score:
    """Fit on all groups but one, test on that one, in turn.

    Features are standardised with the fitted groups' mean and deviation; logistic regression has L2, C = 1.

    Args:
        features: (N, D).
        labels: N classes.
        groups: N groups, at least two different ones.

    Raises:
        ValueError: with fewer than two groups.
        ConfigError: if too little is left to fit.
        MissingExtraError: without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("probes need scikit-learn: pip install 'd2v2ds[eval]'") from error
    wanted, group = np.asarray(labels), np.asarray(groups)
    names = sorted(set(groups))
    if len(names) < 2:
        raise ValueError(f"leave-one-out needs two groups or more, found {names}")
    logistic, knn = {}, {}
    for name in names:
        fitted, tested = group != name, group == name
        if len(set(wanted[fitted])) < 2 or fitted.sum() < NEIGHBOURS:
            raise ConfigError(
                f"without {name}, {fitted.sum()} clips of {len(set(wanted[fitted]))} classes are left; expected "
                f"{NEIGHBOURS} clips and two classes or more"
            )
        scaler = StandardScaler().fit(features[fitted])
        x, y = scaler.transform(features[fitted]), scaler.transform(features[tested])
        classifier = LogisticRegression(C=1.0, max_iter=1000).fit(x, wanted[fitted])
        logistic[name] = float(classifier.score(y, wanted[tested]))
        neighbours = KNeighborsClassifier(NEIGHBOURS, metric="cosine").fit(x, wanted[fitted])
        knn[name] = float(neighbours.score(y, wanted[tested]))
    return Score(float(np.mean(list(logistic.values()))), float(np.mean(list(knn.values()))), logistic)
