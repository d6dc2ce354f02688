"""Documents of TSV files."""

from collections.abc import Iterator, Sequence

from d2v2ds.errors import ConfigError
from preprocessing.text.documents import DocumentBatch, DocumentOptions, TextFile, TextSpan
from preprocessing.text.stream import decode_lines, open_text, place_of, read_bytes, whole_lines

_HEADER_BYTES = 64 << 10
"""Bytes that are read for the first line, which names the columns."""


def read_tsv(span: TextSpan, options: DocumentOptions) -> Iterator[DocumentBatch]:
    """Read the documents of a span of a TSV file; see `preprocessing.text.read.read_documents`."""
    columns, wanted = tsv_columns(span.file), wanted_columns(options)
    check_columns(span.file, columns, wanted)
    at = [columns.index(name) for name in wanted]
    for first, position, data in whole_lines(span):
        batch = DocumentBatch(texts=[], lines=(numbers := []))
        for number, line in enumerate(decode_lines(data, position, span, options.errors), start=first):
            if not line or (number == 0 and span.start == 0):
                continue
            values = line.removesuffix("\r").split("\t")
            if len(values) != len(columns):
                raise ConfigError(
                    f"{place_of(span, number)}: expected {len(columns)} tab-separated fields, found {len(values)}"
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
    """Return the names in the first line of a TSV file."""
    with open_text(file) as stream:
        start = read_bytes(stream, _HEADER_BYTES, file, 0)
    line = start.split(b"\n", 1)[0].decode("utf-8-sig", "replace")
    return line.removesuffix("\r").split("\t")


def wanted_columns(options: DocumentOptions) -> list[str]:
    """Return the columns that reading needs: text, and label if one is set."""
    return [options.text_field, *([options.label_field] if options.label_field else [])]


def check_columns(file: TextFile, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise a `ConfigError` if a TSV file lacks a column."""
    if absent := [name for name in wanted if name not in columns]:
        raise ConfigError(
            f"{file.source} line 1: expected tab-separated column names with {', '.join(map(repr, absent))}, found "
            f"{list(columns)!r:.200}; name the columns by --text-field and --label-field"
        )
