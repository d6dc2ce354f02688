"""Sentencepiece units: deterministic, whole words back, letters for the letter error rate, clear errors."""

import pickle
from io import BytesIO
from typing import Any

import pytest
import sentencepiece
import torch

from d2v2ds.batch import Labels
from d2v2ds.errors import ConfigError
from d2v2ds.objectives.protocol import Totals
from d2v2ds.tasks.ctc import Ctc, CtcConfig
from d2v2ds.tasks.units import Units, count_words, train_units, units_of
from d2v2ds.tasks.vocabulary import NO_LETTER, UNKNOWN, Vocabulary
from tests.tasks.tiny import audio_batch, built

WORDS = {"the": 50, "cat": 7, "hat": 5, "that": 9, "cats": 3, "日本": 2}
COUNT = 12


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_units(WORDS, COUNT)


def sent(one: Any) -> Any:
    """Send an object to a data worker."""
    return pickle.loads(pickle.dumps(one))  # noqa: S301


def task_of(model: bytes) -> Ctc:
    task, _ = built(CtcConfig(modality="audio", vocabulary=units_of(model, "units.model"), units=COUNT))
    assert isinstance(task, Ctc)
    return task


def test_the_same_words_in_any_order_give_the_same_units(model: bytes) -> None:
    assert train_units(dict(reversed(WORDS.items())), COUNT) == model
    units = units_of(model, "units.model")
    assert units[0] == "|" and len(units) == COUNT + 1 == len(set(units))
    assert {"the", "t", "日"} <= set(units), "words that are frequent, and every letter"


def test_text_becomes_units_and_words_again(model: bytes) -> None:
    vocabulary = Vocabulary(units_of(model, "units.model"), sent(Units(model)))
    numbers = vocabulary.encode(" the cats  that日本x ")
    assert vocabulary.words(numbers, NO_LETTER) == ["the", "cats", f"that日本{NO_LETTER}"]
    assert vocabulary.symbols[numbers[0]] == "the" and vocabulary.symbols[numbers[1]] == "|"
    assert numbers.count(UNKNOWN) == 1 and len(numbers) < len("the|cats|that日本x|")


def test_the_encoder_of_a_run_spells_as_the_vocabulary_does(model: bytes) -> None:
    task = task_of(model)
    task.set_units(model, "units.model")
    encoded = sent(task.encoder()).encode(["the cats", "hat"])
    assert encoded.values[0, : encoded.lengths[0]].tolist() == task.vocabulary.encode("the cats")
    assert encoded.values[1, : encoded.lengths[1]].tolist() == task.vocabulary.encode("hat")


def test_the_letter_error_rate_counts_letters_not_units(model: bytes) -> None:
    """ "the" is one unit and three letters: one of the four with the word end is wrong, or all of a unit."""
    task = task_of(model)
    task.set_units(model, "units.model")
    wanted, said = task.vocabulary.encode("the cat"), task.vocabulary.encode("hat cat")
    logits = torch.full((1, 20, len(task.vocabulary)), -9.0)
    logits[..., 0] = 0.0
    for i, number in enumerate(said):
        logits[0, 2 * i, number] = 5.0
    labels = Labels(values=torch.tensor([wanted]), lengths=torch.tensor([len(wanted)]))

    def network(*_: object) -> dict[str, torch.Tensor]:
        return {"logits": logits, "frames": torch.tensor([20])}

    losses = task.losses(network, audio_batch(lengths=(400,), labels=labels), None)
    rates = task.metrics("audio", Totals(sums={"ctc": 1.0}, count=1.0, statistics=losses.statistics))
    assert rates["ctc/wer"] == pytest.approx(50.0)
    assert rates["ctc/cer"] == pytest.approx(100 * 3 / 8), "the| -> hat|: the h stays, t, a and e do not"


def test_units_without_their_model_spell_nothing_but_say_what_is_missing(model: bytes) -> None:
    task = task_of(model)
    assert task.vocabulary.words([5, 4]) == [task.vocabulary.symbols[5]]
    with pytest.raises(ConfigError, match=r"'the'.*units\.model.*found none"):
        task.encoder().encode(["the"])


def test_a_model_of_other_units_is_refused(model: bytes) -> None:
    with pytest.raises(ConfigError, match=r"x\.model: expected the 13 units.*found 11 others"):
        task_of(model).set_units(train_units(WORDS, COUNT - 2), "x.model")


@pytest.mark.parametrize(
    ("words", "count", "said"),
    [
        (WORDS, 3, "with 8 letters: expected 8 letters or more"),
        (WORDS, 500, "500 units: .* 6 words with 8 letters: expected at most 1[0-9] "),
        ({}, 5, "0 words"),
    ],
)
def test_numbers_of_units_that_words_do_not_allow_are_named(words: dict[str, int], count: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        train_units(words, count)


def marked() -> bytes:
    found = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat", "that cat"] * 9), model_writer=found, vocab_size=12, minloglevel=2
    )
    return found.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "found an empty file"),
        (b"abc", "x.model: expected a sentencepiece model, found none"),
        (marked(), "expected pieces of single words, found . with the mark of a word's beginning"),
    ],
)
def test_files_that_hold_no_units_are_named(content: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        units_of(content, "x.model")


def test_words_are_counted_over_transcripts() -> None:
    assert count_words({"a b a": 2, " b ": 3, "": 1}) == {"a": 4, "b": 5}
