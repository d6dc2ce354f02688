"""What an image file is, and whether it is whole: by structure as by decoding."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from d2v2ds.data.codecs.pixels import to_rgb, upright
from preprocessing.image.check import BadImageError, ImageFacts, examine, opened
from preprocessing.image.rows import ImageSettings, reencode
from tests.preprocessing.pictures import encoded, picture, with_orientation

LIMIT = 10_000_000


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_size_and_orientation_are_what_pillow_displays(format: str, orientation: int, decode: bool) -> None:
    data = encoded(picture(50, 30), format, exif=with_orientation(orientation))
    with opened(data) as image:
        displayed = ImageOps.exif_transpose(image)
    facts = examine(data, LIMIT, decode)
    # Pillow itself turns a TIFF upright when it is loaded
    assert facts == ImageFacts(format.lower(), *displayed.size, 1 if format == "TIFF" else orientation)
    with opened(data) as image:
        np.testing.assert_array_equal(np.asarray(upright(to_rgb(image), facts.orientation)), np.asarray(displayed))


def test_orientation_of_either_byte_order_is_read_and_damaged_exif_means_upright() -> None:
    def jpeg(exif: bytes) -> bytes:
        plain = encoded(picture(50, 30), "JPEG")
        return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif + plain[2:]

    little = b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
    big = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
    assert examine(jpeg(little), LIMIT).orientation == examine(jpeg(big), LIMIT).orientation == 6
    for damaged in (b"", b"II*\0", little[:15], big.replace(b"\0\6", b"\0\x63"), b"XX" + little[2:]):
        facts = examine(jpeg(damaged), LIMIT)
        assert (facts.orientation, facts.width, facts.height) == (1, 50, 30)


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
def test_every_cut_of_every_format_is_found(format: str, mode: str, options: dict[str, object]) -> None:
    data = encoded(picture(64, 48).convert(mode), format, **options)
    facts = examine(data, LIMIT)
    assert (facts.format, facts.width, facts.height) == (format.lower(), 64, 48)
    ends = [*range(1, min(len(data), 700), 9), *np.linspace(len(data) // 2, len(data) - 3, 20, dtype=int).tolist()]
    if format == "GIF":  # its last bytes carry no pixels
        ends = [end for end in ends if end < len(data) - 30]
    assert [end for end in ends if not _is_bad(data[:end])] == []


def _is_bad(data: bytes) -> bool:
    try:
        examine(data, LIMIT)
    except BadImageError:
        return True
    return False


def test_what_follows_an_image_does_not_matter_and_is_no_end() -> None:
    data = encoded(picture(200, 150), "JPEG")
    assert examine(data + b"trailer of a camera", LIMIT).width == 200
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(data)) + data  # a whole JPEG inside of one that is cut off
    with pytest.raises(BadImageError, match="cut off"):
        examine(data[:2] + thumbnail + data[2:-300], LIMIT)


def test_a_flipped_bit_of_a_png_is_seen_by_its_checksum() -> None:
    data = bytearray(encoded(picture(64, 48), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadImageError, match="damaged: checksum of chunk b'IDAT'"):
        examine(bytes(data), LIMIT)


def test_a_damaged_scan_is_seen_where_every_image_is_decoded() -> None:
    data = bytearray(encoded(picture(64, 48), "JPEG", progressive=True))
    at = data.index(b"\xff\xc4")  # a table of codes that no decoder accepts
    data[at + 5 : at + 21] = b"\xfe" * 16
    assert examine(bytes(data), LIMIT).format == "jpeg"
    with pytest.raises(BadImageError, match="does not decode"):
        examine(bytes(data), LIMIT, decode=True)


def test_bombs_are_refused_before_a_pixel_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    for decode in (False, True):
        with pytest.raises(BadImageError, match="decompression bomb: 100000 x 100000 pixels"):
            examine(bomb, ImageSettings().max_pixels, decode)
    with pytest.raises(BadImageError, match="decompression bomb: 64 x 48"):
        examine(encoded(picture(64, 48), "BMP"), 64 * 48 - 1)
    assert examine(encoded(picture(64, 48), "BMP"), 64 * 48).width == 64


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image"),
        (b"\xff\xd8\xff\xd9", "cut off"),
        (b"\xff\xd8\xff\xe0\x00\x02\xff\xd9\x00\x00", "without image data"),
        (b"\x89PNG\r\n\x1a\n", "cut off"),
        (b"RIFF\x10\0\0\0WEBP", "cut off"),
        (b"%PDF-1.4 this is a document", "not an image"),
    ],
)
def test_what_is_no_image_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        examine(data, LIMIT)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(BadImageError, match="floating point"):
        examine(encoded(picture(20, 20).convert("F"), "TIFF"), LIMIT)


def test_pillows_own_limit_is_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS
    examine(encoded(picture(20, 20), "BMP"), LIMIT)
    with pytest.raises(BadImageError):
        examine(b"BM no bitmap", LIMIT)
    assert before == Image.MAX_IMAGE_PIXELS == ImageSettings().max_pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reencoding_turns_scales_and_keeps_the_picture(orientation: int) -> None:
    data = encoded(picture(600, 400), "JPEG", quality=95, exif=with_orientation(orientation))
    facts = examine(data, LIMIT)
    smaller, found = reencode(data, facts, 64, 90)
    assert found == ImageFacts("jpeg", *((96, 64) if orientation < 5 else (64, 96)), 1) == examine(smaller, LIMIT)
    with opened(data) as image, opened(smaller) as result:
        expected = upright(to_rgb(image), orientation).resize((found.width, found.height), Image.Resampling.LANCZOS)
        difference = np.asarray(result.convert("RGB"), dtype=float) - np.asarray(expected, dtype=float)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb_when_reencoded(mode: str) -> None:
    grey = picture(90, 60).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256) if mode == "I;16" else grey.convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    smaller, _ = reencode(data, examine(data, LIMIT), 30, 95)
    with opened(smaller) as result:
        assert result.mode == "RGB" and result.size == (45, 30)
        if mode != "1":
            difference = np.asarray(result.convert("L"), dtype=float) - np.asarray(grey.resize((45, 30)), dtype=float)
            assert np.abs(difference).mean() < 4


def test_alpha_lets_white_through() -> None:
    image = Image.new("RGBA", (80, 80), (255, 0, 0, 0))
    smaller, _ = reencode(encoded(image, "PNG"), ImageFacts("png", 80, 80, 1), 20, 95)
    with opened(smaller) as result:
        assert np.asarray(result).min() > 250
