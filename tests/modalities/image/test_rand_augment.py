"""RandAugment: which operations are drawn, and what each does to pixels, against loops and NumPy."""

import pickle
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from d2v2ds.modalities.image.operations import FILL, apply, operate
from d2v2ds.modalities.image.rand_augment import NAMES, Operation, RandAugmentConfig, draw_operations
from tests.data.fake_images import FakeImages, encode, photo
from tests.modalities.image.test_reader import read, reader_of

ROWS = 20_000
PUBLISHED = RandAugmentConfig()
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def drawn(config: RandAugmentConfig, seed: int = 0, epoch: int = 0, rows: int = ROWS) -> list[list[Operation]]:
    return draw_operations(config, seed=seed, epoch=epoch, rows=np.arange(rows))


def applied(name: str, strength: float, sign: int = 1, pixels: np.ndarray | None = None) -> np.ndarray:
    """One operation on a photograph, as integers that subtraction does not wrap."""
    pixels = photo(40, 30) if pixels is None else pixels
    return np.asarray(apply(Image.fromarray(pixels), Operation(name, strength, sign))).astype(int)


# --- which operations ------------------------------------------------------------------------------------------------


def test_two_of_fifteen_operations_are_drawn_and_each_is_applied_half_of_the_time() -> None:
    found = drawn(PUBLISHED)
    counts = Counter(len(row) for row in found)
    assert [counts[number] / ROWS for number in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    names = Counter(one.name for row in found for one in row)
    assert set(names) == set(NAMES)
    assert [names[name] / ROWS for name in NAMES] == pytest.approx([1 / 15] * 15, abs=0.006)
    pairs = Counter((row[0].name == row[1].name) for row in found if len(row) == 2)
    assert pairs[True] / pairs.total() == pytest.approx(1 / 15, abs=0.012), "drawn with replacement"


def test_magnitudes_are_normal_inside_their_range_and_directions_are_even() -> None:
    ones = [one for row in drawn(replace(PUBLISHED, probability=1.0)) for one in row]
    magnitudes = np.array([10 * one.strength for one in ones])
    assert magnitudes.max() == 10.0
    assert np.mean(magnitudes == 10.0) == pytest.approx(0.0228, abs=0.004), "P(z > 2)"
    assert np.quantile(magnitudes, [0.159, 0.5, 0.841]) == pytest.approx([8.5, 9.0, 9.5], abs=0.02)
    assert np.mean([one.sign for one in ones]) == pytest.approx(0.0, abs=0.02)
    assert {one.strength for row in drawn(replace(PUBLISHED, magnitude_std=0.0), rows=50) for one in row} == {0.9}


def test_operations_depend_on_seed_epoch_and_row_only() -> None:
    first = drawn(PUBLISHED, rows=100)
    assert draw_operations(PUBLISHED, seed=0, epoch=0, rows=np.array([73, 5])) == [first[73], first[5]]
    assert drawn(PUBLISHED, seed=1, rows=100) != first
    assert drawn(PUBLISHED, epoch=1, rows=100) != first


# --- what they do ----------------------------------------------------------------------------------------------------


def test_every_operation_changes_a_photograph_at_the_published_strength() -> None:
    dull = photo(40, 30) // 2 + 40
    for name in NAMES:
        assert abs(applied(name, 0.9, pixels=dull) - dull).mean() > 0.5, name


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"auto_contrast", "equalize", "invert", "posterize"}))
def test_operations_change_nothing_at_strength_zero(name: str) -> None:
    np.testing.assert_array_equal(applied(name, 0.0), photo(40, 30))


