"""Small labelled pictures from what scikit-learn brings along: ``python -m preprocessing.samples.images --output DIR``.

For demonstrations and tests without a network; they are **composed**, no photographs of digits. Each is a handwritten
digit of scikit-learn's `digits` (1,797 of 8 x 8 pixels), turned, scaled and moved, cut out of a patch of one of its two
sample photographs and laid over another patch. What is learned from brightness alone helps little: digit and ground are
textures, and either may be the brighter one. The label is the digit. Digits and parts of the photographs that make
``valid`` are not used in ``train``.

Written are ``train/DIGIT/NUMBER.png`` and ``valid/DIGIT/NUMBER.png``, 32 x 32 pixels, class folders as
`preprocessing.pack_images` takes them. The same options give the same pixels.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2v2ds.errors import D2V2Error, MissingExtraError

SIDE = 32
"""Pixels along each side."""
VALID_SHARE = 0.2
"""Held-out fraction of the digits, and of the width of the photographs."""
_DIGIT_SIDES = (18.0, 30.0)
"""Smallest and largest side of a digit, its empty margin included (pixels)."""
_TURN = math.radians(15)
_SHEAR = 0.2
_CONTRAST = (60.0, 130.0)
"""Smallest and largest difference between the mean brightness of digit and ground (of 255)."""
_PATCH_SIDES = (24, 97)
"""Smallest side of a patch of a photograph, and one more than the largest (pixels)."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """Material of the pictures of one split."""

    digits: NDArray[np.uint8]
    """(N, 8, 8), ink = 255."""
    labels: NDArray[np.int64]
    """(N,) 0 to 9."""
    photographs: tuple[Image.Image, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.samples.images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--train", type=int, default=8000, metavar="N", help="pictures to learn from (%(default)s)")
    parser.add_argument("--valid", type=int, default=2000, metavar="N", help="pictures to test on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of places, sizes and textures (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        materials = load_materials()
    except D2V2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, (split, material) in enumerate(materials.items()):
        write_split(options.output / split, material, getattr(options, split), (options.seed, number))
    print(
        f"{options.output}: {options.train:,} pictures in train, {options.valid:,} in valid, COMPOSED of handwritten "
        "digits and sample photographs of scikit-learn"
    )
    return 0


def load_materials() -> dict[str, Material]:
    """Digits and photographs by split; no digit and no column of a photograph is in both.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise MissingExtraError("sample images need scikit-learn", "eval,image") from error
    digits = load_digits()
    ink = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    first = round(len(ink) * (1 - VALID_SHARE))
    edges = [round(photograph.width * (1 - VALID_SHARE)) for photograph in photographs]
    return {
        "train": Material(
            digits=ink[:first],
            labels=digits.target[:first],
            photographs=tuple(p.crop((0, 0, edge, p.height)) for p, edge in zip(photographs, edges, strict=True)),
        ),
        "valid": Material(
            digits=ink[first:],
            labels=digits.target[first:],
            photographs=tuple(p.crop((edge, 0, *p.size)) for p, edge in zip(photographs, edges, strict=True)),
        ),
    }


def write_split(folder: Path, material: Material, num_pictures: int, seed: tuple[int, int]) -> None:
    """Write pictures into class folders; every digit is used equally often, give or take one."""
    rng = np.random.default_rng(seed)
    for label in np.unique(material.labels):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    for number in range(num_pictures):
        digit = number % len(material.digits)
        pixels = compose(material.digits[digit], material.photographs, rng)
        Image.fromarray(pixels).save(folder / str(material.labels[digit]) / f"{number:05d}.png")


def compose(
    digit: NDArray[np.uint8], photographs: Sequence[Image.Image], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """(Y, X, 3) uint8: a digit cut out of one texture, over another.

    Args:
        digit: (8, 8), ink = 255.
        photographs: where textures come from.
        rng: decides everything else.
    """
    shape = draw_shape(digit, rng)[..., None]  # (Y, X, 1)
    ground, figure = (texture(photographs[int(rng.integers(len(photographs)))], rng) for _ in range(2))  # (Y, X, 3)
    contrast = rng.uniform(*_CONTRAST)
    brightness = ground.mean()
    # bright figures stand out best where the ground is dark, and the other way round; in between by chance
    brighter = rng.random() < (0.5 if abs(brightness - 128) < 40 else brightness < 128)
    figure += brightness + (contrast if brighter else -contrast) - figure.mean()
    picture = shape * figure + (1 - shape) * ground
    return np.rint(picture.clip(0, 255)).astype(np.uint8)


def draw_shape(digit: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float64]:
    """(Y, X) shares of ink: the digit turned, sheared, scaled and placed by chance; corners may be cut off."""
    side, turn, shear = rng.uniform(*_DIGIT_SIDES), rng.uniform(-_TURN, _TURN), rng.uniform(-_SHEAR, _SHEAR)
    place = SIDE / 2 + rng.uniform(-0.5, 0.5, 2) * (SIDE - side)  # the digit's centre
    scale = len(digit) / side
    turned = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    inverse = scale * turned @ np.array([[1.0, shear], [0.0, 1.0]])  # from pixels of the picture to the digit's
    offset = len(digit) / 2 - inverse @ place
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    drawn = Image.fromarray(digit).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC
    )
    return np.asarray(drawn) / 255


def texture(photograph: Image.Image, rng: np.random.Generator) -> NDArray[np.float64]:
    """(Y, X, 3): a square patch of a photograph, of any size and place, mirrored or not."""
    side = int(rng.integers(_PATCH_SIDES[0], min(_PATCH_SIDES[1], *photograph.size)))
    left, top = (int(rng.integers(length - side + 1)) for length in photograph.size)
    patch = photograph.resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + side, top + side))
    pixels = np.asarray(patch).astype(np.float64)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


if __name__ == "__main__":
    sys.exit(main())
