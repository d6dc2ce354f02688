"""Probes on frozen features: linear models, nearest neighbours, and small heads trained by Adam (extra `eval`)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from d2v2ds.errors import ConfigError, MissingExtraError
from d2v2ds.evals import trained
from d2v2ds.evals.features import Features
from d2v2ds.evals.wanted import OneClass, Rows, Wanted

Matrix = Any
"""(N, D) features: a NumPy array, or a sparse matrix of SciPy."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of the probes."""

    c: float = 1.0
    """Inverse strength of logistic regression's L2 penalty; heads trained by Adam have the same one."""
    neighbours: int = 5
    """Neighbours of the kNN probe, by cosine similarity."""

    def check(self) -> list[str]:
        """Return one message for each setting out of range."""
        faults = [] if 0 < self.c < math.inf else [f"c is {self.c:g}, expected a number above 0"]
        return faults + ([] if self.neighbours >= 1 else [f"neighbours is {self.neighbours}, expected 1 or more"])


@dataclass(frozen=True)
class Score:
    """Score of one probe, mean over folds."""

    name: str
    """What the score is: logistic (accuracy), map, r2, cer."""
    parts: dict[str, NDArray[np.float64]]
    """(n,) for each fold: numbers whose mean is the fold's score, for a tested row or a class each."""
    more: dict[str, float] = field(default_factory=dict)
    """Further scores, such as that of nearest neighbours; mean over folds."""
    is_error: bool = False
    """True if less is better."""

    @property
    def folds(self) -> dict[str, float]:
        """Score of each fold."""
        return {name: float(parts.mean()) for name, parts in self.parts.items()}

    @property
    def value(self) -> float:
        """Score, mean over folds."""
        return float(np.mean(list(self.folds.values())))

    @property
    def standard_error(self) -> float:
        """Standard error of the score over the tested rows, or classes, of all folds; not over seeds."""
        variances = [float(np.var(parts)) / len(parts) for parts in self.parts.values()]
        return math.sqrt(sum(variances)) / len(variances)

    @property
    def values(self) -> dict[str, float]:
        """All scores by name."""
        return {self.name: self.value, **self.more}

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain values."""
        return {**self.values, "folds": self.folds}


@dataclass(frozen=True)
class Gain:
    """Difference of a score between two sets of features, in percentage points; positive if the first is better."""

    points: float
    standard_error: float
    """Standard error of `points` if both were equally good, from the rows on which the two disagree (McNemar's test in
    each fold; for mean average precision, from the classes). It does not include the variance over seeds and over the
    choice of speakers."""


def gain(features: Score, others: Score) -> Gain:
    """Compare two scores of the same rows in the same folds, row by row."""
    differences = [features.parts[name].astype(float) - others.parts[name] for name in features.parts]
    variances = [np.square(fold).sum() / len(fold) ** 2 for fold in differences]
    sign = -1 if features.is_error else 1
    return Gain(
        points=100 * sign * (features.value - others.value),
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

    @property
    def rows(self) -> tuple[Rows, Rows]:
        """Numbers of the fitted and of the tested rows."""
        return np.flatnonzero(self.fitted), np.flatnonzero(self.tested)


def leave_one_out(groups: Sequence[str]) -> list[Fold]:
    """Return one fold for each group: fit on all others, test on that one.

    Raises:
        ValueError: there are fewer than two groups.
    """
    group, names = np.asarray(groups), sorted(set(groups))
    if len(names) < 2:
        raise ValueError(f"leave-one-out needs two groups or more, found {names}")
    return [Fold(name, group != name, group == name) for name in names]


def check_folds(wanted: Wanted, folds: Sequence[Fold], config: ProbeConfig) -> None:
    """Check that probes can be fitted and tested in every fold.

    Raises:
        ConfigError: too few rows are left, or their labels do not differ.
    """
    for fold in folds:
        fitted, _ = fold.rows
        if len(fitted) < config.neighbours:
            raise ConfigError(f"without {fold.name}, {len(fitted)} rows are left; expected {config.neighbours} or more")
        wanted.check(fitted, fold.name)


@contextmanager
def fit_threads(threads: int) -> Iterator[None]:
    """Limit the threads of scikit-learn's matrix products: idle ones spin, which takes the cores from other processes.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression  # noqa: F401 - loads the libraries that are limited
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise MissingExtraError("probes need scikit-learn", "eval") from error
    with threadpool_limits(threads):
        yield


