"""Beam search equals the ranking of every path; files that do not fit are named."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v2ds.decoding.beam import BeamConfig, BeamDecoder, is_arpa, read_arpa_words
from d2v2ds.decoding.lexicon import encode_lexicon, read_lexicon, spelled
from d2v2ds.errors import ConfigError, MissingExtraError
from d2v2ds.tasks.vocabulary import Vocabulary
from tests.decoding.arpa import TOY
from tests.oracles.ctc import collapse

LETTERS = Vocabulary(("|", "A", "B"))
WORDS = ("A", "AB", "B", "BA")
FRAMES = 6
pytest.importorskip("flashlight.lib.text.decoder")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return TOY.write(tmp_path / "toy.arpa")


def words_of(path: tuple[int, ...]) -> tuple[str, ...] | None:
    """Words of a path, all of them ended by `|`; None if one is unknown or has no end."""
    text = "".join(LETTERS.symbols[one] for one in collapse(path))
    if text and not text.endswith("|"):
        return None
    words = tuple(text.replace("|", " ").split())
    return words if set(words) <= set(WORDS) else None


def ranking(log_probs: np.ndarray, config: BeamConfig) -> dict[tuple[str, ...], float]:
    """Score of every sequence of words by its best path."""
    found: dict[tuple[str, ...], float] = {}
    for path in itertools.product((0, 4, 5, 6), repeat=len(log_probs)):
        words = words_of(path)
        if words is not None:
            score = sum(log_probs[i, one] for i, one in enumerate(path)) + config.boundary_score * path.count(4)
            found[words] = max(score, found.get(words, -np.inf))
    return {
        words: score + config.lm_weight * TOY.log10(words) + config.word_score * len(words)
        for words, score in found.items()
    }


@pytest.mark.parametrize(
    ("lm_weight", "word_score", "boundary_score"),
    [(0.0, 0.0, 0.0), (2.0, -1.0, 0.0), (1.3, 0.7, -0.4), (0.5, 2.0, 0.3)],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_search_with_a_wide_beam_finds_the_best_of_all_paths(
    seed: int, lm_weight: float, word_score: float, boundary_score: float, model: Path
) -> None:
    config = BeamConfig(
        lm_weight=lm_weight, word_score=word_score, boundary_score=boundary_score, beam=20_000, threshold=1e6
    )
    log_probs = torch.randn(FRAMES, 7, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)
    expected = ranking(log_probs.numpy().astype(np.float64), config)
    decoder = BeamDecoder(LETTERS, model, config=config)
    found: dict[tuple[str, ...], float] = {}
    for one in decoder(log_probs):
        found.setdefault(one.words, one.score)
        assert len(one.path) == FRAMES
        assert one.score <= expected[one.words] + 1e-4
    best = max(expected, key=lambda words: expected[words])
    assert next(iter(found)) == best
    for words, score in found.items():
        assert score == pytest.approx(expected[words], abs=1e-4)
    assert len(found) == len(expected), "an unlimited beam drops nothing"


UNIT_WORDS = {"A": ("A",), "AB": ("AB",), "B": ("B",), "BA": ("B", "A")}
"""Units in which words are spelled; AB is one unit, so that A and B behind each other are no word."""
UNITS = Vocabulary(("|", "AB", "A", "B"), lambda word: UNIT_WORDS.get(word, ("?",)))


@pytest.mark.parametrize("lexicon", [None, {word: (*word, "|") for word in WORDS}])
def test_words_are_found_by_their_units_whatever_the_lexicon_spells(
    model: Path, lexicon: dict[str, tuple[str, ...]] | None
) -> None:
    config = BeamConfig(lm_weight=1.3, word_score=0.7, beam=20_000, threshold=1e6)
    log_probs = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).mul(2).log_softmax(-1)
    words_by_outputs = {tuple(UNITS.encode(word)): word for word in WORDS}
    expected: dict[tuple[str, ...], float] = {}
    for path in itertools.product((0, 4, 5, 6, 7), repeat=len(log_probs)):
        words, word = list[str | None](), tuple[int, ...]()
        for one in collapse(path):
            word = (*word, one)
            if one == 4:
                words += [words_by_outputs.get(word)] if len(word) > 1 else []
                word = ()
        if None not in words and not word:
            score = sum(float(log_probs[i, one]) for i, one in enumerate(path))
            key = tuple(one or "" for one in words)
            expected[key] = max(score, expected.get(key, -np.inf))
    expected = {words: score + 1.3 * TOY.log10(words) + 0.7 * len(words) for words, score in expected.items()}
    found: dict[tuple[str, ...], float] = {}
    for hypothesis in BeamDecoder(UNITS, model, lexicon, config)(log_probs):
        found.setdefault(hypothesis.words, hypothesis.score)
    assert found == {words: pytest.approx(score, abs=1e-4) for words, score in expected.items()}
    assert next(iter(found)) == max(expected, key=lambda words: expected[words])


def test_sentences_have_the_probabilities_of_the_definition(model: Path) -> None:
    decoder = BeamDecoder(LETTERS, model)
    for words in itertools.chain.from_iterable(itertools.product((*WORDS, "C"), repeat=n) for n in range(4)):
        assert decoder.log10(words) == pytest.approx(TOY.log10(words), abs=1e-5), words


def test_logits_rank_as_their_log_probabilities(model: Path) -> None:
    logits = torch.randn(FRAMES, 7, generator=torch.Generator().manual_seed(5))
    decoder = BeamDecoder(LETTERS, model)
    one, other = decoder(logits)[0], decoder(logits.log_softmax(-1))[0]
    assert (one.words, one.path) == (other.words, other.path)


def test_path_and_words_belong_together(model: Path) -> None:
    for seed in range(20):
        logits = 3 * torch.randn(9, 7, generator=torch.Generator().manual_seed(seed))
        for one in BeamDecoder(LETTERS, model)(logits)[:5]:
            # a search that ends inside of a word has no word for it
            assert words_of(one.path) in (one.words, None)


def test_spelling_of_a_lexicon_replaces_that_of_the_word(model: Path) -> None:
    log_probs = torch.full((4, 7), -20.0)
    for frame, letter in enumerate(("B", "A", "|", "|")):
        log_probs[frame, LETTERS.symbols.index(letter)] = 0.0
    assert BeamDecoder(LETTERS, model)(log_probs)[0].words == ("BA",)
    assert BeamDecoder(LETTERS, model, {"A": ("B", "A", "|")})(log_probs)[0].words == ("A",)


def test_an_utterance_without_frames_has_no_hypothesis(model: Path) -> None:
    assert BeamDecoder(LETTERS, model)(torch.zeros(0, 7)) == []


def test_one_decoder_serves_many_utterances(model: Path) -> None:
    decoder = BeamDecoder(LETTERS, model)
    logits = [torch.randn(n, 7, generator=torch.Generator().manual_seed(n)) for n in (6, 3, 6)]
    first = [decoder(one)[0] for one in logits]
    assert [decoder(one)[0] for one in reversed(logits)] == first[::-1]


# ---- files that do not fit ----


def test_missing_language_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"language model .*nowhere\.arpa: no such file"):
        BeamDecoder(LETTERS, tmp_path / "nowhere.arpa")


def test_arpa_file_without_unigrams_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.arpa"
    path.write_text("\\data\\\nngram 1=0\n\n\\end\\\n")
    with pytest.raises(ConfigError, match=r"empty\.arpa: expected an ARPA file with .*1-grams:, found none"):
        BeamDecoder(LETTERS, path)
    with pytest.raises(ConfigError, match="found none"):
        read_arpa_words(path)


def test_broken_language_model_is_a_config_error(model: Path) -> None:
    model.write_text(model.read_text().replace("-0.6\tA", "minus\tA"))
    with pytest.raises(ConfigError, match=r"language model .*toy\.arpa: "):
        BeamDecoder(LETTERS, model)


def test_model_without_unknown_word_works_for_the_words_that_it_has(model: Path) -> None:
    lines = model.read_text().replace("ngram 1=7", "ngram 1=6").splitlines(keepends=True)
    model.write_text("".join(line for line in lines if "<unk>" not in line))
    decoder = BeamDecoder(LETTERS, model)
    for words in itertools.product(WORDS, repeat=2):
        assert decoder.log10(words) == pytest.approx(TOY.log10(words), abs=1e-5)
    assert decoder(torch.randn(FRAMES, 7, generator=torch.Generator().manual_seed(0)))


def test_binary_model_needs_a_lexicon(tmp_path: Path) -> None:
    path = tmp_path / "toy.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(200))
    assert not is_arpa(path)
    with pytest.raises(ConfigError, match=r"toy\.bin is no ARPA file, .*give a lexicon"):
        BeamDecoder(LETTERS, path)


def test_model_of_another_case_is_named(model: Path) -> None:
    with pytest.raises(ConfigError, match="another case"):
        BeamDecoder(Vocabulary(("|", "a", "b")), model, {"a": ("a", "|"), "ab": ("a", "b", "|")})


def test_words_without_a_spelling_are_an_error(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of its 4 words \(A, AB, B, BA, ...\).*outputs \| a b"):
        BeamDecoder(Vocabulary(("|", "a", "b")), model)


def test_vocabulary_without_word_end_is_an_error(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected the output '\|'"):
        BeamDecoder(Vocabulary(("A", "B")), model)


def test_missing_flashlight_is_named_with_its_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder.kenlm", None)
    with pytest.raises(MissingExtraError, match=r"flashlight-text.*asr"):
        BeamDecoder(LETTERS, model)


# ---- lexicons ----


def test_lexicon_is_read_and_the_first_spelling_counts(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text("AB\tA B |\n\nA\tA |\nA\tB |\n")
    assert read_lexicon(path) == {"AB": ("A", "B", "|"), "A": ("A", "|")}
    assert encode_lexicon({"AB": ("A", "B", "|"), "C": ("C", "|")}, LETTERS) == {"AB": [5, 6, 4]}
    assert spelled(["AB", "", "A B"]) == {"AB": ("A", "B", "|")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A\tA |\nB\n", r"lexicon\.txt line 2: expected a word and its letters with \| at the end, found 'B'"),
        ("\n", "found none"),
    ],
)
def test_lexicon_of_another_form_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_lexicon(path)
    with pytest.raises(ConfigError, match=r"nowhere\.txt"):
        read_lexicon(tmp_path / "nowhere.txt")
