"""Encoded image files -> pixels, by Pillow and simplejpeg: upright RGB of 8 bits. No torch.

Packing (where it re-encodes) and reading go through the same functions, so that an image trains alike whether it was
packed as it is or re-encoded.

`decode_box` is the fast way to a part of an image. A JPEG is decoded at a reduced scale where the part is larger than
needed, and not further down than the part reaches. Both leave out work without changing what remains: the scale is
part of the format (ITU-T T.81, an inverse DCT of fewer frequencies), and rows are stored from the top. Whole ordinary
JPEGs go to simplejpeg, which calls the same library as Pillow (libjpeg-turbo) with fewer copies in between: the same
pixels in four fifths of the time. Pillow decodes everything else, and says what is wrong with a file.
"""

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.errors import MissingExtraError

try:
    from PIL import Image
except ImportError as error:
    raise MissingExtraError("images need Pillow", "image") from error

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: its JPEGs are for Pillow too
    simplejpeg = None

ALPHA_OVER = (255, 255, 255)
"""What shows through transparent pixels: white."""

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of this EXIF orientation upright; one of orientation 1 is upright as stored."""

SWAPS_SIDES = frozenset({5, 6, 7, 8})
"""EXIF orientations whose stored width is the displayed height."""
_MIRRORS_COLUMNS = frozenset({2, 3, 7, 8})
"""EXIF orientations whose stored columns run against what they become."""
_MIRRORS_ROWS = frozenset({3, 4, 6, 7})

PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers raise on damaged files."""

SCALES = (8, 4, 2)
"""Reductions that a JPEG decoder offers, largest first."""
_ROWS_OF_CONTEXT = 2
"""Rows below the last one wanted that its colours are interpolated from."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a segment that begins with the size of the image."""
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_LARGEST_SCRATCH = 1 << 26
"""Bytes that a thread keeps to decode into: a photograph of 22 million pixels."""
_COLOURS = {1: "GRAY", 3: "RGB"}
"""What a JPEG of so many components decodes to."""


