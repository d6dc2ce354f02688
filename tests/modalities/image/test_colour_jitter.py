"""Colour jitter: what is drawn, and torchvision's definition written out in NumPy."""

from collections import Counter

import numpy as np
import pytest

from d2v2ds.modalities.image.colour_jitter import Change, ColourJitterConfig, draw_changes
from d2v2ds.modalities.image.operations import change
from tests.data.fake_images import FakeImages, encode, photo
from tests.modalities.image.test_reader import read, reader_of

ROWS = 6000
GREY = np.array([19595, 38470, 7471]) / 65536
"""Shares of red, green and blue in a grey level (ITU-R 601-2), as Pillow has them."""


def drawn(seed: int = 0, epoch: int = 0, rows: int = ROWS) -> list[tuple[Change, ...]]:
    return draw_changes(ColourJitterConfig(), seed=seed, epoch=epoch, rows=np.arange(rows))


def test_three_changes_in_every_order_by_uniform_factors() -> None:
    found = drawn()
    orders = Counter(tuple(one.kind for one in row) for row in found)
    assert len(orders) == 6
    assert [count / ROWS for count in orders.values()] == pytest.approx([1 / 6] * 6, abs=0.025)
    for kind in ("brightness", "contrast", "saturation"):
        factors = np.array([one.factor for row in found for one in row if one.kind == kind])
        assert factors.min() >= 0.6 and factors.max() <= 1.4
        assert np.quantile(factors, [0.25, 0.5, 0.75]) == pytest.approx([0.8, 1.0, 1.2], abs=0.02)


def test_changes_depend_on_seed_epoch_and_row_only() -> None:
    first = drawn(rows=100)
    found = draw_changes(ColourJitterConfig(), seed=0, epoch=0, rows=np.array([73, 5]))
    assert found == [first[73], first[5]]
    assert drawn(seed=1, rows=100) != first
    assert drawn(epoch=1, rows=100) != first
    none = draw_changes(ColourJitterConfig(brightness=0, contrast=0, saturation=0), seed=0, epoch=0, rows=np.arange(3))
    assert none == [(), (), ()]


@pytest.mark.parametrize("factor", [0.6, 1.4])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_a_change_is_torchvisions_blend(kind: str, factor: float) -> None:
    pixels = photo(40, 30)
    grey = pixels @ GREY  # (Y, X)
    plain = {"brightness": 0.0, "contrast": np.floor(grey.mean() + 0.5), "saturation": grey[..., None]}[kind]
    found = pixels.copy()
    change(found, (Change(kind, factor),))
    expected = np.clip(factor * pixels + (1 - factor) * plain, 0, 255)
    assert abs(found - expected).max() <= 1


def test_changes_are_applied_one_after_another() -> None:
    both = (Change("brightness", 1.4), Change("contrast", 0.6))
    forward, backward, alone = photo(40, 30), photo(40, 30), photo(40, 30)
    change(forward, both)
    change(backward, both[::-1])
    assert not np.array_equal(forward, backward)
    change(alone, both[:1])
    change(alone, both[1:])
    np.testing.assert_array_equal(forward, alone)
    change(alone, ())
    np.testing.assert_array_equal(forward, alone)


def test_the_reader_changes_crops_and_no_whole_images() -> None:
    source = FakeImages([encode(photo(48, 40 + n)) for n in range(4)])
    plain, changed = reader_of(source), reader_of(source, colour_jitter=ColourJitterConfig())
    crops = read(plain, [0, 1, 2, 3]).permute(0, 2, 3, 1).contiguous().numpy()
    found = read(changed, [0, 1, 2, 3]).permute(0, 2, 3, 1).numpy()
    wanted = draw_changes(ColourJitterConfig(), seed=0, epoch=0, rows=np.arange(4))
    for crop, own, one in zip(crops, wanted, found, strict=True):
        change(crop, own)
        np.testing.assert_array_equal(one, crop)
    np.testing.assert_array_equal(changed.read_whole(2).numpy(), plain.read_whole(2).numpy())
