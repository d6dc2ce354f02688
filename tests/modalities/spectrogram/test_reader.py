"""Packed recordings as spectrograms: parts, padding, sizes of a plan, and what is reported."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from d2v2ds.data.collate import Collator
from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.order import BatchPlan, MicroBatch, SamplerState
from d2v2ds.data.reader import AnyMask
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.spectrogram.features import DecibelFeatures, FbankFeatures
from d2v2ds.modalities.spectrogram.network import SpectrogramNetwork
from d2v2ds.modalities.spectrogram.reader import SpectrogramDataConfig, SpectrogramReader
from d2v2ds.whole_masks import GridBlocks, SpanWholeMask
from tests.data.fake_audio import FakeAudio

MASK = MaskConfig(kind="block_2d", masked_fraction=0.75, block_length=2, num_masks=2, inverse=True, columns=8)
NETWORK = SpectrogramNetwork(prenet_depth=0, target_length=64, max_rows=20)


class Clips(FakeAudio):
    """Clips at 16 kHz: one too short, one of half of 64 frames, and longer ones."""

    sample_rate_hz = 16000

    def __init__(self) -> None:
        super().__init__(1)
        rng = np.random.default_rng(1)
        lengths = (300, 5500, 12_000, 16_000, 40_000)
        self.clips = [(rng.normal(200, 3000, n)).clip(-32768, 32767).astype(np.int16) for n in lengths]


def reader(mask: AnyMask | None = MASK, network: SpectrogramNetwork = NETWORK, **changes: Any) -> SpectrogramReader:
    settings: dict[str, Any] = {"global_batch_clips": 4, "micro_batch_clips": 2, "min_seconds": 0.2}
    config = SpectrogramDataConfig(shards=Path("fake"), **(settings | changes))
    return SpectrogramReader(JoinedShards([Clips()]), config, network, mask)


def read(of: SpectrogramReader, *rows: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    found = of.read(MicroBatch(epoch, np.array(rows), 64), seed)
    assert found.padding is None and found.source.shape == (len(rows), 128, 64)
    return found.source


def test_a_long_recording_is_cut_behind_its_first_frames_and_a_short_one_is_padded() -> None:
    source = read(reader(), 1, 4)
    clips = Clips()
    for found, row in zip(source, (1, 4), strict=True):
        samples = torch.from_numpy(clips.clips[row].astype(np.float32) / 32768)
        whole = FbankFeatures().compute(samples, float(samples.double().mean()), 128)
        frames = min(64, whole.shape[1])
        torch.testing.assert_close(found[:, :frames], whole[:, :frames])
        assert (found[:, frames:] == FbankFeatures().fill).all()
    assert FbankFeatures().num_frames(5500) == 32 and (source[0, :, 32:] == source[0, 0, 63]).all()


def test_a_random_part_depends_on_seed_epoch_and_row_alone() -> None:
    of = reader(crop="random")
    one = read(of, 4)[0]
    assert torch.equal(one, read(of, 3, 4)[1])
    assert not torch.equal(one, read(of, 4, epoch=1)[0]) and not torch.equal(one, read(of, 4, seed=1)[0])
    assert not torch.equal(one, read(reader(), 4)[0])
    of.augments = False
    assert torch.equal(read(of, 4), read(reader(), 4)), "validation reads the beginning"


def test_a_shift_turns_the_samples_of_a_clip() -> None:
    plain, turned = read(reader(), 3)[0], read(reader(shift=True), 3)[0]
    assert not torch.equal(plain, turned)
    assert float((plain.mean() - turned.mean()).abs()) < 0.05, "the same sound in another order"
    assert not torch.equal(turned, read(reader(shift=True), 3, epoch=1)[0])


def test_decibels_of_a_short_clip_are_padded_with_their_least_value() -> None:
    source = read(reader(features=DecibelFeatures()), 1, 4)
    assert (source[0, :, 36:] == 0).all() and source[0, :, :35].max() == pytest.approx(1.0)
    assert float(source.min()) >= 0 and float(source.max()) <= 1


def test_every_batch_has_as_many_clips_of_one_length_and_none_that_is_too_short() -> None:
    of = reader()
    assert of.sizes.tolist() == [0, 64, 64, 64, 64]
    batches = BatchPlan(of.datasets, config=of.plan_config(), seed=0).iter_from(SamplerState())
    seen = [micro for _ in range(4) for micro in next(batches).micro]
    assert {len(micro.rows) for micro in seen} == {2} and {micro.size for micro in seen} == {64}
    assert {row for micro in seen for row in micro.rows.tolist()} == {1, 2, 3, 4}
    batch = Collator(reader=of, seed=0)(seen[0])
    assert batch.masks is not None and batch.masks.masked.shape == (2, 2, 32) and batch.num_masked == 4 * 24


def test_evaluation_reads_whole_recordings_up_to_whole_patches() -> None:
    of = reader(mask=None)
    assert of.sizes.tolist() == [16, 32, 80, 112, 256]
    for row, size in enumerate(of.sizes.tolist()):
        assert of.read_whole(row).shape == (128, size)
    torch.testing.assert_close(of.read_whole(4)[:, :64], read(reader(), 4)[0])
    of.labelled = SimpleNamespace()  # a task asks for one length
    assert of.sizes.tolist() == [0, 64, 64, 64, 64]


@pytest.mark.parametrize(
    ("mask", "changes", "fault"),
    [
        (MaskConfig(masked_fraction=0.5, num_masks=1), {}, "spectrograms need 'block_2d', 'random' or"),
        (
            SpanWholeMask(fraction=0.5, length=2),
            {},
            "'spans', spectrograms need 'block_2d', 'random' or, on a square grid",
        ),
        (GridBlocks(count=9), {}, "grid_blocks need a square grid, found 32 tokens"),
        (MaskConfig(kind="block_2d", masked_fraction=0.5, num_masks=1, block_length=5, columns=8), {}, "cannot hold"),
        (MASK, {"min_seconds": 3.0}, "the longest clip has 2.50 s, expected 3.000 s or more"),
    ],
)
def test_what_does_not_fit_is_named(mask: AnyMask, changes: dict[str, Any], fault: str) -> None:
    assert reader().faults() == []
    (found,) = reader(mask, **changes).faults()
    assert fault in found


def test_shards_of_another_rate_are_refused() -> None:
    of = reader()
    of.shards.first.sample_rate_hz = 8000
    assert "sample_rate_hz is 8000, spectrograms are computed at 16000" in of.misfits()[0]


def test_what_is_left_out_and_what_is_added_is_said() -> None:
    said = reader().remarks()
    assert said[0].startswith("data.spectrogram: 1 of 5 recordings are never drawn")
    long = SpectrogramNetwork(prenet_depth=0, target_length=512)
    assert "of all frames are padding" in reader(network=long).remarks()[1]