def test_the_levels_of_each_channel_equal_arithmetic() -> None:
    plain = photo(40, 30).astype(int)
    np.testing.assert_array_equal(applied("invert", 0.3), 255 - plain)
    for strength, bits in ((0.0, 4), (0.5, 2), (0.9, 1), (1.0, 0)):
        np.testing.assert_array_equal(applied("posterize", strength), plain // 2 ** (8 - bits) * 2 ** (8 - bits))
    np.testing.assert_array_equal(applied("solarize", 0.9), np.where(plain < 26, plain, 255 - plain))
    np.testing.assert_array_equal(applied("solarize", 1.0), 255 - plain)
    np.testing.assert_array_equal(applied("solarize_add", 0.9), np.where(plain < 128, plain + 99, plain))
    dull = photo(40, 30) // 2 + np.array([10, 40, 90], dtype=np.uint8)
    low, high = dull.min((0, 1)), dull.max((0, 1))
    assert abs(applied("auto_contrast", 0.9, pixels=dull) - (dull - low) * 255.0 / (high - low)).max() <= 1
    flat = np.sort(applied("equalize", 0.9)[..., 0].ravel())
    assert abs(flat - np.linspace(0, 255, len(flat))).max() < 40, "levels are spread evenly"


@pytest.mark.parametrize("sign", [1, -1])
def test_enhancements_move_away_from_a_plain_image(sign: int) -> None:
    plain = photo(40, 30).astype(float)
    factor = 1 + sign * 0.9 * 0.5
    grey = plain @ [0.299, 0.587, 0.114]
    for name, base in (("brightness", 0.0), ("colour", grey[..., None]), ("contrast", round(grey.mean()))):
        expected = np.clip(base + factor * (plain - base), 0, 255)
        assert abs(applied(name, 0.5, sign) - expected).max() <= 2, name
    around = sum(plain[y : 28 + y, x : 38 + x] for y in range(3) for x in range(3))
    middle = plain[1:-1, 1:-1]
    smooth = (around + 4 * middle) / 13
    expected = np.clip(smooth + factor * (middle - smooth), 0, 255)
    assert abs(applied("sharpness", 0.5, sign)[1:-1, 1:-1] - expected).max() <= 2


@pytest.mark.parametrize("sign", [1, -1])
def test_shifts_and_shears_read_where_the_matrix_says(sign: int) -> None:
    pixels = photo(40, 30)
    moved, width = applied("translate_x", 0.5, sign, pixels), 9  # of 0.45 * 0.5 * 40 pixels
    kept, from_ = (slice(0, 40 - width), slice(width, 40)) if sign > 0 else (slice(width, 40), slice(0, 40 - width))
    np.testing.assert_array_equal(moved[:, kept], pixels[:, from_])
    uncovered = moved[:, 40 - width :] if sign > 0 else moved[:, :width]
    assert (uncovered == FILL).all()
    down = applied("translate_y", 1 / 1.35, sign, pixels)  # 10 of 30 rows
    assert np.array_equal(down[:20], pixels[10:]) if sign > 0 else np.array_equal(down[10:], pixels[:20])
    ramp = np.broadcast_to(3 * np.arange(60, dtype=np.uint8)[None, :, None], (40, 60, 3)).copy()
    sheared = applied("shear_x", 0.5, sign, ramp)  # 0.15 pixels for each row
    assert abs(sheared[30, 20:40, 0] - 3 * (np.arange(20, 40) + sign * 0.15 * 30.5)).max() <= 1
    upright = applied("shear_y", 0.5, sign, ramp.transpose(1, 0, 2))
    assert abs(upright[20:40, 30, 0] - 3 * (np.arange(20, 40) + sign * 0.15 * 30.5)).max() <= 1


def test_a_rotation_turns_about_the_middle_by_its_angle() -> None:
    y, x = np.mgrid[:81, :81] - 40.0
    ramp = np.clip(128 + 1.5 * x, 0, 255).astype(np.uint8)[..., None].repeat(3, 2)
    for sign in (1, -1):
        turned = applied("rotate", 1.0, sign, ramp)
        angle = np.deg2rad(30 * sign)
        expected = 128 + 1.5 * (np.cos(angle) * x - np.sin(angle) * y)
        near = np.hypot(x, y) < 30
        assert abs(turned[..., 0] - expected)[near].max() <= 2
        assert (turned[0, 0] == FILL).all()


def test_operations_are_applied_one_after_another_and_none_leaves_the_image() -> None:
    pixels = photo(40, 30)
    found = pixels.copy()
    operate(found, [])
    np.testing.assert_array_equal(found, pixels)
    steps = [Operation("posterize", 0.9, 1), Operation("invert", 0.9, 1)]
    operate(found, steps)
    np.testing.assert_array_equal(found, 255 - (pixels >> 7 << 7))
    operate(pixels, steps[::-1])
    assert not np.array_equal(found, pixels)


# --- in the reader ---------------------------------------------------------------------------------------------------


def test_the_reader_applies_what_is_drawn_to_the_mirrored_crop_in_any_batch_and_process() -> None:
    source = FakeImages([encode(photo(60, 45, seed)) for seed in range(12)], [1, 6, 3] * 4)
    plain, augmented = reader_of(source), reader_of(source, rand_augment=PUBLISHED)
    rows = list(range(12))
    found = read(augmented, rows, epoch=3, seed=5)
    operations = draw_operations(PUBLISHED, seed=5, epoch=3, rows=np.arange(12))
    assert 0 < sum(map(bool, operations)) < 12
    for crop, own, image in zip(read(plain, rows, epoch=3, seed=5), operations, found, strict=True):
        expected = crop.permute(1, 2, 0).contiguous().numpy()
        operate(expected, own)
        assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))
    assert found.is_contiguous(memory_format=torch.channels_last)
    again = read(pickle.loads(pickle.dumps(augmented)), [7, 3], epoch=3, seed=5)  # noqa: S301  (our own)
    assert torch.equal(again, found[[7, 3]])
    assert not torch.equal(read(augmented, rows, epoch=4, seed=5), found)


def test_evaluation_has_no_random_operations() -> None:
    source = FakeImages([encode(photo(60, 45))])
    reader, plain = reader_of(source, rand_augment=replace(PUBLISHED, probability=1.0)), reader_of(source)
    reader.augments = plain.augments = False
    for epoch in range(3):
        assert torch.equal(read(reader, [0], epoch=epoch), read(plain, [0]))


def test_the_defaults_are_the_published_settings() -> None:
    assert asdict(PUBLISHED) == {"operations": 2, "probability": 0.5, "magnitude": 9.0, "magnitude_std": 0.5}
