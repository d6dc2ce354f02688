"""CTC by enumeration: every path of outputs, one per frame."""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def collapse(path: Sequence[int], blank: int = 0) -> tuple[int, ...]:
    """Merge repeats, then leave out blanks."""
    merged = [one for i, one in enumerate(path) if i == 0 or one != path[i - 1]]
    return tuple(one for one in merged if one != blank)


def paths(num_frames: int, num_outputs: int) -> itertools.product:
    """Every path."""
    return itertools.product(range(num_outputs), repeat=num_frames)


def sums(log_probs: np.ndarray) -> dict[tuple[int, ...], float]:
    """(T, V) natural logarithms -> ln p of every sequence of letters, alignments added."""
    found: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for path in paths(*log_probs.shape):
        found[collapse(path)].append(sum(log_probs[i, one] for i, one in enumerate(path)))
    return {letters: float(np.logaddexp.reduce(scores)) for letters, scores in found.items()}


def best(log_probs: np.ndarray) -> dict[tuple[int, ...], tuple[float, tuple[int, ...]]]:
    """(T, V) -> score and path of the best alignment of every sequence of letters."""
    found: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
    for path in paths(*log_probs.shape):
        score = float(sum(log_probs[i, one] for i, one in enumerate(path)))
        letters = collapse(path)
        if letters not in found or score > found[letters][0]:
            found[letters] = score, path
    return found
