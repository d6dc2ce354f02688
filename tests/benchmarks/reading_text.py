"""Reading blocks of text: from the shard to an int64 batch, in random order, beside what memory allows.

    python -m tests.benchmarks.reading_text [--shards FOLDER] [--rows 200000] [--batch 16] [--rounds 5]

Without ``--shards`` it writes rows of random ids. One worker, one core. The limit is `np.copyto` from the stored type
to int64 for as many tokens: once out of one small array that stays in the cache, and once from the same random places
of one large array, which is the memory traffic that no reader can avoid. The best round of each counts.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.order import MicroBatch
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.text.reader import TextDataConfig, TextReader
from d2v2ds.modalities.text.shards import TextShards
from tests.preprocessing.tiny_text import pack_tiny

VOCAB_SIZE = 50265
BLOCK_TOKENS = 512
GOAL = 50.0
"""Million tokens per second."""


@dataclass
class Network:
    """Settings of the network that a reader asks for."""

    vocab_size: int
    max_tokens: int

    def num_tokens(self, size: int) -> int:
        return size


def best_rate(work: Callable[[], object], tokens: int, rounds: int) -> float:
    """Million tokens per second of the fastest round."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return tokens / min(seconds) / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="a folder of packed text")
    parser.add_argument("--rows", type=int, default=200_000, help="of made-up shards")
    parser.add_argument("--batch", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = options.shards
        if folder is None:
            folder = Path(name) / "shards"
            pack_tiny(folder, [BLOCK_TOKENS] * options.rows, vocab_size=VOCAB_SIZE, shard_bytes=64 << 20)
        shards = TextShards(folder)
        length, dtype = shards.block_tokens, shards.read_tokens(0).dtype
        tokens_per_batch = options.batch * length
        config = TextDataConfig(
            shards=folder,
            global_batch_tokens=tokens_per_batch,
            micro_batch_tokens=tokens_per_batch,
        )
        mask = MaskConfig(masked_fraction=0.5, num_masks=1, kind="random")
        reader = TextReader(JoinedShards([shards]), config, Network(shards.vocab_size, length), mask)
        order = np.random.default_rng(0).permutation(np.flatnonzero(shards.sizes == length))
        order = order[: len(order) // options.batch * options.batch].reshape(-1, options.batch)
        tokens = order.size * length
        micro = [MicroBatch(epoch=0, rows=rows, size=length) for rows in order]
        out = np.empty((options.batch, length), dtype=np.int64)
        cached = np.full((options.batch, length), 5, dtype=dtype)
        large = np.zeros((len(shards), length), dtype=dtype)
        large += np.arange(length, dtype=dtype)

        def blocks() -> None:
            for rows in order:
                shards.read_blocks(rows, out, 1)

        def batches() -> None:
            for one in micro:
                reader.read(one, seed=0)

        def from_cache() -> None:
            for _ in order:
                np.copyto(out, cached)

        def from_memory() -> None:
            for rows in order:
                for line, row in enumerate(rows.tolist()):
                    out[line] = large[row]

        for rows in order:  # every page is mapped once before anything is timed
            assert np.array_equal(shards.read_tokens(int(rows[0])), reader.read_whole(int(rows[0])).numpy())
        rates = {
            "np.copyto, cached": best_rate(from_cache, tokens, options.rounds),
            "the same from random rows of one array": best_rate(from_memory, tokens, options.rounds),
            "TextShards.read_blocks": best_rate(blocks, tokens, options.rounds),
            "TextReader.read (to a torch batch)": best_rate(batches, tokens, options.rounds),
        }
        load = os.getloadavg()[0]
        print(f"{order.size:,} random rows of {length} {dtype}, batches of {options.batch}, machine load {load:.1f}")
        print(f"{'':<42}{'M tokens/s':>12}{'goal':>8}{'of cached copy':>16}")
        limit = rates["np.copyto, cached"]
        for label, rate in rates.items():
            goal = f"{GOAL:.0f}" if label.startswith("Text") else ""
            print(f"{label:<42}{rate:>12.1f}{goal:>8}{rate / limit:>16.3f}")


if __name__ == "__main__":
    main()
