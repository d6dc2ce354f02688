"""Masks: exact counts, the loop oracle, the reference's statistics, and where the randomness comes from."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2v2ds.masking import (
    MaskConfig,
    blocks_2d,
    draw_masks,
    masked_count,
    masks_from_uniforms,
    num_blocks,
    num_draws,
    uniforms,
    visible_positions,
)
from d2v2ds.rng import hash64, mix64
from tests.oracles.mask_statistics import (
    agreement,
    golden_rows,
    golden_statistics,
    mask_config,
    pooled,
    row_statistics,
)
from tests.oracles.masks import mask_row

OFFICIAL = Path(__file__).parent / "golden" / "official"
SETTINGS = json.loads((OFFICIAL / "mask_stats.json").read_text())

CONFIGS = {
    "audio_base": (MaskConfig(masked_fraction=0.5, adjust=0.05, block_length=5, num_masks=8), 99),
    "audio_large": (MaskConfig(masked_fraction=0.55, adjust=0.1, block_length=5, num_masks=12), 249),
    "blocks_overshoot": (MaskConfig(masked_fraction=0.3, adjust=0.5, block_length=4, num_masks=3), 41),
    "inverse_1d": (MaskConfig(masked_fraction=0.6, adjust=0.1, block_length=3, num_masks=4, inverse=True), 50),
    "image_base": (
        MaskConfig(kind="block_2d", masked_fraction=0.8, adjust=0.07, block_length=3, num_masks=16, inverse=True),
        196,
    ),
    "spectrogram_base": (
        MaskConfig(
            kind="block_2d", masked_fraction=0.8, adjust=0.07, block_length=5, num_masks=3, inverse=True, columns=8
        ),
        512,
    ),
    "image_direct": (MaskConfig(kind="block_2d", masked_fraction=0.4, adjust=0.2, block_length=2, num_masks=2), 25),
    "text_base": (MaskConfig(kind="random", masked_fraction=0.48, num_masks=8), 64),
}
every_config = pytest.mark.parametrize(("config", "num_tokens"), CONFIGS.values(), ids=CONFIGS.keys())


@every_config
def test_masks_equal_the_loop_oracle(config, num_tokens):
    numbers = np.random.default_rng(0).random((5, 3, num_draws(config, num_tokens)))
    fast = masks_from_uniforms(config, num_tokens, numbers)
    slow = [[mask_row(config, num_tokens, row.tolist()) for row in sample] for sample in numbers]
    np.testing.assert_array_equal(fast, np.array(slow))


@every_config
def test_every_row_masks_exactly_the_declared_count(config, num_tokens):
    masked = draw_masks(config, num_tokens, seed=1, epoch=0, sample_ids=np.arange(40))
    assert masked.shape == (40, config.num_masks, num_tokens)
    assert (masked.sum(-1) == masked_count(config, num_tokens)).all()


@pytest.mark.parametrize(
    ("fraction", "num_tokens", "inverse", "count"),
    [(0.5, 499, False, 249), (0.55, 999, False, 549), (0.8, 196, True, 157), (0.75, 256, True, 192)],
)
def test_counts_truncate_as_the_published_recipes_do(fraction, num_tokens, inverse, count):
    config = MaskConfig(masked_fraction=fraction, block_length=3, num_masks=1, inverse=inverse)
    assert masked_count(config, num_tokens) == count


@every_config
def test_visible_and_masked_partition_the_tokens(config, num_tokens):
    masked = draw_masks(config, num_tokens, seed=1, epoch=0, sample_ids=[5, 9])
    keep = visible_positions(masked)
    assert keep.dtype == np.int64
    assert (np.diff(keep, axis=-1) > 0).all(), "visible positions ascend"
    for masked_row, keep_row in zip(masked.reshape(-1, num_tokens), keep.reshape(-1, keep.shape[-1]), strict=True):
        assert sorted([*np.flatnonzero(masked_row), *keep_row]) == list(range(num_tokens))


def test_the_masks_of_a_sample_differ():
    config, num_tokens = CONFIGS["audio_base"]
    masked = draw_masks(config, num_tokens, seed=1, epoch=0, sample_ids=np.arange(10))
    rows = masked.reshape(-1, num_tokens)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_a_mask_does_not_depend_on_the_batch_around_it():
    config, num_tokens = CONFIGS["audio_base"]
    together = draw_masks(config, num_tokens, seed=1, epoch=3, sample_ids=[7, 100_000_000, 3])
    alone = [draw_masks(config, num_tokens, seed=1, epoch=3, sample_ids=[i])[0] for i in (7, 100_000_000, 3)]
    np.testing.assert_array_equal(together, np.stack(alone))


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 1}, {"sample_ids": [8]}])
def test_seed_epoch_and_sample_each_change_the_mask(change):
    config, num_tokens = CONFIGS["audio_base"]
    origin = {"seed": 1, "epoch": 0, "sample_ids": [7]}
    first = draw_masks(config, num_tokens, **origin)
    assert (draw_masks(config, num_tokens, **origin) == first).all()
    other = draw_masks(config, num_tokens, **(origin | change))
    assert (other != first).any(-1).all()


def test_drawn_masks_stay_what_they_were():
    """A changed draw would silently end the exact resume of old runs."""
    config = MaskConfig(masked_fraction=0.5, adjust=0.05, block_length=5, num_masks=2)
    masked = draw_masks(config, 30, seed=1, epoch=2, sample_ids=[3])
    rows = ["".join("X" if m else "." for m in row) for row in masked[0]]
    assert rows == [
        "...XXXXX..XXXXX.....XXXXX.....",
        "XXXX..X........XXXXX..XXXXX...",
    ]


@pytest.mark.parametrize(
    ("config", "num_tokens", "message"),
    [
        (MaskConfig(masked_fraction=0.5, num_masks=1), 1, "nothing masked"),
        (MaskConfig(masked_fraction=0.999, num_masks=1, inverse=True), 50, "nothing visible"),
        (MaskConfig(masked_fraction=0.99, num_masks=1, kind="random"), 50, "nothing visible"),
        (MaskConfig(masked_fraction=0.5, num_masks=1, block_length=10), 9, "cannot hold a block"),
        (MaskConfig(masked_fraction=0.5, num_masks=1, kind="block_2d"), 24, "square grid"),
        (MaskConfig(masked_fraction=0.5, num_masks=1, kind="block_2d", columns=8), 60, "whole rows of 8"),
        (MaskConfig(masked_fraction=0.5, num_masks=1, kind="block_2d", columns=8, block_length=5), 32, "cannot hold"),
    ],
)
def test_impossible_masks_are_refused(config, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        draw_masks(config, num_tokens, seed=0, epoch=0, sample_ids=[0])


def test_an_adjustment_that_leaves_no_blocks_to_draw_is_named():
    config = MaskConfig(masked_fraction=0.3, num_masks=1, adjust=-0.4)
    (fault,) = config.check()
    assert re.match(r"adjust -0.4 makes .* negative \(0.3 \+ adjust\)", fault)
    assert replace(config, inverse=True).check() == [], "0.7 of the tokens are visible, and those are drawn"


# ---- random numbers ----


def test_mix64_is_splitmix64():
    """Known answers: the published sequence of SplitMix64 with state 1234567."""
    states = np.array([1234567], np.uint64) + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_hashes_of_neighbouring_places_do_not_collide():
    hashes = hash64(0, np.arange(30)[:, None, None], np.arange(50)[:, None], np.arange(60))
    assert len(np.unique(hashes)) == hashes.size
    assert hash64(1, 2)[0] != hash64(2, 1)[0], "the order of the parts counts"


def test_uniforms_are_uniform():
    numbers = uniforms(seed=0, epoch=0, sample_ids=np.arange(200), num_masks=8, num_draws=250)  # 400,000
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    observed = np.bincount((numbers.ravel() * 100).astype(int), minlength=100)
    chi_square = ((observed - 4000) ** 2 / 4000).sum()  # 99 degrees of freedom, sd 14
    assert abs(chi_square - 99) < 4 * 14


def test_uniforms_of_neighbours_are_independent():
    """Neighbours in draw, mask, sample, epoch and seed are uncorrelated (se = 1/sqrt(n))."""
    config = {"num_masks": 8, "num_draws": 250}
    numbers = uniforms(seed=0, epoch=0, sample_ids=np.arange(200), **config)
    pairs = {
        "draw": (numbers[..., 1:], numbers[..., :-1]),
        "mask": (numbers[:, 1:], numbers[:, :-1]),
        "sample": (numbers[1:], numbers[:-1]),
        "epoch": (numbers, uniforms(seed=0, epoch=1, sample_ids=np.arange(200), **config)),
        "seed": (numbers, uniforms(seed=1, epoch=0, sample_ids=np.arange(200), **config)),
        "sample against mask": (numbers[1, 2:8], numbers[2:8, 1]),
    }
    for name, (a, b) in pairs.items():
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(a.size), name


# ---- statistics of the reference ----


@pytest.mark.parametrize("setting", SETTINGS)
def test_statistics_agree_with_the_official_samplers(setting):
    entry, means, first_bins = golden_statistics(OFFICIAL, setting)
    config, num_tokens = mask_config(entry), entry["L"]
    assert num_blocks(config, num_tokens) == entry.get("centres", 0)
    assert masked_count(config, num_tokens) == entry["masked_per_row"]
    ours = row_statistics(config, num_tokens, seed=17, num_rows=10_000)
    assert len(means) >= 3
    for name, mean in means.items():
        rows = pooled(ours[name], first_bins[name]) if name in first_bins else ours[name]
        distance = agreement(rows, mean, num_golden_rows=golden_rows(name, entry["rows"]))
        assert np.abs(distance).max() < 4.0, f"{setting} {name}: {distance.round(1)} standard errors"


@pytest.mark.parametrize(
    ("fraction", "adjust", "rows", "centres", "masked", "mean", "deviation", "too_many"),
    [
        (0.8, 0.07, 64, 5, 410, 95.4, 11.5, 0.28),
        (0.75, 0.1, 64, 7, 384, 128.4, 14.1, 0.51),
        (0.8, 0.07, 32, 2, 205, 39.0, 7.0, 0.0),
        (0.8, 0.07, 8, 0, 52, 0.0, 0.0, 0.0),
    ],
)
def test_blocks_on_a_spectrogram_have_the_statistics_of_the_official_sampler(
    fraction, adjust, rows, centres, masked, mean, deviation, too_many
):
    """Kept cells of the blocks alone in 2,000 rows of the official EAT sampler, on grids of `rows` x 8."""
    config = MaskConfig(
        kind="block_2d", masked_fraction=fraction, adjust=adjust, block_length=5, num_masks=1, inverse=True, columns=8
    )
    tokens = 8 * rows
    assert (num_blocks(config, tokens), masked_count(config, tokens)) == (centres, masked)
    numbers = uniforms(seed=3, epoch=0, sample_ids=np.arange(4000), num_masks=1, num_draws=num_draws(config, tokens))
    kept = blocks_2d(numbers[:, 0, :centres], (rows, 8), 5).sum(-1)
    assert abs(kept.mean() - mean) < 4 * deviation / 2000**0.5 + 0.05
    assert abs(kept.std() - deviation) < 4 * deviation / (2 * 2000) ** 0.5 + 0.05
    assert abs((kept > tokens - masked).mean() - too_many) < 4 * 0.5 / 2000**0.5


@pytest.mark.parametrize("kind", ["block_1d", "block_2d"])
def test_few_tokens_without_any_block_still_have_the_exact_count(kind: str) -> None:
    config = MaskConfig(masked_fraction=0.8, num_masks=2, kind=kind, block_length=3, inverse=True)
    masked = draw_masks(config, 9, seed=0, epoch=0, sample_ids=[1, 2])
    assert num_blocks(config, 9) == 0
    assert (masked.sum(-1) == masked_count(config, 9)).all()
