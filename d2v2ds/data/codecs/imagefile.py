"""Image files by Pillow: which files are images, which way is up, and their pixels as RGB of 8 bits.

Packing, `preprocessing.verify`, training, feature extraction and the exported image processor take these answers from
here, so that they agree on every file. Export folders hold a copy of this module, so it imports no more than Pillow.
Files may come from strangers: what a header says is bounded before memory is taken, and a machine without memory or
descriptors is a `MachineError`, not a damaged image.
"""

import errno
import io
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import numpy as np

from d2v2ds.errors import MachineError, MissingExtraError
from d2v2ds.io.machine_faults import ADVICE, is_machine_fault, reading_error, retried

try:
    from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin
except ImportError as error:
    raise MissingExtraError("images need Pillow", "image") from error

OTHER_FORMATS = ("WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats besides JPEG and PNG, by Pillow's names. The content decides, not the name of the file."""

ALPHA_OVER = (255, 255, 255)
"""Colour behind transparent pixels: white."""

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Operation that undoes each EXIF orientation; an image of orientation 1 is upright as stored."""

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
    Image.DecompressionBombError,
)
"""Errors of Pillow's readers on damaged files."""

MAX_SCANS = 100
"""Most scans of a JPEG: each is a pass over all pixels, and encoders write about ten."""
BYTES_PER_PIXEL = 4
"""Bytes of a pixel without compression, for the largest file that is read; of 16 bits and more it is smaller."""
_METADATA_BYTES = 64 << 20
"""Bytes of a file beside its pixels: profiles, previews, texts."""
_MEMORY_PROBE_BYTES = 1 << 30
"""Address space that decoding the largest image takes about."""
_SCAN = b"\xff\xda"
_NO_FILE = "expected an image file, found a folder, FIFO, socket or device"

_JPEG, _END_OF_JPEG, _PNG = b"\xff\xd8\xff", b"\xff\xd9", b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"})
"""Chunks of a PNG that its pixels and its orientation depend on."""
_TEXT_CHUNKS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_TEXTS_OF_ORIENTATION = (b"exif\0", b"xmp\0", b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Keywords of the texts of a PNG in which Pillow looks for an orientation."""


class DecodeError(ValueError):
    """Bytes that are no image, damaged, or of another size than expected; the text is the reason."""


@contextmanager
def decoding() -> Iterator[None]:
    """Raise a `DecodeError` for whatever Pillow raises, a `MachineError` if the machine is at fault."""
    try:
        yield
    except DecodeError:
        raise
    except Image.UnidentifiedImageError as error:
        raise DecodeError(f"not an image of JPEG, PNG, {', '.join(OTHER_FORMATS)}") from error
    except PILLOW_ERRORS as error:
        if isinstance(error, OSError) and is_machine_fault(error):
            raise reading_error(error.filename or "image", error, MachineError) from error
        if _asks_for_memory(error) and not has_memory():
            raise MachineError(f"an image cannot be decoded: {ADVICE[errno.ENOMEM]}") from error
        reason = "cut off" if isinstance(error.__cause__ or error, struct.error) else str(error)
        raise DecodeError(f"does not decode: {reason}".splitlines()[0]) from error


def _asks_for_memory(error: Exception) -> bool:
    """Return True if an allocation failed: for want of memory, or because a damaged file asks for too much."""
    return isinstance(error, MemoryError) or str(error).endswith(("error -9", "out of memory error"))


def has_memory() -> bool:
    """Return True if this process may take as much memory as decoding a large image needs."""
    try:
        mmap.mmap(-1, _MEMORY_PROBE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, MemoryError):
        return False
    return True


def read_image_file(path: str | PathLike[str], max_pixels: int | None) -> bytes:
    """Read a whole image file of at most so many pixels without compression.

    Raises:
        DecodeError: it is absent, no regular file, or larger.
        MachineError: the machine is at fault; what may pass is tried again before.
    """
    return retried(lambda: _read_image_file(path, max_pixels))


def _read_image_file(path: str | PathLike[str], max_pixels: int | None) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would block for ever
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise DecodeError(_NO_FILE)
            check_bytes(facts.st_size, max_pixels)
            return io.FileIO(descriptor, closefd=False).readall()
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise DecodeError(_NO_FILE) from error
        if is_machine_fault(error):
            raise reading_error(os.fspath(path), error, MachineError) from error
        raise DecodeError(f"unreadable: {error.strerror}") from error


def check_bytes(size: int, max_pixels: int | None) -> None:
    """Raise a `DecodeError` if a file has more bytes than the pixels that are allowed."""
    if max_pixels is not None and size > (most := BYTES_PER_PIXEL * max_pixels + _METADATA_BYTES):
        raise DecodeError(f"a file of {size:,} bytes, expected at most {most:,} for {max_pixels:,} pixels")


def open_image(data: bytes | bytearray | memoryview, whole: bool = True) -> Image.Image:
    """The first picture of an image file, not decoded yet. To be called inside `decoding`.

    Args:
        data: the file.
        whole: refuse a JPEG without an end. Decoders take zeros for pixels, which fill files that were not all written.
    """
    data = bytes(data)
    if not data:
        raise DecodeError("empty file (0 bytes)")
    if data.startswith(_PNG):
        return PngImagePlugin.PngImageFile(io.BytesIO(_only_pixels(data)))
    stream = io.BytesIO(data)
    if not data.startswith(_JPEG):
        return Image.open(stream, formats=OTHER_FORMATS)
    image = JpegImagePlugin.JpegImageFile(stream)  # not by Image.open, which looks for further pictures and may fail
    if data.count(_SCAN) > MAX_SCANS:
        raise DecodeError(f"decompression bomb: {data.count(_SCAN):,} scans, expected at most {MAX_SCANS}")
    if whole and data.rfind(_END_OF_JPEG, stream.tell()) < 0:  # Pillow has read up to the pixels
        raise DecodeError("cut off: a JPEG without end marker")
    return image


def check_pixels(image: Image.Image, max_pixels: int | None, option: str) -> None:
    """Raise a `DecodeError` if an image has no pixels, or more than `max_pixels`, which `option` changes."""
    width, height = image.size
    if width < 1 or height < 1:
        raise DecodeError(f"no pixels: {width} x {height}")
    if max_pixels is not None and width * height > max_pixels:
        raise DecodeError(f"decompression bomb: {width} x {height} pixels exceed {option} {max_pixels}")


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation (1 to 8) that makes an image upright, from EXIF or XMP; 1 if there is none that can be read.

    It agrees with `PIL.ImageOps.exif_transpose`, which fails on damaged EXIF. Pillow itself turns a TIFF when it is
    loaded, so the image has to be loaded, unless it is a JPEG.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return int(value) if value in TRANSPOSES else 1
    except PILLOW_ERRORS:
        return 1


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
        wide = np.asarray(image) >> 8
        return Image.fromarray(wide.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        below = Image.new("RGB", image.size, ALPHA_OVER)
        below.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return below
    return image if image.mode == "RGB" else image.convert("RGB")


def read_rgb(given: str | PathLike[str] | Image.Image) -> Image.Image:
    """An image as it is displayed, in mode RGB.

    Args:
        given: path of an image file, or an image of Pillow, which need not be loaded.

    Raises:
        DecodeError: it is something else, it cannot be read, or it has more pixels than Pillow is set to allow
            (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if not isinstance(given, str | PathLike | Image.Image):
        raise DecodeError(f"expected a path or a PIL image, found {type(given).__name__}")
    with decoding():
        if not isinstance(given, Image.Image):
            image = open_image(read_image_file(given, Image.MAX_IMAGE_PIXELS))
        else:
            image = _anew(given)
        check_pixels(image, Image.MAX_IMAGE_PIXELS, "PIL.Image.MAX_IMAGE_PIXELS")
        image.load()
        return upright(to_rgb(image), orientation_of(image))


def _anew(image: Image.Image) -> Image.Image:
    """The same image by `open_image`, if it is a PNG or JPEG of which Pillow has not read the pixels yet."""
    if not isinstance(image, PngImagePlugin.PngImageFile | JpegImagePlugin.JpegImageFile):
        return image
    if not image.tile or image.tell() or image.fp is None:
        return image
    image.fp.seek(0)
    opened = open_image(image.fp.read())
    return opened if opened.size == image.size else image  # a JPEG may be told to decode to another size


def _only_pixels(png: bytes) -> bytes:
    """A PNG without the chunks that neither its pixels nor its orientation depend on.

    Pillow refuses a PNG for the size of its texts and of its colour profile, and for faults in an animation.
    """
    texts = PngImagePlugin.PngStream(io.BytesIO())
    kept, at, kind = [_PNG], len(_PNG), b""
    while at < len(png) and kind != b"IEND":
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        kind, content = png[at + 4 : at + 8], png[at + 8 : end - 4]
        if kind in _PIXEL_CHUNKS or (
            kind in _TEXT_CHUNKS and content.startswith(_TEXTS_OF_ORIENTATION) and _is_readable(kind, content, texts)
        ):
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def _is_readable(kind: bytes, content: bytes, texts: PngImagePlugin.PngStream) -> bool:
    """Return True if Pillow reads a text of a PNG after the `texts` before it."""
    texts.fp = io.BytesIO(content)
    try:
        texts.call(kind, 0, len(content))
    except PILLOW_ERRORS:
        return False
    return True
