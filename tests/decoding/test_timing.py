"""Times of words are those of the best alignment, for greedy decoding and for beam search."""

from pathlib import Path

import numpy as np
import pytest
import torch

from d2v2ds.decoding.alignment import align
from d2v2ds.decoding.beam import BeamConfig, BeamDecoder
from d2v2ds.decoding.timing import TimedWord, beam_words, greedy_words
from d2v2ds.tasks.ctc import greedy
from d2v2ds.tasks.vocabulary import Vocabulary
from tests.decoding.arpa import TOY
from tests.decoding.test_segments import logits_of

LETTERS = Vocabulary(("|", "A", "B"))


def test_words_begin_and_end_with_their_letters() -> None:
    found = greedy_words(logits_of("..AA.B|.|..B.B.|.A"), LETTERS)
    assert found == [TimedWord("AB", 2, 6), TimedWord("BB", 11, 14), TimedWord("A", 17, 18)]
    assert greedy_words(logits_of("...||"), LETTERS) == []


@pytest.mark.parametrize("seed", range(6))
def test_greedy_words_and_frames_are_those_of_task_and_alignment(seed: int) -> None:
    logits = torch.randn(40, 7, generator=torch.Generator().manual_seed(seed)) * 2
    letters = greedy(logits[None], torch.tensor([40]))[0]
    found = greedy_words(logits.numpy(), LETTERS)
    assert [one.word for one in found] == LETTERS.words(letters)
    aligned = align(logits.numpy(), letters)
    assert aligned is not None
    for one, (_, first, last) in zip(found, LETTERS.word_spans(letters), strict=True):
        frames = np.flatnonzero((aligned[1] >= first) & (aligned[1] < last))
        assert (one.first, one.last) == (frames[0], frames[-1] + 1)


def test_times_of_a_search_are_those_of_its_path(tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text.decoder")
    config = BeamConfig(beam=1000, threshold=1e4)
    decoder = BeamDecoder(LETTERS, TOY.write(tmp_path / "toy.arpa"), config=config)
    logits = logits_of("..AA.B|..B...|A|...") * 8
    assert beam_words(logits, decoder) == [TimedWord("AB", 2, 6), TimedWord("B", 9, 10), TimedWord("A", 14, 15)]
    assert beam_words(logits[:0], decoder) == []


def test_other_settings_share_lexicon_and_language_model(tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text.decoder")
    path = TOY.write(tmp_path / "toy.arpa")
    log_probs = torch.randn(12, 7, generator=torch.Generator().manual_seed(2)).mul(2).log_softmax(-1)
    first = BeamDecoder(LETTERS, path)
    for config in (BeamConfig(lm_weight=0.1, word_score=3.0), BeamConfig(boundary_score=-2.0, beam=7)):
        other = first.with_settings(config)
        assert other.config == config and first.config == BeamConfig()
        assert other(log_probs)[0] == BeamDecoder(LETTERS, path, config=config)(log_probs)[0]
    assert first(log_probs)[0] == BeamDecoder(LETTERS, path)(log_probs)[0]
