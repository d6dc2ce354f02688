"""Images that are larger than --shorter-side become small JPEGs of the same picture."""

import io

import numpy as np
import pytest
from PIL import Image

from d2v2ds.data.codecs.imagefile import DecodeError, upright
from d2v2ds.data.codecs.pixels import ImageFacts, examine
from preprocessing.image.rows import ImageSettings, reencode
from tests.preprocessing.odd_images import BAD
from tests.preprocessing.pictures import encoded, picture, with_orientation

LIMIT = 10_000_000


def reencoded(data: bytes, shorter_side: int, quality: int = 95) -> tuple[Image.Image, bytes, ImageFacts]:
    result = reencode(data, ImageSettings(shorter_side=shorter_side, quality=quality))
    assert result is not None
    return Image.open(io.BytesIO(result[0])), *result


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_reencoding_turns_scales_and_keeps_the_picture(format: str, orientation: int) -> None:
    stored = picture(600, 400)
    image, data, facts = reencoded(encoded(stored, format, exif=with_orientation(orientation)), 64, 90)
    assert facts == ImageFacts("jpeg", *((96, 64) if orientation < 5 else (64, 96)), 1) == examine(data, LIMIT)
    expected = upright(stored, orientation).resize(image.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)).mean() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = picture(90, 60).convert("L")
    stored = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256) if mode == "I;16" else grey.convert(mode)
    image, _, _ = reencoded(encoded(stored, "TIFF" if mode == "CMYK" else "PNG"), 30)
    assert image.mode == "RGB" and image.size == (45, 30)
    if mode != "1":
        difference = np.asarray(image.convert("L"), dtype=float) - np.asarray(grey.resize((45, 30)), dtype=float)
        assert np.abs(difference).mean() < 4


def test_alpha_lets_white_through() -> None:
    image, _, _ = reencoded(encoded(Image.new("RGBA", (80, 80), (255, 0, 0, 0)), "PNG"), 20)
    assert np.asarray(image).min() > 250


def test_images_that_are_small_enough_are_kept() -> None:
    data = encoded(picture(90, 60), "PNG")
    assert reencode(data, ImageSettings(shorter_side=60)) is None
    assert reencode(data, ImageSettings()) is None


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_decode_is_not_reencoded(name: str) -> None:
    with pytest.raises(DecodeError):
        reencode(BAD[name], ImageSettings(shorter_side=20))
