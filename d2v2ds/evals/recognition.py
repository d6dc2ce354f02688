"""Word and letter error rates of a recogniser over a set of utterances (jiwer, extra `asr`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v2ds.errors import MissingExtraError
from d2v2ds.evals.scores import bootstrap


@dataclass(frozen=True)
class Utterance:
    """One recognised utterance."""

    id: str
    wanted: str
    found: str
    speaker: str | None
    seconds: float


@dataclass(frozen=True)
class ErrorCounts:
    """Edits of every utterance, (N,) each."""

    substitutions: NDArray[np.int64]
    deletions: NDArray[np.int64]
    insertions: NDArray[np.int64]
    wanted: NDArray[np.int64]
    """Words or letters of the reference."""

    @property
    def errors(self) -> NDArray[np.int64]:
        """(N,) edits of all kinds."""
        return self.substitutions + self.deletions + self.insertions

    def rate(self, rows: NDArray[np.int64] | slice = slice(None)) -> float:
        """Return errors per 100 wanted words or letters of some utterances."""
        return 100.0 * float(self.errors[rows].sum()) / max(float(self.wanted[rows].sum()), 1.0)


def _jiwer() -> Any:
    """Import jiwer.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtraError("word error rates need jiwer", "asr") from error
    return jiwer


def count_errors(utterances: Sequence[Utterance], *, letters: bool = False) -> ErrorCounts:
    """Count edits of words, or of letters with the blanks between words.

    Raises:
        MissingExtraError: jiwer is not installed.
    """
    jiwer = _jiwer()
    process = jiwer.process_characters if letters else jiwer.process_words
    columns: dict[str, list[int]] = {name: [] for name in ("substitutions", "deletions", "insertions", "wanted")}
    for one in utterances:
        found = process(one.wanted, one.found)
        for name in ("substitutions", "deletions", "insertions"):
            columns[name].append(getattr(found, name))
        columns["wanted"].append(found.hits + found.substitutions + found.deletions)
    return ErrorCounts(**{name: np.array(values, dtype=np.int64) for name, values in columns.items()})


def summarise(utterances: Sequence[Utterance], *, draws: int, seed: int) -> dict[str, Any]:
    """Compute error rates with 95 % intervals over utterances, kinds of errors, and rates by speaker."""
    found: dict[str, Any] = {}
    words = count_errors(utterances)
    for name, counts in (("wer", words), ("cer", count_errors(utterances, letters=True))):
        low, high = bootstrap(counts.rate, len(utterances), draws=draws, seed=seed)
        found[name] = {
            "value": counts.rate(),
            "interval": [low, high],
            "substitutions": int(counts.substitutions.sum()),
            "deletions": int(counts.deletions.sum()),
            "insertions": int(counts.insertions.sum()),
            "wanted": int(counts.wanted.sum()),
        }
    speakers = sorted({one.speaker for one in utterances if one.speaker is not None})
    rows = {name: np.array([i for i, one in enumerate(utterances) if one.speaker == name]) for name in speakers}
    found["by_speaker"] = {name: {"wer": words.rate(own), "utterances": len(own)} for name, own in rows.items()}
    return found


def worst(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    """Return the utterances with the most word errors, the most first."""
    errors = count_errors(utterances).errors
    return [utterances[i] for i in np.argsort(-errors, kind="stable")[:count] if errors[i]]


def rates_by_length(utterances: Sequence[Utterance], groups: int = 8) -> list[tuple[float, float, int]]:
    """Return (mean seconds, WER, utterances) of groups of equal size, shortest first."""
    counts, seconds = count_errors(utterances), np.array([one.seconds for one in utterances])
    parts = np.array_split(np.argsort(seconds), min(groups, len(utterances)))
    return [(float(seconds[part].mean()), counts.rate(part), len(part)) for part in parts]
