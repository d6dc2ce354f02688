"""A micro-batch becomes a batch: shapes, contents, masks."""

import numpy as np
import pytest
import torch

from d2v2ds.data.collate import Collator
from d2v2ds.data.order import MicroBatch
from d2v2ds.errors import ShardError
from d2v2ds.masking import MaskConfig, draw_masks, masked_count
from d2v2ds.modalities.audio.reader import crop_starts
from d2v2ds.shapes import conv_output_length
from d2v2ds.whole_masks import SpanWholeMask, draw_whole_masks
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


@pytest.mark.parametrize("rows", [[3, 9, 11], [9]])
def test_a_reader_without_masks_gives_the_same_batch_without_them(source, collate, rows):
    micro = make_micro(source, rows)
    batch, masked = Collator(reader=fake_reader(source, None), seed=7)(micro), collate(micro)
    assert batch.masks is None and batch.num_masked == 0
    assert torch.equal(batch.source, masked.source) and torch.equal(batch.ids, masked.ids)
    moved = batch.to(torch.device("cpu"))
    assert moved.masks is None and torch.equal(moved.source, batch.source)
    assert masked.required_masks() is masked.masks
    with pytest.raises(ValueError, match="Batch of audio: expected masks, found none; the objective must ask for them"):
        batch.required_masks()


def test_without_masks_any_length_that_the_model_reads_will_do(source):
    reader = fake_reader(source, None)
    assert reader.faults() == []
    tokens = {mask: fake_reader(source, mask, min_seconds=0.03).faults() for mask in (None, MASK)}
    assert tokens[None] == []
    assert "objective.modalities.audio.mask, for clips of data.audio.min_seconds 0.03: 2 tokens" in tokens[MASK][0]


# ---- rows that cannot be read ----


class Damaged(FakeAudio):
    """Some rows raise what damaged shards raise; counts how often rows are asked for."""

    def __init__(self, num_rows, bad):
        super().__init__(num_rows)
        self.bad, self.asked = set(bad), []

    def read_audio(self, index, start=0, stop=None):
        self.asked.append(index)
        if index in self.bad:
            raise ShardError(f"audio-00000.arrow row {index}: expected this, found that")
        return super().read_audio(index, start, stop)


def collate_damaged(bad, rows, num_rows=30, **options):
    damaged = Damaged(num_rows, bad)
    return Collator(reader=fake_reader(damaged, MASK), seed=7)(make_micro(damaged, rows, **options))


def test_a_damaged_row_is_left_out_and_reported(source, collate):
    rows = [3, 9, 11, 20]
    whole, batch = collate(make_micro(source, rows)), collate_damaged({9, 20}, rows)
    assert batch.faults == tuple(f"audio-00000.arrow row {row}: expected this, found that" for row in (9, 20))
    assert batch.ids.tolist() == [3, 11] and batch.loss_weight == 1.0
    assert batch.source.shape[1] == whole.source.shape[1], "S stays"
    assert torch.equal(batch.source, whole.source[[0, 2]])
    assert torch.equal(batch.masks.masked, whole.masks.masked[[0, 2]])
    assert torch.equal(batch.masks.keep, whole.masks.keep[[0, 2]])
    assert batch.num_masked == int(batch.masks.masked.sum()) == whole.num_masked // 2
    assert whole.faults == ()


def test_where_no_row_is_left_the_next_one_that_fits_stands_in_without_weight(source):
    size = int(source.sizes[[3, 9]].min())
    others = [row for row in [*range(10, 30), *range(9)] if source.sizes[row] >= size and row != 3]
    first, second = others[:2]
    batch = collate_damaged({3, 9, first}, [3, 9])
    assert batch.ids.tolist() == [second] and batch.loss_weight == 0.0 and len(batch.faults) == 2
    assert batch.source.shape == (1, size) and batch.num_masked == int(batch.masks.masked.sum()) > 0
    assert torch.equal(batch.source, collate_damaged({3, 9, first}, [3, 9]).source)


def test_where_no_other_row_is_long_enough_a_shorter_one_stands_in(source):
    longest, rate = int(source.sizes.argmax()), 1000
    damaged = Damaged(30, {longest})
    collate = Collator(reader=fake_reader(damaged, MASK, max_seconds=5.0, micro_batch_seconds=5.0), seed=7)
    batch = collate(MicroBatch(0, np.array([longest]), int(source.sizes[longest])))
    (row,) = batch.ids.tolist()
    assert row != longest and source.sizes[row] >= 0.5 * rate and batch.loss_weight == 0.0
    assert batch.source.shape == (1, source.sizes[row])
    assert batch.masks.num_tokens == conv_output_length(int(source.sizes[row]), CONV_LAYERS)


def test_a_filler_reports_nothing_because_its_rows_are_reported_where_they_count():
    for rows in ([3, 9], [9]):
        batch = collate_damaged({9}, rows, weight=0.0)
        assert batch.faults == () and batch.loss_weight == 0.0


def test_data_of_which_nothing_can_be_read_are_an_error():
    with pytest.raises(ShardError, match=r"row 9: expected this, found that; \d+ other rows of the data were tried"):
        collate_damaged(range(30), [3, 9])
    with pytest.raises(ShardError, match="0 other rows"):
        collate_damaged([0], [0], num_rows=1)


def test_tries_are_limited_and_spread_over_the_data(monkeypatch):
    monkeypatch.setattr("d2v2ds.data.collate.STAND_IN_TRIES", 7)
    damaged = Damaged(400, range(400))
    collate = Collator(reader=fake_reader(damaged, MASK), seed=7)
    micro = MicroBatch(0, np.array([50]), int(damaged.sizes.min()))
    with pytest.raises(ShardError, match="7 other rows"):
        collate(micro)
    tried = np.array(damaged.asked[2:])
    assert len(tried) == 7 and 50 not in tried and np.diff(np.sort(tried)).min() > 40


def test_masks_of_whole_inputs_remove_no_token_and_are_counted(source):
    mask = SpanWholeMask(fraction=0.5, length=3)
    batch = Collator(reader=fake_reader(source, mask), seed=7)(make_micro(source, [3, 9, 11]))
    num_tokens = conv_output_length(batch.source.shape[1], CONV_LAYERS)
    expected = draw_whole_masks(mask, np.full(3, num_tokens), seed=7, epoch=2, sample_ids=np.array([3, 9, 11]))
    assert batch.masks is None
    assert batch.span_masks.channels is None
    assert torch.equal(batch.span_masks.time, torch.from_numpy(expected))
    assert batch.num_masked == expected.sum() > 0
