"""Sentencepiece units (Kudo and Richardson 2018, arXiv 1808.06226): pieces of words as outputs of a recogniser.

A transcript is the pieces of every word, and a word end behind it, as with letters. Pieces do not carry the boundary
themselves, as the pieces of other toolkits do by a mark at their beginning: an output of its own at the end of a word
is what the lexicon search, the pauses of long recordings and the times of words need.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

from d2v2ds.errors import ConfigError, MissingExtraError
from d2v2ds.tasks.vocabulary import SPECIAL, WORD_END

FILE = "units.model"
"""Name of the sentencepiece model in the folder of a run and of an export."""


@dataclass(frozen=True)
class Units:
    """Words -> pieces of a sentencepiece model; can be pickled."""

    model: bytes
    """Content of the model's file."""

    def __call__(self, word: str) -> list[str]:
        """Divide one word; characters that the model lacks are pieces of their own, which no vocabulary has.

        Raises:
            MissingExtraError: sentencepiece is not installed.
        """
        pieces: list[str] = _processor(self.model).encode(word, out_type=str)
        return pieces


def train_units(words: Mapping[str, int], count: int) -> bytes:
    """Train a unigram model; the same words give the same bytes.

    Args:
        words: how often each word occurs.
        count: number of pieces.

    Returns:
        Content of a sentencepiece model, with `<unk>` beside the pieces.

    Raises:
        ConfigError: the words do not allow so many pieces, or so few.
        MissingExtraError: sentencepiece is not installed.
    """
    model = BytesIO()
    try:
        _library().SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{words[word]}" for word in sorted(words)),
            input_format="tsv",
            model_writer=model,
            vocab_size=count + 1,
            model_type="unigram",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            character_coverage=1.0,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,  # sums of several threads would come in any order
            minloglevel=2,
        )
    except RuntimeError as error:
        most, least = re.search(r"<= (\d+)", str(error)), re.search(r"(\d+) vs (\d+)", str(error))
        letters = len(set("".join(words)))
        advice = f"expected at most {int(most[1]) - 1}" if most and not least else f"expected {letters} letters or more"
        raise ConfigError(
            f"{count} units: sentencepiece cannot train them on these {len(words)} words with {letters} letters: "
            f"{advice} ({error})"
        ) from error
    return model.getvalue()


def units_of(model: bytes, where: Any) -> tuple[str, ...]:
    """Return the outputs of a model: the word end, then its pieces in their order.

    Args:
        model: content of its file.
        where: name of the file, for messages.

    Raises:
        ConfigError: it is no sentencepiece model, or one that cannot divide single words.
        MissingExtraError: sentencepiece is not installed.
    """
    try:
        found = _processor(model) if model else None
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{where}: expected a sentencepiece model, found none: {error}") from error
    if found is None:
        raise ConfigError(f"{where}: expected a sentencepiece model, found an empty file")
    pieces = [found.id_to_piece(number) for number in range(found.vocab_size())]
    own = [
        piece
        for number, piece in enumerate(pieces)
        if not (found.is_unknown(number) or found.is_control(number) or found.is_byte(number))
    ]
    marked = [piece for piece in own if "\u2581" in piece]
    wrong = [piece for piece in own if piece in (*SPECIAL, WORD_END)]
    if marked or wrong or not own:
        what = f"{len(marked)} with the mark of a word's beginning" if marked else ", ".join(wrong) or "none"
        raise ConfigError(
            f"{where}: expected pieces of single words, found {what}; train the units with python -m d2v2ds.outputs "
            "--units, or let the run train them"
        )
    return (WORD_END, *own)


def count_words(texts: Mapping[str, int]) -> dict[str, int]:
    """Count the words of counted transcripts."""
    found: dict[str, int] = {}
    for text, count in texts.items():
        for word in text.split():
            found[word] = found.get(word, 0) + count
    return found


def no_units(word: str) -> Sequence[str]:
    """Divide nothing: stands for a model that is not there.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"{word!r:.40} cannot be divided into the units of this recogniser: expected their sentencepiece model {FILE} "
        "beside it, found none; take the folder of the run, or an export folder of it"
    )


def letters_of(symbols: Iterable[str]) -> set[str]:
    """Return the letters that units are made of."""
    return set("".join(symbols))


@lru_cache(maxsize=4)
def _processor(model: bytes) -> Any:
    return _library().SentencePieceProcessor(model_proto=model)


def _library() -> Any:
    """Import sentencepiece.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise MissingExtraError("units of a recogniser need sentencepiece", "asr") from error
    return sentencepiece
