"""Tokenizing and packing text against the tokenizer alone on the same documents in the same run.

    python -m tests.benchmarks.packing_text [--data FOLDER] [--megabytes 60] [--vocab-size 4000] [--rounds 3]

Without ``--data`` the text is the language reference that comes with Python. It is copied until there are
`--megabytes`, as plain text (paragraphs) and as JSON lines. "Alone" has all documents in memory as `str` and asks the
tokenizer for their ids, in batches as long as the packer's, in the fastest way its library has. Packing is everything a
user waits for, with one worker: scan, reading, blocks, sync to disk, index. The best time of each counts, on the wall
and, for machines that are shared with other work, of the processor.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from d2v2ds.modalities.text.tokenizers import BytePairTokenizer, SentencePieceTokenizer, Tokenizer
from preprocessing.pack_text import main as pack
from preprocessing.text.documents import DocumentOptions
from preprocessing.text.find import find_text_files
from preprocessing.text.read import read_documents
from preprocessing.text.shard_plan import TextSettings, make_plan
from preprocessing.text.tokenization import train_sentencepiece
from tests.benchmarks.packing import timed

GOAL = 0.85


def python_reference() -> str:
    """Half a megabyte of English that every Python has."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def write_corpora(texts: list[str], folder: Path, megabytes: float) -> dict[str, Path]:
    """The same documents as files of plain text and of JSON lines."""
    plain, lines = folder / "plain", folder / "json"
    plain.mkdir()
    lines.mkdir()
    (plain / "one.txt").write_text("\n\n\n".join(texts), encoding="utf-8")
    documents = [text for batch in batches_of(plain / "one.txt") for text in batch]
    (plain / "one.txt").unlink()
    size = sum(len(text) for text in documents)
    for copy in range(max(1, round(megabytes * 1e6 / size))):
        (plain / f"{copy:04d}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        with (lines / f"{copy:04d}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "source": "benchmark"}) + "\n" for text in documents)
    return {"paragraphs": plain, "JSON lines": lines}


def batches_of(path: Path) -> list[list[str]]:
    """Documents as the packer reads them."""
    settings = TextSettings(vocab_size=1000)
    spans = [span for shard in make_plan([path], settings).shards for span in shard]
    return [batch.texts for span in spans for batch in read_documents(span, DocumentOptions())]


def train_bpe(texts: list[str], vocab_size: int) -> bytes:
    """A byte-level BPE with RoBERTa's ids, as the packer wants it."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.add_special_tokens(["<mask>"])
    text: str = model.to_str()
    return text.encode()


def alone(tokenizer: Tokenizer, batches: list[list[str]]) -> None:
    """Nothing but the library's own call."""
    model = tokenizer._model  # type: ignore[attr-defined]
    for texts in batches:
        if tokenizer.kind == "sentencepiece":
            model.encode(texts, return_type="numpy", num_threads=1)
        else:
            for encoding in model.encode_batch_fast(texts, add_special_tokens=False):
                _ = encoding.ids


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with text")
    parser.add_argument("--megabytes", type=float, default=60.0)
    parser.add_argument("--vocab-size", type=int, default=4000, help="of tokenizers that are trained on the text first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's temporary folder")
    options = parser.parse_args(arguments)
    if options.data:
        files = find_text_files([options.data], DocumentOptions())
        texts = [Path(file.path).read_text(encoding="utf-8") for file in files if file.form == "text"]
    else:
        texts = [python_reference()]
    tokenizers: list[Tokenizer] = [
        SentencePieceTokenizer(train_sentencepiece(texts, options.vocab_size, "nmt_nfkc")),
        BytePairTokenizer(train_bpe(texts, options.vocab_size)),
    ]
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        corpora = write_corpora(texts, scratch, options.megabytes)
        lines = []
        for tokenizer in tokenizers:
            (scratch / tokenizer.file_name).write_bytes(tokenizer.data)
            for form, folder in corpora.items():
                batches = batches_of(folder)
                size = sum(len(text.encode()) for batch in batches for text in batch)
                packing: list[object] = ["--input", folder, "--output", scratch / "output", "--workers", 1]
                packing += ["--tokenizer", scratch / tokenizer.file_name]
                best = [(float("inf"), float("inf"))] * 2
                for _ in range(options.rounds):
                    for way, work in enumerate((partial(alone, tokenizer, batches), partial(pack_quietly, packing))):
                        wall, processor = timed(work)
                        best[way] = min(best[way][0], wall), min(best[way][1], processor)
                    index = json.loads((scratch / "output" / "index.json").read_text())
                    shutil.rmtree(scratch / "output")
                assert index["totals"]["bytes"] == size, "both have to see the same documents"
                speeds = "".join(f"{size / wall / 1e6:>14.1f}" for wall, _ in best)
                (wall, processor), (packing_wall, packing_processor) = best
                million = index["totals"]["tokens"] / 1e6
                lines.append(
                    f"{tokenizer.kind:<15}{form:<12}{million:>10.2f}{speeds}{wall / packing_wall:>8.3f}{GOAL:>6}"
                    f"{processor / packing_processor:>12.3f}"
                )
        load = os.getloadavg()[0]
        print(f"{size / 1e6:.1f} MB of text, {options.vocab_size:,} ids, best of {options.rounds}, load {load:.1f}")
        print(
            f"{'tokenizer':<15}{'form':<12}{'M tokens':>10}{'alone MB/s':>14}{'packing MB/s':>14}"
            f"{'ratio':>8}{'goal':>6}{'processor':>12}"
        )
        print("\n".join(lines))


def pack_quietly(arguments: list[object]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert pack([str(argument) for argument in arguments]) == 0


if __name__ == "__main__":
    main()
