"""Documents to rows of tokens: blocks across documents for pretraining, or one row per document or pair with labels.

Token ids stay in NumPy arrays from the tokenizer to the shard; no Python loop runs over tokens.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v2ds.modalities.text.sentences import PAIR_SPECIALS, SINGLE_SPECIALS, join_sentences
from d2v2ds.modalities.text.tokenizers import BOS, EOS, UNK, Tokenizer
from preprocessing.driver.protocol import Notes, Row
from preprocessing.driver.shard_plan import Skipped
from preprocessing.text.documents import DocumentBatch, TextSpan
from preprocessing.text.read import read_documents
from preprocessing.text.shard_plan import TextSettings
from preprocessing.text.tokenization import token_dtype


def block_rows(units: Sequence[TextSpan], tokenizer: Tokenizer, settings: TextSettings, notes: Notes) -> Iterator[Row]:
    """Yield the blocks of one shard: its documents joined, cut, each with ``<s>`` in front; the last may be shorter."""
    blocks = Blocks(settings.block_tokens, token_dtype(tokenizer.vocab_size))
    for span in units:
        tally = Tally()
        blocks.source = span.file.source
        for batch in read_documents(span, settings.documents):
            ids, lengths = tokenizer.encode(batch.texts)
            tally.add(batch, ids)
            yield from blocks.add(with_ends(ids, lengths, open_end=batch.ends_inside))
        tally.close(span, notes)
    yield from blocks.finish()


def document_rows(
    units: Sequence[TextSpan], tokenizer: Tokenizer, settings: TextSettings, notes: Notes
) -> Iterator[Row]:
    """Yield one row per document: ``<s>``, its tokens as far as they fit, ``</s>``."""
    dtype = token_dtype(tokenizer.vocab_size)
    most = settings.block_tokens - SINGLE_SPECIALS
    for span in units:
        tally = Tally()
        documents = 0
        for batch in read_documents(span, settings.documents):
            ids, lengths = tokenizer.encode(batch.texts)
            tally.add(batch, ids)
            stops = np.cumsum(lengths)
            for number, (stop, length) in enumerate(zip(stops.tolist(), lengths.tolist(), strict=True)):
                if number == 0 and batch.begins_inside:
                    continue  # its row was made from its first piece, which is far longer than a row
                start = stop - length
                kept = min(length, most)
                tally.cut += kept < length
                yield _row(span, batch, number, documents, join_sentences(ids[start : start + kept], dtype=dtype))
                documents += 1
        tally.close(span, notes)


def pair_rows(units: Sequence[TextSpan], tokenizer: Tokenizer, settings: TextSettings, notes: Notes) -> Iterator[Row]:
    """Yield one row per pair: ``<s> A </s> </s> B </s>``. Pairs are never cut.

    Pairs that are longer than a row, and pairs of which a sentence has no token, are left out and noted.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    most = settings.block_tokens - PAIR_SPECIALS
    for span in units:
        tally = Tally()
        pairs = 0
        for batch in read_documents(span, settings.documents):
            ids, lengths = tokenizer.encode(batch.all_texts)
            tally.add(batch, ids)
            sentences = np.split(ids, np.cumsum(lengths)[:-1])
            halves = zip(sentences[: len(batch.texts)], sentences[len(batch.texts) :], strict=True)
            for number, (first, second) in enumerate(halves):
                if not len(first) or not len(second):
                    tally.empty += 1
                elif len(first) + len(second) > most:
                    tally.too_long += 1
                else:
                    yield _row(span, batch, number, pairs, join_sentences(first, second, dtype))
                    pairs += 1
        tally.close(span, notes)


def _row(span: TextSpan, batch: DocumentBatch, number: int, start: int, tokens: NDArray[Any]) -> Row:
    """Make the row of one document.

    Args:
        span: where it comes from.
        batch: of the document.
        number: of the document in it.
        start: number of the row among those of the span.
        tokens: (S,) ids, special ones included.
    """
    return Row(
        payload=tokens,
        values={
            "id": f"{span.file.source}#{batch.lines[number] + 1 if batch.lines else start}",
            "num_tokens": len(tokens),
            "label": batch.labels[number] if batch.labels else span.file.label,
            "source": span.file.source,
            "start": start,
        },
    )


