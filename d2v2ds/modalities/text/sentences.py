"""One or two sentences as one sequence of tokens. NumPy only, no torch."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2v2ds.modalities.text.tokenizers import BOS, EOS

SINGLE_SPECIALS = 2
"""Special ids of a row with one sentence."""
PAIR_SPECIALS = 4
"""Special ids of a row with two sentences."""


def join_sentences(first: ArrayLike, second: ArrayLike | None = None, dtype: Any = np.int64) -> NDArray[Any]:
    """Join token ids without special ones: `<s> A </s>`, or `<s> A </s> </s> B </s>`.

    Source: the official fairseq/tasks/sentence_prediction.py, as the fine-tuning of RoBERTa uses it.

    Args:
        first: (n,) ids of A.
        second: (m,) ids of B; None for a single sentence.
        dtype: of the result.

    Returns:
        (n + 2,) or (n + m + 4,).
    """
    parts = [[BOS], first, [EOS]] if second is None else [[BOS], first, [EOS, EOS], second, [EOS]]
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts])


def is_pair(tokens: NDArray[Any]) -> bool:
    """Return True if (S,) ids are two sentences as `join_sentences` writes them, each with a token."""
    (ends,) = np.nonzero(tokens == EOS)
    if len(ends) != 3 or not len(tokens) or tokens[0] != BOS:
        return False
    first, second, last = ends.tolist()
    return bool(first > 1 and second == first + 1 and last == len(tokens) - 1 and last > second + 1)
