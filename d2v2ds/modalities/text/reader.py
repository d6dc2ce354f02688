"""Text: its settings of data, and rows of a text shard -> blocks of token ids.

In: token ids in the shard. Out: int64 (B, S), rows shorter than the longest one padded on the right.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v2ds.bounds import Count
from d2v2ds.data.folders import sizes_of
from d2v2ds.data.order import MicroBatch, PlanConfig
from d2v2ds.data.reader import DataSettings, Examples, Reader, Unit, mask_faults
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.modalities.text.shards import TextShards
from d2v2ds.shapes import PAD_ID


@dataclass(frozen=True, kw_only=True)
class TextDataConfig(DataSettings):
    """Settings for reading texts: folders, batch sizes and masks."""

    modality = "text"
    unit = "tokens"

    global_batch_tokens: Count
    """Tokens per optimizer step over all ranks (count, an upper limit; before the M masks multiply it); a
    multiple of the next."""
    micro_batch_tokens: Count
    """Tokens per forward pass on one rank (count, an upper limit); decides the memory needed."""
    global_batch_rows: Count | None = None
    """Rows per optimizer step over all ranks (count, an upper limit beside the tokens, shared evenly by the
    micro-batches); a multiple of `global_batch_tokens` over `micro_batch_tokens`. None: the tokens alone decide."""

    @property
    def micro_batch_rows(self) -> int | None:
        """Most rows of one forward pass; None without a limit."""
        return None if self.global_batch_rows is None else self.global_batch_rows // self.num_micro

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        faults = super().check()
        if not faults and self.global_batch_rows is not None and self.global_batch_rows % self.num_micro:
            more = -(-self.global_batch_rows // self.num_micro) * self.num_micro
            faults.append(
                f"data.text.global_batch_rows {self.global_batch_rows} cannot be divided among the {self.num_micro} "
                f"micro-batches of a step (global_batch_tokens over micro_batch_tokens); expected for example {more}"
            )
        return faults

    def largest_samples(self, network: Any) -> tuple[float, int]:
        """Texts of the greatest length in one optimizer step, and that length in tokens."""
        rows = self.global_batch / network.max_tokens
        return rows if self.global_batch_rows is None else min(rows, self.global_batch_rows), network.max_tokens


TOKENS = Unit(
    name="tokens",
    label="tokens",
    total_metric="data/tokens",
    total_help="text tokens seen since the run began, padding included; sum over ranks, not multiplied by masks",
    speed_metric="perf/tokens_per_s",
    speed_help="text tokens per second of wall time, padding included; sum over ranks",
)


class TextReader(Reader[TextShards]):
    """Packed folders of token blocks."""

    modality = "text"
    unit = TOKENS
    can_be_whole = True

    config: TextDataConfig
    network: TextNetwork

    @property
    def block_tokens(self) -> int:
        """Tokens of the longest row of all folders."""
        return max(part.block_tokens for part in self.shards.parts)

    def plan_config(self) -> PlanConfig:
        """Limits in tokens."""
        config = self.config
        return PlanConfig(
            micro_size=config.micro_batch_tokens,
            num_micro=config.num_micro,
            min_size=self._smallest(),
            max_size=self.block_tokens,
            crops=False,
            micro_rows=config.micro_batch_rows,
        )

    def _smallest(self) -> int:
        """Fewest tokens of which some can be masked and some visible; shorter rows are never drawn."""
        sizes = range(2, self.block_tokens)
        return next((n for n in sizes if not mask_faults(self.mask, n, "")), self.block_tokens)

    def units(self, num_rows: int, size: int) -> float:
        """Tokens, padding included."""
        return float(num_rows * size)

    def read(self, micro: MicroBatch, seed: int) -> Examples:
        """Token ids (B, S) int64 and their padding."""
        source = torch.empty(len(micro.rows), micro.size, dtype=torch.int64)
        out = source.numpy()
        for part, rows, places in self.shards.split(micro.rows):
            if isinstance(places, slice):
                part.read_blocks(rows, out, PAD_ID)
            else:
                block = np.empty((len(rows), micro.size), dtype=np.int64)
                part.read_blocks(rows, block, PAD_ID)
                out[places] = block
        sizes = torch.from_numpy(sizes_of(self.datasets, micro.rows))
        if int(sizes.min()) == micro.size:
            return Examples(source)
        return Examples(source, torch.arange(micro.size) >= sizes[:, None])

    def read_whole(self, row: int) -> Tensor:
        """(S,) int64, all tokens of a row."""
        part, local = self.shards.locate(row)
        return torch.from_numpy(part.read_tokens(local).astype(np.int64))

    def faults(self) -> list[str]:
        """Return one message for each way in which shards, settings and network do not fit."""
        faults = self.misfits()
        block, micro = self.block_tokens, self.config.micro_batch_tokens
        if self.mask is not None and not self.mask.is_for_sequences:
            faults.append(
                f"objective.modalities.text.mask.kind is {self.mask.kind!r}, text needs 'random', 'block_1d' or 'spans'"
            )
        else:
            faults += mask_faults(self.mask, block, f"objective.modalities.text.mask, for blocks of {block} tokens")
        if micro < block:
            faults.append(
                f"data.text.micro_batch_tokens {micro} cannot hold one block of {block} tokens; raise the first or "
                "pack with a smaller --block-tokens"
            )
        return faults

    def remarks(self) -> list[str]:
        """Report ids that the embedding has and the tokenizer lacks."""
        known, own = self.shards.first.vocab_size, self.network.vocab_size
        if known >= own:
            return []
        return [
            f"data.text.shards: the tokenizer has {known} ids, model.modalities.text.vocab_size is {own}: "
            f"{own - known} rows of the embedding will never be used"
        ]

    def misfits(self) -> list[str]:
        """Return one message for each reason why the network cannot read these shards."""
        faults = []
        if self.shards.first.vocab_size > self.network.vocab_size:
            faults.append(
                f"data.text.shards: the tokenizer has {self.shards.first.vocab_size} ids, "
                f"model.modalities.text.vocab_size is {self.network.vocab_size}; set it to the first"
            )
        if self.block_tokens > self.network.max_tokens:
            faults.append(
                f"data.text.shards: blocks of {self.block_tokens} tokens, model.modalities.text.max_tokens is "
                f"{self.network.max_tokens}; raise the second or pack with a smaller --block-tokens"
            )
        return faults
