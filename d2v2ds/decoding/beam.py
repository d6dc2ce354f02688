"""Beam search with a lexicon and an n-gram language model (flashlight-text with KenLM, extra `asr`).

A hypothesis has the score

    emissions + lm_weight * log10 p(words) + word_score * words + boundary_score * frames of `|`

Emissions are natural logarithms, those of the language model are to the base of 10, as in the official code: weights of
papers that use natural logarithms for both are smaller by the factor ln 10 = 2.3026. The language model starts with
`<s>` and scores `</s>`. A hypothesis counts with its best alignment; alignments are not added.
"""

import copy
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from d2v2ds.bounds import Count, Positive
from d2v2ds.decoding.lexicon import encode_lexicon, spelled
from d2v2ds.errors import ConfigError, MissingExtraError
from d2v2ds.io.read import is_there, open_regular
from d2v2ds.tasks.vocabulary import BLANK, WORD_END, Vocabulary

_ARPA_HEAD = b"\\data\\"
_UNKNOWN_WORD = "<unk>"
_SENTENCE_MARKS = ("<s>", "</s>", _UNKNOWN_WORD)


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """Settings of the search."""

    lm_weight: float = 2.0
    """Factor of the language model's log10 probability."""
    word_score: float = -1.0
    """Added for every word."""
    boundary_score: float = 0.0
    """Added for every frame that emits `|` (official name: `sil_score`)."""
    beam: Count = 50
    """Hypotheses that are kept at each frame."""
    threshold: Positive = 50.0
    """Distance in score from the best one beyond which a hypothesis is dropped."""
    beam_letters: Count | None = None
    """Outputs that are tried at each frame, the most likely ones; None tries all."""


@dataclass(frozen=True)
class Hypothesis:
    """Result of a search."""

    words: tuple[str, ...]
    score: float
    path: tuple[int, ...]
    """Output of every frame."""


def read_arpa_words(path: Path) -> list[str]:
    """Read the words of an ARPA file's unigrams.

    Raises:
        ConfigError: the file cannot be read, is no ARPA file, or has no unigrams.
    """
    words, in_unigrams = [], False
    with open_regular(path, ConfigError) as file:
        for line in io.TextIOWrapper(file, encoding="utf-8", errors="replace"):
            if line.startswith("\\"):
                if in_unigrams:
                    break
                in_unigrams = line.startswith("\\1-grams:")
            elif in_unigrams and len(parts := line.split()) >= 2:
                words.append(parts[1])
    if not words:
        raise ConfigError(f"{path}: expected an ARPA file with \\1-grams:, found none")
    return [word for word in words if word not in _SENTENCE_MARKS]


def is_arpa(path: Path) -> bool:
    """Return True for an ARPA file, False for KenLM's binary form.

    Raises:
        ConfigError: it cannot be read.
    """
    with open_regular(path, ConfigError) as file:
        return _ARPA_HEAD in file.read(4096)


