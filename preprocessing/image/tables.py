"""Parquet tables of images: row groups as parts, and the rows of one. Tables may come from strangers."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2v2ds.data.codecs.imagefile import has_memory
from d2v2ds.errors import ConfigError, MachineError
from d2v2ds.io.machine_faults import ADVICE, is_machine_fault, reading_error, retried
from d2v2ds.io.read import open_regular
from preprocessing.image.units import Part

_BATCH_ROWS = 64
_BATCH_BYTES = 64 << 20
"""Bytes of images that are in memory together, unless one has more."""
_BUFFER_BYTES = 1 << 20
_LEAST_ROW_BYTES = 32
"""Bytes of a file for each of its rows, at least: an image has more, and every row is counted."""


@contextmanager
def open_table(path: str) -> Iterator[pq.ParquetFile]:
    """Open a table, for reading row by row.

    Raises:
        ConfigError: it is absent, no regular file, or damaged; also for what is read inside the block.
        MachineError: the machine is at fault.
    """
    retried(partial(open_regular, path, ConfigError)).close()  # Arrow would wait for ever at a FIFO
    # without these two, the whole row group is read before its first row comes out
    with table_faults(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as table:
        yield table


@contextmanager
def table_faults(path: str) -> Iterator[None]:
    """Raise a `ConfigError` for whatever Arrow raises on a damaged table, a `MachineError` for the machine's faults."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        if isinstance(error, OSError) and is_machine_fault(error):
            raise reading_error(path, error, ConfigError) from error
        if isinstance(error, MemoryError) and not has_memory():  # else a damaged page asks for too much
            raise MachineError(f"{path}: {ADVICE[errno.ENOMEM]}") from error
        raise ConfigError(f"damaged: {str(error).splitlines()[0]}") from error


def table_parts(table: pq.ParquetFile, file_bytes: int, image_column: str, label_column: str) -> tuple[Part, ...]:
    """Return the row groups of a table.

    Args:
        table: open.
        file_bytes: size of its file.
        image_column: with the encoded images.
        label_column: it must be there if it is not the default.

    Raises:
        ConfigError: it lacks a column, or its number of rows cannot be true.
    """
    if table.metadata.num_rows > file_bytes // _LEAST_ROW_BYTES:
        raise ConfigError(f"expected images in every row, found {table.metadata.num_rows:,} in {file_bytes:,} bytes")
    names = image_field(table.schema_arrow, image_column)
    if label_column != "label" and label_column not in names:
        raise ConfigError(f"expected a column {label_column!r}, found {names}")
    groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
    return tuple(
        Part(files=group.num_rows, size=_image_bytes(group, image_column), start=number)
        for number, group in enumerate(groups)
    )


def _image_bytes(group: Any, image_column: str) -> int:
    """Bytes of the images in a row group, as stored (encoded images hardly compress)."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema in (image_column, f"{image_column}.bytes")
    )


def image_field(schema: pa.Schema, column: str) -> list[str]:
    """Check the column of a table that holds encoded images; returns the names of all columns.

    Raises:
        ConfigError: if there is none, or it holds something else.
    """
    index = schema.get_field_index(column)
    if index < 0:
        raise ConfigError(f"expected a column {column!r}, found {schema.names}; give --image-column")
    kind = schema.field(index).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(test(kind) for test in _BINARY):
        raise ConfigError(
            f"column {column!r}: expected binary, or a struct with 'bytes', found {schema.field(index).type}; give "
            "--image-column"
        )
    return list(schema.names)


_BINARY = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)


def table_rows(
    table: pq.ParquetFile, group: int, image_column: str, label_column: str
) -> Iterator[tuple[bytes | None, str | None]]:
    """Yield the encoded image and the label of each row of a row group; None where there is none.

    A label that is no UTF-8 has escapes in place of the bytes that are none.
    """
    schema = table.schema_arrow
    labelled = label_column in schema.names
    names = _class_names(schema, label_column)
    columns = [image_column, *([label_column] if labelled else [])]
    facts = table.metadata.row_group(group)
    average = _image_bytes(facts, image_column) // max(1, facts.num_rows)
    rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, average)))
    for batch in table.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        labels = batch.column(label_column) if labelled else [None] * batch.num_rows
        for image, label in zip(batch.column(image_column), labels, strict=True):
            value = image.as_py()
            data = value.get("bytes") if isinstance(value, dict) else value
            yield data, None if label is None else _label_text(label, names)


def _label_text(label: pa.Scalar, names: list[str] | None) -> str | None:
    if not label.is_valid:
        return None
    try:
        value = label.as_py()
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "backslashreplace")
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(value)


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Names of the numbered classes of a column, where the library `datasets` has left them in a table's metadata."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return None
    for key in ("info", "features", column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    is_names = isinstance(found, list) and all(isinstance(name, str) for name in found)
    return found or None if is_names else None
