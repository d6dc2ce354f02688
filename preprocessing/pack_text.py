"""Pack text into Arrow shards of token blocks: ``python -m preprocessing.pack_text --input FILES --output DIR ...``.

Documents are tokenized and end with ``</s>``; they are joined, across documents, and cut into pieces of
--block-tokens less one, each with ``<s>`` in front. Joining begins anew with every shard, so only
the last block of a shard may be shorter. The tokenizer is trained on the corpus (--train-tokenizer) or given
(--tokenizer), and lies in the shard folder. --one-row-per-document makes rows with labels instead, for probes and
fine-tuning: ``<s> A </s>``. With --pair-columns A B a row holds two sentences: ``<s> A </s> </s> B </s>``.

Killed and started again with the same command, it keeps finished shards and ends with the same bytes.

Lines whose text is null are left out; they, unknown tokens and characters that --errors replaced are counted.

Exit codes: 0 done; 2 wrong input or settings; 3 the folder is complete, but all files or more than --max-skipped were
skipped, or notes on more than --max-noted of the content; 4 a file could not be written, an input vanished or the
machine failed, run again; 130 interrupted, run again.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d2v2ds.data.schema import Index
from d2v2ds.modalities.text.shards import SENTENCES, TEXT_LAYOUT
from d2v2ds.modalities.text.tokenizers import TOKENIZERS, SentencePieceTokenizer, Tokenizer, load_tokenizer
from preprocessing.driver.command import common_parser, parse_bytes, run
from preprocessing.driver.output_file import replacing
from preprocessing.driver.progress import MEBIBYTES
from preprocessing.driver.protocol import Notes, Row
from preprocessing.driver.shard_plan import Plan
from preprocessing.driver.team.protocol import Team
from preprocessing.driver.writer import PACKING_NAME
from preprocessing.text.documents import DOCUMENT_KINDS, ERRORS, DocumentOptions, TextSpan
from preprocessing.text.rows import block_rows, document_rows, pair_rows
from preprocessing.text.shard_plan import TextSettings, make_plan, sample_texts
from preprocessing.text.tokenization import (
    NORMALIZATIONS,
    read_tokenizer,
    special_ids,
    token_dtype,
    train_sentencepiece,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.train_tokenizer != (options.vocab_size is not None):
        parser.error("--train-tokenizer and --vocab-size N belong together")
    if options.part and options.train_tokenizer:
        parser.error("--part with --train-tokenizer: parts on two machines could train two tokenizers; train one on a "
                     "sample first and give its file as --tokenizer")  # fmt: skip
    if options.pair_columns and options.text_field is not None:
        parser.error("--text-field and --pair-columns exclude each other: the first column of a pair is its text")
    first, second = options.pair_columns or (options.text_field or DocumentOptions().text_field, None)
    has_labels = options.one_row_per_document or second is not None
    settings = TextSettings(
        documents=DocumentOptions(
            document=options.document,
            text_field=first,
            pair_field=second,
            label_field=options.label_field if has_labels else None,
            errors=options.errors,
        ),
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        normalization=options.normalization,
        train_bytes=options.train_bytes,
        seed=options.seed,
        block_tokens=options.block_tokens,
        one_row_per_document=has_labels,
        shard_bytes=options.shard_bytes,
    )
    return run(TextPacker(settings), options, arguments)


@dataclass(frozen=True)
class TextPacker:
    """Text files to rows of tokens; the methods are those of `preprocessing.driver.protocol.Packer`."""

    settings: TextSettings
    layout = TEXT_LAYOUT
    measure = MEBIBYTES

    def scan(self, team: Team, inputs: Sequence[Path]) -> Plan:
        """List the files and divide them into spans; only the surroundings of the cuts are read."""
        return team.share(lambda: make_plan(inputs, self.settings))

    def make_beside(self, folder: Path, plan: Plan) -> tuple[str, ...]:
        """Write the tokenizer, trained or given; one that is already there stays."""
        if (there := _tokenizer_in(folder)) is not None:
            return (there[1].name,)
        if self.settings.tokenizer is not None:
            tokenizer = read_tokenizer(self.settings.tokenizer)
        else:
            texts = sample_texts([span for shard in plan.shards for span in shard], self.settings)
            vocab_size = self.settings.planned_vocab_size()
            tokenizer = SentencePieceTokenizer(train_sentencepiece(texts, vocab_size, self.settings.normalization))
        with replacing(folder / tokenizer.file_name, folder / PACKING_NAME) as sink:
            sink.write(tokenizer.data)
        return (tokenizer.file_name,)

    def format(self, folder: Path) -> dict[str, Any]:
        """Type and range of the ids, and how to turn them into text."""
        tokenizer = _tokenizer_of(folder)
        return {
            "token_dtype": token_dtype(tokenizer.vocab_size).name,
            "vocab_size": tokenizer.vocab_size,
            "block_tokens": self.settings.block_tokens,
            "tokenizer": tokenizer.kind,
            "tokenizer_file": tokenizer.file_name,
            "special": special_ids(tokenizer),
        } | ({SENTENCES: 2} if self.settings.has_pairs else {})

    def rows(self, units: Sequence[TextSpan], folder: Path, notes: Notes) -> Iterator[Row]:
        """Blocks, documents, or pairs."""
        make = document_rows if self.settings.one_row_per_document else block_rows
        make = pair_rows if self.settings.has_pairs else make
        return make(units, _tokenizer_of(folder), self.settings, notes)

    def totals(self, size: int, counts: Mapping[str, int]) -> dict[str, Any]:
        """Tokens (specials included), documents, and bytes of their text."""
        return {"tokens": size, "documents": counts.get("documents", 0), "bytes": counts.get("bytes", 0)}

    def describe(self, index: Index) -> str:
        """Tokens and documents."""
        return f"{index.totals['tokens']:,} tokens of {index.totals['documents']:,} documents"

    def versions(self) -> dict[str, str]:
        """The tokenizer's library."""
        given = self.settings.tokenizer
        library = SentencePieceTokenizer.library if given is None else read_tokenizer(given).library
        return {library: version(library)}


