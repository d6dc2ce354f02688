"""RandAugment (arXiv 1909.13719): settings, and which operations each image of a batch goes through.

The list and the strengths are those of the published fine-tuning, `rand-m9-mstd0.5-inc1`: every operation does more at
a larger magnitude. `d2v2ds.modalities.image.operations` has the operations themselves.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from d2v2ds.bounds import Bounds, PositiveOrZero, Share
from d2v2ds.rng import Stream, hash64, to_unit_interval

NAMES = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "colour", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
"""Operations; all are drawn with the same probability."""
LARGEST_MAGNITUDE = 10.0
_NUMBERS = 5
"""Random numbers of one operation: name, whether it is applied, two for the magnitude, sign."""


@dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """Settings of RandAugment."""

    operations: Annotated[int, Bounds(ge=1, le=15)] = 2
    """Operations drawn for each image, with replacement (count)."""
    probability: Share = 0.5
    """Probability of applying each of them (fraction)."""
    magnitude: Annotated[float, Bounds(ge=0, le=LARGEST_MAGNITUDE)] = 9.0
    """Mean strength of an operation, 0 to 10."""
    magnitude_std: PositiveOrZero = 0.5
    """Standard deviation of the strength; drawn values outside 0 to 10 are moved to that range."""


@dataclass(frozen=True)
class Operation:
    """One operation on one image."""

    name: str
    """One of `NAMES`."""
    strength: float
    """Magnitude over the largest one, 0 to 1."""
    sign: int
    """Direction of operations that have two, 1 or -1."""


def draw_operations(
    config: RandAugmentConfig, *, seed: int, epoch: int, rows: NDArray[np.int64]
) -> list[list[Operation]]:
    """Draw the operations of some rows, a pure function of (settings, seed, epoch, row).

    Args:
        config: settings.
        seed: of the run.
        epoch: in which the rows are seen.
        rows: (B,) row numbers.

    Returns:
        For each row the operations that are applied, in their order.
    """
    count = config.operations
    words = hash64(seed, epoch, Stream.OPERATIONS, rows[:, None], np.arange(count * _NUMBERS))
    which, applied, radius, angle, sign = np.moveaxis(to_unit_interval(words).reshape(len(rows), count, -1), -1, 0)
    normal = np.sqrt(-2.0 * np.log1p(-radius)) * np.cos(2.0 * np.pi * angle)  # Box and Muller 1958
    magnitudes = np.clip(config.magnitude + config.magnitude_std * normal, 0.0, LARGEST_MAGNITUDE)
    kinds = (which * len(NAMES)).astype(np.int64)
    return [
        [
            Operation(
                NAMES[kinds[row, i]], float(magnitudes[row, i]) / LARGEST_MAGNITUDE, 1 if sign[row, i] < 0.5 else -1
            )
            for i in range(count)
            if applied[row, i] < config.probability
        ]
        for row in range(len(rows))
    ]
