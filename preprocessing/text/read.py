"""Text files to documents, as a stream: plain text, JSON lines and TSV, also compressed by gzip or zstandard.

In: spans of files. Out: batches of documents, read `CHUNK_BYTES` at a time, so neither a file nor the corpus has to
fit in memory. Plain text is read here, the other forms in modules of their own.
"""

import re
from collections.abc import Callable, Iterator

from preprocessing.text.documents import DocumentBatch, DocumentKind, DocumentOptions, TextSpan
from preprocessing.text.json_lines import read_json
from preprocessing.text.stream import decoded_text
from preprocessing.text.tsv import read_tsv

PIECE_CHARS = 128 << 10
"""Characters of the longest text in a batch; a longer document comes in pieces."""


def read_documents(span: TextSpan, options: DocumentOptions) -> Iterator[DocumentBatch]:
    """Yield the documents of a span in order; documents without text are left out, unless they have labels.

    Raises:
        ConfigError: invalid UTF-8 (strict), a malformed JSON or TSV line, a line without the field, or a damaged
            compressed file; the message names the place.
        ShardError: the file became shorter after the packing was planned.
    """
    return _READERS[span.file.form](span, options)


def _read_plain(span: TextSpan, options: DocumentOptions) -> Iterator[DocumentBatch]:
    split = _SPLITTERS[options.document]
    rest, inside = "", False
    for text in decoded_text(span, options.errors):
        parts = split(rest + text)
        rest = parts.pop()
        if parts:
            yield DocumentBatch(texts=_stripped(parts, inside), begins_inside=inside)
            inside = False
        while len(rest) > PIECE_CHARS:
            cut = piece_end(rest)
            piece = rest[:cut] if inside else rest[:cut].lstrip()
            rest = rest[cut:]
            if piece:
                yield DocumentBatch(texts=[piece], begins_inside=inside, ends_inside=True)
                inside = True
    last = _stripped([rest], inside)
    if last:
        yield DocumentBatch(texts=last, begins_inside=inside)


def piece_end(text: str, most: int = PIECE_CHARS) -> int:
    """Return where to cut a long text: before the last white space in front of a word, within `most` characters.

    GPT-2's pattern and sentencepiece both begin a new word at that character, so the pieces have the tokens of the
    whole text. Text without white space is cut at `most`.
    """
    end = len(text[:most].rstrip())
    cut = max(text.rfind(blank, 1, end) for blank in (" ", "\n", "\t"))
    return cut if cut > 0 else most


def _stripped(parts: list[str], inside: bool) -> list[str]:
    """Strip white space around documents and drop empty ones, but keep the end of a document begun before."""
    if not inside:
        return [text for part in parts if (text := part.strip())]
    return [parts[0].rstrip(), *(text for part in parts[1:] if (text := part.strip()))]


_BLANK_LINES = re.compile(r"\n\s*\n", re.ASCII)
_SPLITTERS: dict[DocumentKind, Callable[[str], list[str]]] = {
    "line": lambda text: text.split("\n"),
    "paragraph": _BLANK_LINES.split,
    "file": lambda text: [text],
}
_READERS = {"text": _read_plain, "json": read_json, "tsv": read_tsv}
