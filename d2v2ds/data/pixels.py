"""What a decoded image means: RGB of 8 bits, upright. Needs Pillow, no torch.

Packing (where it re-encodes) and reading go through the same functions, so that an image trains alike whether it was
packed as it is or re-encoded.
"""

import numpy as np

from d2v2ds.errors import MissingExtraError

try:
    from PIL import Image
except ImportError as error:
    raise MissingExtraError("images need Pillow: pip install 'd2v2ds[image]'") from error

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


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Undo an EXIF orientation (1 to 8): the image as it is displayed."""
    return image if orientation == 1 else image.transpose(TRANSPOSES[orientation])
