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
"""Estimated bytes of text per byte of file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """One input file."""

    path: str
    """File to open."""
    source: str
    """Name in shards and messages: the path below the input folder, or the file's name."""
    bytes: int
    """Size on disk."""
    form: Form
    compression: str | None
    label: str | None = None
    """Label of all its documents, from a manifest; None without one."""

    @property
    def text_bytes(self) -> int:
        """Bytes of text; an estimate if the file is compressed."""
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
    """Definition of a document, and treatment of bad input."""

    document: DocumentKind = "paragraph"
    """Unit of plain text: a line, a paragraph (lines between blank lines), or a file. In JSON and TSV it is a line."""
    text_field: str = "text"
    """The JSON field or TSV column that holds the text."""
    pair_field: str | None = None
    """The JSON field or TSV column that holds the second sentence of a pair; None: documents are single texts."""
    label_field: str | None = None
    """The JSON field or TSV column that holds the label; None reads no labels."""
    errors: Errors = "strict"
    """strict: invalid UTF-8 is an error; replace: it becomes U+FFFD."""

    @property
    def keeps_empty(self) -> bool:
        """True if texts without a character are documents: rows with labels, or with another sentence, count."""
        return self.label_field is not None or self.pair_field is not None

    @property
    def fields(self) -> tuple[str, ...]:
        """JSON fields or TSV columns that are read: text, second sentence and label, as far as they are set."""
        return tuple(name for name in (self.text_field, self.pair_field, self.label_field) if name is not None)


@dataclass(kw_only=True)
class DocumentBatch:
    """Consecutive documents of one file."""

    texts: list[str]
    """Documents without white space around them. With `errors` strict each can be encoded as UTF-8."""
    begins_inside: bool = False
    """The first text continues the last one of the batch before."""
    ends_inside: bool = False
    """The last text continues in the next batch."""
    lines: Sequence[int] = ()
    """Line numbers inside the span, from 0; empty for plain text."""
    labels: list[str | None] = field(default_factory=list)
    """Labels of the documents; empty unless `DocumentOptions.label_field` is set."""
    seconds: list[str] = field(default_factory=list)
    """Second sentences; empty unless `DocumentOptions.pair_field` is set."""
    nulls: int = 0
    """Lines among them whose text is null; they are no documents."""
    quoted: int = 0
    """TSV fields among them that look quoted as in CSV; quotes are characters like others."""

    @property
    def all_texts(self) -> list[str]:
        """Texts and second sentences."""
        return [*self.texts, *self.seconds] if self.seconds else self.texts
