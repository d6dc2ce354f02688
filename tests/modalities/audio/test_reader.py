"""Normalisation over the whole recording, and where crops begin."""

import numpy as np
import pytest
import soundfile
import torch

from d2v2ds.config.load import load_config
from d2v2ds.errors import ConfigError
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.audio.reader import crop_starts, decode
from d2v2ds.modalities.audio.shards import AudioShards
from preprocessing.pack_audio import main as pack_audio
from tests.data.fake_audio import FakeAudio, fake_config, fake_reader


def crop(source, row, start, length):
    out = np.empty(length, dtype=np.float32)
    decode(source, row, start, out)
    return out


@pytest.mark.parametrize("row", range(5))
def test_a_crop_equals_the_crop_of_the_normalised_recording(row):
    source = FakeAudio(5)
    whole = torch.from_numpy(source.clips[row].astype(np.float32) / 32768)
    expected = torch.nn.functional.layer_norm(whole, whole.shape, eps=1e-5).numpy()
    length = len(expected) // 3
    for start in (0, 17, len(expected) - length):
        np.testing.assert_allclose(crop(source, row, start, length), expected[start : start + length], atol=2e-5)


@pytest.mark.parametrize("codec", ["pcm16", "flac"])
def test_a_crop_from_shards_equals_the_crop_of_the_normalised_file(tmp_path, codec):
    rng = np.random.default_rng(0)
    for i in range(3):
        noise = rng.normal(0.1 * i, 0.05 * (i + 1), 16_000 * (i + 2)).clip(-1, 1)
        soundfile.write(tmp_path / f"{i}.wav", noise, 16_000, subtype="PCM_16")
    assert pack_audio(["--input", str(tmp_path), "--output", str(tmp_path / "shards"), "--codec", codec]) == 0
    shards = AudioShards(tmp_path / "shards")
    assert len(shards) == 3
    for row in range(3):
        whole, _ = soundfile.read(tmp_path / shards[row].id, dtype="float32")
        whole = torch.from_numpy(whole)
        expected = torch.nn.functional.layer_norm(whole, whole.shape, eps=1e-5).numpy()
        for start in (0, 4097, len(expected) - 8000):
            np.testing.assert_allclose(crop(shards, row, start, 8000), expected[start : start + 8000], atol=2e-5)


def test_silence_stays_zero():
    source = FakeAudio(1)
    source.clips[0] = np.zeros(300, dtype=np.int16)
    assert (crop(source, 0, 10, 50) == 0).all()


def test_crops_reach_every_place_where_they_fit_and_no_other():
    rows = np.arange(4000)
    starts = crop_starts(np.full(4000, 103), 100, seed=0, epoch=0, rows=rows)
    counts = np.bincount(starts)
    assert len(counts) == 4 and (abs(counts - 1000) < 4 * np.sqrt(750)).all()
    assert (crop_starts(np.full(4000, 100), 100, seed=0, epoch=0, rows=rows) == 0).all()


def test_a_crop_depends_on_seed_epoch_and_row_only():
    lengths = np.full(50, 100_000)
    origin = {"seed": 0, "epoch": 0, "rows": np.arange(50)}
    first = crop_starts(lengths, 1000, **origin)
    alone = [crop_starts(lengths[:1], 1000, **(origin | {"rows": [row]}))[0] for row in range(50)]
    assert first.tolist() == alone
    for change in ({"seed": 1}, {"epoch": 1}, {"rows": np.arange(50) + 50}):
        assert (crop_starts(lengths, 1000, **(origin | change)) != first).sum() > 45


MASK = MaskConfig(masked_fraction=0.5, block_length=3, num_masks=2)


def test_seconds_become_micro_batches_without_rounding_surprises():
    for num_micro in range(1, 100):
        limits = {"global_batch_seconds": num_micro * 0.1, "micro_batch_seconds": 0.1, "max_seconds": 0.1}
        assert fake_reader(FakeAudio(2), MASK, min_seconds=0.1, **limits).plan_config().num_micro == num_micro


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_seconds": 9.0}, "min_seconds 9.0"),
        ({"micro_batch_seconds": 1.0}, "micro_batch_seconds 1 cannot hold one row of 2 seconds"),
        ({"global_batch_seconds": 3.0}, "global_batch_seconds 3 is less than micro_batch_seconds 4"),
        (
            {"global_batch_seconds": 10.0},
            "global_batch_seconds 10 is no whole number of micro-batches of 4; expected for example "
            "global_batch_seconds=8 or global_batch_seconds=12 or micro_batch_seconds=3.33333333",
        ),
    ],
)
def test_contradicting_limits_are_refused(changes, message):
    assert fake_config().check() == []
    (fault,) = fake_config(**changes).check()
    assert fault.startswith("data.audio.") and message in fault


@pytest.mark.parametrize(
    ("override", "bound"),
    [
        ("min_seconds=0.0", "greater than 0"),
        ("max_seconds=0.0", "greater than 0"),
        ("micro_batch_seconds=-1.0", "greater than 0"),
        ("global_batch_seconds=0.0", "greater than 0"),
        ("sample_rate_hz=0", "greater than or equal to 1"),
        ("loss_weight=-1.0", "greater than or equal to 0"),
    ],
)
def test_amounts_out_of_bounds_are_named_with_what_was_found(override, bound):
    name, value = override.split("=")
    with pytest.raises(ConfigError, match=f"data.audio.{name}: Input should be {bound}, found {value}"):
        load_config("audio_tiny", ["data.audio.shards=x", f"data.audio.{override}"])


def test_the_evaluation_view_is_the_whole_normalised_recording():
    source = FakeAudio(3)
    whole = fake_reader(source, MASK).read_whole(1)
    assert torch.equal(whole, torch.from_numpy(crop(source, 1, 0, len(source.clips[1]))))
