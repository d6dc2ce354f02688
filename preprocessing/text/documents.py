"""Text files to documents, as a stream: plain text, JSON lines and TSV, also compressed by gzip or zstandard.

In: files and folders. Out: batches of documents, read `CHUNK_BYTES` at a time, so neither a file nor the corpus has to
fit in memory. Large files are divided at document boundaries (`document_boundaries`), so that several processes share
them; where they are divided depends on the files alone.
"""

import codecs
import contextlib
import functools
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa

from d2v2ds.errors import ConfigError, ShardError
from preprocessing.driver.input_files import check_present, read_manifest, source_name, unreadable, walk

DocumentKind = Literal["line", "paragraph", "file"]
DOCUMENT_KINDS: tuple[DocumentKind, ...] = ("line", "paragraph", "file")
Errors = Literal["strict", "replace"]
ERRORS: tuple[Errors, ...] = ("strict", "replace")
Form = Literal["text", "json", "tsv"]
FORMS: dict[str, Form] = {".txt": "text", ".text": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
"""What a folder is searched for; ``.tsv`` counts only where a file is named, because folders often list themselves."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
SUFFIXES = frozenset({*FORMS, *COMPRESSIONS})
EXPANSION = {None: 1, "gzip": 3, "zstd": 3}
"""Bytes of text per byte of file, as the plan guesses them; English text has 2.5 to 3.5."""

CHUNK_BYTES = 512 << 10
"""Read at a time; a batch of documents is about as long."""
PIECE_CHARS = 128 << 10
"""A longer document reaches the tokenizer in pieces of at most this length."""
MAX_LINE_BYTES = 64 << 20
"""A JSON or TSV line has to fit in memory; a longer one is no line."""
_SCAN_BYTES = 64 << 10


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


def find_text_files(
    inputs: Sequence[Path], options: DocumentOptions, ignored: Counter[str] | None = None
) -> list[TextFile]:
    """List the files of all inputs, in an order that depends on nothing else.

    Args:
        inputs: folders, and files of any name (what is neither JSON nor TSV by its suffix is plain text). A TSV file
            without the text's column but with a column ``path`` is a manifest: it stands for the files it names.
        options: names of the text's and the label's column.
        ignored: other files of folders are counted here by suffix.

    Raises:
        ConfigError: if an input is missing, a folder holds no text, or a TSV file is malformed.
    """
    files: list[TextFile] = []
    ignored = Counter() if ignored is None else ignored
    for root in inputs:
        if root.is_dir():
            found = list(_of_folder(root, ignored))
        elif root.is_file():
            file = _text_file(str(root), root.parent)
            found = _of_manifest(root, options) if file.form == "tsv" and _is_manifest(file, options) else [file]
        else:
            raise ConfigError(f"--input {root}: expected a folder or a file, found nothing there")
        if not found:
            known = ", ".join(sorted(FORMS))
            raise ConfigError(f"--input {root}: expected text ({known}, each also with .gz or .zst), found none")
        files.extend(found)
    return files


def _of_folder(root: Path, ignored: Counter[str]) -> Iterator[TextFile]:
    for folder, names in walk(root, SUFFIXES, ignored):
        for name in names:
            suffix = _split_name(name)[0]
            if suffix in FORMS:
                yield _text_file(os.path.join(folder, name), root)  # noqa: PTH118  (a corpus may have a million files)
            else:  # compressed, but no text
                ignored[suffix + os.path.splitext(name)[1].lower()] += 1  # noqa: PTH122


def _is_manifest(file: TextFile, options: DocumentOptions) -> bool:
    columns = tsv_columns(file)
    is_manifest = "path" in columns and options.text_field not in columns
    if not is_manifest:
        _check_columns(file, columns, _wanted_columns(options))
    return is_manifest


def _of_manifest(manifest: Path, options: DocumentOptions) -> list[TextFile]:
    optional = [options.label_field] if options.label_field else []
    lines = list(read_manifest(manifest, optional, required=optional))
    check_present([line.place for line in lines if not (manifest.parent / line.path).is_file()])
    return [
        _text_file(str(manifest.parent / line.path), manifest.parent, label=next(iter(line.values.values()), None))
        for line in lines
    ]


def _split_name(name: str) -> tuple[str, str | None]:
    """Suffix without the compression's, and the compression."""
    stem, suffix = os.path.splitext(name.lower())  # noqa: PTH122
    compression = COMPRESSIONS.get(suffix)
    return (os.path.splitext(stem)[1] if compression else suffix), compression  # noqa: PTH122


def _text_file(path: str, root: Path, label: str | None = None) -> TextFile:
    suffix, compression = _split_name(path)
    try:
        size = os.stat(path).st_size  # noqa: PTH116
    except OSError as error:
        raise ConfigError(f"{path}: {unreadable(path, error)}; mend or remove it") from error
    return TextFile(
        path=path,
        source=source_name(root, path),
        bytes=size,
        form="tsv" if suffix == ".tsv" else FORMS.get(suffix, "text"),
        compression=compression,
        label=label,
    )


# --- dividing large files ---------------------------------------------------------------------------------------------

_BOUNDARIES = {"line": re.compile(rb"\n"), "paragraph": re.compile(rb"\n[ \t\r\f\v]*\n")}


def can_be_divided(file: TextFile, options: DocumentOptions) -> bool:
    """Whether several processes may read one file each from a place of its own."""
    return file.compression is None and (file.form != "text" or options.document != "file")


def document_boundaries(file: TextFile, offsets: Sequence[int], options: DocumentOptions) -> list[int]:
    """For each offset, where the first document begins that starts behind it.

    Args:
        file: one that can be divided.
        offsets: bytes, ascending.
        options: what a document is.

    Returns:
        Ascending byte positions right behind the end of a line (or a blank line); the file's size where no document
        follows. A stretch of the file without boundary is scanned once, however many offsets lie in it.
    """
    pattern = _BOUNDARIES[options.document if file.form == "text" else "line"]
    found, reached = [], 0
    with _opened(file) as stream:
        for offset in offsets:
            if offset > reached:
                reached = _next_boundary(stream, offset, pattern, file.bytes)
            found.append(reached)
    return found


def _next_boundary(stream: Any, offset: int, pattern: re.Pattern[bytes], size: int) -> int:
    stream.seek(offset)
    data = b""
    while chunk := stream.read(_SCAN_BYTES):
        data += chunk
        if match := pattern.search(data):
            return offset + match.end()
        last = data.rfind(b"\n")  # a blank line may have begun there
        kept = data[last:] if last >= 0 and not data[last:].strip() else b""
        offset += len(data) - len(kept)
        data = kept
    return size


# --- reading ----------------------------------------------------------------------------------------------------------


def read_documents(span: TextSpan, options: DocumentOptions) -> Iterator[DocumentBatch]:
    """The documents of a span in order; documents without any text are left out (unless they have labels).

    Raises:
        ConfigError: naming the place, if the text is no UTF-8 (strict), a JSON or TSV line is malformed or lacks the
            field, or a compressed file is damaged.
        ShardError: if the file has become shorter since the packing was planned.
    """
    return _READERS[span.file.form](span, options)


def _read_plain(span: TextSpan, options: DocumentOptions) -> Iterator[DocumentBatch]:
    split = _SPLITTERS[options.document]
    rest, inside = "", False
    for text in _decoded(span, options.errors):
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
    """Where to cut a long text: before the last white space that a word follows, within `most` characters.

    GPT-2's pattern and sentencepiece both begin a new word at that character, so the pieces have the tokens of the
    whole. Text without white space is cut at `most`.
    """
    end = len(text[:most].rstrip())
    cut = max(text.rfind(blank, 1, end) for blank in (" ", "\n", "\t"))
    return cut if cut > 0 else most


def _stripped(parts: list[str], inside: bool) -> list[str]:
    """Documents without white space around them; what ends an opened document stays, even if empty."""
    if not inside:
        return [text for part in parts if (text := part.strip())]
    return [parts[0].rstrip(), *(text for part in parts[1:] if (text := part.strip()))]


_BLANK_LINES = re.compile(r"\n\s*\n", re.ASCII)
_SPLITTERS: dict[DocumentKind, Callable[[str], list[str]]] = {
    "line": lambda text: text.split("\n"),
    "paragraph": _BLANK_LINES.split,
    "file": lambda text: [text],
}


def _read_json(span: TextSpan, options: DocumentOptions) -> Iterator[DocumentBatch]:
    for first, position, data in _whole_lines(span):
        batch = _all_at_once(first, data, options)
        if batch is None:
            lines = _decode_lines(data, position, span, options.errors)
            batch = _line_by_line(first, lines, span, options)
        if batch.texts:
            yield batch


def _all_at_once(first: int, data: bytes, options: DocumentOptions) -> DocumentBatch | None:
    """The documents of many lines, or None if any of them needs to be looked at.

    The decoder takes no notice of line ends and of what it skips. But a line end between two braces is never inside an
    object, so if all are and there is one object more than line ends, every line is one object.
    """
    try:
        objects = _decoder(options.text_field, options.label_field).decode_lines(data)
        if not data.isascii():
            data.decode()
    except ValueError:
        return None
    if len(objects) != _count_lines_of_one_object(data):
        return None
    texts = [values.text.strip() for values in objects]
    numbers: Sequence[int] = range(first, first + len(texts))
    if options.label_field is not None:
        labels = [None if values.label is None else str(values.label) for values in objects]
        return DocumentBatch(texts=texts, lines=numbers, labels=labels)
    if not all(texts):
        numbers = [number for number, text in zip(numbers, texts, strict=True) if text]
        texts = [text for text in texts if text]
    return DocumentBatch(texts=texts, lines=numbers)


def _count_lines_of_one_object(data: bytes) -> int | None:
    """The number of lines, or None if a line end lies anywhere but between two braces."""
    characters = np.frombuffer(data, dtype=np.uint8)  # bytes.count takes five times as long
    ends = np.flatnonzero(characters == ord("\n"))
    before = ends - 1
    before -= characters[before] == ord("\r")
    if len(ends) and (before[0] < 0 or ends[-1] == len(data) - 1):
        return None
    if (characters[before] != ord("}")).any() or (characters[ends + 1] != ord("{")).any():
        return None
    return len(ends) + 1


@functools.cache
def _decoder(text_field: str, label_field: str | None) -> msgspec.json.Decoder[Any]:
    """Of the lines of a file: only the fields that are wanted become objects."""
    fields: list[Any] = [("text", str, msgspec.field(name=text_field))]
    if label_field is not None:
        fields.append(("label", str | int | None, msgspec.field(name=label_field, default=None)))
    return msgspec.json.Decoder(msgspec.defstruct("Line", fields, gc=False))


def _line_by_line(first: int, lines: Sequence[str], span: TextSpan, options: DocumentOptions) -> DocumentBatch:
    """The same for lines of which some are blank, hold half characters, or are wrong."""
    texts, numbers, labels = [], [], []
    for number, line in enumerate(map(str.strip, lines), start=first):
        if not line:
            continue
        values = _looked_at(line, options.text_field, span, number)
        text = _whole_characters(values[options.text_field].strip(), span, number, options.errors)
        if options.label_field is not None:
            labels.append(_label_of(values, options.label_field, span, number))
        elif not text:
            continue
        numbers.append(number)
        texts.append(text)
    return DocumentBatch(texts=texts, lines=numbers, labels=labels)


def _looked_at(line: str, name: str, span: TextSpan, number: int) -> dict[str, Any]:
    """One line of JSON, by Python's decoder, which takes half a character and says what is wrong.

    Raises:
        ConfigError: saying what is wrong with the line.
    """
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{_place(span, number)}: expected one JSON object, found {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{_place(span, number)}: expected one JSON object, found {line!r:.60}")
    text = values.get(name)
    if not isinstance(text, str):
        found = f"it is {text!r:.40}" if name in values else f"the fields {sorted(values)!r:.200}"
        raise ConfigError(
            f"{_place(span, number)}: expected text in field {name!r}, found {found}; name the field by --text-field"
        )
    return values


def _label_of(values: dict[str, Any], name: str, span: TextSpan, number: int) -> str | None:
    label = values.get(name)
    if label is None or isinstance(label, (str, int)):
        return None if label is None else str(label)
    raise ConfigError(f"{_place(span, number)}: expected text or a whole number as label {name!r}, found {label!r:.40}")


def _whole_characters(text: str, span: TextSpan, number: int, errors: Errors) -> str:
    r"""Text that can be stored as UTF-8: JSON can write half a character (a lone ``\ud83d``)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise ConfigError(
            f"{_place(span, number)}: expected whole characters, found half of one, \\u{ord(text[error.start]):04x}; "
            "--errors replace puts U+FFFD in its place"
        ) from error
    return text


def _read_tsv(span: TextSpan, options: DocumentOptions) -> Iterator[DocumentBatch]:
    columns, wanted = tsv_columns(span.file), _wanted_columns(options)
    _check_columns(span.file, columns, wanted)
    at = [columns.index(name) for name in wanted]
    for first, position, data in _whole_lines(span):
        batch = DocumentBatch(texts=[], lines=(numbers := []))
        for number, line in enumerate(_decode_lines(data, position, span, options.errors), start=first):
            if not line or (number == 0 and span.start == 0):
                continue
            values = line.removesuffix("\r").split("\t")
            if len(values) != len(columns):
                raise ConfigError(
                    f"{_place(span, number)}: expected {len(columns)} tab-separated fields, found {len(values)}"
                )
            text = values[at[0]].strip()
            if options.label_field is not None:
                batch.labels.append(values[at[1]] or None)
            elif not text:
                continue
            numbers.append(number)
            batch.texts.append(text)
        if batch.texts:
            yield batch


def tsv_columns(file: TextFile) -> list[str]:
    """The names in the first line of a TSV file."""
    with _opened(file) as stream:
        start = _read(stream, _SCAN_BYTES, file, 0)
    line = start.split(b"\n", 1)[0].decode("utf-8-sig", "replace")
    return line.removesuffix("\r").split("\t")


def _wanted_columns(options: DocumentOptions) -> list[str]:
    return [options.text_field, *([options.label_field] if options.label_field else [])]


def _check_columns(file: TextFile, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise a `ConfigError` if a TSV file lacks a column."""
    if absent := [name for name in wanted if name not in columns]:
        raise ConfigError(
            f"{file.source} line 1: expected tab-separated column names with {', '.join(map(repr, absent))}, found "
            f"{list(columns)!r:.200}; name the columns by --text-field and --label-field"
        )


_READERS = {"text": _read_plain, "json": _read_json, "tsv": _read_tsv}


def _whole_lines(span: TextSpan) -> Iterator[tuple[int, int, bytes]]:
    """Many lines at a time, with line ends between them: number of the first inside the span, its byte, the lines."""
    first, position = 0, span.start
    rest: list[bytes] = []
    held = 0
    for data in _chunks(span):
        end = data.rfind(b"\n")
        held += len(data) if end < 0 else data.find(b"\n")
        if held > MAX_LINE_BYTES:
            raise ConfigError(f"{_place(span, first)}: expected a line, found more than {MAX_LINE_BYTES} bytes")
        if end < 0:
            rest.append(data)
            continue
        lines = b"".join([*rest, memoryview(data)[:end]])
        yield first, position, lines
        first += int(np.count_nonzero(np.frombuffer(lines, dtype=np.uint8) == ord("\n"))) + 1
        position += len(lines) + 1
        rest = [data[end + 1 :]]
        held = len(rest[0])
    yield first, position, b"".join(rest)


def _decode_lines(data: bytes, position: int, span: TextSpan, errors: Errors) -> list[str]:
    """Whole lines that begin at a byte of a span's text."""
    try:
        text = data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise _no_utf8(error, span, position, data) from error
    return (text.removeprefix("\ufeff") if position == 0 else text).split("\n")


def _decoded(span: TextSpan, errors: Errors) -> Iterator[str]:
    """The text of a span, in pieces that end anywhere between two characters."""
    rest = b""
    position = span.start
    for data in _chunks(span):
        rest += data
        try:
            text, used = codecs.utf_8_decode(rest, errors, not data)
        except UnicodeDecodeError as error:
            raise _no_utf8(error, span, position, rest) from error
        yield text.removeprefix("\ufeff") if position == 0 else text
        position += used
        rest = rest[used:]


def _no_utf8(error: UnicodeDecodeError, span: TextSpan, position: int, data: bytes) -> ConfigError:
    """What is said of `data`, which begins at a byte of the text."""
    return ConfigError(
        f"{span.file.source}: expected UTF-8 text, found {error.reason} at byte {position + error.start}"
        f"{' of the decompressed text' if span.file.compression else ''} "
        f"({data[error.start : error.start + 4].hex(' ')}); convert the file, or --errors replace"
    )


def _chunks(span: TextSpan) -> Iterator[bytes]:
    """The bytes of a span; the last chunk is empty."""
    left = None if span.stop is None else span.stop - span.start
    done = 0
    with _opened(span.file) as stream:
        if span.start:
            stream.seek(span.start)
        while left is None or left > 0:
            data = _read(stream, CHUNK_BYTES if left is None else min(CHUNK_BYTES, left), span.file, done)
            if not data:
                break
            done += len(data)
            yield data
            if left is not None:
                left -= len(data)
    if left:
        raise ShardError(
            f"{span.file.source}: expected {span.file.bytes} bytes, found an end at byte {span.start + done}; the file "
            "changed while it was packed: begin again in another folder"
        )
    yield b""


def _read(stream: Any, size: int, file: TextFile, done: int) -> bytes:
    """The next bytes of a stream of which `done` have been read."""
    try:
        data: bytes = stream.read(size)
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        raise ConfigError(
            f"{file.source}: expected {file.compression or 'readable'} data, found it damaged behind {done} bytes of "
            f"text: {error}"
        ) from error
    return data


_OPENERS: dict[str | None, Callable[[str], Any]] = {
    None: io.FileIO,
    "gzip": gzip.GzipFile,  # as the program does, it takes no notice of zeros behind the end; Arrow's refuses them
    "zstd": lambda path: pa.CompressedInputStream(pa.OSFile(path, "rb"), "zstd"),
}


@contextlib.contextmanager
def _opened(file: TextFile) -> Iterator[Any]:
    """A stream of the file's text."""
    try:
        stream = _OPENERS[file.compression](file.path)
    except OSError as error:
        raise ConfigError(f"{file.source}: expected a readable file, found {error.strerror or error}") from error
    with stream:
        yield stream


def _place(span: TextSpan, number: int) -> str:
    """File and line for a message. Lines before the span are counted only now that they are needed."""
    if span.start:
        before = TextSpan(file=span.file, stop=span.start)
        number += sum(chunk.count(b"\n") for chunk in _chunks(before))
    return f"{span.file.source} line {number + 1}"
