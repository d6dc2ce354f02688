"""Intervals, times and fronts against slow, obvious versions."""

import math
from statistics import fmean

import numpy as np
import pytest

from d2v2ds.run.sweeps.statistics import mean_interval, pareto_front, ratio_interval, time_to_reach


def slow_margin(values: list[float]) -> float:
    """Half a 95 % t interval: the density of Student's t is integrated, and the bound found by bisection."""
    count, mean = len(values), fmean(values)
    freedom = count - 1
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))

    def outside(bound: float) -> float:
        """Share beyond both bounds; t = tan(u) makes the range finite."""
        edges = np.linspace(math.atan(bound), math.pi / 2, 200_001)
        u = (edges[1:] + edges[:-1]) / 2
        density = scale * (1 + np.tan(u) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(u) ** 2
        return 2 * float(density.sum() * (edges[1] - edges[0]))

    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if outside(middle) > 0.05 else (low, middle)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / freedom)
    return low * deviation / math.sqrt(count)


@pytest.mark.parametrize("values", [[1.0, 3.0], [40.0, 41.5, 39.0], [0.1, 0.2, 0.2, 0.9, 0.4]])
def test_interval_is_that_of_student(values: list[float]) -> None:
    found = mean_interval(values)
    margin = slow_margin(values)
    assert found.count == len(values) and found.mean == pytest.approx(fmean(values))
    assert (found.low, found.high) == pytest.approx((found.mean - margin, found.mean + margin), rel=1e-4)


def test_one_seed_has_no_interval() -> None:
    found = mean_interval([4.0])
    assert (found.mean, found.count) == (4.0, 1) and math.isnan(found.low) and math.isnan(found.high)


def test_ratio_is_a_geometric_mean_of_pairs() -> None:
    found = ratio_interval([20.0, 80.0], [10.0, 10.0])
    assert found.mean == pytest.approx(4.0)  # of 2 and 8
    margin = slow_margin([math.log(2), math.log(8)])
    assert (found.low, found.high) == pytest.approx((4 * math.exp(-margin), 4 * math.exp(margin)), rel=1e-3)
    other = ratio_interval([10.0, 10.0], [20.0, 80.0])
    assert (other.mean, other.low) == pytest.approx((1 / found.mean, 1 / found.high))


CURVE = [(0.0, 10.0), (10.0, 30.0), (20.0, 25.0), (30.0, 50.0)]


@pytest.mark.parametrize(
    ("target", "seconds"),
    [(10, 0.0), (15, 2.5), (20, 5.0), (30, 10.0), (31, 22.4), (40, 26.0), (50, 30.0), (50.1, None)],
)
def test_time_to_a_score_is_interpolated_where_it_is_first_reached(target: float, seconds: float | None) -> None:
    found = time_to_reach(CURVE, target)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_time_to_an_error_rate() -> None:
    errors = [(seconds, 100 - score) for seconds, score in CURVE]
    assert time_to_reach(errors, 60, is_error=True) == pytest.approx(26.0)
    assert time_to_reach(errors, 49, is_error=True) is None


def test_time_without_an_earlier_point_is_that_of_the_first() -> None:
    assert time_to_reach([(5.0, 30.0), (9.0, 40.0)], 20) == 5.0
    assert time_to_reach([], 20) is None


@pytest.mark.parametrize("is_error", [False, True])
def test_front_is_what_no_other_point_beats(is_error: bool) -> None:
    rng = np.random.default_rng(0)
    points = [(float(a), float(b)) for a, b in rng.integers(0, 12, size=(40, 2))]
    sign = -1 if is_error else 1

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and sign * one[1] >= sign * other[1]

    slow = sorted({point for point in points if not any(beats(one, point) for one in points)})
    assert [points[number] for number in pareto_front(points, is_error=is_error)] == slow