def score(features: Matrix, wanted: Wanted, folds: Sequence[Fold], config: ProbeConfig) -> Score:
    """Fit and test linear models and nearest neighbours on features that are standardised by the fitted rows.

    Args:
        features: (N, D); a sparse matrix is not standardised.
        wanted: labels.
        folds: at least one.
        config: of the probes.
    """
    from sklearn.preprocessing import StandardScaler

    parts, more = {}, list[dict[str, float]]()
    for fold in folds:
        fitted, tested = fold.rows
        x, y = features[fitted], features[tested]
        if isinstance(features, np.ndarray):
            scaler = StandardScaler().fit(x)
            x, y = scaler.transform(x), scaler.transform(y)
        outputs = wanted.fit_linear(x, fitted, config.c)(y)
        parts[fold.name] = wanted.parts(outputs, fitted, tested)
        more.append(wanted.more(outputs, tested) | _neighbours(x, y, wanted, fitted, tested, config.neighbours))
    return Score(wanted.linear, parts, _means(more))


def _neighbours(x: Matrix, y: Matrix, wanted: Wanted, fitted: Rows, tested: Rows, count: int) -> dict[str, float]:
    """Accuracy of nearest neighbours, for rows with one class."""
    if not isinstance(wanted, OneClass):
        return {}
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(count, metric="cosine").fit(x, wanted.values[fitted])
    return {"knn": float(model.score(y, wanted.values[tested]))}


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def score_layers(features: Features, wanted: Wanted, folds: Sequence[Fold], config: ProbeConfig) -> Score:
    """Fit and test a linear layer on a learned sum of all layers; see `score`. The weights are means over folds."""
    shape = (len(features.layers), features.layers[0].shape[1])
    weights: list[NDArray[np.float64]] = []

    def build() -> nn.Module:
        return trained.LayerWeights(*shape, wanted.num_outputs)

    def keep(head: nn.Module) -> None:
        assert isinstance(head, trained.LayerWeights)
        weights.append(head.weights.detach().softmax(0).double().numpy())

    found = _score_head(
        build, lambda fitted: trained.standardised_layers(features.layers, fitted), wanted, folds, config, keep
    )
    means = {f"weight_{i}": float(value) for i, value in enumerate(np.mean(weights, axis=0))}
    return Score(found.name, found.parts, found.more | means)


def score_attention(features: Features, wanted: Wanted, folds: Sequence[Fold], config: ProbeConfig) -> Score:
    """Fit and test a linear layer on frames that learned attention pools; see `score`."""
    width = features.frames[0].shape[1]

    def build() -> nn.Module:
        return trained.AttentionPooling(width, wanted.num_outputs)

    return _score_head(
        build, lambda fitted: trained.standardised_frames(features.frames, fitted), wanted, folds, config
    )


def _score_head(
    build: Callable[[], nn.Module],
    inputs_of: Callable[[Rows], trained.Inputs],
    wanted: Wanted,
    folds: Sequence[Fold],
    config: ProbeConfig,
    keep: Callable[[nn.Module], None] = lambda head: None,
) -> Score:
    parts, more = {}, list[dict[str, float]]()
    for fold in folds:
        fitted, tested = fold.rows
        head, inputs = build(), inputs_of(fitted)
        trained.fit(head, inputs, wanted.loss, fitted, penalty=0.5 / (config.c * len(fitted)))
        keep(head)
        outputs = np.stack([one.double().numpy() for one in trained.outputs_of(head, inputs, tested)])
        parts[fold.name] = wanted.parts(outputs, fitted, tested)
        more.append(wanted.more(outputs, tested))
    return Score(wanted.measure, parts, _means(more))
