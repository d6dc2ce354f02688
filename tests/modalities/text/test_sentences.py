"""Special ids around one or two sentences."""

import numpy as np
import pytest

from d2v2ds.modalities.text.sentences import PAIR_SPECIALS, SINGLE_SPECIALS, is_pair, join_sentences


def test_sentences_are_joined_as_in_the_official_code() -> None:
    assert join_sentences([7, 8]).tolist() == [0, 7, 8, 2]
    assert join_sentences([7], [9]).tolist() == [0, 7, 2, 2, 9, 2]
    assert join_sentences([], []).tolist() == [0, 2, 2, 2]
    assert len(join_sentences([])) == SINGLE_SPECIALS and len(join_sentences([], [])) == PAIR_SPECIALS
    assert join_sentences([7], [9], np.uint16).dtype == np.uint16


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([0, 7, 2, 2, 9, 2], True),
        ([0, 7, 8, 2, 2, 9, 8, 2], True),
        ([0, 7, 8, 2], False),
        ([0, 7, 2, 9, 2, 2], False),
        ([0, 2, 2, 9, 2], False),
        ([0, 7, 2, 2, 2], False),
        ([0, 7, 2, 2, 9, 2, 5], False),
        ([7, 7, 2, 2, 9, 2], False),
        ([], False),
    ],
)
def test_a_pair_is_told_by_its_specials(tokens: list[int], found: bool) -> None:
    assert is_pair(np.array(tokens, dtype=np.uint16)) is found
