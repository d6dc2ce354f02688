"""Colour jitter: random brightness, contrast and saturation of an image, in random order.

The definition is that of `torchvision.transforms.ColorJitter` without its hue on an RGB image of 8 bits, where it is
Pillow's: each of the three blends the image with a plain version of it by a factor drawn from [1 - amount, 1 + amount].
Published image models of data2vec 1.0 have it (arXiv 2202.03555), as BEiT (arXiv 2106.08254). They change the whole
image before it is cropped; here the crop is changed, so that the contrast is against the mean grey of the crop.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2v2ds.bounds import Share
from d2v2ds.rng import Stream, hash64, to_unit_interval

_KINDS = ("brightness", "contrast", "saturation")


@dataclass(frozen=True, kw_only=True)
class ColourJitterConfig:
    """Largest changes of an image's colours (fractions); 0 leaves one as it is."""

    brightness: Share = 0.4
    """Blend with black."""
    contrast: Share = 0.4
    """Blend with the mean grey of the image."""
    saturation: Share = 0.4
    """Blend with the grey version of the image."""


@dataclass(frozen=True)
class Change:
    """One change of an image's colours."""

    kind: str
    """`brightness`, `contrast` or `saturation`."""
    factor: float
    """Share of the image in the blend; above 1 it moves away from the plain version."""


def draw_changes(
    config: ColourJitterConfig, *, seed: int, epoch: int, rows: NDArray[np.int64]
) -> list[tuple[Change, ...]]:
    """Draw the changes of some images, a pure function of (seed, epoch, row).

    Args:
        config: largest changes.
        seed: of the run.
        epoch: in which the rows are seen.
        rows: (B,) row numbers.

    Returns:
        Of each row the changes in their order.
    """
    keys = hash64(seed, epoch, Stream.COLOURS, rows[:, None], np.arange(2 * len(_KINDS)))
    numbers = to_unit_interval(keys)  # (B, 6): three factors, then three keys to sort by
    amounts = np.array([getattr(config, kind) for kind in _KINDS])
    factors = 1.0 + amounts * (2.0 * numbers[:, : len(_KINDS)] - 1.0)  # (B, 3)
    orders = numbers[:, len(_KINDS) :].argsort(axis=1)  # (B, 3)
    return [
        tuple(Change(_KINDS[i], float(own[i])) for i in order if amounts[i])
        for own, order in zip(factors, orders, strict=True)
    ]