class DecodeError(ValueError):
    """Bytes that are no image, damaged, or of another size than expected; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Box:
    """A part of an image, in pixels; `right` and `bottom` lie behind the last column and row."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top

    def reduced(self, scale: int) -> "Box":
        """The whole pixels of an image of 1 / scale that are nearest to this box: off by half of one at most."""
        if scale == 1:
            return self
        return Box(*((edge + scale // 2) // scale for edge in (self.left, self.top, self.right, self.bottom)))


def stored_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """Where a part of the displayed image lies in the stored one.

    Args:
        box: in displayed coordinates.
        width: of the displayed image (pixels).
        height: likewise.
        orientation: EXIF, 1 to 8.
    """
    left, top, right, bottom = box.left, box.top, box.right, box.bottom
    if orientation in SWAPS_SIDES:
        left, top, right, bottom = top, left, bottom, right
        width, height = height, width
    if orientation in _MIRRORS_COLUMNS:
        left, right = width - right, width - left
    if orientation in _MIRRORS_ROWS:
        top, bottom = height - bottom, height - top
    return Box(left, top, right, bottom)


def displayed(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of stored pixels (Y, X, C) as they are displayed; (X, Y, C) where the orientation swaps sides."""
    if orientation in _MIRRORS_COLUMNS:
        pixels = pixels[:, ::-1]
    if orientation in _MIRRORS_ROWS:
        pixels = pixels[::-1]
    return pixels.swapaxes(0, 1) if orientation in SWAPS_SIDES else pixels


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Undo an EXIF orientation (1 to 8): the image as it is displayed."""
    return image if orientation == 1 else image.transpose(TRANSPOSES[orientation])


def to_rgb(image: Image.Image) -> Image.Image:
    """The same picture in mode RGB; the image itself if it is RGB without a transparent colour.

    Grey becomes three equal channels, of 16 bits the upper 8 remain, a palette is looked up, alpha (also a transparent
    colour of a palette) lets white through. CMYK is converted without a colour profile, as Pillow does; in JPEG files
    it takes CMYK for inverted, as Adobe writes it and as practically all of them are.

    Raises:
        ValueError: the mode says nothing about brightness (floating point), or Pillow cannot convert it.
    """
    if image.mode == "F":
        raise ValueError("mode F: the brightness of floating point pixels is not defined; convert the file first")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(wide.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        below = Image.new("RGB", image.size, ALPHA_OVER)
        below.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return below
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_box(data: memoryview | bytes, size: tuple[int, int], box: Box, least: int | None) -> NDArray[np.uint8]:
    """Decode a part of an image file.

    Args:
        data: the file.
        size: width and height that it should have, as stored.
        box: the part, in stored coordinates.
        least: pixels that must remain of both sides of the box where a JPEG is reduced; None: it is not reduced.

    Returns:
        (Y, X, C) uint8 of the box, or of `box.reduced` by a power of two; C = 3, or 4 of which the last says nothing
        (Pillow holds RGB in four bytes, and dropping one takes longer than copying all), or 1 if all of it is grey.

    Raises:
        DecodeError: the bytes cannot be decoded, or to another size.
    """
    frame = _find_frame(data)
    file: memoryview | bytes | bytearray = data
    scale = 1
    if frame is not None:
        height, width, components = struct.unpack_from(">HHB", data, frame)
        _check_size((width, height), size)
        scale = _reduction(box, least)
        rows = (box.reduced(scale).bottom + _ROWS_OF_CONTEXT) * scale
        if rows < height:  # told of fewer rows, a decoder stops early
            file = bytearray(data)
            struct.pack_into(">H", file, frame, rows)
        if simplejpeg is not None and components in _COLOURS and bytes(data[-2:]) == _END_OF_IMAGE:
            fast = _decode_fast(file, components, (width, min(rows, height)), scale, box.reduced(scale))
            if fast is not None:
                return fast
    with _pillow():
        image = Image.open(io.BytesIO(file))
        if frame is None:
            _check_size(image.size, size)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        part = box.reduced(scale)
        image.load()
        if image.mode == "RGB" and not image.has_transparency_data and (whole := _four_bytes(image)) is not None:
            return whole[part.top : part.bottom, part.left : part.right].copy()
        cropped = image.crop((part.left, part.top, part.right, part.bottom))
        if cropped.mode != "L" or cropped.has_transparency_data:
            cropped = to_rgb(cropped)
    return np.array(cropped).reshape(part.height, part.width, -1)


class _Scratch(threading.local):
    """Where a thread decodes, again and again: fresh memory has to be cleared, which takes a fifth of the time."""

    memory = bytearray()

    def of(self, size: int) -> bytearray:
        """At least `size` bytes, kept unless they are many."""
        if size > _LARGEST_SCRATCH:
            return bytearray(size)
        if len(self.memory) < size:
            self.memory = bytearray(size)
        return self.memory


_scratch = _Scratch()


def _decode_fast(
    file: memoryview | bytes | bytearray, components: int, size: tuple[int, int], scale: int, part: Box
) -> NDArray[np.uint8] | None:
    """(Y, X, C) uint8, a part of a JPEG at 1 / scale; None if simplejpeg cannot make it.

    `strict` would also refuse what follows the rows that are wanted, so a file that lost its end must not come here.
    """
    width, height = (-(-length // scale) for length in size)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            file,
            _COLOURS[components],
            min_height=height,
            min_width=width,
            min_factor=scale,
            buffer=_scratch.of(height * width * components),
            strict=False,
        )
    except ValueError:
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return pixels[part.top : part.bottom, part.left : part.right].copy()


def _four_bytes(image: Image.Image) -> NDArray[np.uint8] | None:
    """(Y, X, 4) uint8: the pixels of an RGB image where they lie. None if that is several places, as of large ones."""
    try:
        pixels = pa.array(image).values.buffers()[1]
    except ValueError:
        return None
    return np.frombuffer(pixels, dtype=np.uint8).reshape(image.height, image.width, 4)


def _reduction(box: Box, least: int | None) -> int:
    """The largest scale at which the box still has `least` pixels on both sides."""
    if least is None:
        return 1
    return next((scale for scale in SCALES if min(box.width, box.height) // scale >= least), 1)


def _find_frame(data: memoryview | bytes) -> int | None:
    """Where a JPEG says how high and wide it is: offset of two 16-bit numbers. None if this is no plain JPEG."""
    if bytes(data[:3]) != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        if data[at + 1] in _FRAMES:
            return at + 5
        is_fill = data[at + 1] == 0xFF
        at += 1 if is_fill else 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _check_size(found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        raise DecodeError(f"expected {expected[0]} x {expected[1]} pixels as stored, found {found[0]} x {found[1]}")


@contextmanager
def _pillow() -> Iterator[None]:
    """Whatever Pillow raises, as one type. Its limit on pixels does not apply: packing has had its own."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    except DecodeError:
        raise
    except PILLOW_ERRORS as error:
        raise DecodeError(f"does not decode: {error}".splitlines()[0]) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
