"""Text files, spans of them, documents, and the options that say what a document is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

DocumentKind = Literal["line", "paragraph", "file"]
DOCUMENT_KINDS: tuple[DocumentKind, ...] = ("line", "paragraph", "file")
Errors = Literal["strict", "replace"]
ERRORS: tuple[Errors, ...] = ("strict", "replace")
Form = Literal["text", "json", "tsv"]

EXPANSION = {None: 1, "gzip": 3, "zstd": 3}
"""Bytes of text per byte of file, as the plan guesses them; English text has 2.5 to 3.5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """One input file."""

    path: str
    """Where to open it."""
    source: str
    """How it is named in shards and messages: its path below the input folder, or its name."""
    bytes: int
    """Size on disk."""
    form: Form
    compression: str | None
    label: str | None = None
    """Of all its documents, if a manifest says so."""

    @property
    def text_bytes(self) -> int:
        """Bytes of text in it; a guess if it is compressed."""
        return self.bytes * EXPANSION[self.compression]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpan:
    """Bytes `start` to `stop` of a file that is not compressed, or a whole file (`stop` is None)."""

    file: TextFile
    order: int = 0
    """Position of the file among all input files."""
    start: int = 0
    stop: int | None = None

    @property
    def files(self) -> int:
        """Files that begin in it."""
        return int(self.start == 0)

    @property
    def size(self) -> int:
        """Planned bytes of text."""
        return self.file.text_bytes if self.stop is None else self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """What a document is, and what is done with bad input."""

    document: DocumentKind = "paragraph"
    """In plain text: what a line, lines between blank ones, or a file. Elsewhere a line is a document."""
    text_field: str = "text"
    """The JSON field or TSV column that holds the text."""
    label_field: str | None = None
    """The JSON field or TSV column that holds the label; None reads no labels."""
    errors: Errors = "strict"
    """replace: what is no UTF-8 becomes U+FFFD instead of an error."""


@dataclass(kw_only=True)
class DocumentBatch:
    """Consecutive documents of one file."""

    texts: list[str]
    """White space around documents is removed. In strict reading each can be encoded as UTF-8."""
    begins_inside: bool = False
    """The first text goes on with the last one of the batch before."""
    ends_inside: bool = False
    """The last text goes on in the next batch."""
    lines: Sequence[int] = ()
    """Of JSON and TSV: line numbers inside the span, from 0."""
    labels: list[str | None] = field(default_factory=list)
    """Only if labels were asked for."""
