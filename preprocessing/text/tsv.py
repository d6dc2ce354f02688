"""Documents of TSV files."""

from collections.abc import Iterator, Sequence

from d2v2ds.errors import ConfigError
from preprocessing.text.documents import DocumentBatch, DocumentOptions, TextFile, TextSpan
from preprocessing.text.stream import decode_lines, open_text, place_of, read_bytes, whole_lines

_HEADER_BYTES = 64 << 10
"""Bytes that are read for the first line, which names the columns."""


def read_tsv(span: TextSpan, options: DocumentOptions) -> Iterator[DocumentBatch]:
    """Read the documents of a span of a TSV file; see `preprocessing.text.read.read_documents`."""
    columns = tsv_columns(span.file)
    check_columns(span.file, columns, options)
    text_at, pair_at, label_at = (
        None if name is None else columns.index(name)
        for name in (options.text_field, options.pair_field, options.label_field)
    )
    assert text_at is not None
    for first, position, data in whole_lines(span):
        batch = DocumentBatch(texts=[], lines=(numbers := []))
        for number, line in enumerate(decode_lines(data, position, span, options.errors), start=first):
            if not line or (number == 0 and span.start == 0):
                continue
            values = line.removesuffix("\r").split("\t")
            if len(values) != len(columns):
                hint = "; quotes do not protect tabs or line ends here" if '"' in line else ""
                raise ConfigError(
                    f"{place_of(span, number)}: expected {len(columns)} tab-separated fields, found {len(values)}{hint}"
                )
            text = values[text_at].strip()
            if not text and not options.keeps_empty:
                continue
            if label_at is not None:
                batch.labels.append(values[label_at] or None)
            if pair_at is not None:
                batch.seconds.append(values[pair_at].strip())
                batch.quoted += _looks_quoted(batch.seconds[-1])
            batch.quoted += _looks_quoted(text)
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


def check_columns(file: TextFile, columns: Sequence[str], options: DocumentOptions) -> None:
    """Raise a `ConfigError` if a TSV file lacks a column that the options name."""
    if absent := [name for name in options.fields if name not in columns]:
        text = "--text-field" if options.pair_field is None else "--pair-columns"
        raise ConfigError(
            f"{file.source} line 1: expected tab-separated column names with {', '.join(map(repr, absent))}, found "
            f"{list(columns)!r:.200}; name the columns by {text} and --label-field"
        )


def _looks_quoted(text: str) -> bool:
    """Return True for a field as CSV quotes it: quotes around it and, inside, only doubled ones."""
    inside = text[1:-1]
    return text[:1] == '"' == text[-1:] and '""' in inside and '"' not in inside.replace('""', "")
