"""Rows of packed texts: columns of their shards, and memory-mapped access. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.data.schema import Layout, column
from d2v2ds.data.shardfile import RowBatch
from d2v2ds.data.shards import Shards
from d2v2ds.errors import ShardError
from d2v2ds.modalities.text.tokenizers import MOST_IDS

TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
"""Stored tokens by the index' `token_dtype`: the smallest that holds the vocabulary."""

Tokens = NDArray[np.uint16] | NDArray[np.uint32]

MOST_BLOCK_TOKENS = 1 << 20
"""Longest row, in tokens."""
SENTENCES = "sentences"
"""Entry of `Index.format` that only folders of pairs have, with the value 2: each row is `<s> A </s> </s> B </s>`."""
_SPECIAL = {"bos", "pad", "eos", "unk"}

TEXT_LAYOUT = Layout(
    name="text",
    fields=(
        column("id", pa.large_string(), nullable=True),  # of rows that are one document each, else null
        column("tokens", pa.large_binary()),  # little-endian, of the index' token_dtype
        column("num_tokens", pa.int64()),
        column("label", pa.large_string(), nullable=True),  # as id
        column("source", pa.large_string()),  # where the block's first token comes from
        column("start", pa.int64()),  # number of the block inside its unit of packing
    ),
    payload="tokens",
    size=("num_tokens",),
    total="tokens",
    format=frozenset({"token_dtype", "vocab_size", "block_tokens", "tokenizer", "tokenizer_file", "special"}),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLabels:
    """Annotations of a row; both are None unless rows are documents."""

    id: str | None
    label: str | None


def format_fault(format: Mapping[str, Any]) -> str:
    """Return what is wrong with `Index.format` of a folder of text, empty if nothing is."""
    if (name := format.get("token_dtype")) not in tuple(TOKEN_DTYPES):
        return f"token_dtype is {name!r:.40}, expected one of {', '.join(TOKEN_DTYPES)}"
    for field, (least, most) in {"vocab_size": (6, MOST_IDS), "block_tokens": (3, MOST_BLOCK_TOKENS)}.items():
        if type(found := format.get(field)) is not int or not least <= found <= most:
            return f"{field} is {found!r:.40}, expected {least} to {most:,}"
    if format.get(SENTENCES, 2) != 2:
        return f"{SENTENCES} is {format[SENTENCES]!r:.40}, expected 2, or no such entry"
    special = format.get("special")
    ids = special if isinstance(special, dict) else {}
    if not ids.keys() >= _SPECIAL or not all(type(id) is int and 0 <= id < format["vocab_size"] for id in ids.values()):
        return f"special is {special!r:.80}, expected ids of {', '.join(sorted(_SPECIAL))} below {format['vocab_size']}"
    return ""


class TextShards(Shards):
    """Rows of a folder that `preprocessing.pack_text` has finished, by number."""

    layout = TEXT_LAYOUT
    labels = TextLabels

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        if fault := format_fault(self.index.format):
            raise ShardError(f"{self.folder}: {fault}; pack the folder again")

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return TOKEN_DTYPES[self.index.format["token_dtype"]]

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        size: int = self.index.format["vocab_size"]
        return size

    @property
    def block_tokens(self) -> int:
        """Tokens of the longest row that the packer makes."""
        tokens: int = self.index.format["block_tokens"]
        return tokens

    @property
    def special(self) -> Mapping[str, int]:
        """Ids of the tokens that are no text, by name: `bos`, `pad`, `eos`, `unk`, and `mask` if there is one."""
        ids: Mapping[str, int] = self.index.format["special"]
        return ids

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the tokens, inside the folder.

        Raises:
            ShardError: the index names a file that is not one of the folder.
        """
        name, beside = self.index.format["tokenizer_file"], [entry.file for entry in self.index.files_beside]
        if name not in beside or Path(name).name != name:
            raise ShardError(f"{self.folder}: expected a tokenizer among its files {beside}, found {name!r:.60}")
        return self.folder / str(name)

    def read_tokens(self, index: int) -> Tokens:
        """(size,) tokens of row `index`: a read-only view of the mapped file, in the smallest type that fits.

        Raises:
            ShardError: the row is damaged, or has ids that the tokenizer lacks.
        """
        batch, row = self.locate(index)
        start, stop = self._bounds(batch, row, int(self.sizes[index]))
        tokens: Tokens = batch.data[start:stop].view(self._dtype)
        self._check_ids(tokens, batch.where(row))
        return tokens

    def read_blocks(self, rows: NDArray[np.int64], out: NDArray[np.int64], pad_id: int) -> None:
        """Write whole rows into a batch; what is left of a line is padded.

        Args:
            rows: (B,) numbers of rows.
            out: (B, S) int64, overwritten; S must hold the longest of these rows.
            pad_id: written after the end of a shorter row.

        Raises:
            ShardError: a row is damaged, or has ids that the tokenizer lacks.
        """
        width = out.shape[1]
        for line, (batch, row, length) in enumerate(self.locate_all(rows)):
            start, stop = self._bounds(batch, row, length)
            if length > width:
                raise ValueError(f"row {rows[line]} has {length} tokens, the batch has room for {width}")
            out[line, :length] = batch.data[start:stop].view(self._dtype)
            if length < width:
                out[line, length:] = pad_id
        self._check_ids(out, f"{self.folder}: rows {rows.tolist()[:5]}")

    def _check_ids(self, ids: NDArray[Any], where: str) -> None:
        """Raise a `ShardError` for ids that no embedding of the vocabulary has; on a GPU they would end the process."""
        if ids.size and int(ids.max()) >= self.vocab_size:
            raise ShardError(
                f"{where}: expected ids below {self.vocab_size}, found {int(ids.max())}; run python -m "
                "preprocessing.verify on the folder"
            )

    def _bounds(self, batch: RowBatch, row: int, length: int) -> tuple[int, int]:
        """First and last byte of a row's `length` tokens in its batch."""
        start, stop = batch.bounds(row)
        if stop - start != length * self._dtype.itemsize:
            raise ShardError(
                f"{batch.where(row)}: expected {length} tokens of {self._dtype.itemsize} bytes, found "
                f"{stop - start} bytes; run python -m preprocessing.verify on the folder"
            )
        return start, stop
