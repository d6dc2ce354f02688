"""Reading text for training: blocks as they were packed, padded to the longest, and settings that do not fit."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v2ds.config.load import load_config
from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.order import BatchPlan, MicroBatch, SamplerState
from d2v2ds.errors import ConfigError
from d2v2ds.masking import MaskConfig, masked_count
from d2v2ds.modalities.text.reader import TextDataConfig, TextReader
from d2v2ds.modalities.text.shards import TextShards
from d2v2ds.shapes import PAD_ID
from tests.preprocessing.tiny_text import pack_tiny, tokens_of

LENGTHS = [64, 64, 30, 64, 7, 64]
MASK = MaskConfig(masked_fraction=0.5, num_masks=2, kind="random")


@dataclass(frozen=True)
class Network:
    """Settings of the network that a reader asks for."""

    vocab_size: int = 1000
    max_tokens: int = 64

    def num_tokens(self, size: int) -> int:
        return size


@pytest.fixture
def shards(tmp_path: Path) -> TextShards:
    pack_tiny(tmp_path / "text", LENGTHS)
    return TextShards(tmp_path / "text")


def config(**changes: Any) -> TextDataConfig:
    settings = TextDataConfig(shards=Path("text"), global_batch_tokens=512, micro_batch_tokens=128)
    return replace(settings, **changes)


def reader_of(
    shards: TextShards, mask: MaskConfig | None = MASK, network: Network = Network(), **changes: Any
) -> TextReader:
    return TextReader(JoinedShards([shards]), config(**changes), network, mask)


def micro(*rows: int) -> MicroBatch:
    return MicroBatch(epoch=0, rows=np.array(rows), size=max(LENGTHS[row] for row in rows))


def test_a_batch_is_its_rows_padded_on_the_right(shards: TextShards) -> None:
    examples = reader_of(shards).read(micro(2, 0, 4), seed=0)
    assert examples.source.dtype == torch.int64 and examples.padding is not None
    for line, row in enumerate((2, 0, 4)):
        length = LENGTHS[row]
        expected = [*tokens_of(row, length, 1000).tolist(), *[PAD_ID] * (64 - length)]
        assert examples.source[line].tolist() == expected
        assert examples.padding[line].tolist() == [False] * length + [True] * (64 - length)


def test_rows_of_one_length_have_no_padding(shards: TextShards) -> None:
    reader = pickle.loads(pickle.dumps(reader_of(shards)))  # noqa: S301
    assert reader.read(micro(0, 1, 3), seed=0).padding is None
    assert reader.read(micro(4, 4), seed=0).padding is None
    assert reader.read_whole(4).tolist() == tokens_of(4, 7, 1000).tolist()
    assert (reader.units(3, 64), reader.network.num_tokens(30), len(reader)) == (192.0, 30, 6)


def test_every_row_is_drawn_once_an_epoch_and_micro_batches_stay_within_their_tokens(shards: TextShards) -> None:
    reader = reader_of(shards)
    plan = BatchPlan(reader.sizes, config=reader.plan_config(), seed=0)
    seen: list[int] = []
    for batch in plan.iter_from(SamplerState()):
        for one in batch.micro:
            assert len(one.rows) * one.size <= 128 and one.size == max(LENGTHS[row] for row in one.rows)
            if one.epoch == 0:
                seen += one.rows.tolist()
        if batch.micro[-1].epoch > 0:
            break
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_faults_name_settings_and_folder(shards: TextShards) -> None:
    assert reader_of(shards).faults() == [] == config().check()
    blocks = MaskConfig(masked_fraction=0.5, num_masks=1, kind="block_2d", block_length=3)
    faults = reader_of(shards, blocks, Network(900, 32), micro_batch_tokens=50).faults()
    for words in (
        "1000 ids, model",
        "blocks of 64 tokens, model",
        "'block_2d', text needs",
        "cannot hold one block of 64",
    ):
        assert any(words in fault for fault in faults), words


@pytest.mark.parametrize("rows", [4, 8])
def test_a_step_keeps_its_limit_of_rows(shards: TextShards, rows: int) -> None:
    reader = reader_of(shards, global_batch_rows=rows)  # four micro-batches of 128 tokens
    assert config(global_batch_rows=rows).check() == []
    batches = BatchPlan(reader.sizes, config=reader.plan_config(), seed=0).iter_from(SamplerState())
    counts = [[len(one.rows) for one in next(batches).micro] for _ in range(9)]
    assert all(sum(one) <= rows and max(one) <= rows // 4 for one in counts)
    assert max(map(max, counts)) == rows // 4


def test_a_limit_of_rows_that_cannot_be_divided_is_named() -> None:
    assert config(global_batch_rows=6).check() == [
        "data.text.global_batch_rows 6 cannot be divided among the 4 micro-batches of a step (global_batch_tokens over "
        "micro_batch_tokens); expected for example 8"
    ]
    assert config(global_batch_rows=6, global_batch_tokens=100).check() == config(global_batch_tokens=100).check() != []
    network: Any = Network()
    assert config(global_batch_rows=4).largest_samples(network) == (4, 64)
    assert config(global_batch_rows=400).largest_samples(network) == config().largest_samples(network) == (8.0, 64)


@pytest.mark.parametrize(
    ("override", "bound"),
    [
        ("global_batch_tokens=0", "greater than or equal to 1"),
        ("micro_batch_tokens=0", "greater than or equal to 1"),
        ("global_batch_rows=0", "greater than or equal to 1"),
        ("loss_weight=-1.0", "greater than or equal to 0"),
    ],
)
def test_amounts_out_of_bounds_are_named_with_what_was_found(override: str, bound: str) -> None:
    name, value = override.split("=")
    with pytest.raises(ConfigError, match=f"data.text.{name}: Input should be {bound}, found {value}"):
        load_config("text_tiny", ["data.text.shards=x", f"data.text.{override}"])


@pytest.mark.parametrize(("fraction", "smallest"), [(0.48, 2), (0.6, 3), (0.9, 11)])
def test_rows_too_short_for_the_masks_are_never_drawn(shards: TextShards, fraction: float, smallest: int) -> None:
    mask = MaskConfig(masked_fraction=fraction, num_masks=1, kind="random")
    reader = reader_of(shards, mask)
    assert reader.plan_config().min_size == smallest
    assert 0 < masked_count(mask, smallest) < smallest
