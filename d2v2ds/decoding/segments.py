"""Logits of a recording of any length as segments that end in pauses, for a search over one sentence at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2v2ds.tasks.vocabulary import BLANK, WORD_END, Vocabulary

Logits = NDArray[np.float32]

_LEAST_SHARE = 0.25
"""Shortest segment that ends in a pause, over the longest one."""


@dataclass(frozen=True)
class Segment:
    """Frames of a recording that follow one another."""

    first: int
    """Number of the first frame."""
    logits: Logits
    """(T, V)."""


class Segmenter:
    """Collects logits and cuts them between words; a recording of at most one segment stays whole.

    A segment ends in the longest run of blanks and word ends of its last three quarters, behind the word end; if no
    word ends there, in the longest run of blanks, and if there is none, at its greatest length.
    """

    def __init__(self, most_frames: int, vocabulary: Vocabulary) -> None:
        """
        Args:
            most_frames: longest segment.
            vocabulary: outputs of the recogniser.
        """
        self._most = most_frames
        self._boundary = vocabulary.symbols.index(WORD_END) if WORD_END in vocabulary.symbols else BLANK
        self._held: list[Logits] = []
        self._first = 0

    @property
    def frames(self) -> int:
        """Frames so far."""
        return self._first + sum(map(len, self._held))

    def add(self, logits: Logits) -> Iterator[Segment]:
        """Take the next frames (T, V), and yield the segments that are complete."""
        self._held.append(logits)
        while sum(map(len, self._held)) > self._most:
            held = np.concatenate(self._held)
            cut = self._pause(held[: self._most].argmax(-1))
            yield Segment(self._first, held[:cut])
            self._first, self._held = self._first + cut, [held[cut:].copy()]

    def close(self) -> Iterator[Segment]:
        """Yield the last segment."""
        if self._held:
            yield Segment(self._first, np.concatenate(self._held))

    def _pause(self, best: NDArray[np.int64]) -> int:
        """Return where the most likely outputs (T,) are cut."""
        least = int(len(best) * _LEAST_SHARE)
        quiet = np.concatenate(([False], ((best == BLANK) | (best == self._boundary))[least:], [False]))
        edges = np.flatnonzero(quiet[1:] != quiet[:-1]).reshape(-1, 2) + least
        found = []
        for start, stop in edges.tolist():
            ends = np.flatnonzero(best[start:stop] == self._boundary)
            is_word_end = self._boundary != BLANK and len(ends) > 0
            behind = start + int(ends[-1]) + 1 if is_word_end else start
            found.append((is_word_end, stop - start, (behind + stop + 1) // 2))
        return max(max(found)[2], 1) if found else len(best)
