"""Settings and plan of a packing of text: units of each shard, and the sample that a tokenizer is trained on."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from d2v2ds.errors import ConfigError
from preprocessing.driver.input_files import check_unique
from preprocessing.driver.shard_plan import Plan, Skipped, cut_shards, fingerprint
from preprocessing.text.divide import can_be_divided, document_boundaries
from preprocessing.text.documents import DocumentOptions, TextFile, TextSpan
from preprocessing.text.find import find_text_files
from preprocessing.text.read import read_documents
from preprocessing.text.tokenization import Normalization, read_tokenizer, token_dtype

BYTES_PER_TOKEN = 4
"""Estimated bytes of text per token, about those of English."""
SPANS_PER_SHARD = 16
"""Spans of a large file per shard. More spans make the sizes of shards more even."""
SAMPLE_BYTES = 64 << 10
"""Bytes of text that the training of a tokenizer takes at least from a span."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The options that change the bytes of a shard folder."""

    documents: DocumentOptions = DocumentOptions()
    tokenizer: Path | None = None
    """File or folder for `read_tokenizer`; None trains a tokenizer."""
    vocab_size: int | None = None
    """Ids of the tokenizer to be trained."""
    normalization: Normalization = "nmt_nfkc"
    """Normalization of the tokenizer to be trained."""
    train_bytes: int = 100 << 20
    """Bytes of text that the tokenizer is trained on; from a larger corpus a sample is drawn."""
    seed: int = 0
    """Seed of that sample."""
    block_tokens: int = 512
    """Tokens of a row, ``<s>`` included."""
    one_row_per_document: bool = False
    shard_bytes: int = 64 << 20
    """Planned size of a shard."""

    def check(self) -> None:
        """Raise a `ConfigError` that names every setting that cannot work."""
        faults = []
        if (self.tokenizer is None) == (self.vocab_size is None):
            faults.append("expected either --tokenizer PATH, or --train-tokenizer with --vocab-size N")
        if self.vocab_size is not None and self.vocab_size < 300:
            faults.append(
                f"--vocab-size {self.vocab_size}: expected at least 300: 256 bytes, the specials, and letters"
            )
        least, parts = (3, "<s>, a token and </s>") if not self.has_pairs else (6, "four special ids and two tokens")
        if self.block_tokens < least:
            faults.append(f"--block-tokens {self.block_tokens}: expected at least {least}: {parts}")
        if self.has_pairs and self.documents.text_field == self.documents.pair_field:
            faults.append(f"--pair-columns: expected two columns, found {self.documents.text_field!r} twice")
        if self.shard_bytes < 1:
            faults.append(f"--shard-bytes {self.shard_bytes} must be positive")
        if self.train_bytes < 1:
            faults.append(f"--train-bytes {self.train_bytes} must be positive")
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def has_pairs(self) -> bool:
        """True if a row holds two sentences."""
        return self.documents.pair_field is not None

    def planned_vocab_size(self) -> int:
        """Return the size of the vocabulary, which is known before a tokenizer is trained."""
        if self.tokenizer is not None:
            return read_tokenizer(self.tokenizer).vocab_size
        assert self.vocab_size is not None  # see `check`
        return self.vocab_size

    def as_json(self) -> dict[str, Any]:
        """Return the settings as ``index.json`` stores them; a given tokenizer is stored as its checksum."""
        if self.tokenizer is None:
            tokenizer: dict[str, Any] = {
                "trained": "sentencepiece",
                "vocab_size": self.vocab_size,
                "normalization": self.normalization,
                "train_bytes": self.train_bytes,
                "seed": self.seed,
            }
        else:
            tokenizer = {"sha256": hashlib.sha256(read_tokenizer(self.tokenizer).data).hexdigest()}
        documents = {name: value for name, value in vars(self.documents).items() if name != "pair_field" or value}
        return {
            **documents,
            "tokenizer": tokenizer,
            "block_tokens": self.block_tokens,
            "one_row_per_document": self.one_row_per_document,
            "shard_bytes": self.shard_bytes,
        }


