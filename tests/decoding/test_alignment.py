"""Alignments equal the best of all paths."""

import itertools

import numpy as np
import pytest

from d2v2ds.decoding.alignment import align
from tests.oracles.ctc import best, collapse


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_alignment_is_the_best_of_all_paths(frames: int) -> None:
    log_probs = np.log(np.random.default_rng(frames).dirichlet(np.ones(4), frames))
    expected = best(log_probs)
    for letters in (one for n in range(frames + 2) for one in itertools.product((1, 2, 3), repeat=n)):
        found = align(log_probs, list(letters))
        if letters not in expected:
            assert found is None, letters
            continue
        assert found is not None, letters
        score, owners = found
        assert score == pytest.approx(expected[letters][0])
        path = [letters[one] if one >= 0 else 0 for one in owners]
        assert collapse(path) == letters
        assert sum(log_probs[i, one] for i, one in enumerate(path)) == pytest.approx(score)
        assert [one for one, _ in itertools.groupby(owners[owners >= 0])] == list(range(len(letters)))


def test_repeated_letters_need_a_blank_between_them() -> None:
    log_probs = np.zeros((3, 2))
    found = align(log_probs, [1, 1])
    assert found is not None and found[1].tolist() == [0, -1, 1]
    assert align(log_probs[:2], [1, 1]) is None


def test_logits_align_as_their_log_probabilities() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 4))
    shifted = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    one, other = align(logits, [1, 2]), align(shifted, [1, 2])
    assert one is not None and other is not None
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("letters", [[], [1]])
def test_an_utterance_without_frames_has_no_alignment_of_letters(letters: list[int]) -> None:
    found = align(np.zeros((0, 3)), letters)
    if letters:
        assert found is None
    else:
        assert found is not None and found[0] == 0.0 and len(found[1]) == 0
