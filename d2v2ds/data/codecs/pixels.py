"""Encoded image files -> pixels, by Pillow and simplejpeg: a whole image, or a part of it, as stored. No torch.

`decode_box` is the fast way to a part of an image. A JPEG is decoded at a reduced scale where the part is larger than
needed, and not further down than the part reaches. Both leave out work without changing what remains: the scale is
part of the format (ITU-T T.81, an inverse DCT of fewer frequencies), and rows are stored from the top. Whole ordinary
JPEGs go to simplejpeg, which calls the same library as Pillow (libjpeg-turbo) with fewer copies in between: the same
pixels in four fifths of the time. Pillow decodes everything else, and says what is wrong with a file.

`examine` decodes a whole file in the same way; packing and `preprocessing.verify` call it for every image.
"""

import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from d2v2ds.data.codecs.imagefile import DecodeError, check_pixels, decoding, open_image, orientation_of, to_rgb

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: its JPEGs are for Pillow too
    simplejpeg = None

SWAPS_SIDES = frozenset({5, 6, 7, 8})
"""EXIF orientations whose stored width is the displayed height."""
_MIRRORS_COLUMNS = frozenset({2, 3, 7, 8})
"""EXIF orientations whose stored columns run against what they become."""
_MIRRORS_ROWS = frozenset({3, 4, 6, 7})

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
"""Colour space of a decoded JPEG by its number of components."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Facts of an image file."""

    format: str
    """jpeg, png, webp, gif, bmp, tiff or ppm."""
    width: int
    """Pixels, as displayed: after `orientation`."""
    height: int
    orientation: int
    """EXIF orientation that Pillow leaves to be applied, 1 to 8; of TIFF always 1."""


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
    """Position in the stored image of a part of the displayed one.

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


@contextmanager
def opened(data: bytes, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open an image file to be packed or looked at; whatever is wrong with it raises a `DecodeError`.

    Args:
        data: the file.
        max_pixels: a larger image counts as a decompression bomb.
    """
    with warnings.catch_warnings(), _any_size(), decoding():
        warnings.simplefilter("ignore")  # of odd metadata, which nobody asked for
        image = open_image(data)
        check_pixels(image, max_pixels, "--max-pixels")
        yield image


def facts_of(image: Image.Image) -> ImageFacts:
    """Facts of an open image file. Loads it unless it is a JPEG."""
    if image.format != "JPEG":
        image.load()  # what follows the pixels may state the orientation
    turn = orientation_of(image)
    width, height = image.size[::-1] if turn in SWAPS_SIDES else image.size
    return ImageFacts(str(image.format).lower(), width, height, turn)


def examine(data: bytes, max_pixels: int) -> ImageFacts:
    """Decode an image file completely, as training does.

    Raises:
        DecodeError: it cannot be packed.
        MachineError: the machine has no memory for it.
    """
    with opened(data, max_pixels) as image:
        facts = facts_of(image)
        # decoders make all pixels in front of the last one; to copy and convert them all would take thrice the memory
        last = Box(image.width - 1, image.height - 1, image.width, image.height)
        if facts.format == "jpeg":
            decode_box(data, image.size, last, None)
        else:
            _part_of(image, last)
    return facts


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
            rows = min(rows, height)
            fast = _decode_fast(file, components, (width, rows), scale, box.reduced(scale), strict=rows == height)
            if fast is not None:
                return fast
    with _any_size(), decoding():
        image = open_image(file, whole=False)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        image.load()
        if frame is None:
            _check_size(image.size, size)  # a TIFF has it only now
        return _part_of(image, box.reduced(scale))


def _part_of(image: Image.Image, part: Box) -> NDArray[np.uint8]:
    """(Y, X, C) uint8 of a loaded image, as `decode_box` returns it."""
    if image.mode == "RGB" and not image.has_transparency_data and (whole := _four_bytes(image)) is not None:
        return whole[part.top : part.bottom, part.left : part.right].copy()
    cropped = image.crop((part.left, part.top, part.right, part.bottom))
    if cropped.mode != "L" or cropped.has_transparency_data:
        cropped = to_rgb(cropped)
    return np.array(cropped).reshape(part.height, part.width, -1)


class _Scratch(threading.local):
    """Memory that a thread decodes into again and again. Clearing fresh memory takes a fifth of the time."""

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
    file: memoryview | bytes | bytearray, components: int, size: tuple[int, int], scale: int, part: Box, strict: bool
) -> NDArray[np.uint8] | None:
    """(Y, X, C) uint8, a part of a JPEG at 1 / scale; None if simplejpeg cannot make it.

    `strict` refuses what the library warns of, so that Pillow judges damaged files. It also refuses what follows the
    rows that are wanted, so it is for whole images, and a file that lost its end must not come here.
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
            strict=strict,
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
    """Offset of height and width in a JPEG, two 16-bit numbers. None if this is no plain JPEG."""
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
def _any_size() -> Iterator[None]:
    """Lift Pillow's limit on pixels, of which a process has only one: packing has its own."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
