"""Edit distance of two sequences of words or letters."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from d2v2ds.errors import MissingExtraError


@dataclass(frozen=True)
class EditCounts:
    """Edits that turn the wanted sequence into the found one."""

    errors: int
    """Least number of substitutions, deletions and insertions."""
    wanted: int
    """Length of the wanted sequence."""


def edit_counts(wanted: Sequence[Hashable], found: Sequence[Hashable]) -> EditCounts:
    """Count the least edits between two sequences.

    Raises:
        MissingExtraError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise MissingExtraError("word error rates need rapidfuzz", "asr") from error
    return EditCounts(Levenshtein.distance(wanted, found), len(wanted))