class BeamDecoder:
    """Search with one lexicon and one language model, for many utterances."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        language_model: Path,
        lexicon: Mapping[str, Sequence[str]] | None = None,
        config: BeamConfig | None = None,
    ) -> None:
        """
        Args:
            vocabulary: outputs of the recogniser.
            language_model: ARPA file, or KenLM's binary form of one.
            lexicon: letters of every word; None: words of the ARPA file, spelled by their own letters. A vocabulary of
                larger units spells the words itself.
            config: settings; None: the defaults.

        Raises:
            ConfigError: a file is not what it should be, or they do not fit each other.
            MissingExtraError: flashlight-text is not installed.
        """
        self.config = config or BeamConfig()
        self._vocabulary, text = vocabulary, _flashlight()
        if not is_there(language_model, ConfigError):
            raise ConfigError(f"language model {language_model}: no such file")
        if WORD_END not in vocabulary.symbols:
            raise ConfigError(f"beam search: expected the output {WORD_END!r}, found {' '.join(vocabulary.symbols)}")
        arpa_words = read_arpa_words(language_model) if is_arpa(language_model) else None
        if lexicon is None and arpa_words is None:
            raise ConfigError(f"{language_model} is no ARPA file, its words cannot be read; give a lexicon")
        if lexicon is None or vocabulary.has_units:
            chosen = spelled((arpa_words or []) if lexicon is None else lexicon, vocabulary.spell)
        else:
            chosen = {word: tuple(own) for word, own in lexicon.items()}
        numbers = encode_lexicon(chosen, vocabulary)
        self._numbers, self._words = numbers, list(numbers)
        dictionary = text.dictionary.Dictionary()
        for word in (*self._words, _UNKNOWN_WORD):
            dictionary.add_entry(word)
        try:
            self._lm = text.kenlm.KenLM(str(language_model), dictionary)
        except RuntimeError as error:
            raise ConfigError(f"language model {language_model}: {str(error).splitlines()[0]}") from error
        if arpa_words is not None and not set(arpa_words) & set(self._words):
            raise ConfigError(
                f"language model {language_model}: has none of the {len(self._words)} words of the lexicon; is it of "
                "another case?"
            )
        self._unknown = dictionary.get_index(_UNKNOWN_WORD)
        self._trie = self._build_trie(text.decoder)
        self._decoder = self._build_decoder(text.decoder)

    def with_settings(self, config: BeamConfig) -> "BeamDecoder":
        """Return a search with other settings; lexicon and language model are shared and not read again."""
        other = copy.copy(self)
        other.config = config
        other._decoder = other._build_decoder(_flashlight().decoder)
        return other

    def _build_trie(self, library: Any) -> Any:
        """Build the tree of spellings, with the best word's probability at every node."""
        trie = library.Trie(len(self._vocabulary), self._vocabulary.symbols.index(WORD_END))
        start = self._lm.start(False)
        for number, word in enumerate(self._words):
            _, score = self._lm.score(start, number)
            trie.insert(self._numbers[word], number, score)
        trie.smear(library.SmearingMode.MAX)
        return trie

    def _build_decoder(self, library: Any) -> Any:
        config, vocabulary = self.config, self._vocabulary
        boundary = vocabulary.symbols.index(WORD_END)
        options = library.LexiconDecoderOptions(
            beam_size=config.beam,
            beam_size_token=config.beam_letters or len(vocabulary),
            beam_threshold=config.threshold,
            lm_weight=config.lm_weight,
            word_score=config.word_score,
            unk_score=-math.inf,
            sil_score=config.boundary_score,
            log_add=False,
            criterion_type=library.CriterionType.CTC,
        )
        return library.LexiconDecoder(options, self._trie, self._lm, boundary, BLANK, self._unknown, [], False)

    def __call__(self, emissions: Tensor) -> list[Hypothesis]:
        """Search one utterance.

        Args:
            emissions: (T, V) logits or log probabilities of real frames.

        Returns:
            Hypotheses, best first; none if the utterance has no frames.
        """
        frames = np.ascontiguousarray(emissions.detach().float().cpu().numpy())
        if not len(frames):
            return []
        found = self._decoder.decode(frames.ctypes.data, *frames.shape)
        return [self._hypothesis(one, len(frames)) for one in found]

    def _hypothesis(self, result: Any, num_frames: int) -> Hypothesis:
        words = tuple(self._words[number] for number in result.words if 0 <= number < len(self._words))
        return Hypothesis(words, float(result.score), tuple(result.tokens[1 : num_frames + 1]))

    def spelling(self, word: str) -> list[int]:
        """Return the numbers of a word's letters, the word end at their end."""
        return self._numbers[word]

    def log10(self, words: Sequence[str]) -> float:
        """Return log10 p of a sentence with `</s>` after `<s>`; unknown words count as `<unk>`."""
        state, total = self._lm.start(False), 0.0
        for word in words:
            number = self._words.index(word) if word in self._words else len(self._words)
            state, score = self._lm.score(state, number)
            total += score
        return float(total + self._lm.finish(state)[1])


def _flashlight() -> Any:
    """Import flashlight-text.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import flashlight.lib.text.decoder.kenlm as kenlm
        from flashlight.lib.text import decoder, dictionary
    except ImportError as error:
        raise MissingExtraError("beam search needs flashlight-text", "asr") from error

    @dataclass(frozen=True)
    class Library:
        decoder: Any
        dictionary: Any
        kenlm: Any

    return Library(decoder, dictionary, kenlm)
