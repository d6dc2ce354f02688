"""Demands of a fine-tuning task on packed rows: whole inputs, the annotation with the label, its encoding.

Encoders are picklable: data workers use them. They need torch, not the network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from d2v2ds.batch import Labels
from d2v2ds.masking import SpanMaskConfig

PAD = 1
"""Number that fills sequences of letters behind their end, as in the official code; no loss reads it."""


class LabelEncoder(Protocol):
    """Annotations of rows -> labels."""

    @property
    def column(self) -> str:
        """Annotation that is read, as packers call it: `text` or `label`."""

    def encode(self, values: Sequence[str]) -> Labels:
        """Encode the annotations of B rows.

        Raises:
            ValueError: one of them cannot be a label; the message says what was expected and found.
        """


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Demands of a task on the inputs of one modality, which are read whole and padded."""

    encoder: LabelEncoder
    """Encoding of the labels."""
    spans: SpanMaskConfig
    """Masks of training inputs."""
    width: int
    """D, for masks of channels."""


def spell(text: str, word_end: str, divide: Callable[[str], Sequence[str]] = tuple) -> Iterator[str]:
    """Yield the letters of a transcript, or what `divide` makes of a word, and `word_end` behind every word."""
    for word in text.split():
        yield from divide(word)
        yield word_end


@dataclass(frozen=True)
class Letters:
    """Transcripts as sequences of letters; a `LabelEncoder`."""

    numbers: Mapping[str, int]
    """Number of every letter."""
    word_end: str
    """Letter behind every word."""
    unknown: int
    """Number of letters that have none."""
    divide: Callable[[str], Sequence[str]] = tuple
    """Divides a word into letters, or into larger units."""
    column: str = "text"

    def encode(self, values: Sequence[str]) -> Labels:
        """Spell every transcript: (B, U) and lengths (B,)."""
        spelled = [torch.tensor([self.spell(value)]) for value in values]
        return join_labels([Labels(values=row, lengths=torch.tensor([row.shape[1]])) for row in spelled])

    def spell(self, text: str) -> list[int]:
        """Spell one transcript.

        Raises:
            ValueError: it has no word.
        """
        letters = list(spell(text, self.word_end, self.divide))
        if not letters:
            raise ValueError(f"expected a transcript with a word, found {text!r:.60}")
        return [self.numbers.get(letter, self.unknown) for letter in letters]


@dataclass(frozen=True)
class ClassNumbers:
    """Names of classes as numbers; a `LabelEncoder`."""

    names: tuple[str, ...]
    """Classes in the order of the outputs."""
    column: str = "label"

    def encode(self, values: Sequence[str]) -> Labels:
        """Number every class: (B,) int64."""
        return Labels(values=torch.tensor([self._number(value) for value in values]))

    def _number(self, value: str) -> int:
        try:
            return self.names.index(value)
        except ValueError as error:
            raise ValueError(f"expected a class of the training data ({_some(self.names)}), found {value!r}") from error


@dataclass(frozen=True)
class ClassSets:
    """Several classes of one row, divided by a character; a `LabelEncoder`."""

    names: tuple[str, ...]
    """Classes in the order of the outputs."""
    divider: str = ","
    column: str = "label"

    def encode(self, values: Sequence[str]) -> Labels:
        """Mark the classes of every row: (B, C) float32."""
        marked = torch.zeros(len(values), len(self.names))
        for row, value in zip(marked, values, strict=True):
            for name in self.split(value):
                if name not in self.names:
                    raise ValueError(f"expected classes of the training data ({_some(self.names)}), found {name!r}")
                row[self.names.index(name)] = 1.0
        return Labels(values=marked)

    def split(self, value: str) -> list[str]:
        """List the classes of one row."""
        return [name.strip() for name in value.split(self.divider) if name.strip()]


@dataclass(frozen=True)
class Numbers:
    """Numbers, divided by a constant; a `LabelEncoder`."""

    scale: float = 1.0
    """Largest number: wanted outputs are the numbers over it."""
    column: str = "label"

    def encode(self, values: Sequence[str]) -> Labels:
        """Read every number: (B,) float32."""
        return Labels(values=torch.tensor([self._number(value) for value in values], dtype=torch.float32))

    def _number(self, value: str) -> float:
        try:
            number = float(value)
        except ValueError as error:
            raise ValueError(f"expected a number, found {value!r:.60}") from error
        if not abs(number / self.scale) <= torch.finfo(torch.float32).max:
            raise ValueError(f"expected a finite number, found {value!r:.60}")
        return number / self.scale


def join_labels(parts: Sequence[Labels]) -> Labels:
    """Join the labels of several rows or batches; sequences are padded to the longest."""
    if parts[0].lengths is None:
        return Labels(values=torch.cat([part.values for part in parts]))
    rows = [row[:n] for part in parts for row, n in zip(part.values, part.lengths.tolist(), strict=True)]  # type: ignore[union-attr]
    lengths = torch.tensor([len(row) for row in rows])
    return Labels(values=pad_sequence(rows, batch_first=True, padding_value=PAD), lengths=lengths)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... {len(names)} in all" if len(names) > 5 else "")
