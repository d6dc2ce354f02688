"""Best alignment of letters to frames under CTC, for times of words and for exact scores."""

import numpy as np
from numpy.typing import NDArray

from d2v2ds.tasks.vocabulary import BLANK


def align(log_probs: NDArray[np.floating], letters: list[int]) -> tuple[float, NDArray[np.int64]] | None:
    """Find the most likely path of given letters (Viterbi).

    Args:
        log_probs: (T, V) natural logarithms, or logits.
        letters: U outputs without blanks.

    Returns:
        Its score, and (T,) the number of the letter that each frame emits, -1 for blank; None if there are too few
        frames.
    """
    states = np.full(2 * len(letters) + 1, BLANK)
    states[1::2] = letters
    can_skip = np.zeros(len(states), dtype=bool)
    can_skip[3::2] = states[3::2] != states[1:-2:2]
    emitted = np.asarray(log_probs, dtype=np.float64)[:, states]  # (T, 2U + 1)
    if not len(emitted):
        return None if letters else (0.0, np.empty(0, dtype=np.int64))
    score = np.full(len(states), -np.inf)
    score[:2] = emitted[0, :2]
    back = np.zeros(emitted.shape, dtype=np.int8)
    for frame in range(1, len(emitted)):
        one = np.concatenate(([-np.inf], score[:-1]))
        two = np.where(can_skip, np.concatenate(([-np.inf, -np.inf], score[:-2]))[: len(states)], -np.inf)
        ways = np.stack((score, one, two))
        back[frame] = ways.argmax(0)
        score = ways.max(0) + emitted[frame]
    last = len(states) - 1 if len(states) == 1 or score[-1] >= score[-2] else len(states) - 2
    if score[last] == -np.inf:
        return None
    total, path = float(score[last]), np.empty(len(emitted), dtype=np.int64)
    for frame in range(len(emitted) - 1, -1, -1):
        path[frame] = last
        last -= int(back[frame, last])
    return total, np.where(path % 2 == 1, path // 2, -1)
