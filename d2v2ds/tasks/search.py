"""Search with a language model in the validation of a recogniser: counted errors, and a limit of time."""

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from d2v2ds.tasks.words import edit_counts


class TimedSearch:
    """Decodes the utterances of one validation set after another until each set's time is over."""

    def __init__(self, find: Callable[[Tensor], Sequence[str]], limit_s: float) -> None:
        """
        Args:
            find: words of one utterance, from its logits (T, V) on the CPU.
            limit_s: seconds for one set on this rank, after which no further utterance begins.
        """
        self._find, self._limit_s, self._spent_s = find, limit_s, 0.0

    def count(self, logits: Tensor, frames: Sequence[int], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
        """Decode a micro-batch and count its errors.

        Args:
            logits: (B, T, V).
            frames: B counts of real frames; none for a filler, which is not decoded.
            wanted: words of B references.

        Returns:
            Sums: `lm_errors` wrong words, `lm_rows` decoded utterances, `lm_seconds`.
        """
        errors, rows, began = 0, 0, time.perf_counter()
        for own, count, words in zip(logits.detach().float().cpu(), frames, wanted, strict=False):
            if self._spent_s + time.perf_counter() - began >= self._limit_s:
                break
            errors += edit_counts(words, self._find(own[:count])).errors
            rows += 1
        seconds = time.perf_counter() - began
        self._spent_s += seconds
        return {"lm_errors": float(errors), "lm_rows": float(rows), "lm_seconds": seconds}

    def restart(self) -> None:
        """Begin the time of the next set."""
        self._spent_s = 0.0
