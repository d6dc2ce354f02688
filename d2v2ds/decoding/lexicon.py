"""Words that a beam search may find, and their spellings."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from d2v2ds.errors import ConfigError
from d2v2ds.io.read import read_text
from d2v2ds.tasks.vocabulary import WORD_END, Vocabulary, spell

_MOST_BYTES = 1 << 30
_SHOWN = 5


def read_lexicon(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a file of lines `word TAB letters`, letters divided by blanks and ending with `|`.

    Raises:
        ConfigError: the file cannot be read, is empty, or has a line of another form.
    """
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(read_text(path, ConfigError, _MOST_BYTES).splitlines(), 1):
        if not line.strip():
            continue
        word, *letters = line.split()
        if not letters or letters[-1] != WORD_END:
            raise ConfigError(
                f"{path} line {number}: expected a word and its letters with {WORD_END} at the end, found {line[:60]!r}"
            )
        found.setdefault(word, tuple(letters))
    if not found:
        raise ConfigError(f"{path}: expected lines of a word, a tab and its letters, found none")
    return found


def spelled(words: Iterable[str], own: Callable[[str], Iterable[str]] = spell) -> dict[str, tuple[str, ...]]:
    """Spell words by their own letters, or as a vocabulary spells them."""
    return {word: tuple(own(word)) for word in words if word.split() == [word]}


def encode_lexicon(lexicon: Mapping[str, tuple[str, ...]], vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Convert spellings to numbers of outputs; words with unknown letters are left out.

    Raises:
        ConfigError: no word is left.
    """
    known = set(vocabulary.symbols)
    kept = {word: letters for word, letters in lexicon.items() if known.issuperset(letters)}
    if not kept:
        some = ", ".join(list(lexicon)[:_SHOWN])
        raise ConfigError(
            f"lexicon: none of its {len(lexicon)} words ({some}, ...) can be spelled with the outputs "
            f"{' '.join(vocabulary.symbols[4:40])}; is it of another case or language?"
        )
    return {word: [vocabulary.symbols.index(letter) for letter in letters] for word, letters in kept.items()}
