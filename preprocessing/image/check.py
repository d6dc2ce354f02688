"""Is this an image, is it whole, how large is it? Answered from its structure where that suffices, without decoding.

* JPEG: the segments up to the first scan are walked; a file that was cut off has no end marker after it.
* PNG: every chunk is walked to the end chunk and its CRC-32 compared.
* WebP: the length in its first bytes.
* Anything else that Pillow reads (`FORMATS`), and JPEGs that are unusual, are decoded.

Damage in the middle of a whole JPEG or WebP shows only when it is decoded (`decode=True`): neither has checksums.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from d2v2ds.data.codecs.pixels import PILLOW_ERRORS, SWAPS_SIDES, to_rgb
from d2v2ds.io.crc import crc32

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is packed, as Pillow calls it; multi-picture files (MPO) open as JPEG. The content decides, not the name."""

_ORIENTATION = 0x0112
_BASIC_SCANS = frozenset({0xC0, 0xC1, 0xC2})
"""Start-of-frame markers of Huffman coded DCT images, sequential and progressive: what every decoder reads."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_DQT, _DHT, _SOS, _EOI, _APP1 = 0xDB, 0xC4, 0xDA, 0xD9, 0xE1
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
"""JPEG markers without a length."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class BadImageError(Exception):
    """A file cannot be packed; the text is the reason that goes to ``skipped.tsv``."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the beginning of an image file tells."""

    format: str
    """jpeg, png, webp, gif, bmp, tiff or ppm."""
    width: int
    """Pixels, as displayed: after `orientation`."""
    height: int
    orientation: int
    """EXIF orientation that Pillow leaves to be applied, 1 to 8; of TIFF always 1."""


def examine(data: bytes, max_pixels: int, decode: bool = False) -> ImageFacts:
    """Check that an image file is whole and small enough, and say what it is.

    Args:
        data: the file.
        max_pixels: a larger image counts as a decompression bomb.
        decode: decode all pixels, whatever the structure says.

    Raises:
        BadImageError: if it cannot be packed.
    """
    if not data:
        raise BadImageError("empty file (0 bytes)")
    found = _structure(data)
    if found is None or decode:
        found = _decoded(data, max_pixels, found)
    format, width, height, orientation = found
    _check_pixels(width, height, max_pixels)
    if orientation in SWAPS_SIDES:
        width, height = height, width
    return ImageFacts(format, width, height, orientation)


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet; whatever is wrong with it, then or inside the block, has one type.

    Pillow's own limit on pixels does not apply: it knows only one for the whole process, and its half of it warns.

    Raises:
        BadImageError: if the file is no image or does not decode.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which nobody asked for
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                yield image
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not an image") from error
    except PILLOW_ERRORS as error:
        raise BadImageError(f"does not decode: {error}".splitlines()[0]) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _structure(data: bytes) -> tuple[str, int, int, int] | None:
    """(format, stored width, stored height, orientation) by structure alone; None if only decoding can tell."""
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    return None


def _decoded(data: bytes, max_pixels: int, structure: tuple[str, int, int, int] | None) -> tuple[str, int, int, int]:
    """As `_structure`, and decodes. Where the structure has told already, that stands."""
    with opened(data) as image:
        _check_pixels(*image.size, max_pixels)
        image.load()
        to_rgb(image)  # as training will
        if structure is None:  # asked after loading, in which Pillow already turns a TIFF upright
            structure = _format_of(image), *image.size, _valid_orientation(image.getexif().get(_ORIENTATION))
    return structure


def _format_of(image: Image.Image) -> str:
    format = image.format or ""
    return "jpeg" if format == "MPO" else format.lower()


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImageError(f"no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise BadImageError(f"decompression bomb: {width} x {height} pixels exceed --max-pixels {max_pixels}")


def _jpeg(data: bytes) -> tuple[str, int, int, int] | None:
    """Walk the segments of a JPEG (ITU-T T.81, annex B) to its first scan, and find its end marker behind that."""
    at, size, orientation = 2, None, None
    seen = set()
    length = len(data)
    while True:
        if at + 4 > length:
            raise BadImageError("cut off: a JPEG without image data")
        if data[at] != 0xFF:
            return None  # junk between segments: some decoders accept it
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _BARE:
            at += 2
            continue
        if marker == _EOI:
            raise BadImageError("a JPEG without image data")
        segment = int.from_bytes(data[at + 2 : at + 4], "big")
        if at + 2 + segment > length:
            raise BadImageError("cut off: a JPEG without image data")
        if marker in _FRAMES:
            if segment < 8 or marker not in _BASIC_SCANS or data[at + 4] != 8 or data[at + 9] not in (1, 3, 4):
                return None
            size = int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        elif marker == _APP1 and orientation is None and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + segment])
        seen.add(marker)
        at += 2 + segment
        if marker == _SOS:
            break
    # 0xff inside a scan is followed by 0x00, so this can only be the end marker of the image or of what follows it
    if data.rfind(b"\xff\xd9", at) < 0:
        raise BadImageError("cut off: no end marker (JPEG)")
    if size is None or not size[1] or not seen >= {_DQT, _DHT}:
        return None
    return "jpeg", *size, orientation or 1


def _png(data: bytes) -> tuple[str, int, int, int]:
    """Walk the chunks of a PNG (ISO/IEC 15948) and compare their checksums."""
    view = memoryview(data)
    at, size, orientation, has_data = len(_PNG_SIGNATURE), None, 1, False
    while True:
        if at + 12 > len(data):
            raise BadImageError("cut off: no end chunk (PNG)")
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(data):
            raise BadImageError(f"cut off in chunk {kind!r} (PNG)")
        if crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BadImageError(f"damaged: checksum of chunk {kind!r} (PNG)")
        if size is None:
            if kind != b"IHDR" or length != 13:
                raise BadImageError(f"damaged: begins with chunk {kind!r} (PNG)")
            size = struct.unpack_from(">II", data, at + 8)
        elif kind == b"eXIf":
            orientation = _exif_orientation(data[at + 8 : end])
        elif kind == b"IDAT":
            has_data = True
        elif kind == b"IEND":
            break
        at = end + 4
    if not has_data:
        raise BadImageError("a PNG without image data")
    return "png", *size, orientation


def _webp(data: bytes) -> tuple[str, int, int, int]:
    """A WebP is whole if it is as long as it says; Pillow reads its size without decoding."""
    expected = int.from_bytes(data[4:8], "little") + 8
    if len(data) < expected:
        raise BadImageError(f"cut off: {len(data)} of {expected} bytes (WebP)")
    with opened(data) as image:
        return "webp", *image.size, _valid_orientation(image.getexif().get(_ORIENTATION))


def _exif_orientation(exif: bytes) -> int:
    """Orientation of an EXIF block (a TIFF header and its first directory), 1 if it has none or is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    if at + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, values, value = struct.unpack_from(f"{order}HHIH", exif, entry)
        if tag == _ORIENTATION:
            return _valid_orientation(value) if (kind, values) == (3, 1) else 1
    return 1


def _valid_orientation(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