@dataclass(slots=True)
class Tally:
    """Counts of one span."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    nulls: int = 0
    characters: int = 0
    invalid: int = 0
    """U+FFFD, which `DocumentOptions.errors` puts in the place of invalid UTF-8."""
    cut: int = 0
    """Documents longer than a row."""
    empty: int = 0
    """Pairs that are left out because a sentence has no token."""
    too_long: int = 0
    """Pairs that are left out because they are longer than a row."""
    quoted: int = 0
    """Fields that look quoted as in CSV."""

    def add(self, batch: DocumentBatch, ids: NDArray[Any]) -> None:
        """Count a batch and the (n,) ids of its texts."""
        self.documents += len(batch.texts) - batch.begins_inside
        texts = batch.all_texts
        self.bytes += _text_bytes(texts)
        self.tokens += len(ids)
        self.unknown += int(np.count_nonzero(ids == UNK))
        self.nulls += batch.nulls
        self.quoted += batch.quoted
        self.characters += sum(map(len, texts))
        self.invalid += sum(text.count("\ufffd") for text in texts)

    def close(self, span: TextSpan, notes: Notes) -> None:
        """Report the counts of a whole span; a whole file without a document counts as skipped."""
        notes.counts["documents"] += self.documents - self.empty - self.too_long
        notes.counts["bytes"] += self.bytes
        order, source = span.order, span.file.source
        note = partial(notes.note, order=order, source=source)
        is_whole = span.start == 0 and span.stop in (None, span.file.bytes)
        if is_whole and not self.documents:
            reason = "only lines whose text is null" if self.nulls else "no text but white space"
            notes.skipped.append(Skipped(order=order, source=source, reason=reason))
        elif self.nulls:
            lines = self.nulls + self.documents
            note("null texts", f"{self.nulls:,} of {lines:,} lines", lost=self.nulls / lines)
        if self.unknown:
            detail = f"{self.unknown:,} of {self.tokens:,} tokens"
            note("unknown tokens", detail, lost=self.unknown / self.tokens)
        if self.invalid:
            detail = f"{self.invalid:,} of {self.characters:,} characters are U+FFFD"
            note("invalid characters", detail, lost=self.invalid / self.characters)
        if self.cut:
            note("cut documents", f"{self.cut:,} of {self.documents:,} documents", lost=0.0)
        for kind, count in {
            "pairs with an empty sentence": self.empty,
            "pairs longer than a row": self.too_long,
        }.items():
            if count:
                note(kind, f"left out {count:,} of {self.documents:,} pairs", lost=count / self.documents)
        if self.quoted:
            note("quoted fields", f"{self.quoted:,} fields; their quotes are characters of the text", lost=0.0)
        notes.report(span.files, span.size)


def _text_bytes(texts: Sequence[str]) -> int:
    if all(map(str.isascii, texts)):
        return sum(map(len, texts))
    return len("".join(texts).encode())  # once over everything is faster than once per document


def with_ends(ids: NDArray[Any], lengths: NDArray[np.int64], open_end: bool) -> NDArray[Any]:
    """Return the ids with ``</s>`` behind every document.

    Args:
        ids: (n,) of all documents, one after the other.
        lengths: (d,) ids of each.
        open_end: the last document continues in the next batch and gets no ``</s>``.

    Returns:
        (n + d,) or (n + d - 1,).
    """
    ends = np.cumsum(lengths + 1) - 1  # positions of </s>
    joined = np.full(len(ids) + len(lengths), EOS, dtype=ids.dtype)
    is_text = np.ones(len(joined), dtype=bool)
    is_text[ends] = False
    joined[is_text] = ids
    return joined[:-1] if open_end else joined


class Blocks:
    """Cuts a stream of ids into rows and keeps the rest for the next call.

    Args:
        block_tokens: S, length of a row, ``<s>`` included.
        dtype: of stored ids.
    """

    def __init__(self, block_tokens: int, dtype: np.dtype[Any]) -> None:
        self._body = block_tokens - 1
        self._dtype = dtype
        self._rest = np.zeros(0, dtype=dtype)
        self._made = 0
        self._begins: list[int] = []
        self._sources: list[str] = []
        self._added = 0
        self.source = ""
        """Input file of the ids that are added next."""

    def add(self, ids: NDArray[Any]) -> Iterator[Row]:
        """Yield the rows that (n,) more ids fill."""
        if not self._sources or self._sources[-1] != self.source:
            self._begins.append(self._added)
            self._sources.append(self.source)
        self._added += len(ids)
        stream = np.concatenate([self._rest, ids.astype(self._dtype)])
        count = len(stream) // self._body
        rows = np.empty((count, self._body + 1), dtype=self._dtype)
        rows[:, 0] = BOS
        rows[:, 1:] = stream[: count * self._body].reshape(count, self._body)
        self._rest = stream[count * self._body :]
        for row in rows:
            yield self._row(row)

    def finish(self) -> Iterator[Row]:
        """Yield the last row, if ids are left."""
        if len(self._rest):
            yield self._row(np.concatenate([np.full(1, BOS, dtype=self._dtype), self._rest]))

    def _row(self, tokens: NDArray[Any]) -> Row:
        source = self._sources[bisect_right(self._begins, self._made * self._body) - 1]
        values = {"id": None, "num_tokens": len(tokens), "label": None, "source": source, "start": self._made}
        self._made += 1
        return Row(payload=tokens, values=values)
