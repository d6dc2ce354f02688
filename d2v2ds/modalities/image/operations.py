"""Operations of RandAugment and colour jitter on Pillow images. No torch, and no torchvision, whose wheel needs the
CUDA build of torch.

Ranges of RandAugment are those of AutoAugment (arXiv 1805.09501, table 6) and RandAugment (arXiv 1909.13719), in the
order of the published `inc1`: strength 0 changes least, 1 most. Rotation, shear and shift are bicubic and fill what
they uncover with ImageNet's mean colour.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from d2v2ds.modalities.image.colour_jitter import Change
from d2v2ds.modalities.image.rand_augment import Operation

FILL = (124, 116, 104)
"""Mean colour of ImageNet (0 to 255)."""
LARGEST_ANGLE = 30.0
"""Degrees."""
LARGEST_SHEAR = 0.3
"""Pixels of shift for each pixel of distance from the first row or column."""
LARGEST_SHIFT = 0.45
"""Share of the side."""
LARGEST_ENHANCEMENT = 0.9
"""Most that a factor of colour, contrast, brightness or sharpness differs from 1."""
LARGEST_ADDITION = 110
"""Grey levels."""
POSTERIZED_BITS = 4
"""Bits kept at strength 0; none are at 1."""

_BICUBIC = Image.Resampling.BICUBIC
_Pixels = Image.Image
_Apply = Callable[[_Pixels, float], _Pixels]


def operate(pixels: NDArray[np.uint8], operations: Sequence[Operation]) -> None:
    """Apply operations in their order, in place.

    Args:
        pixels: (Y, X, 3) uint8.
        operations: none leave the image as it is.
    """
    if not operations:
        return
    image = Image.fromarray(pixels)
    for one in operations:
        image = apply(image, one)
    pixels[:] = np.asarray(image)


def change(pixels: NDArray[np.uint8], changes: Sequence[Change]) -> None:
    """Apply changes of colours in their order, in place.

    Args:
        pixels: (Y, X, 3) uint8.
        changes: none leave the image as it is.
    """
    if not changes:
        return
    image = Image.fromarray(pixels)
    for one in changes:
        image = _CHANGES[one.kind](image).enhance(one.factor)
    pixels[:] = np.asarray(image)


_CHANGES: dict[str, Callable[[_Pixels], ImageEnhance._Enhance]] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def apply(image: Image.Image, operation: Operation) -> Image.Image:
    """Apply one operation to an RGB image."""
    if operation.name in _PLAIN:
        return _PLAIN[operation.name](image, operation.strength)
    return _SIGNED[operation.name](image, operation.strength * operation.sign)


def _solarize(image: _Pixels, strength: float) -> _Pixels:
    """Invert the grey levels from a threshold on."""
    return ImageOps.solarize(image, 256 - int(256 * strength))


def _solarize_add(image: _Pixels, strength: float) -> _Pixels:
    """Brighten the darker half of the grey levels."""
    added = int(LARGEST_ADDITION * strength)
    return image.point([level + added if level < 128 else level for level in range(256)] * 3)


def _posterize(image: _Pixels, strength: float) -> _Pixels:
    """Keep the upper bits of each grey level; `ImageOps.posterize` refuses to keep none."""
    dropped = 8 - POSTERIZED_BITS + int(POSTERIZED_BITS * strength)
    return image.point([level >> dropped << dropped for level in range(256)] * 3)


def _enhance(kind: Callable[[_Pixels], ImageEnhance._Enhance]) -> _Apply:
    """Make an operation that moves an image away from a plain version of it, or towards it."""
    return lambda image, amount: kind(image).enhance(1.0 + LARGEST_ENHANCEMENT * amount)


def _move(image: _Pixels, *matrix: float) -> _Pixels:
    """Read each pixel (x, y) from (ax + by + c, dx + ey + f) of the image."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=_BICUBIC, fillcolor=FILL)


_PLAIN: dict[str, _Apply] = {
    "auto_contrast": lambda image, strength: ImageOps.autocontrast(image),
    "equalize": lambda image, strength: ImageOps.equalize(image),
    "invert": lambda image, strength: ImageOps.invert(image),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
}
"""Operations that take a strength."""
_SIGNED: dict[str, _Apply] = {
    "rotate": lambda image, amount: image.rotate(LARGEST_ANGLE * amount, resample=_BICUBIC, fillcolor=FILL),
    "colour": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, amount: _move(image, 1, LARGEST_SHEAR * amount, 0, 0, 1, 0),
    "shear_y": lambda image, amount: _move(image, 1, 0, 0, LARGEST_SHEAR * amount, 1, 0),
    "translate_x": lambda image, amount: _move(image, 1, 0, LARGEST_SHIFT * amount * image.width, 0, 1, 0),
    "translate_y": lambda image, amount: _move(image, 1, 0, 0, 0, 1, LARGEST_SHIFT * amount * image.height),
}
"""Operations that take a strength with a sign."""
