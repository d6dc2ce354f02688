"""Image files that programs disagree on: odd metadata, orientations, modes, ends; and some that are no images."""

import struct
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from tests.preprocessing.pictures import encoded, with_orientation

WIDTH, HEIGHT = 96, 64
PIXELS = np.full((HEIGHT, WIDTH, 3), 250, dtype=np.uint8)
PIXELS[:40, :60], PIXELS[40:, :60], PIXELS[:40, 60:] = (250, 10, 10), (10, 250, 10), (10, 10, 250)
"""Four fields of different sizes and colours."""
FIELDS = Image.fromarray(PIXELS)
OTHER = Image.fromarray(PIXELS[::-1, ::-1].copy())
"""The second picture of animations."""

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    "</rdf:RDF></x:xmpmeta>"
)
_SIX = with_orientation(6).tobytes().removeprefix(b"Exif\0\0")
_MUCH = zlib.compress(bytes(range(256)) * (1 << 13))
"""2 MiB, twice what Pillow allows for a text."""


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(before: bytes = b"", after: bytes = b"") -> bytes:
    """The fields as a PNG with more chunks before and after the pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def jpeg(*segments: bytes, **options: object) -> bytes:
    """The fields as a JPEG with these APP1 segments."""
    plain = encoded(FIELDS, "JPEG", **{"quality": 95} | options)
    inserted = b"".join(b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment for segment in segments)
    return plain[:2] + inserted + plain[2:]


def exif(kind: int, count: int, value: bytes) -> bytes:
    """An APP1 segment whose only entry is an orientation of this TIFF type."""
    return b"Exif\0\0MM\0*" + struct.pack(">IHHHI", 8, 1, 0x0112, kind, count) + value.ljust(4, b"\0") + bytes(4)


def _raw_profile(data: bytes) -> bytes:
    """As ImageMagick stores EXIF in a PNG."""
    text = b"\nexif\n%8d\n%s\n" % (len(data), data.hex().encode())
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def _itxt(keyword: bytes, text: bytes, compressed: bool = False) -> bytes:
    return chunk(b"iTXt", keyword + b"\0%c\0\0\0" % compressed + (zlib.compress(text) if compressed else text))


_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0" + XMP.encode()
_PNG_XMP = _itxt(b"XML:com.adobe.xmp", XMP.encode())


def texts_of_70_megabytes() -> bytes:
    """More than Pillow allows for all texts of a file."""
    return b"".join(chunk(b"zTXt", b"k%d\0\0" % number + zlib.compress(bytes(1_000_000))) for number in range(70))


METADATA: Mapping[str, bytes] = {
    "text before.png": png(chunk(b"zTXt", b"parameters\0\0" + _MUCH)),
    "text after.png": png(b"", chunk(b"zTXt", b"parameters\0\0" + _MUCH)),
    "itxt.png": png(chunk(b"iTXt", b"workflow\0\1\0\0\0" + _MUCH)),
    "profile.png": png(chunk(b"iCCP", b"icc\0\0" + _MUCH)),
    "many texts.png": png(texts_of_70_megabytes()),
    "large xmp.png": png(_itxt(b"XML:com.adobe.xmp", XMP.encode() + bytes(2 << 20), compressed=True)),
    "unknown compression.png": png(chunk(b"zTXt", b"Raw profile type exif\0\7abc")),
    "short gamma.png": png(chunk(b"gAMA", b"\0")),
    "text called interlace.png": png(chunk(b"tEXt", b"interlace\0yes")),
    "wrong frames.png": png(chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", bytes(26))),
    "trailer.png": png() + b"trailer",
    "no end.png": png()[:-12],
    "trailer.jpg": jpeg() + b"trailer",
    "trailer with end.jpg": jpeg() + b"trailer\xff\xd9",
    "trailer.gif": encoded(FIELDS, "GIF") + b"trailer",
    "pictures in segments.jpg": jpeg(b"thumbnail" + jpeg(quality=5)),
    "wrong index of pictures.jpg": jpeg().replace(b"\xff\xdb", b"\xff\xe2\x00\x0cMPF\0MM\0*\xff\xff\xff\xdb", 1),
}
"""Nothing but the pixels matters; all of them are the fields as stored."""

ORIENTATIONS: Mapping[str, bytes] = {
    **{
        f"exif {turn}.{suffix}": encoded(FIELDS, format, exif=with_orientation(turn), **options)
        for turn in range(10)
        for suffix, format, options in (
            ("jpg", "JPEG", {}), ("png", "PNG", {}), ("webp", "WEBP", {"lossless": True}), ("tif", "TIFF", {}),
        )
    },
    "xmp.jpg": jpeg(_JPEG_XMP),
    "xmp.png": png(_PNG_XMP),
    "xmp after.png": png(b"", _PNG_XMP),
    "compressed xmp.png": png(_itxt(b"XML:com.adobe.xmp", XMP.encode(), compressed=True)),
    "xmp.webp": encoded(FIELDS, "WEBP", lossless=True, xmp=XMP.encode()),
    "xmp.tif": encoded(FIELDS, "TIFF", tiffinfo={700: XMP.encode()}),
    "long.jpg": jpeg(exif(4, 1, struct.pack(">I", 6))),
    "two values.jpg": jpeg(exif(3, 2, struct.pack(">HH", 6, 3))),
    "bytes.jpg": jpeg(exif(1, 1, b"\6")),
    "text.jpg": jpeg(exif(2, 2, b"6\0")),
    "raw profile.png": png(_raw_profile(b"Exif\0\0" + _SIX)),
    "raw profile after.png": png(b"", _raw_profile(b"Exif\0\0" + _SIX)),
    "broken raw profile.png": png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 9\nzz\n"))),
    "exif after.png": png(b"", chunk(b"eXIf", _SIX)),
    "text called exif.png": png(chunk(b"tEXt", b"exif\0Exif\0\0" + _SIX)),
    "exif and xmp.jpg": jpeg(exif(3, 1, b"\0\3"), _JPEG_XMP),
    "upright exif and xmp.jpg": jpeg(exif(3, 1, b"\0\1"), _JPEG_XMP),
    "exif and xmp.png": png(chunk(b"eXIf", with_orientation(3).tobytes().removeprefix(b"Exif\0\0")) + _PNG_XMP),
    "raw profile and xmp.png": png(_PNG_XMP + _raw_profile(b"Exif\0\0" + with_orientation(8).tobytes()[6:])),
    "no tiff.jpg": jpeg(b"Exif\0\0XX*\0" + bytes(20)),
    "cut.jpg": jpeg(exif(3, 1, b"\0\6")[:-9]),
    "empty.jpg": jpeg(b"Exif\0\0"),
    "no tiff.png": png(chunk(b"eXIf", b"nonsense")),
    "no tiff.webp": encoded(FIELDS, "WEBP", lossless=True, exif=b"Exif\0\0nonsense"),
}  # fmt: skip
"""The same fields, to be turned or not."""


def _modes() -> dict[str, bytes]:
    grey = FIELDS.convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77)
    alpha = FIELDS.convert("RGBA")
    alpha.putalpha(grey)
    palette = FIELDS.convert("P")
    full = jpeg(quality=100)
    return {
        "grey.jpg": encoded(grey, "JPEG"),
        "cmyk.jpg": encoded(FIELDS.convert("CMYK"), "JPEG"),
        "rgb.jpg": encoded(FIELDS, "JPEG", keep_rgb=True),
        "progressive.jpg": jpeg(progressive=True),
        "hole.jpg": full[: len(full) // 2] + full[len(full) // 2 + 200 :],  # which decoders fill
        "cmyk.tif": encoded(FIELDS.convert("CMYK"), "TIFF"),
        "lab.tif": encoded(Image.new("LAB", FIELDS.size, (99, 120, 140)), "TIFF"),
        "16.png": encoded(wide, "PNG"),
        "16.tif": encoded(wide, "TIFF"),
        "32.tif": encoded(Image.fromarray(np.asarray(grey).astype(np.int32) * 256), "TIFF"),
        "16.pgm": encoded(wide, "PPM"),
        "1.png": encoded(grey.convert("1"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette and transparency.png": encoded(palette, "PNG", transparency=palette.getpixel((0, 0))),
        "palette and alpha.png": encoded(palette, "PNG", transparency=bytes(range(256))),
        "colour key.png": encoded(FIELDS, "PNG", transparency=(250, 10, 10)),
        "grey key.png": encoded(grey, "PNG", transparency=grey.getpixel((0, 0))),
        "alpha.png": encoded(alpha, "PNG"),
        "grey and alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "alpha.tif": encoded(alpha, "TIFF"),
        "transparent.gif": encoded(palette, "GIF", transparency=palette.getpixel((0, 0))),
        "animated.gif": encoded(palette, "GIF", save_all=True, append_images=[OTHER.convert("P")]),
        "animated.png": encoded(FIELDS, "PNG", save_all=True, append_images=[OTHER]),
        "animated behind a picture.png": encoded(
            FIELDS, "PNG", save_all=True, append_images=[OTHER, FIELDS], default_image=True
        ),
        "animated.webp": encoded(FIELDS, "WEBP", save_all=True, append_images=[OTHER], lossless=True),
        "pages.tif": encoded(FIELDS, "TIFF", save_all=True, append_images=[OTHER]),
        "two pictures.jpg": encoded(FIELDS, "MPO", save_all=True, append_images=[OTHER]),
        "fields.bmp": encoded(FIELDS, "BMP"),
        "fields.ppm": encoded(FIELDS, "PPM"),
    }


MODES: Mapping[str, bytes] = _modes()
"""Other kinds of pixels, and files of several pictures, of which the first is taken."""


def _with_size(width: int, height: int) -> bytes:
    """The PNG of the fields, whose header states another size."""
    header = chunk(b"IHDR", struct.pack(">II", width, height) + png()[24:29])
    return png()[:8] + header + png()[33:]


def _bad() -> dict[str, bytes]:
    whole = {
        "jpg": jpeg(), "progressive.jpg": jpeg(progressive=True), "png": png(), "webp": encoded(FIELDS, "WEBP"),
        "gif": encoded(FIELDS, "GIF"), "bmp": encoded(FIELDS, "BMP"), "tif": encoded(FIELDS, "TIFF"),
        "ppm": encoded(FIELDS, "PPM"),
    }  # fmt: skip
    bad = {f"cut {part}.{name}": data[: int(len(data) * part)] for name, data in whole.items() for part in (0.1, 0.7)}
    codes = bytearray(whole["progressive.jpg"])
    at = codes.index(b"\xff\xc4")
    codes[at + 5 : at + 21] = b"\xfe" * 16  # a table of codes that no decoder accepts
    skip = whole["progressive.jpg"]
    middle = len(skip) * 2 // 3
    flipped = bytearray(png())
    flipped[flipped.index(b"IDAT") + 20] ^= 16
    return bad | {
        "wrong codes.jpg": bytes(codes),
        "segment beyond the end.jpg": skip[:middle] + b"\xff\xe1\xff\xff" + skip[middle + 4 :],
        "no end.jpg": jpeg()[:-2],
        "zeros.jpg": jpeg()[:-300] + bytes(300),
        "thumbnail has an end.jpg": jpeg(b"thumbnail" + jpeg(quality=5))[:-300],
        "flipped bit.png": bytes(flipped),
        "bomb.png": _with_size(10_000, 9_000),
        "no pixels.png": _with_size(0, HEIGHT),
        "float.tif": encoded(FIELDS.convert("F"), "TIFF"),
        "icon.png": encoded(FIELDS, "ICO"),
        "jpeg2000.jpg": encoded(FIELDS, "JPEG2000"),
        "postscript.jpg": encoded(FIELDS, "EPS"),
        "empty.png": b"",
        "page.jpg": b"<!doctype html>",
        "document.jpg": b"%PDF-1.4 this is a document",
        "signature.png": b"\x89PNG\r\n\x1a\n",
        "signature.jpg": b"\xff\xd8\xff\xd9",
        "no scan.jpg": b"\xff\xd8\xff\xe0\x00\x02\xff\xd9\x00\x00",
        "signature.webp": b"RIFF\x10\0\0\0WEBP",
    }


BAD: Mapping[str, bytes] = _bad()
"""None of them can be read."""
