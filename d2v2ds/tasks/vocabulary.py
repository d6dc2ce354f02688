"""Vocabulary of a recogniser: text <-> numbers of outputs.

The first four numbers are those of the official dictionaries: `<s>`, the blank of CTC, `<pad>`, `</s>`, `<unk>`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from d2v2ds import labels

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
BLANK, PAD, END, UNKNOWN = range(4)
NO_LETTER = "\ufffd"
"""Stands for a letter of a reference that the vocabulary lacks, so that no output equals it."""
WORD_END = "|"
"""Output behind every word, the last one too."""
LIBRISPEECH = tuple("|ETAONIHSRDLUMWCFGYPBVK'XJQZ")
"""Letters of the official dictionary, most frequent first."""


class Vocabulary:
    """Letters, or other units, of a recogniser."""

    def __init__(self, units: Sequence[str], divide: Callable[[str], Sequence[str]] = tuple) -> None:
        """
        Args:
            units: outputs behind the four special ones.
            divide: divides a word into them, such as `d2v2ds.tasks.units.Units`; into letters by default.
        """
        self.divide = divide
        self.symbols = (*SPECIAL, *units)
        self._word_end = self.symbols.index(WORD_END) if WORD_END in units else -1
        self._numbers = {symbol: number for number, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        """V, number of outputs."""
        return len(self.symbols)

    @property
    def has_units(self) -> bool:
        """True if outputs are larger units than letters."""
        return self.divide is not tuple

    def encode(self, text: str) -> list[int]:
        """Convert a transcript: the letters of every word, then a word end. Unknown letters become `UNKNOWN`."""
        return [self._numbers.get(letter, UNKNOWN) for letter in self.spell(text)]

    def spell(self, text: str) -> Iterator[str]:
        """Yield the units of a transcript with the word ends."""
        return labels.spell(text, WORD_END, self.divide)

    def letters(self, numbers: Iterable[int]) -> list[str | int]:
        """Convert outputs to the letters of which units are made; outputs that are letters, and special ones, stay."""
        if not self.has_units:
            return list(numbers)
        return [
            letter for number in numbers for letter in (self.symbols[number] if number >= len(SPECIAL) else (number,))
        ]

    def words(self, numbers: Iterable[int], unknown: str = SPECIAL[UNKNOWN]) -> list[str]:
        """Convert outputs, without blanks and repeats, to words; `unknown` stands for letters without a number."""
        return [word for word, _, _ in self.word_spans(numbers, unknown)]

    def word_spans(self, numbers: Iterable[int], unknown: str = SPECIAL[UNKNOWN]) -> list[tuple[str, int, int]]:
        """Convert outputs as `words` does, each word with its place.

        Returns:
            For every word the word, the index of its first letter, and that behind its last one.
        """
        found: list[tuple[str, int, int]] = []
        word, first, last = "", 0, 0
        for place, number in enumerate([*numbers, self._word_end]):
            if number == self._word_end:
                if word:
                    found.append((word, first, last))
                word = ""
            elif number not in (BLANK, END):
                first, last = (first if word else place), place + 1
                word += unknown if number == UNKNOWN else self.symbols[number]
        return found


def spell(text: str) -> Iterator[str]:
    """Yield the letters of a transcript with the word ends."""
    return labels.spell(text, WORD_END)


def count_letters(texts: Mapping[str, int]) -> tuple[str, ...]:
    """Return the letters of counted transcripts, most frequent first, equal ones in the order of their code points."""
    found: Counter[str] = Counter()
    for text, count in texts.items():
        for letter in spell(text):
            found[letter] += count
    return tuple(sorted(found, key=lambda letter: (-found[letter], letter)))
