"""Vocabularies of any script, word ends, unknown letters; edit distances."""

import sys
from collections.abc import Hashable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2v2ds.errors import MissingExtraError
from d2v2ds.tasks.vocabulary import BLANK, END, LIBRISPEECH, PAD, UNKNOWN, Vocabulary, count_letters, spell
from d2v2ds.tasks.words import edit_counts

WORDS = st.lists(st.text(st.characters(exclude_characters="|", exclude_categories=["Cs"]), min_size=1))


def test_librispeech_has_the_official_numbers() -> None:
    vocabulary = Vocabulary(LIBRISPEECH)
    assert len(vocabulary) == 32
    assert (BLANK, PAD, END, UNKNOWN) == (0, 1, 2, 3)
    assert vocabulary.symbols[:6] == ("<s>", "<pad>", "</s>", "<unk>", "|", "E")
    assert vocabulary.encode("THE CAT") == [6, 11, 5, 4, 19, 7, 6, 4]


@given(WORDS)
def test_text_of_any_script_comes_back(words: list[str]) -> None:
    text = " ".join(words)
    vocabulary = Vocabulary(count_letters({text: 1}))
    numbers = vocabulary.encode(text)
    assert UNKNOWN not in numbers
    assert vocabulary.words(numbers) == text.split()
    assert numbers.count(vocabulary.symbols.index("|")) == len(text.split()) if text.split() else numbers == []


def test_unknown_letters_and_other_specials() -> None:
    vocabulary = Vocabulary(("|", "A", "B"))
    assert vocabulary.encode("aB  A\tÄ") == [UNKNOWN, 6, 4, 5, 4, UNKNOWN, 4]
    assert vocabulary.words([UNKNOWN, 6, 4, 4, BLANK, 5, END]) == ["<unk>B", "A"]
    assert vocabulary.words([4, 4]) == [] == vocabulary.words([])


def test_letters_come_by_frequency_then_by_code_point() -> None:
    assert count_letters({"BB A": 1, "CB": 1, "": 3}) == ("B", "|", "A", "C")
    assert list(spell(" A  BC\n")) == ["A", "|", "B", "C", "|"]
    assert count_letters({}) == ()


def distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Edit distance by recursion over the first elements."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance(a[1:], b[1:])
    return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


@given(st.lists(st.sampled_from(["A", "BB", "C"]), max_size=5), st.lists(st.sampled_from(["A", "BB", "C"]), max_size=5))
def test_edits_equal_the_recursion(wanted: list[str], found: list[str]) -> None:
    counts = edit_counts(wanted, found)
    assert (counts.errors, counts.wanted) == (distance(wanted, found), len(wanted))


def test_missing_rapidfuzz_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(MissingExtraError, match=r"rapidfuzz.*asr"):
        edit_counts(["A"], ["B"])


@given(st.lists(st.sampled_from("ABC"), min_size=1, max_size=9), st.lists(st.sampled_from("ABC"), max_size=9))
def test_word_errors_equal_those_of_jiwer(wanted: list[str], found: list[str]) -> None:
    jiwer = pytest.importorskip("jiwer")
    assert edit_counts(wanted, found).errors / len(wanted) == jiwer.wer(" ".join(wanted), " ".join(found))
