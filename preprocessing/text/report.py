"""Report on text for `verify` (ids of every row) and `inspect` (fill of rows, frequent tokens, decoded samples)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2v2ds.data.schema import INDEX_NAME, Index
from d2v2ds.errors import MissingExtraError, ShardError
from d2v2ds.modalities.text.sentences import is_pair
from d2v2ds.modalities.text.shards import SENTENCES, TOKEN_DTYPES, TextShards, format_fault
from d2v2ds.modalities.text.tokenizers import Tokenizer, load_tokenizer
from preprocessing.driver.report_lines import MAX_ROWS, distinct_line, fault, percentiles, sampled_labels, spread

_TOP_TOKENS = 12
_SAMPLES = 3
_SAMPLE_CHARS = 160


def batch_faults(batch: pa.RecordBatch, index: Index, name: str, first: int) -> Iterator[str]:
    """Yield faults: rows of another length than stated, longer than a block, without ``<s>``, with ids out of range."""
    if found := format_fault(index.format):
        yield f"{INDEX_NAME}: {found}"
        return
    dtype, vocab_size, bos = TOKEN_DTYPES[index.format["token_dtype"]], index.format["vocab_size"], _bos(index)
    _, offsets, data = batch.column("tokens").buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64, count=batch.num_rows + 1)
    stated = batch.column("num_tokens").to_numpy()
    for row in np.flatnonzero(np.diff(bounds) != stated * dtype.itemsize).tolist():
        size = int(bounds[row + 1] - bounds[row])
        yield fault(f"{name} row {first + row}", "tokens", f"{stated[row]} of {dtype.itemsize} bytes", f"{size} bytes")
        return  # the offsets of later rows are unknown
    for row in np.flatnonzero((stated < 1) | (stated > index.format["block_tokens"])).tolist():
        expected = f"1 to {index.format['block_tokens']}"
        yield fault(f"{name} row {first + row}", "num_tokens", expected, stated[row])
        return
    ids = np.frombuffer(data, dtype=np.uint8)[bounds[0] : bounds[-1]].view(dtype)
    starts = (bounds[:-1] - bounds[0]) // dtype.itemsize
    for row in np.flatnonzero(ids[starts] != bos).tolist():
        yield fault(f"{name} row {first + row}", "first token", f"{bos} (<s>)", ids[starts[row]])
    if SENTENCES in index.format:
        for row, tokens in enumerate(np.split(ids, starts[1:])):
            if not is_pair(tokens):
                yield fault(f"{name} row {first + row}", "tokens", "<s> A </s> </s> B </s>", tokens[:8].tolist())
    for at in np.flatnonzero(ids >= vocab_size)[:1].tolist():
        row = int(starts.searchsorted(at, side="right")) - 1
        yield fault(f"{name} row {first + row}", f"token {at - starts[row]}", f"an id below {vocab_size}", ids[at])


def headline(index: Index) -> str:
    """Tokenizer and length of a row."""
    form = index.format
    kind = "pairs of up to" if SENTENCES in form else "rows of"
    return f"{form['tokenizer']} of {form['vocab_size']:,} ids as {form['token_dtype']}, {kind} {form['block_tokens']}"


def lines(shards: TextShards) -> list[str]:
    """Amounts, fill of the rows, frequent tokens, decoded beginnings of rows."""
    totals = shards.index.totals
    documents, tokens = totals.get("documents", 0), totals.get("tokens", 0)
    found = [f"tokens    {tokens:,}"]
    if not len(shards):
        return found
    each = f", {tokens / documents:.1f} tokens each" if documents else ""
    found.append(
        f"documents {documents:,}{each}; {totals.get('bytes', 0) / max(1, tokens):.2f} bytes of text per token"
    )
    found.append("fill      " + percentiles(100 * shards.sizes / shards.block_tokens, "least", "most", 1) + " %")
    tokenizer = _tokenizer_of(shards)
    counts = token_counts(shards)
    share = counts / counts.sum()
    found.append(f"unknown   {share[shards.special['unk']]:.3%} of the tokens{_of(shards)}")
    top = [f"{tokenizer.token(id)} {share[id]:.1%}" for id in np.argsort(-share)[:_TOP_TOKENS].tolist()]
    found.append("frequent  " + ", ".join(top))
    found.append(f"used      {np.count_nonzero(counts):,} of {shards.vocab_size:,} ids")
    rows, of = sampled_labels(shards)
    if any(row.id is not None for row in rows):
        found.append(distinct_line(rows, "label", of))
    found += [f"row {row:<5} {text!r}" for row, text in samples(shards, tokenizer, _SAMPLE_CHARS)]
    return found


def token_counts(shards: TextShards) -> NDArray[np.int64]:
    """(V,) counts of each id in up to `MAX_ROWS` rows."""
    counts = np.zeros(shards.vocab_size, dtype=np.int64)
    for row in spread(len(shards), MAX_ROWS):
        counts += np.bincount(shards.read_tokens(row), minlength=shards.vocab_size)
    return counts


def samples(shards: TextShards, tokenizer: Tokenizer, chars: int) -> list[tuple[int, str]]:
    """Row numbers and the beginning of their text; ``</s>`` is shown as it is."""
    eos = shards.special["eos"]
    found = []
    for row in spread(len(shards), _SAMPLES):
        tokens = shards.read_tokens(row)
        pieces = np.split(tokens, np.flatnonzero(tokens == eos))
        found.append((row, "</s>".join(tokenizer.decode(piece.tolist()) for piece in pieces)[:chars]))
    return found


def plot(shards: TextShards, path: Path) -> None:
    """Fill of the rows, frequency of the ids by rank, and the text of a few rows.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("--plot needs matplotlib", "eval") from error
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes: Any = figure.subplots(2, 2)
    axes[0, 0].hist(shards.sizes, bins=60, range=(0, shards.block_tokens), log=True)
    tokens = shards.index.totals.get("tokens", 0)
    axes[0, 0].set(title=f"{len(shards):,} rows, {tokens:,} tokens", xlabel="tokens of a row", ylabel="rows")
    for axis in axes[1]:
        axis.set_axis_off()
    if len(shards):
        tokenizer = _tokenizer_of(shards)
        counts = token_counts(shards)
        used = np.sort(counts[counts > 0])[::-1]
        axes[0, 1].loglog(np.arange(1, len(used) + 1), used / used.sum())
        axes[0, 1].set(xlabel="rank of the id", ylabel="share of the tokens")
        most = np.argsort(-counts)[: 2 * _TOP_TOKENS].tolist()
        top = [f"{counts[id] / counts.sum():6.2%}  {tokenizer.token(id)}" for id in most]
        texts = [f"row {row}: {text}" for row, text in samples(shards, tokenizer, 4 * _SAMPLE_CHARS)]
        for axis, content in zip(axes[1], (top, texts), strict=True):
            content = [text.replace("$", r"\$") for text in content]  # matplotlib reads formulas between dollars
            axis.text(0, 1, "\n".join(content), va="top", wrap=True, fontsize=7, family="monospace")
    axes[0, 1].set_title(f"{shards.vocab_size:,} ids")
    figure.savefig(path, dpi=100)


def _tokenizer_of(shards: TextShards) -> Tokenizer:
    """Read the tokenizer of a folder.

    Raises:
        ConfigError: it is none.
        ShardError: it is not the one that made the tokens.
    """
    tokenizer = load_tokenizer(str(shards.index.format["tokenizer"]), shards.tokenizer_file)
    if tokenizer.vocab_size != shards.vocab_size:
        raise ShardError(f"{shards.tokenizer_file}: expected {shards.vocab_size} ids, found {tokenizer.vocab_size}")
    return tokenizer


def _bos(index: Index) -> int:
    bos: int = index.format["special"]["bos"]
    return bos


def _of(shards: TextShards) -> str:
    return "" if len(shards) <= MAX_ROWS else f" (of {MAX_ROWS:,} rows)"
