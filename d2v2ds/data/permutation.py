"""Pseudo-random permutation of any number of rows, computed only at the given positions."""

import math

import numpy as np
from numpy.typing import NDArray

from d2v2ds.rng import hash64, mix64

_FEISTEL_ROUNDS = 6


def permute(positions: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply a pseudo-random permutation of 0..size-1 to given positions, in O(1) each.

    A Feistel network permutes the smallest square power of two that holds `size`. It is applied again to values outside
    the range until they fall inside, which keeps the result a permutation (cycle walking).

    Args:
        positions: (n,) integers below `size`.
        size: length of the permuted sequence.
        key: (1,) chooses the permutation.

    Returns:
        (n,) int64 below `size`.
    """
    half_bits = max(2, math.ceil((size - 1).bit_length() / 2))
    half, low, high = np.uint64(half_bits), np.uint64((1 << half_bits) - 1), np.uint64(64 - half_bits)
    round_keys = hash64(key, np.arange(_FEISTEL_ROUNDS))

    def network(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> half, values & low
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) >> high)
        return (left << half) | right

    values = network(positions.astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = network(values[outside])
    return values.astype(np.int64)
