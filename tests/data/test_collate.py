"""A micro-batch becomes a batch: shapes, contents, masks."""

import numpy as np
import pytest
import torch

from d2v2ds.data.audio import crop_starts
from d2v2ds.data.collate import Collator
from d2v2ds.data.sampler import MicroBatch
from d2v2ds.masking import MaskConfig, draw_masks, masked_count
from d2v2ds.shapes import conv_output_length
from tests.data.fake_audio import CONV_LAYERS, FakeAudio, fake_reader

MASK = MaskConfig(masked_fraction=0.5, adjust=0.05, block_length=3, num_masks=4)


@pytest.fixture
def source():
    return FakeAudio(30)


@pytest.fixture
def collate(source):
    return Collator(reader=fake_reader(source, MASK), seed=7)


def make_micro(source, rows, epoch=2, weight=1.0):
    rows = np.array(rows)
    return MicroBatch(epoch, rows, int(source.sizes[rows].min()), weight)


def test_batch_has_the_declared_shapes(source, collate):
    micro = make_micro(source, [3, 9, 11])
    batch = collate(micro)
    num_tokens = conv_output_length(micro.size, CONV_LAYERS)
    num_masked = masked_count(MASK, num_tokens)
    assert batch.source.shape == (3, micro.size) and batch.source.dtype == torch.float32
    assert batch.padding is None
    assert batch.ids.tolist() == [3, 9, 11]
    assert batch.masks.masked.shape == (3, 4, num_tokens)
    assert batch.masks.keep.shape == (3, 4, num_tokens - num_masked)
    assert batch.num_masked == int(batch.masks.masked.sum()) == 12 * num_masked


def test_visible_and_masked_partition_the_tokens(source, collate):
    masks = collate(make_micro(source, [3, 9, 11])).masks
    visible = torch.zeros_like(masks.masked).scatter_(2, masks.keep, True)
    assert torch.equal(visible, ~masks.masked)


def test_rows_are_normalised_crops_at_their_own_offset(source, collate):
    micro = make_micro(source, [3, 9, 11])
    batch = collate(micro)
    starts = crop_starts(source.sizes[micro.rows], micro.size, seed=7, epoch=2, rows=micro.rows)
    for row, start, waveform in zip(micro.rows, starts, batch.source, strict=True):
        clip = source.clips[row] / 32768
        expected = ((clip - clip.mean()) / np.sqrt(clip.var() + 1e-5))[start : start + micro.size]
        np.testing.assert_allclose(waveform.numpy(), expected, atol=2e-5)


def test_masks_are_those_of_seed_epoch_and_row(source, collate):
    micro = make_micro(source, [3, 9, 11])
    batch = collate(micro)
    expected = draw_masks(MASK, batch.masks.num_tokens, seed=7, epoch=2, sample_ids=micro.rows)
    assert torch.equal(batch.masks.masked, torch.from_numpy(expected))


def test_another_epoch_has_other_crops_and_masks(source, collate):
    first, second = (collate(make_micro(source, [3, 9, 11], epoch)) for epoch in (0, 1))
    assert not torch.equal(first.source, second.source)
    assert (first.masks.masked != second.masks.masked).any(-1).all()


def test_a_filler_has_weight_zero(source, collate):
    assert collate(make_micro(source, [1])).loss_weight == 1.0
    assert collate(make_micro(source, [1], weight=0.0)).loss_weight == 0.0


def test_a_crop_too_short_for_the_masks_is_refused(source, collate):
    with pytest.raises(ValueError, match="0 tokens"):
        collate(MicroBatch(0, np.array([1]), 19))
