"""Segments join to the recording, end between words, and decode to the same text."""

import numpy as np
import pytest

from d2v2ds.decoding.segments import Segmenter
from d2v2ds.decoding.timing import greedy_words
from d2v2ds.tasks.vocabulary import Vocabulary

LETTERS = Vocabulary(("|", "A", "B"))
NO_WORD_END = Vocabulary(("A", "B"))


def logits_of(path: str, vocabulary: Vocabulary = LETTERS) -> np.ndarray:
    """Logits whose most likely output is this path; `.` is blank."""
    numbers = [0 if letter == "." else vocabulary.symbols.index(letter) for letter in path]
    return np.eye(len(vocabulary), dtype=np.float32)[numbers]


def segments_of(path: str, most: int, chunk: int, vocabulary: Vocabulary = LETTERS) -> list[str]:
    segmenter, found, logits = Segmenter(most, vocabulary), [], logits_of(path, vocabulary)
    for start in range(0, len(path), chunk):
        found += list(segmenter.add(logits[start : start + chunk]))
    assert segmenter.frames == len(path)
    found += list(segmenter.close())
    assert np.array_equal(np.concatenate([one.logits for one in found]), logits)
    assert [one.first for one in found] == np.cumsum([0, *(len(one.logits) for one in found)])[:-1].tolist()
    return ["".join(("." if n == 0 else vocabulary.symbols[n]) for n in one.logits.argmax(-1)) for one in found]


def test_a_short_recording_is_one_segment() -> None:
    assert segments_of("AB|..A|B", 8, 3) == ["AB|..A|B"]
    assert not list(Segmenter(8, LETTERS).close())


def test_segments_end_between_words() -> None:
    assert segments_of("AB.....B|..A|B.B|.A|", 12, 4) == ["AB.....B|.", ".A|B.B|.A|"], "not in the pause of a word"
    assert segments_of("A|.....B..|.|....A|", 16, 5) == ["A|.....B..|.|..", "..A|"], "behind the word end"


def test_a_recording_without_word_ends_is_cut_in_blanks_or_at_its_greatest_length() -> None:
    assert segments_of("ABABA...BABBA", 11, 13) == ["ABABA..", ".BABBA"]
    assert segments_of("ABABABABAB", 4, 10) == ["ABAB", "ABAB", "AB"]
    assert segments_of("AB...ABAB", 8, 9, NO_WORD_END) == ["AB..", ".ABAB"]


@pytest.mark.parametrize("seed", range(5))
def test_greedy_text_does_not_depend_on_the_segments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(["A", "B", "A.A", "BB", "."], 3)) + "||."[: rng.integers(1, 4)] for _ in range(60)]
    path = "".join(word + "." * int(rng.integers(0, 4)) for word in words)
    whole = greedy_words(logits_of(path), LETTERS)
    segmenter, found = Segmenter(50, LETTERS), []
    for segment in [*segmenter.add(logits_of(path)), *segmenter.close()]:
        assert len(segment.logits) <= 50
        found += [
            (one.word, one.first + segment.first, one.last + segment.first)
            for one in greedy_words(segment.logits, LETTERS)
        ]
    assert found == [(one.word, one.first, one.last) for one in whole] and len(found) > 30
