"""Which files are images: whole ones of some formats, not too large; and Pillow's own images.

Orientations, modes and odd files are the matter of `tests.preprocessing.test_odd_images`.
"""

import errno
import importlib
import io
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from d2v2ds.data.codecs.imagefile import DecodeError, read_rgb
from d2v2ds.data.codecs.pixels import ImageFacts, examine
from d2v2ds.errors import MachineError, MissingExtraError
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


# --- files that ask for too much, and machines that have too little ---------------------------------------------------


def progressive(scans: int) -> bytes:
    """A JPEG that repeats its last scan."""
    data = encode(photo(64, 48), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def webp(side: int) -> bytes:
    """A small animation on a canvas of this side."""
    still = encode(photo(64, 48), "WEBP", lossless=True)[12:]
    sides = [(number - 1).to_bytes(3, "little") for number in (side, side, 64, 48)]
    frame = bytes(6) + sides[2] + sides[3] + bytes(4) + still
    chunks = [(b"VP8X", b"\x02" + bytes(3) + sides[0] + sides[1]), (b"ANIM", bytes(6)), (b"ANMF", frame)]
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(data)) + data for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, left: int) -> bytes:
    """A GIF whose screen has this width, and its picture this place."""
    data = bytearray(encode(Image.new("L", (64, 48)), "GIF"))
    struct.pack_into("<H", data, 6, width)
    struct.pack_into("<H", data, data.index(b"\x2c\0\0\0\0") + 1, left)
    return bytes(data)


BOMBS = {
    "scans of a JPEG": (lambda: progressive(200), "decompression bomb: 2.. scans, expected at most 100"),
    "canvas of a WebP": (lambda: webp(16_000), "decompression bomb: 16000 x 16000"),
    "larger canvas of a WebP": (lambda: webp(1 << 24), "decompression bomb|does not decode"),
    "screen of a GIF": (lambda: gif(65_535, 0), "decompression bomb: 65535 x 48|decompression bomb"),
    "place of a GIF's picture": (lambda: gif(64, 65_000), "decompression bomb: 65064 x 48|decompression bomb"),
    "numbers of a PPM": (lambda: b"P6 99999999 99999999 255\n", "decompression bomb"),
    "digits of a PPM": (lambda: b"P5 " + b"9" * 5000 + b" 1 255\n", "does not decode"),
    "sides of a BMP": (
        lambda: b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHH", 40, 2**31 - 1, -(2**31 - 1), 1, 24)
        + bytes(24),
        "decompression bomb",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_headers_that_ask_for_too_much_are_refused_before_decoding(name: str) -> None:
    make, expected = BOMBS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match=expected):
        examine(make(), 3_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_jpeg_of_ordinary_scans_is_read() -> None:
    assert examine(progressive(5), LIMIT).format == "jpeg"


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "I;16"])
def test_examining_takes_no_more_memory_than_decoding(mode: str) -> None:
    code = (
        "import sys, resource; from d2v2ds.data.codecs.pixels import examine; data = sys.stdin.buffer.read();"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; examine(data, 1 << 30);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    image = Image.new(mode, (5000, 5000))
    data = encode(image, "PNG", compress_level=1)
    ran = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    decoded = 5000 * 5000 * {"RGBA": 4, "P": 1, "L": 1, "I;16": 2}[mode]
    assert int(ran.stdout) * 1024 < 1.5 * decoded + (20 << 20)


def test_special_and_endless_files_are_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DecodeError, match="expected an image file, found a folder, FIFO, socket or device"):
        read_rgb(tmp_path / "a.png")
    with pytest.raises(DecodeError, match="expected an image file, found a folder"):
        read_rgb(tmp_path)
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DecodeError, match="a file of 1,099,511,627,776 bytes, expected at most"):
        read_rgb(tmp_path / "b.png")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
def test_a_file_that_the_machine_cannot_read_is_not_damaged(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encode(photo(9, 9), "PNG"))
    monkeypatch.setattr("d2v2ds.io.machine_faults.time.sleep", lambda seconds: None)
    real = os.open

    def fail(path: Any, *rest: Any, **named: Any) -> int:
        if str(path).endswith("a.png"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(MachineError, match=rf"a\.png: cannot be read: {os.strerror(code)}"):
        read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("error", [MemoryError(), OSError("decoder error -9")])
def test_memory_that_a_machine_lacks_is_no_damage_and_that_a_file_asks_for_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    data = encode(photo(9, 9), "PNG")
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(DecodeError, match="does not decode"):
        examine(data, LIMIT)
    monkeypatch.setattr(
        "mmap.mmap", fail if isinstance(error, MemoryError) else Mock(side_effect=OSError(errno.ENOMEM))
    )
    with pytest.raises(MachineError, match="no memory left"):
        examine(data, LIMIT)
