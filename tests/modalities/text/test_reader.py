"""Reading text for training: blocks as they were packed, padded to the longest, and settings that do not fit."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v2ds.data.order import BatchPlan, MicroBatch, SamplerState
from d2v2ds.data.shards import TextShards
from d2v2ds.masking import MaskConfig, masked_count
from d2v2ds.modalities.text.reader import TextDataConfig, TextReader
from d2v2ds.shapes import PAD_ID
from tests.preprocessing.tiny_text import pack_tiny, tokens_of

LENGTHS = [64, 64, 30, 64, 7, 64]


@dataclass(frozen=True)
class Model:
    """What a text model says of its input."""

    vocab_size: int = 1000
    max_tokens: int = 64
    input_size: None = None

    def num_tokens(self, size: int) -> int:
        return size


@pytest.fixture
def shards(tmp_path: Path) -> TextShards:
    pack_tiny(tmp_path / "text", LENGTHS)
    return TextShards(tmp_path / "text")


def config(**changes: Any) -> TextDataConfig:
    mask = MaskConfig(masked_fraction=0.5, num_masks=2, kind="random")
    settings = TextDataConfig(shards=Path("text"), mask=mask, global_batch_tokens=512, micro_batch_tokens=128)
    return replace(settings, **changes)


def micro(*rows: int) -> MicroBatch:
    return MicroBatch(epoch=0, rows=np.array(rows), size=max(LENGTHS[row] for row in rows))


def test_a_batch_is_its_rows_padded_on_the_right(shards: TextShards) -> None:
    examples = TextReader(shards, config(), Model()).read(micro(2, 0, 4), seed=0)
    assert examples.source.dtype == torch.int64 and examples.padding is not None
    for line, row in enumerate((2, 0, 4)):
        length = LENGTHS[row]
        expected = [*tokens_of(row, length, 1000).tolist(), *[PAD_ID] * (64 - length)]
        assert examples.source[line].tolist() == expected
        assert examples.padding[line].tolist() == [False] * length + [True] * (64 - length)


def test_rows_of_one_length_have_no_padding(shards: TextShards) -> None:
    reader = pickle.loads(pickle.dumps(TextReader(shards, config(), Model())))  # noqa: S301
    assert reader.read(micro(0, 1, 3), seed=0).padding is None
    assert reader.read(micro(4, 4), seed=0).padding is None
    assert reader.read_whole(4).tolist() == tokens_of(4, 7, 1000).tolist()
    assert (reader.units(3, 64), reader.model.num_tokens(30), len(reader)) == (192.0, 30, 6)


def test_every_row_is_drawn_once_an_epoch_and_micro_batches_stay_within_their_tokens(shards: TextShards) -> None:
    reader = TextReader(shards, config(), Model())
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
    assert TextReader(shards, config(), Model()).faults() == [] == config().check()
    blocks = MaskConfig(masked_fraction=0.5, num_masks=1, kind="block_2d", block_length=3)
    faults = TextReader(shards, config(mask=blocks, micro_batch_tokens=50), Model(900, 32)).faults()
    for words in (
        "1000 ids, model",
        "blocks of 64 tokens, model",
        "'block_2d', text needs",
        "cannot hold one block of 64",
    ):
        assert any(words in fault for fault in faults), words
    assert config(micro_batch_tokens=0, loss_weight=-1.0).check()


@pytest.mark.parametrize(("fraction", "smallest"), [(0.48, 2), (0.6, 3), (0.9, 11)])
def test_rows_too_short_for_the_masks_are_never_drawn(shards: TextShards, fraction: float, smallest: int) -> None:
    mask = MaskConfig(masked_fraction=fraction, num_masks=1, kind="random")
    reader = TextReader(shards, config(mask=mask), Model())
    assert reader.plan_config().min_size == smallest
    assert 0 < masked_count(mask, smallest) < smallest
