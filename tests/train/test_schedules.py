"""Learning rates against second formulas: continuity at the borders of stages, ends, groups with a scale."""

import math
from typing import Any

import pytest

from d2v2ds.train.schedule import LearningRateConfig, learning_rate

STEPS = [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 19, 20, 21, 30, 31, 100]


def rates(config: LearningRateConfig, total: int, scale: float = 1.0) -> list[float]:
    return [learning_rate(step, config, total, scale) for step in range(total + 5)]


def interpolated(points: list[tuple[int, float]], step: int) -> float:
    """Linear between points, constant behind the last."""
    for (n, low), (m, high) in zip(points, points[1:], strict=False):
        if n <= step < m:
            return low + (high - low) * (step - n) / (m - n)
    return points[-1][1]


@pytest.mark.parametrize(("warmup", "hold", "decay"), [(4, 5, 10), (0, 3, 8), (4, 0, 10), (0, 0, 20), (3, 2, 40)])
def test_tri_stage_is_linear_in_the_logarithm_after_the_plateau(warmup: int, hold: int, decay: int) -> None:
    config = LearningRateConfig(
        shape="tri_stage", peak=2e-4, warmup_steps=warmup, hold_steps=hold, decay_steps=decay,
        start_scale=0.02, final_scale=0.05,
    )  # fmt: skip
    for step in STEPS:
        points = [(0, 0.02 * 2e-4), (warmup, 2e-4)] if warmup else [(0, 2e-4)]
        expected = interpolated(points, step)
        if step >= warmup + hold:
            logarithms = [(warmup + hold, math.log(2e-4)), (warmup + hold + decay, math.log(0.05 * 2e-4))]
            expected = math.exp(interpolated(logarithms, step))
        assert learning_rate(step, config, 50) == pytest.approx(expected, rel=1e-9), step


def test_tri_stage_uses_the_rest_of_the_run_for_its_decay() -> None:
    settings: dict[str, Any] = {"shape": "tri_stage", "peak": 1.0, "warmup_steps": 3, "hold_steps": 4}
    rest = LearningRateConfig(**settings)
    assert rates(rest, 20) == rates(LearningRateConfig(decay_steps=13, **settings), 20)
    assert learning_rate(20, rest, 20) == pytest.approx(0.01)
    short = LearningRateConfig(shape="tri_stage", peak=1.0, warmup_steps=3, hold_steps=20)
    assert all(0.0 <= rate <= 1.0 for rate in rates(short, 20)), "stages longer than the run"


def test_tri_stage_to_zero_stays_finite() -> None:
    config = LearningRateConfig(shape="tri_stage", peak=1.0, warmup_steps=0, final_scale=0.0)
    found = rates(config, 10)
    assert found[0] == 1.0 and found[-1] == 0.0
    assert all(math.isfinite(rate) for rate in found)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_polynomial_between_its_ends(warmup: int, power: float) -> None:
    config = LearningRateConfig(shape="polynomial", peak=3e-5, warmup_steps=warmup, minimum=1e-6, power=power)
    for step in range(30):
        left = (20 - step) / (20 - warmup)
        if warmup and step <= warmup:
            expected = 3e-5 * step / warmup
        else:
            expected = 1e-6 + (3e-5 - 1e-6) * left**power if left > 0 else 1e-6
        assert learning_rate(step, config, 20) == pytest.approx(expected), step
    assert learning_rate(warmup, config, 20) == pytest.approx(3e-5)


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_is_a_half_period_above_the_minimum(warmup: int) -> None:
    config = LearningRateConfig(peak=1e-3, warmup_steps=warmup, minimum=1e-5)
    found = rates(config, 24)
    assert found[warmup] == pytest.approx(1e-3)
    assert found[24:] == pytest.approx([1e-5] * 5)
    if warmup:
        assert found[0] == pytest.approx(1e-5), "the warm-up begins at the minimum"
    middle = (24 + warmup) // 2
    assert found[middle] == pytest.approx((1e-3 + 1e-5) / 2)
    for step in range(warmup, 24):  # symmetric around the middle: cos x = -cos(pi - x)
        assert found[step] + found[24 + warmup - step] == pytest.approx(1e-3 + 1e-5)
        quarter = math.sin(math.pi * (step - warmup) / (24 - warmup) / 2) ** 2
        assert found[step] == pytest.approx(1e-3 - (1e-3 - 1e-5) * quarter)


SHAPES = [
    LearningRateConfig(peak=1e-3, warmup_steps=3, minimum=1e-6),
    LearningRateConfig(peak=1e-3, warmup_steps=3, hold_steps=4, shape="tri_stage"),
    LearningRateConfig(peak=1e-3, warmup_steps=3, minimum=1e-6, shape="polynomial"),
]


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: config.shape)
def test_a_scale_moves_the_peak_and_not_the_minimum(config: LearningRateConfig) -> None:
    whole, half = rates(config, 20), rates(config, 20, 0.5)
    assert max(half) == pytest.approx(0.5 * max(whole))
    least = config.minimum
    for step in range(config.warmup_steps, 25):
        assert half[step] - least == pytest.approx((whole[step] - least) * (0.5e-3 - least) / (1e-3 - least), abs=1e-15)


def test_a_scaled_peak_below_the_minimum_is_a_constant_rate() -> None:
    config = LearningRateConfig(peak=1e-3, warmup_steps=3, minimum=1e-6)
    assert set(rates(config, 20, 1e-4)) == {1e-3 * 1e-4}


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: config.shape)
def test_rates_rise_in_the_warm_up_and_never_after_it(config: LearningRateConfig) -> None:
    found = rates(config, 20)
    assert found[:4] == sorted(found[:4])
    assert found[3:] == sorted(found[3:], reverse=True)


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: config.shape)
def test_a_warm_up_longer_than_the_run_is_no_error(config: LearningRateConfig) -> None:
    assert all(0.0 <= rate <= config.peak for rate in rates(config, 2))
