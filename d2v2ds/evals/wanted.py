"""What a probe predicts from features: one class of a row, several classes, or a number."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.errors import ConfigError
from d2v2ds.tasks import scores

Rows = NDArray[np.int64]
Numbers = NDArray[np.float64]
_ALPHAS = np.logspace(-2, 6, 17)
"""Strengths of ridge regression's penalty, of which the best is chosen."""


class Wanted(Protocol):
    """Labels of N rows of one kind."""

    measure: str
    """Name of the score of outputs."""
    linear: str
    """Name of the score of the linear model that `fit_linear` fits."""
    num_outputs: int
    """C."""

    def check(self, fitted: Rows, without: str) -> None:
        """Check that a model can be fitted.

        Raises:
            ConfigError: the fitted rows do not differ in their labels; `without` names the rows that are tested.
        """

    def fit_linear(self, x: Any, fitted: Rows, c: float) -> Any:
        """Fit a linear model of scikit-learn; return a function (n, D) -> (n, C) outputs."""

    def loss(self, outputs: Tensor, rows: Rows) -> Tensor:
        """Mean loss of outputs (n, C) for these rows."""

    def parts(self, outputs: Numbers, fitted: Rows, tested: Rows) -> Numbers:
        """Return numbers whose mean is the score of the outputs (n, C) for tested rows: 1 is perfect."""

    def more(self, outputs: Numbers, tested: Rows) -> dict[str, float]:
        """Further scores of these outputs."""


class OneClass:
    """One class of each row: accuracy."""

    measure, linear = "accuracy", "logistic"

    def __init__(self, labels: Sequence[str]) -> None:
        """
        Args:
            labels: N classes.
        """
        self.names, numbers = np.unique(np.asarray(labels), return_inverse=True)
        self.values: Rows = numbers.astype(np.int64)
        self.num_outputs = len(self.names)

    def check(self, fitted: Rows, without: str) -> None:
        """See `Wanted`."""
        if len(found := np.unique(self.values[fitted])) < 2:
            raise ConfigError(
                f"without {without}, {len(fitted)} rows of {len(found)} classes are left; expected two classes or more"
            )

    def fit_linear(self, x: Any, fitted: Rows, c: float) -> Any:
        """Fit logistic regression."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=c, max_iter=1000).fit(x, self.values[fitted])

        def outputs(y: Any) -> Numbers:
            return np.eye(self.num_outputs)[model.predict(y)]

        return outputs

    def loss(self, outputs: Tensor, rows: Rows) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs, torch.from_numpy(self.values[rows]))

    def parts(self, outputs: Numbers, fitted: Rows, tested: Rows) -> Numbers:
        """1 for each row that is right, else 0."""
        return (outputs.argmax(1) == self.values[tested]).astype(np.float64)

    def more(self, outputs: Numbers, tested: Rows) -> dict[str, float]:
        """Nothing."""
        return {}


class SeveralClasses:
    """Several classes of a row: mean average precision over classes."""

    measure, linear = "map", "map"

    def __init__(self, labels: Sequence[str], divider: str) -> None:
        """
        Args:
            labels: N lists of classes.
            divider: character between the classes of a row.
        """
        sets = [{name.strip() for name in label.split(divider) if name.strip()} for label in labels]
        self.names = sorted(set().union(*sets))
        self.values = np.array([[name in one for name in self.names] for one in sets], dtype=np.float64)  # (N, C)
        self.num_outputs = len(self.names)

    def check(self, fitted: Rows, without: str) -> None:
        """See `Wanted`."""
        share = self.values[fitted].mean(0)
        if not ((share > 0) & (share < 1)).any():
            raise ConfigError(
                f"without {without}, all of the {len(fitted)} rows left have the same of {len(self.names)} classes"
            )

    def fit_linear(self, x: Any, fitted: Rows, c: float) -> Any:
        """Fit logistic regression to every class."""
        from sklearn.linear_model import LogisticRegression

        models = [
            None if len(np.unique(column)) < 2 else LogisticRegression(C=c, max_iter=1000).fit(x, column)
            for column in self.values[fitted].T
        ]

        def outputs(y: Any) -> Numbers:
            nothing = np.zeros(y.shape[0])
            return np.stack([nothing if one is None else one.decision_function(y) for one in models], axis=1)

        return outputs

    def loss(self, outputs: Tensor, rows: Rows) -> Tensor:
        """Binary cross-entropy, mean over classes."""
        return F.binary_cross_entropy_with_logits(outputs, torch.from_numpy(self.values[rows]).to(outputs.dtype))

    def parts(self, outputs: Numbers, fitted: Rows, tested: Rows) -> Numbers:
        """Average precision of each class that a tested row has."""
        wanted = self.values[tested]
        occurs = wanted.any(0)
        return scores.average_precision(wanted[:, occurs], outputs[:, occurs])

    def more(self, outputs: Numbers, tested: Rows) -> dict[str, float]:
        """Nothing."""
        return {}


class Number:
    """A number of each row: the share of its variance that is explained, and Pearson's correlation."""

    measure, linear, num_outputs = "r2", "r2", 1

    def __init__(self, labels: Sequence[str]) -> None:
        """
        Args:
            labels: N numbers.

        Raises:
            ConfigError: one of them is none.
        """
        values = np.array([_number(label) for label in labels])
        self.values: Numbers = (values - values.mean()) / max(float(values.std()), 1e-12)  # scores do not depend on it

    def check(self, fitted: Rows, without: str) -> None:
        """See `Wanted`."""
        if not self.values[fitted].std() > 0:
            raise ConfigError(f"without {without}, all of the {len(fitted)} rows left have the same number")

    def fit_linear(self, x: Any, fitted: Rows, c: float) -> Any:
        """Fit ridge regression; leaving out one fitted row at a time chooses its penalty."""
        from sklearn.linear_model import RidgeCV

        model = RidgeCV(alphas=_ALPHAS).fit(x, self.values[fitted])
        return lambda y: model.predict(y)[:, None]

    def loss(self, outputs: Tensor, rows: Rows) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs[:, 0], torch.from_numpy(self.values[rows]).to(outputs.dtype))

    def parts(self, outputs: Numbers, fitted: Rows, tested: Rows) -> Numbers:
        """1 less each row's squared error over the mean one of a constant, the mean of the fitted rows."""
        wanted = self.values[tested]
        constant = np.square(wanted - self.values[fitted].mean()).mean()
        return 1 - np.square(outputs[:, 0] - wanted) / max(float(constant), 1e-12)

    def more(self, outputs: Numbers, tested: Rows) -> dict[str, float]:
        """Pearson's correlation."""
        return {"pearson": scores.pearson(self.values[tested], outputs[:, 0])}


def _number(label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"--kind number: expected labels that are numbers, found {label!r:.60}")
    return value
