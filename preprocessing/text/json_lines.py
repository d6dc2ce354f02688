"""Documents of JSON lines.

Many lines are decoded in one call. Only if one of them needs attention are they decoded one by one. A line whose text
is null is no document; batches count such lines.
"""

import functools
import json
import math
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
        objects = _decoder(options.text_field, options.pair_field, options.label_field).decode_lines(data)
        if not data.isascii():
            data.decode()
    except (ValueError, RecursionError):
        return None
    if len(objects) != _count_lines_of_one_object(data):
        return None
    numbers: Sequence[int] = range(first, first + len(objects))
    is_null = [values.text is None or (options.pair_field is not None and values.pair is None) for values in objects]
    nulls = sum(is_null)
    if nulls:
        numbers = [number for number, null in zip(numbers, is_null, strict=True) if not null]
        objects = [values for values, null in zip(objects, is_null, strict=True) if not null]
    texts = [values.text.strip() for values in objects]
    if options.keeps_empty:
        labels, seconds = [], []
        if options.label_field is not None:
            labels = [None if values.label is None else str(values.label) for values in objects]
        if options.pair_field is not None:
            seconds = [values.pair.strip() for values in objects]
        return DocumentBatch(texts=texts, lines=numbers, labels=labels, seconds=seconds, nulls=nulls)
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
def _decoder(text_field: str, pair_field: str | None, label_field: str | None) -> msgspec.json.Decoder[Any]:
    """Return the decoder of lines with these fields; other fields become no objects."""
    fields: list[Any] = [("text", str | None, msgspec.field(name=text_field))]
    if pair_field is not None:
        fields.append(("pair", str | None, msgspec.field(name=pair_field)))
    if label_field is not None:
        fields.append(("label", str | int | float | None, msgspec.field(name=label_field, default=None)))
    return msgspec.json.Decoder(msgspec.defstruct("Line", fields, gc=False))


def _decode_one_by_one(first: int, lines: Sequence[str], span: TextSpan, options: DocumentOptions) -> DocumentBatch:
    """Return the documents of lines of which some are blank, hold half characters, or are malformed."""
    batch = DocumentBatch(texts=[], lines=(numbers := []))
    for number, line in enumerate(map(str.strip, lines), start=first):
        if not line:
            continue
        values = _decode_line(line, options, span, number)
        found = [values[name] for name in _text_fields(options)]
        if None in found:
            batch.nulls += 1
            continue
        text, *second = (_without_half_characters(one.strip(), span, number, options.errors) for one in found)
        if not text and not options.keeps_empty:
            continue
        if options.label_field is not None:
            batch.labels.append(_label_in(values, options.label_field, span, number))
        numbers.append(number)
        batch.texts.append(text)
        batch.seconds += second
    return batch


def _text_fields(options: DocumentOptions) -> list[str]:
    return [options.text_field, *([options.pair_field] if options.pair_field is not None else [])]


def _decode_line(line: str, options: DocumentOptions, span: TextSpan, number: int) -> dict[str, Any]:
    """Decode one line with Python's decoder, which accepts half characters and reports the fault.

    Raises:
        ConfigError: the line is not one JSON object, or has neither text nor null in a field of text.
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
    for name in _text_fields(options):
        text = values.get(name, ...)
        if not isinstance(text, str | None):
            found = f"it is {text!r:.40}" if name in values else f"the fields {sorted(values)!r:.200}"
            option = "--text-field" if options.pair_field is None else "--pair-columns"
            raise ConfigError(
                f"{place_of(span, number)}: expected text in field {name!r}, found {found}; name the field by {option}"
            )
    return values


def _label_in(values: dict[str, Any], name: str, span: TextSpan, number: int) -> str | None:
    label = values.get(name)
    if label is None or isinstance(label, (str, int)) or (isinstance(label, float) and math.isfinite(label)):
        return None if label is None else str(label)
    raise ConfigError(f"{place_of(span, number)}: expected text or a number as label {name!r}, found {label!r:.40}")


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
