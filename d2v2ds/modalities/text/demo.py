"""Texts for the demonstration."""

from pathlib import Path

from d2v2ds.modalities.demo import Prepared, key_of, pack, python
from d2v2ds.modalities.text.shards import TextShards

BLOCKS = ("--block-tokens", "128")
ROWS = ("--one-row-per-document",)


def prepare(runs: Path, data: Path | None) -> Prepared:
    """Texts: a folder with labelled `train.jsonl` and `valid.jsonl` can be probed, any other only trained on."""
    if data is None:
        data = runs / "texts"
        python("preprocessing.samples.text", "--output", str(data))
    parts = [data / f"{part}.jsonl" for part in ("train", "valid")]
    labelled = all(part.is_file() for part in parts)
    blocks = pack(
        "text", parts[0] if labelled else data, runs / f"blocks-{key_of(data)}",
        "--train-tokenizer", "--vocab-size", "4000", *BLOCKS,
    )  # fmt: skip
    shards = TextShards(blocks)
    overrides = (f"model.modalities.text.vocab_size={shards.vocab_size}",)
    if not labelled:
        return Prepared(blocks, overrides)
    tokenizer = str(shards.tokenizer_file)
    train, valid = (
        pack("text", part, runs / f"texts-{part.stem}-{key_of(data)}", "--tokenizer", tokenizer, *BLOCKS, *ROWS)
        for part in parts
    )
    return Prepared(blocks, overrides, ("--shards", str(train), "--test-shards", str(valid), "--baseline"))