def _tokenizer_in(folder: Path) -> tuple[str, Path] | None:
    """Kind and file of a folder's tokenizer."""
    for kind, tokenizer in TOKENIZERS.items():
        if (folder / tokenizer.file_name).exists():
            return kind, folder / tokenizer.file_name
    return None


def _tokenizer_of(folder: Path) -> Tokenizer:
    there = _tokenizer_in(folder)
    assert there is not None, "make_beside comes first"
    return load_tokenizer(*there)


def _parser() -> argparse.ArgumentParser:
    defaults, documents = TextSettings(), DocumentOptions()
    parser = common_parser(
        "text", __doc__, "FILES", "text files and folders of them, also .gz and .zst", defaults.shard_bytes
    )
    add = parser.add_argument
    add("--document", choices=DOCUMENT_KINDS, default=documents.document,
        help="what is a document in plain text: a line, lines between blank lines, a file (%(default)s)")  # fmt: skip
    add("--text-field", metavar="NAME", help=f"in JSON lines and TSV ({documents.text_field})")
    add("--pair-columns", nargs=2, metavar=("A", "B"), help="fields or columns of two sentences that make one row")
    add("--errors", choices=ERRORS, default=documents.errors, help="what to do with invalid UTF-8 (%(default)s)")
    add("--tokenizer", type=Path, metavar="PATH",
        help="sentencepiece .model, tokenizer.json, or a folder with encoder.json, vocab.bpe and dict.txt")  # fmt: skip
    add("--train-tokenizer", action="store_true", help="train sentencepiece on the corpus")
    add("--vocab-size", type=int, metavar="N", help="of a trained tokenizer, specials included")
    add("--normalization", choices=NORMALIZATIONS, default=defaults.normalization,
        help="of a trained one: nmt_nfkc unifies, identity keeps every character (%(default)s)")  # fmt: skip
    add("--train-bytes", type=parse_bytes, default=defaults.train_bytes, metavar="BYTES",
        help="text that a tokenizer is trained on, drawn by --seed (100M)")  # fmt: skip
    add("--seed", type=int, default=defaults.seed, help="of that draw (%(default)s)")
    add("--block-tokens", type=int, default=defaults.block_tokens, metavar="N", help="tokens of a row (%(default)s)")
    add("--one-row-per-document", action="store_true", help="rows with id and label, cut to --block-tokens")
    add("--label-field", "--label-column", default="label", metavar="NAME", help="in JSON lines and TSV (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
