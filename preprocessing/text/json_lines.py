"""Documents of JSON lines.

Many lines are decoded in one call. Only if one of them needs attention are they decoded one by one. A line whose text
is null is no document; batches count such lines.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from d2v2ds.errors import ConfigError
from preprocessing.text.documents import DocumentBatch, DocumentOptions, Errors, TextSpan
from preprocessing.text.stream import decode_lines, place_of, whole_lines


def read_json(span: TextSpan, options: DocumentOptions) -> Iterator[DocumentBatch]:
    """Read the documents of a span of JSON lines; see `preprocessing.text.read.read_documents`."""
    for first, position, data in whole_lines(span):
        batch = _decode_at_once(first, data, options)
        if batch is None:
            lines = decode_lines(data, position, span, options.errors)
            batch = _decode_one_by_one(first, lines, span, options)
        if batch.texts or batch.nulls:
            yield batch


def _decode_at_once(first: int, data: bytes, options: DocumentOptions) -> DocumentBatch | None:
    """Return the documents of many lines, or None if the lines have to be decoded one by one.

    The decoder checks neither line ends nor the fields that it skips. A line end between two braces is never inside an
    object. So if all line ends are, and there is one object more than line ends, every line is one object.
    """
    try:
        objects = _decoder(options.text_field, options.label_field).decode_lines(data)
        if not data.isascii():
            data.decode()
    except (ValueError, RecursionError):
        return None
    if len(objects) != _count_lines_of_one_object(data):
        return None
    numbers: Sequence[int] = range(first, first + len(objects))
    nulls = sum(values.text is None for values in objects)
    if nulls:
        numbers = [number for number, values in zip(numbers, objects, strict=True) if values.text is not None]
        objects = [values for values in objects if values.text is not None]
    texts = [values.text.strip() for values in objects]
    if options.label_field is not None:
        labels = [None if values.label is None else str(values.label) for values in objects]
        return DocumentBatch(texts=texts, lines=numbers, labels=labels, nulls=nulls)
    if not all(texts):
        numbers = [number for number, text in zip(numbers, texts, strict=True) if text]
        texts = [text for text in texts if text]
    return DocumentBatch(texts=texts, lines=numbers, nulls=nulls)


def _count_lines_of_one_object(data: bytes) -> int | None:
    """Return the number of lines, or None if a line end is not between two braces."""
    characters = np.frombuffer(data, dtype=np.uint8)  # faster than bytes.count
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
    """Return the decoder of lines with these fields; other fields become no objects."""
    fields: list[Any] = [("text", str | None, msgspec.field(name=text_field))]
    if label_field is not None:
        fields.append(("label", str | int | None, msgspec.field(name=label_field, default=None)))
    return msgspec.json.Decoder(msgspec.defstruct("Line", fields, gc=False))


def _decode_one_by_one(first: int, lines: Sequence[str], span: TextSpan, options: DocumentOptions) -> DocumentBatch:
    """Return the documents of lines of which some are blank, hold half characters, or are malformed."""
    texts, numbers, labels, nulls = [], [], [], 0
    for number, line in enumerate(map(str.strip, lines), start=first):
        if not line:
            continue
        values = _decode_line(line, options.text_field, span, number)
        if values[options.text_field] is None:
            nulls += 1
            continue
        text = _without_half_characters(values[options.text_field].strip(), span, number, options.errors)
        if options.label_field is not None:
            labels.append(_label_in(values, options.label_field, span, number))
        elif not text:
            continue
        numbers.append(number)
        texts.append(text)
    return DocumentBatch(texts=texts, lines=numbers, labels=labels, nulls=nulls)


def _decode_line(line: str, name: str, span: TextSpan, number: int) -> dict[str, Any]:
    """Decode one line with Python's decoder, which accepts half characters and reports the fault.

    Raises:
        ConfigError: the line is not one JSON object, or has neither text nor null in field `name`.
    """
    try:
        values = json.loads(line)
    except RecursionError:
        raise ConfigError(
            f"{place_of(span, number)}: expected one JSON object, found values nested too deeply"
        ) from None
    except ValueError as error:  # also a number of thousands of digits
        raise ConfigError(f"{place_of(span, number)}: expected one JSON object, found {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{place_of(span, number)}: expected one JSON object, found {line!r:.60}")
    text = values.get(name, ...)
    if not isinstance(text, str | None):
        found = f"it is {text!r:.40}" if name in values else f"the fields {sorted(values)!r:.200}"
        raise ConfigError(
            f"{place_of(span, number)}: expected text in field {name!r}, found {found}; name the field by --text-field"
        )
    return values


def _label_in(values: dict[str, Any], name: str, span: TextSpan, number: int) -> str | None:
    label = values.get(name)
    if label is None or isinstance(label, (str, int)):
        return None if label is None else str(label)
    raise ConfigError(
        f"{place_of(span, number)}: expected text or a whole number as label {name!r}, found {label!r:.40}"
    )


def _without_half_characters(text: str, span: TextSpan, number: int, errors: Errors) -> str:
    r"""Return text that can be stored as UTF-8: JSON can hold half a character (a lone ``\ud83d``).

    Raises:
        ConfigError: there is one, and `errors` is strict.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise ConfigError(
            f"{place_of(span, number)}: expected whole characters, found half of one, \\u{ord(text[error.start]):04x}; "
            "--errors replace puts U+FFFD in its place"
        ) from error
    return text