def make_plan(inputs: Sequence[Path], settings: TextSettings) -> Plan:
    """List the files, divide large ones at document boundaries, and assign the spans to shards.

    Raises:
        ConfigError: inputs or tokenizer do not fit the settings. Only the beginnings of files are read for this.
    """
    ignored: Counter[str] = Counter()
    files = find_text_files(inputs, settings.documents, ignored)
    if settings.one_row_per_document:
        check_unique((file.source, file.path) for file in files)
    if settings.has_pairs and (plain := [file.source for file in files if file.form == "text"]):
        raise ConfigError(
            f"--pair-columns: expected JSON lines or TSV files, found plain text: {', '.join(plain[:3])}"
            f"{f', ... {len(plain)} files' if len(plain) > 3 else ''}"
        )
    bytes_per_size = token_dtype(settings.planned_vocab_size()).itemsize / BYTES_PER_TOKEN
    span_bytes = max(1, round(settings.shard_bytes / bytes_per_size / SPANS_PER_SHARD))
    spans: list[TextSpan] = []
    skipped = []
    for order, file in enumerate(files):
        if file.bytes == 0:
            skipped.append(Skipped(order=order, source=file.source, reason="empty file (0 bytes)"))
        else:
            spans.extend(_divide(file, order, span_bytes, settings))
    _check_first_of_each_form(spans, settings.documents)
    return Plan(
        shards=cut_shards(spans, settings.shard_bytes, bytes_per_size),
        skipped=tuple(skipped),
        files=len(files),
        sha256=fingerprint(
            [
                [(file.source, file.bytes, file.form, file.compression, file.label) for file in files],
                [(span.order, span.start, span.stop) for span in spans],
            ]
        ),
        ignored=ignored,
    )


def _divide(file: TextFile, order: int, span_bytes: int, settings: TextSettings) -> list[TextSpan]:
    """Return the spans of one file. It stays whole if rows are documents, which are numbered inside their file."""
    if settings.one_row_per_document or not can_be_divided(file, settings.documents):
        return [TextSpan(file=file, order=order)]
    wanted = range(span_bytes, file.bytes, span_bytes)
    bounds = [0, *document_boundaries(file, wanted, settings.documents), file.bytes]
    return [
        TextSpan(file=file, order=order, start=start, stop=stop) for start, stop in pairwise(bounds) if start < stop
    ]


def _check_first_of_each_form(spans: Sequence[TextSpan], options: DocumentOptions) -> None:
    """Read the first batch of the first file of each form, so that a wrong field name is found before packing."""
    seen = set()
    for span in spans:
        if span.file.form not in seen:
            seen.add(span.file.form)
            next(read_documents(span, options), None)


def sample_texts(spans: Sequence[TextSpan], settings: TextSettings) -> Iterator[str]:
    """Yield lines for the training of a tokenizer: the whole corpus, or a sample of `settings.train_bytes`.

    A sample takes the beginning of every span, at least `SAMPLE_BYTES` of each. If that is too much, `settings.seed`
    draws the spans. A large file has many spans, a compressed file has one.
    """
    options = settings.documents
    if options.document != "line":
        options = DocumentOptions(**(vars(options) | {"document": "line"}))
    quota = None
    chosen: Sequence[int] = range(len(spans))
    if sum(span.size for span in spans) > settings.train_bytes:
        quota = max(SAMPLE_BYTES, settings.train_bytes // len(spans))
        count = max(1, settings.train_bytes // quota)
        chosen = sorted(np.random.default_rng(settings.seed).permutation(len(spans))[:count].tolist())
    for number in chosen:
        taken = 0
        for batch in read_documents(spans[number], options):
            for text in batch.all_texts:
                yield text
                taken += len(text)
                if quota is not None and taken >= quota:
                    break
            if quota is not None and taken >= quota:
                break
