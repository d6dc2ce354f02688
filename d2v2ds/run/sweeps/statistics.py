"""Statistics over seeds: means and ratios with intervals, the time to reach a score, the Pareto front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from d2v2ds.errors import MissingExtraError

LEVEL = 0.95
"""Share of intervals that hold the true value."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the bounds of its interval; the bounds of one seed are NaN."""

    mean: float
    low: float
    high: float
    count: int
    """Seeds."""


def mean_interval(values: Sequence[float]) -> Interval:
    """Compute the mean and Student's t interval (Student 1908): mean +- t(n - 1) s / sqrt(n).

    Args:
        values: one of each seed, at least one.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    mean, count = fmean(values), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    try:
        from scipy.stats import t  # comes with scikit-learn
    except ImportError as error:
        raise MissingExtraError("intervals need SciPy, which comes with scikit-learn", "eval") from error
    margin = float(t.ppf((1 + LEVEL) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - margin, mean + margin, count)


def ratio_interval(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """Compute the geometric mean of ratios of the same seeds, with the t interval of their logarithms.

    Args:
        values: (n,) above 0.
        reference: (n,) above 0, of the same seeds.
    """
    found = mean_interval([math.log(one / other) for one, other in zip(values, reference, strict=True)])
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.count)


def time_to_reach(points: Sequence[tuple[float, float]], target: float, *, is_error: bool = False) -> float | None:
    """Return when a score was first reached, interpolated linearly between two points; None if it never was.

    Args:
        points: (seconds, score) in order of time.
        target: score to reach.
        is_error: True if less is better.
    """
    sign = -1.0 if is_error else 1.0
    before: tuple[float, float] | None = None
    for seconds, score in points:
        if sign * score >= sign * target:
            if before is None:
                return seconds
            share = (target - before[1]) / (score - before[1])
            return before[0] + share * (seconds - before[0])
        before = seconds, score
    return None


def pareto_front(points: Sequence[tuple[float, float]], *, is_error: bool = False) -> list[int]:
    """Find the points that no other beats: none is as fast or faster with a better score.

    Args:
        points: (seconds, score).
        is_error: True if less is better.

    Returns:
        Their numbers in order of time.
    """
    sign = -1.0 if is_error else 1.0
    front: list[int] = []
    best = -math.inf
    for number in sorted(range(len(points)), key=lambda one: (points[one][0], -sign * points[one][1])):
        if sign * points[number][1] > best:
            front.append(number)
            best = sign * points[number][1]
    return front
