"""Random numbers as pure functions of their indices: no generator, no state. Needs numpy only.

Every number depends on (seed, epoch, sample id, index) alone, so draws do not change with the batch, the number of
workers or ranks, or a resume.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_WORD = 0xFFFF_FFFF_FFFF_FFFF
GAMMA = 0x9E37_79B9_7F4A_7C15
"""Odd constant by which SplitMix64 advances its state."""


class Stream(IntEnum):
    """Purpose of random numbers; each has its own stream."""

    MASK = 1
    CROP = 2
    ORDER = 3
    SHUFFLE = 4
    AUGMENT = 5
    MIXTURE = 6
    CHANNELS = 7
    OPERATIONS = 8
    COLOURS = 9


def hash64(*parts: ArrayLike) -> NDArray[np.uint64]:
    """Hash integers, or arrays of integers that broadcast against each other, to 64 bits.

    With all other parts fixed, different values of one part have different hashes.

    Returns:
        uint64 array of the broadcast shape; (1,) if every part is one integer.
    """
    state = np.array([GAMMA], dtype=np.uint64)
    for part in parts:
        word = np.array([part & _WORD], dtype=np.uint64) if isinstance(part, int) else np.asarray(part, dtype=np.uint64)
        state = mix64(state ^ word) + np.uint64(GAMMA)
    return state


def mix64(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Output function of SplitMix64 (Steele, Lea and Flood 2014): a bijection in which every input bit flips every
    output bit with probability close to one half."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58_476D_1CE4_E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D0_49BB_1331_11EB)
    words ^= words >> np.uint64(31)
    return words


def to_unit_interval(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the upper 53 bits as float64 in [0, 1)."""
    return (words >> np.uint64(11)) * np.float64(2.0**-53)


def kept_layers(seed: int, step: int, count: int, drop_rate: float) -> list[bool] | None:
    """Draw the layers that a step keeps, the same on all ranks: under ZeRO-3 ranks that differ block each other.

    Args:
        seed: of the run.
        step: number of finished steps.
        count: layers.
        drop_rate: probability of skipping each.

    Returns:
        One flag for each layer; None, which keeps all, if the rate is 0.
    """
    if drop_rate == 0.0:
        return None
    draws = np.random.default_rng((seed, step, 0x1A7E)).random(count)
    return [bool(draw >= drop_rate) for draw in draws]
