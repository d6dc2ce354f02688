"""Words of a recogniser with the frames that emit them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from d2v2ds.decoding.alignment import align
from d2v2ds.decoding.beam import BeamDecoder
from d2v2ds.tasks.vocabulary import BLANK, Vocabulary


@dataclass(frozen=True)
class TimedWord:
    """A word and its frames. CTC emits a letter in few frames, so that a word seems to end before its sound does."""

    word: str
    first: int
    """First frame that emits a letter of it."""
    last: int
    """Frame behind the last one that does."""


def greedy_words(logits: NDArray[np.float32], vocabulary: Vocabulary) -> list[TimedWord]:
    """Decode (T, V) by the most likely output of every frame."""
    best = logits.argmax(-1)
    before = np.concatenate(([BLANK], best[:-1]))
    is_new = (best != BLANK) & (best != before)
    frames = np.where(best != BLANK, np.cumsum(is_new) - 1, -1)  # (T,) number of the letter
    return _timed(vocabulary.word_spans(best[is_new].tolist()), frames)


def beam_words(logits: NDArray[np.float32], decoder: BeamDecoder) -> list[TimedWord]:
    """Decode (T, V) by beam search; times are those of the best alignment of the words that it finds."""
    log_probs = torch.from_numpy(logits).log_softmax(-1)
    found = decoder(log_probs)
    if not found:
        return []
    letters: list[int] = []
    spans = []
    for word in found[0].words:
        spelling = decoder.spelling(word)
        spans.append((word, len(letters), len(letters) + max(len(spelling) - 1, 1)))  # without the word end
        letters += spelling
    aligned = align(log_probs.numpy(), letters)
    assert aligned is not None, "the search found a path of these words"
    return _timed(spans, aligned[1])


def _timed(spans: list[tuple[str, int, int]], frames: NDArray[np.int64]) -> list[TimedWord]:
    """Turn places of letters into frames.

    Args:
        spans: word, number of its first letter, and number behind its last letter.
        frames: (T,) number of the letter that each frame emits, -1 for blank; does not descend but for -1.
    """
    emitting = np.flatnonzero(frames >= 0)
    numbers = frames[emitting]
    firsts = np.searchsorted(numbers, [first for _, first, _ in spans])
    lasts = np.searchsorted(numbers, [last for _, _, last in spans])
    return [
        TimedWord(word, int(emitting[first]), int(emitting[last - 1]) + 1)
        for (word, _, _), first, last in zip(spans, firsts.tolist(), lasts.tolist(), strict=True)
    ]
