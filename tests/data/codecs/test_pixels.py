"""Parts of image files: what Pillow makes of the whole file, less the work that a part does not need."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile

from d2v2ds.data.codecs import pixels
from d2v2ds.data.codecs.imagefile import DecodeError, to_rgb, upright
from d2v2ds.data.codecs.pixels import SCALES, Box, ImageFacts, _four_bytes, decode_box, displayed, examine, stored_box
from tests.data.fake_images import encode, photo

WIDTH, HEIGHT = 93, 70
"""No multiple of a JPEG's blocks."""


@pytest.fixture(autouse=True, params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    """Everything here holds with simplejpeg and without it."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(pixels, "simplejpeg", None)
    return request.param


def decoded(data: bytes, scale: int = 1) -> np.ndarray:
    """(Y, X, 3), the slow way."""
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    return np.asarray(to_rgb(image))


def part_of(data: bytes, box: Box, least: int | None = None) -> np.ndarray:
    part = decode_box(data, Image.open(io.BytesIO(data)).size, box, least)[..., :3]
    return np.broadcast_to(part, (*part.shape[:2], 3))


def cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    return pixels[box.top : box.bottom, box.left : box.right]


KINDS = {
    "colours at half resolution": {},
    "colours at half width": {"subsampling": 1},
    "full colours": {"subsampling": 0},
    "red, green and blue": {"keep_rgb": True},
    "progressive": {"progressive": True},
    "progressive, full colours": {"progressive": True, "subsampling": 0},
    "restart markers": {"restart_marker_rows": 1},
    "progressive with restart markers": {"progressive": True, "restart_marker_blocks": 3},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_decoded_down_to_any_row_equals_the_whole(options, mode):
    data = encode(Image.fromarray(photo(WIDTH, HEIGHT)).convert(mode), **options)
    whole = decoded(data)
    for bottom in range(1, HEIGHT + 1):
        box = Box(5, max(0, bottom - 20), 80, bottom)
        np.testing.assert_array_equal(part_of(data, box), cut(whole, box), err_msg=str(bottom))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_reduced_jpeg_decoded_down_to_any_row_equals_the_whole(options, scale):
    data = encode(photo(WIDTH * 4, HEIGHT * 4), **options)
    whole = decoded(data, scale)
    for bottom in range(64, HEIGHT * 4 + 1, 5):
        box = Box(5, bottom - 63, 5 + 8 * scale, bottom)
        part = part_of(data, box, min(8 * scale, 63) // scale)
        assert part.shape[:2] == (box.reduced(scale).height, box.reduced(scale).width)
        np.testing.assert_array_equal(part, cut(whole, box.reduced(scale)), err_msg=str(bottom))


@pytest.mark.parametrize("scale", [1, *SCALES])
@pytest.mark.parametrize("kind", ["bytes", "row of a shard"])
def test_ordinary_jpegs_are_for_simplejpeg(decoder, kind, scale, monkeypatch):
    data = encode(photo(WIDTH * 4, HEIGHT * 4))
    given = {"bytes": bytes, "row of a shard": lambda x: np.frombuffer(x, dtype=np.uint8).data}[kind]
    opened, really_open = [], pixels.open_image
    monkeypatch.setattr(pixels, "open_image", lambda *args, **how: opened.append(True) or really_open(*args, **how))
    part = decode_box(given(data), (WIDTH * 4, HEIGHT * 4), Box(8, 8, 8 + 8 * scale, 8 + 8 * scale), 8)
    assert bool(opened) == (decoder == "Pillow")
    assert part.shape[:2] == (8, 8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_examined_file_is_decoded_once(decoder, format, monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(bool(image.tile)) or load(image))
    if decoder == "simplejpeg":
        decode = pixels.simplejpeg.decode_jpeg
        fake = SimpleNamespace(decode_jpeg=lambda *given, **options: decoded.append(True) or decode(*given, **options))
        monkeypatch.setattr(pixels, "simplejpeg", fake)
    data = encode(photo(WIDTH, HEIGHT), format)
    assert examine(data, 10_000) == ImageFacts(format.lower(), WIDTH, HEIGHT, 1)
    assert sum(decoded) == 1


def test_pillow_judges_jpegs_that_the_library_warns_of():
    data = encode(photo(WIDTH, HEIGHT), progressive=True)
    middle = len(data) * 2 // 3
    beyond = data[:middle] + b"\xff\xe1\xff\xff" + data[middle + 4 :]  # a segment that ends behind the file
    with pytest.raises(DecodeError, match="truncated"):
        examine(beyond, 10_000)
    hole = data[:middle] + data[middle + 50 :]
    whole = Box(0, 0, WIDTH, HEIGHT)
    np.testing.assert_array_equal(part_of(hole, whole), decoded(hole))


def test_memory_to_decode_into_is_used_again_without_touching_earlier_parts(decoder):
    boxes = [Box(0, 0, 60, 50), Box(3, 4, 9, 8), Box(1, 2, 93, 70)]
    files = [encode(photo(WIDTH, HEIGHT, seed)) for seed in range(3)]
    parts = [decode_box(data, (WIDTH, HEIGHT), box, None) for data, box in zip(files, boxes, strict=True)]
    for data, box, part in zip(files, boxes, parts, strict=True):
        np.testing.assert_array_equal(part[..., :3], cut(decoded(data), box))


def test_a_jpeg_cut_off_inside_the_box_is_refused():
    data = encode(photo(200, 400))
    with pytest.raises(DecodeError, match="truncated"):
        decode_box(data[:-100], (200, 400), Box(0, 0, 200, 400), None)


def test_decoding_stops_below_the_box():
    data = encode(photo(200, 400))
    cut_off = data[: len(data) // 2]
    box = Box(0, 0, 200, 100)
    np.testing.assert_array_equal(part_of(cut_off, box), cut(decoded(data), box))
    with pytest.raises(DecodeError, match="truncated"):
        part_of(cut_off, Box(0, 0, 200, 400))


def test_the_scale_leaves_what_is_asked_for_and_no_more_than_twice_that():
    data = encode(photo(1000, 700))
    for side, least, scale in ((448, 224, 2), (447, 224, 1), (600, 75, 8), (599, 75, 4), (600, None, 1)):
        part = decode_box(data, (1000, 700), Box(3, 5, 3 + side, 5 + side), least)
        assert abs(part.shape[0] - side / scale) <= 1 and part.shape[0] >= (least or 0), (side, least)


def test_a_reduced_box_moves_by_half_a_pixel_at_most():
    rng = np.random.default_rng(0)
    for scale in SCALES:
        for left, top, width, height in rng.integers(scale, 500, (200, 4)).tolist():
            box = Box(left, top, left + width, top + height)
            small = box.reduced(scale)
            edges = [(box.left, small.left), (box.top, small.top), (box.right, small.right)]
            assert all(abs(full / scale - reduced) <= 0.5 for full, reduced in [*edges, (box.bottom, small.bottom)])
            assert small.width >= width // scale and small.height >= height // scale


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_box_and_its_pixels_turn_as_pillow_turns_the_image(turn):
    stored = Image.fromarray(photo(WIDTH, HEIGHT))
    shown = upright(stored, turn)
    box = Box(11, 3, 41, 66)
    found = cut(np.asarray(stored), stored_box(box, *shown.size, turn))
    np.testing.assert_array_equal(displayed(found, turn), cut(np.asarray(shown), box))


def test_a_file_of_another_size_than_its_row_says_is_refused():
    for data in (encode(photo(40, 30)), encode(photo(40, 30), "PNG")):
        with pytest.raises(DecodeError, match="expected 41 x 30 pixels as stored, found 40 x 30"):
            decode_box(data, (41, 30), Box(0, 0, 40, 30), None)


def test_large_images_are_read():
    data = encode(Image.new("RGB", (3000, 2000), (7, 8, 9)), "PNG")
    assert (part_of(data, Box(0, 0, 3000, 2000)) == (7, 8, 9)).all()


def test_large_and_small_images_give_the_same_pixels():
    corner = photo(120, 80)
    whole = np.zeros((1100, 4000, 3), dtype=np.uint8)  # 17.6 MB in four bytes a pixel: in several pieces
    whole[1020:, 3880:] = corner
    box = Box(3890, 1025, 3995, 1099)
    assert _four_bytes(Image.fromarray(whole)) is None
    np.testing.assert_array_equal(part_of(encode(whole, "PNG"), box), cut(whole, box))
    small = Box(10, 5, 115, 79)
    assert _four_bytes(Image.fromarray(corner)) is not None
    np.testing.assert_array_equal(part_of(encode(corner, "PNG"), small), cut(corner, small))


def test_the_limit_on_pixels_is_that_of_packing(monkeypatch):
    data = encode(photo(60, 50), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_box(data, (60, 50), Box(0, 0, 60, 50), None).shape[:2] == (50, 60)
    assert Image.MAX_IMAGE_PIXELS == 100


GREY = np.arange(256, dtype=np.uint8)[None].repeat(2, axis=0)


def wide_grey() -> Image.Image:
    return Image.fromarray(GREY.astype(np.uint16) * 256 + 255)


def with_palette(mode: str) -> Image.Image:
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    image.putpalette([value for colour in colours for value in colour])
    return image.convert(mode)


OPAQUE = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (9, 9, 9)]]
ALPHA = np.array([[[200, 100, 0, 255], [200, 100, 0, 0]], [[200, 100, 0, 51], [0, 0, 0, 127]]], dtype=np.uint8)
OVER_WHITE = [[(200, 100, 0), (255, 255, 255)], [(244, 224, 204), (128, 128, 128)]]
KEYED = [[(255, 255, 255), (0, 255, 0)], [(0, 0, 255), (9, 9, 9)]]

MODES = {
    "grey": (encode(GREY, "PNG"), GREY),
    "grey of 16 bits": (encode(wide_grey(), "PNG"), GREY),
    "black and white": (encode(Image.fromarray(GREY > 99), "PNG"), np.where(GREY > 99, 255, 0)),
    "palette": (encode(with_palette("P"), "PNG"), OPAQUE),
    "palette of a GIF": (encode(with_palette("P"), "GIF"), OPAQUE),
    "palette with a transparent colour": (encode(with_palette("P"), "PNG", transparency=0), KEYED),
    "palette with alpha": (encode(with_palette("P"), "PNG", transparency=b"\x00\xff\xff\xff"), KEYED),
    "alpha": (encode(ALPHA, "PNG"), OVER_WHITE),
    "alpha of a WebP": (encode(ALPHA, "WEBP", lossless=True, exact=True), OVER_WHITE),
    "grey with alpha": (
        encode(Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)]), "PNG"),
        [[224]],
    ),
    "colour key": (encode(with_palette("RGB"), "PNG", transparency=(255, 0, 0)), KEYED),
    "TIFF": (encode(with_palette("RGB"), "TIFF"), OPAQUE),
    "BMP": (encode(with_palette("RGB"), "BMP"), OPAQUE),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name):
    data, expected = MODES[name]
    expected = np.asarray(expected)
    expected = expected if expected.ndim == 3 else expected[..., None]
    size = expected.shape[1::-1]
    found = part_of(data, Box(0, 0, *size))
    np.testing.assert_allclose(found.astype(int), np.broadcast_to(expected, found.shape), atol=1)


def test_inverted_cmyk_keeps_its_colours():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    found = part_of(encode(ink), Box(0, 0, 16, 16))
    assert abs(found.astype(int) - (255, 0, 0)).max() < 8
    assert b"Adobe" in encode(ink)


def test_brightness_of_floats_is_not_guessed():
    data = encode(Image.new("F", (3, 3), 0.5), "TIFF")
    with pytest.raises(DecodeError, match="mode F"):
        decode_box(data, (3, 3), Box(0, 0, 3, 3), None)


def test_damaged_bytes_raise_one_type_of_error():
    rng = np.random.default_rng(0)
    originals = [
        encode(photo(40, 30)),
        *(encode(photo(40, 30), kind) for kind in ("PNG", "GIF", "WEBP", "TIFF", "BMP")),
    ]
    refused = 0
    for data in originals:
        for _ in range(150):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 3):
                damaged[place] = rng.integers(256)
            damaged = bytes(damaged[: rng.integers(1, len(data) + 1)]) if rng.random() < 0.3 else bytes(damaged)
            try:
                decode_box(damaged, (40, 30), Box(0, 0, 40, 30), None)
            except DecodeError:
                refused += 1
    assert refused > 100
