"""Which files are images: whole ones of some formats, not too large; and Pillow's own images.

Orientations, modes and odd files are the matter of `tests.preprocessing.test_odd_images`.
"""

import importlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2v2ds.data.codecs.imagefile import DecodeError, read_rgb
from d2v2ds.data.codecs.pixels import ImageFacts, examine
from d2v2ds.errors import MissingExtraError
from preprocessing.image.rows import ImageSettings
from tests.data.fake_images import encode, photo

LIMIT = 10_000_000


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"subsampling": 0, "quality": 100}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "1", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "CMYK", {}),
        ("PPM", "RGB", {}),
    ],
)
def test_no_cut_of_any_format_loses_pixels_unseen(format: str, mode: str, options: dict[str, Any]) -> None:
    data = encode(Image.fromarray(photo(64, 48)).convert(mode), format, **options)
    assert examine(data, LIMIT) == ImageFacts(format.lower(), 64, 48, 1)
    ends = [*range(1, min(len(data), 700), 9), *np.linspace(len(data) // 2, len(data) - 3, 20, dtype=int).tolist()]
    taken = [end for end in ends if not is_refused(data[:end])]
    assert all(end > len(data) - 50 for end in taken)
    whole = read_rgb(Image.open(io.BytesIO(data)))
    for end in taken:
        np.testing.assert_array_equal(read_rgb(Image.open(io.BytesIO(data[:end]))), whole)


def is_refused(data: bytes) -> bool:
    try:
        examine(data, LIMIT)
    except DecodeError:
        return True
    return False


def test_no_flipped_bit_changes_the_pixels_of_a_png() -> None:
    pixels = photo(64, 48)
    data = encode(pixels, "PNG")
    start, rng = data.index(b"IDAT"), np.random.default_rng(0)
    for at in rng.integers(start, len(data) - 16, 200):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.integers(8)
        assert is_refused(bytes(damaged)), at


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_on_pixels_is_exact_and_that_of_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = encode(photo(60, 50), "BMP")
    assert ImageSettings().max_pixels == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2999)
    assert examine(data, 3000).width == 60
    with pytest.raises(DecodeError, match="decompression bomb: 60 x 50 pixels exceed --max-pixels 2999"):
        examine(data, 2999)
    assert Image.MAX_IMAGE_PIXELS == 2999, "Pillow's own limit is as it was"
    (tmp_path / "a.bmp").write_bytes(data)
    for given in (tmp_path / "a.bmp", str(tmp_path / "a.bmp"), Image.open(io.BytesIO(data)), Image.new("L", (60, 50))):
        with pytest.raises(DecodeError, match=r"60 x 50 pixels exceed PIL.Image.MAX_IMAGE_PIXELS 2999"):
            read_rgb(given)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.bmp"), photo(60, 50))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (7, "expected a path or a PIL image, found int"),
        (Image.new("RGB", (0, 5)), "no pixels: 0 x 5"),
        (Image.new("F", (5, 5)), "floating point"),
        ("nowhere.png", "No such file"),
    ],
)
def test_what_is_no_picture_says_why(given: Any, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        read_rgb(given)


def test_an_image_that_was_read_can_still_be_used() -> None:
    pixels = photo(60, 50)
    for format in ("PNG", "BMP"):
        image = Image.open(io.BytesIO(encode(pixels, format)))
        np.testing.assert_array_equal(read_rgb(image), pixels)
        np.testing.assert_array_equal(image, pixels)
    image.paste((1, 2, 3), (0, 0, 60, 50))
    assert (np.asarray(read_rgb(image)) == (1, 2, 3)).all(), "what the user drew, not what the file holds"


def test_a_later_picture_is_read_where_the_user_went_to_it() -> None:
    first, second = photo(60, 50), photo(60, 50, seed=1)
    data = encode(Image.fromarray(first), "PNG", save_all=True, append_images=[Image.fromarray(second)])
    image = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(read_rgb(image), first)
    image.seek(1)
    np.testing.assert_array_equal(read_rgb(image), second)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "d2v2ds.data.codecs.imagefile")
    with pytest.raises(MissingExtraError, match=r"\.\[image\]"):
        importlib.import_module("d2v2ds.data.codecs.imagefile")
