"""Features on disk: one Arrow IPC file, a row for each row of the shard folder that they were computed from.

Columns: `row` (number in the folder), `id`, the annotations that the shards have, `tokens` (T), and for each layer
`layer_<i>`: a list of D float32 where features were pooled, else of T lists of D. Plain pyarrow reads it:

    table = pyarrow.ipc.open_file("features.arrow").read_all()
    matrix = table["layer_12"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)   # (N, D), pooled
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.errors import ShardError
from d2v2ds.io.output import whole_file


def feature_schema(
    layers: Sequence[int], width: int, *, pooled: bool, annotations: Sequence[str], facts: Mapping[str, Any]
) -> pa.Schema:
    """Columns of a file.

    Args:
        layers: numbers of the layers.
        width: D.
        pooled: one vector a row instead of one a token.
        annotations: names of the rows' annotations.
        facts: how the features were made; stored as JSON under the metadata key `d2v2ds`.
    """
    vector = pa.list_(pa.float32(), width)
    kind = vector if pooled else pa.large_list(vector)
    fields = [pa.field("row", pa.int64()), pa.field("id", pa.large_string())]
    fields += [pa.field(name, pa.large_string()) for name in annotations]
    fields += [pa.field("tokens", pa.int32()), *(pa.field(f"layer_{layer}", kind) for layer in layers)]
    return pa.schema(fields, metadata={"d2v2ds": json.dumps(facts)})


def write_rows(path: Path, schema: pa.Schema, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a file of some rows, whole or not at all.

    Args:
        path: to write.
        schema: of `feature_schema`.
        columns: values of every column; layers as arrays (D,) or (T, D) float32, one a row.
    """
    arrays = [_layer(columns[f.name], f.type) if f.name.startswith("layer_") else pa.array(columns[f.name], f.type)
              for f in schema]  # fmt: skip
    with _whole_file(path, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))


def _layer(vectors: Sequence[NDArray[np.float32]], kind: pa.DataType) -> pa.Array:
    vector = kind if pa.types.is_fixed_size_list(kind) else kind.value_type
    flat = np.concatenate([part.reshape(-1) for part in vectors]) if len(vectors) else np.zeros(0, dtype=np.float32)
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), vector.list_size)
    if vector is kind:
        return values
    offsets = np.cumsum([0, *(len(part) for part in vectors)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)


def join_files(parts: Mapping[Path, range], path: Path, schema: pa.Schema) -> None:
    """Put files of some rows each one behind the other, batch by batch, whole or not at all.

    Args:
        parts: files in their order, and the rows that each must have.
        path: to write.
        schema: of all of them.

    Raises:
        ShardError: a part is damaged or of something else.
    """
    with _whole_file(path, schema) as writer:
        for part, rows in parts.items():
            try:
                with pa.memory_map(str(part)) as source:
                    reader = pa.ipc.open_file(source)
                    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
                    found = [row for batch in batches for row in batch.column("row").to_pylist()]
                    if found != list(rows):
                        raise pa.ArrowInvalid(f"expected the rows {rows.start} to {rows.stop - 1}, found others")
                    for batch in batches:
                        writer.write_batch(batch)
            except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowTypeError, KeyError) as error:
                advice = "remove it, the same command makes it again"
                raise ShardError(f"{part}: damaged: {error}; {advice}") from error


@contextlib.contextmanager
def _whole_file(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """A writer of a file that takes its name when the block ends well; else nothing of it stays to fill the disk."""
    try:
        with whole_file(path) as file, pa.ipc.new_file(file, schema) as writer:
            yield writer
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written: {error.strerror or error}") from error
