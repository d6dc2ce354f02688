"""Masks of whole inputs: the official samplers' statistics, one row at a time, and where the randomness comes from."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from d2v2ds.whole_masks import GridBlocks, SpanWholeMask, WholeMask, draw_whole_masks
from tests.oracles.mask_statistics import run_histogram

RECORDED = json.loads((Path(__file__).parent / "golden" / "official" / "whole_mask_stats.json").read_text())
"""Statistics of the official samplers over 2,000 to 4,000 rows."""
SPEECH = SpanWholeMask(fraction=0.65, length=10)
TEXT = SpanWholeMask(fraction=0.35, length=4, starts_anywhere=True)
SETTINGS: dict[str, tuple[WholeMask, int]] = {
    "audio_p65_l10_L499_single": (SPEECH, 499),
    "audio_p65_l10_L999_single": (SPEECH, 999),
    "text_p35_l4_L512": (TEXT, 512),
    "image_14x14_120_16_196": (GridBlocks(count=120, least=16, most=196), 196),
    "image_14x14_75_16_196": (GridBlocks(count=75, least=16, most=196), 196),
}


def draw(config: WholeMask, num_tokens: int, rows: int = 8, **origin: int) -> NDArray[np.bool_]:
    places = {"seed": 1, "epoch": 0} | origin
    return draw_whole_masks(config, np.full(rows, num_tokens), sample_ids=np.arange(rows), **places)


@pytest.mark.parametrize(("name", "config", "num_tokens"), [(name, *settings) for name, settings in SETTINGS.items()])
def test_masks_have_the_statistics_of_the_official_sampler(name: str, config: WholeMask, num_tokens: int) -> None:
    recorded = RECORDED[name]
    masked = draw(config, num_tokens, rows=recorded["rows"])
    counts = masked.sum(1)
    error = counts.std() / len(counts) ** 0.5
    assert abs(counts.mean() - recorded["count_mean"]) < 5 * error * 2**0.5
    assert abs(counts.std() / recorded["count_sd"] - 1) < 0.15
    if "mean_run" in recorded:
        runs = run_histogram(masked).sum(0)
        mean_run = (runs * np.arange(len(runs))).sum() / runs.sum()
        assert mean_run == pytest.approx(recorded["mean_run"], rel=0.02)
    if "share_exact" in recorded:
        assert (counts == config.expected(num_tokens)).mean() == pytest.approx(recorded["share_exact"], abs=0.05)
        grid = np.pad(masked.reshape(-1, 14, 14), ((0, 0), (1, 1), (1, 1)))
        neighbours = grid[:, :-2, 1:-1] + grid[:, 2:, 1:-1].astype(int) + grid[:, 1:-1, :-2] + grid[:, 1:-1, 2:]
        mean = neighbours[grid[:, 1:-1, 1:-1]].mean()
        assert mean == pytest.approx(recorded["mean_masked_neighbours"], rel=0.01)


@pytest.mark.parametrize("config", [SPEECH, TEXT, GridBlocks(count=30, least=4)], ids=["speech", "text", "image"])
def test_a_row_depends_on_seed_epoch_and_its_number_alone(config: WholeMask) -> None:
    masked = draw(config, 64)
    alone = draw_whole_masks(config, np.array([64]), seed=1, epoch=0, sample_ids=np.array([5]))
    np.testing.assert_array_equal(alone[0], masked[5])
    assert not np.array_equal(masked, draw(config, 64, seed=2))
    assert not np.array_equal(masked, draw(config, 64, epoch=1))
    assert len(np.unique(masked, axis=0)) > 4


def test_shorter_rows_are_masked_within_their_length() -> None:
    masked = draw_whole_masks(SPEECH, np.array([200, 60, 11]), seed=1, epoch=0, sample_ids=np.arange(3))
    assert masked.shape == (3, 200)
    assert not masked[1, 60:].any()
    assert not masked[2, 11:].any()
    assert masked.any(1).all()


def test_spans_of_speech_are_whole_and_those_of_text_reach_the_end() -> None:
    def shortest_run(masked: NDArray[np.bool_]) -> int:
        return int(np.nonzero(run_histogram(masked).sum(0))[0].min())

    assert shortest_run(draw(SPEECH, 300, rows=200)) == 10
    assert shortest_run(draw(TEXT, 300, rows=200)) < 4
    assert draw(TEXT, 300, rows=200)[:, -1].any()
    assert not draw(TEXT, 4, rows=200).all(1).any()


def test_a_short_text_may_get_no_mask_and_speech_always_gets_one() -> None:
    assert not draw(TEXT, 6, rows=300).any(1).all()
    assert draw(SPEECH, 11, rows=300).any(1).all()


def test_rectangles_never_mask_more_than_asked() -> None:
    counts = draw(GridBlocks(count=20, least=4, most=36), 36, rows=500).sum(1)
    assert counts.max() == 20
    assert counts.min() >= 10


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        (SPEECH, 10, "10 tokens cannot hold a span of 10"),
        (SPEECH, 11, ""),
        (TEXT, 2, ""),
        (GridBlocks(count=9), 12, "grid_blocks need a square grid, found 12 tokens"),
        (GridBlocks(count=16), 16, "count 16 leaves none of 16 tokens visible"),
        (GridBlocks(count=15), 16, ""),
    ],
)
def test_impossible_masks_are_named(config: WholeMask, tokens: int, message: str) -> None:
    assert config.fault(tokens).startswith(message)
    assert bool(config.fault(tokens)) == bool(message)


def test_settings_that_contradict_each_other_are_named() -> None:
    assert GridBlocks(count=9, least=5, most=4).check() == ["mask: most 4 is below least 5"]
    assert GridBlocks(count=9, least_aspect=0.0).check() == ["mask: least_aspect is 0.0, expected above 0"]


@pytest.mark.parametrize(("config", "tokens"), [(SPEECH, 499), (TEXT, 512)])
def test_expected_count_is_near_the_drawn_one(config: WholeMask, tokens: int) -> None:
    assert config.expected(tokens) == pytest.approx(draw(config, tokens, rows=500).sum(1).mean(), rel=0.03)


def test_the_token_that_stays_visible_does_not_depend_on_the_longest_row() -> None:
    mask, ids = SpanWholeMask(fraction=0.9, length=2), np.arange(200)
    alone = draw_whole_masks(mask, np.full(200, 3), seed=1, epoch=0, sample_ids=ids)
    beside = draw_whole_masks(mask, np.append(np.full(199, 3), 60), seed=1, epoch=0, sample_ids=ids)
    assert (alone == [True, False, True]).all(1).sum() > 5  # no spans leave the middle one: all were masked
    assert np.array_equal(alone[:199], beside[:199, :3])
