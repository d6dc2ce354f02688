"""Log-mel features: the formulas as slow loops, another library where it can compute them, and known numbers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v2ds.modalities.spectrogram.features import (
    SILENCE,
    DecibelFeatures,
    FbankFeatures,
    fbank,
    mel_filters,
    mel_power,
)


def waveform(samples: int, seed: int = 0) -> Tensor:
    """Noise with a tone and an offset, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(samples) / 16000)
    return torch.from_numpy((tone + 0.02 * rng.normal(size=samples) + 0.1).astype(np.float32))


def power_at(frame: list[float], line: int, fft: int) -> float:
    """Squared magnitude of one line of a spectrum."""
    found = sum(x * complex(math.cos(t := -2 * math.pi * line * n / fft), math.sin(t)) for n, x in enumerate(frame))
    return abs(found) ** 2


def test_one_frame_is_that_of_the_formulas() -> None:
    samples = waveform(1000).double().tolist()
    start = 2 * 160
    frame = samples[start : start + 400]
    mean = sum(frame) / 400
    frame = [x - mean for x in frame]
    frame = [x - 0.97 * before for x, before in zip(frame, [frame[0], *frame], strict=False)]
    frame = [x * (0.5 - 0.5 * math.cos(2 * math.pi * n / 399)) for n, x in enumerate(frame)]
    powers = [power_at(frame, line, 512) for line in range(257)]

    def mel(hertz: float) -> float:
        return 1127 * math.log(1 + hertz / 700)

    step = (mel(8000) - mel(20)) / 129
    found = fbank(torch.tensor(samples, dtype=torch.float32), 128)
    assert found.shape == (4, 128)
    for number in range(128):
        left, middle, right = (mel(20) + step * (number + i) for i in range(3))
        total = 0.0
        for line, power in enumerate(powers):
            at = mel(line * 31.25)
            total += power * max(0.0, min((at - left) / (middle - left), (right - at) / (right - middle)))
        assert float(found[2, number]) == pytest.approx(math.log(max(total, 1.1920928955078125e-07)), abs=2e-3)


def test_the_filter_bank_is_kaldis_where_that_has_one() -> None:
    """kaldi-native-fbank refuses 128 bins of 512 points, in which the lowest filters hold no line."""
    knf = pytest.importorskip("kaldi_native_fbank", reason="needs the extra `audio`")
    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.window_type = 0, "hanning"
    samples = waveform(16000) - waveform(16000).mean()
    for bins in (40, 80):
        options.mel_opts.num_bins = bins
        computer = knf.OnlineFbank(options)
        computer.accept_waveform(16000, samples.numpy())
        computer.input_finished()
        expected = np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)])
        np.testing.assert_allclose(fbank(samples, bins).numpy(), expected, atol=2e-3)
    options.mel_opts.num_bins = 128
    with pytest.raises(ValueError, match="num_mel_bins too large"):
        knf.OnlineFbank(options)


def test_bins_narrower_than_the_spectrum_stay_at_the_floor() -> None:
    empty = mel_filters(128, 512, 20.0, 1127.0, 700.0).sum(0) == 0
    assert 0 < int(empty.sum()) < 12 and not empty[20:].any()
    found = fbank(waveform(4000), 128)
    assert (found[:, empty] == SILENCE).all() and (found[:, ~empty] > SILENCE).all()


@pytest.mark.parametrize(("seconds", "frames"), [(10, 998), (5, 498), (1, 98)])
def test_frames_are_whole(seconds: int, frames: int) -> None:
    settings = FbankFeatures()
    assert settings.num_frames(16000 * seconds) == frames
    assert settings.num_frames(settings.num_samples(frames)) == frames
    assert settings.num_frames(settings.num_samples(frames) - 1) == frames - 1
    assert settings.num_frames(399) == 0


@pytest.mark.parametrize(
    ("mean", "std", "fill"), [(-4.268, 4.569, 0.4671), (-6.627, 5.359, 0.6183), (-6.846, 5.565, 0.6151)]
)
def test_padding_is_no_silence_unless_asked_for(mean: float, std: float, fill: float) -> None:
    """Values of the published padding after normalisation by the constants of three corpora."""
    assert FbankFeatures(mean=mean, std=std).fill == pytest.approx(fill, abs=1e-4)
    silent = FbankFeatures(mean=mean, std=std, padding="silence")
    digital = silent.compute(torch.zeros(400), 0.0, 128)
    assert (digital == pytest.approx(silent.fill)) and silent.fill < -0.5
    assert FbankFeatures(padding="silence").fill == pytest.approx(-1.28, abs=0.005)


def test_the_mean_of_the_recording_is_subtracted_and_twice_the_deviation_divides() -> None:
    samples = waveform(2000)
    mean = float(samples.mean())
    expected = (fbank(samples - mean, 128).T + 4.268) / 9.138
    torch.testing.assert_close(FbankFeatures().compute(samples, mean, 128), expected)


# ---- decibels ----


def test_mel_power_of_one_frame_is_that_of_the_formulas() -> None:
    samples = waveform(1600).double().tolist()
    centre = 4 * 160
    frame = [samples[centre - 512 + n] if centre - 512 + n >= 0 else samples[512 - centre - n] for n in range(1024)]
    frame = [x * (0.5 - 0.5 * math.cos(2 * math.pi * n / 1024)) for n, x in enumerate(frame)]
    found = mel_power(torch.tensor(samples, dtype=torch.float32), 128)
    assert found.shape == (11, 128)

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    def hertz(number: int) -> float:
        return 700 * (10 ** (mel(8000) * number / 129 / 2595) - 1)

    for number in (20, 40, 77, 127):
        left, middle, right = (hertz(number + i) for i in range(3))
        total = 0.0
        for line in range(513):
            at = line * 15.625
            weight = max(0.0, min((at - left) / (middle - left), (right - at) / (right - middle)))
            total += weight * power_at(frame, line, 1024) if weight else 0.0
        assert float(found[4, number]) == pytest.approx(total, rel=2e-3, abs=1e-6)


def test_decibels_fill_the_range_of_each_clip() -> None:
    settings = DecibelFeatures()
    found = settings.compute(waveform(16000), 0.0, 128)
    assert found.shape == (128, 101) and settings.num_frames(16000) == 101
    assert float(found.min()) == 0.0 and float(found.max()) == pytest.approx(1.0)
    louder = settings.compute(waveform(16000) * 0.1, 0.0, 128)
    torch.testing.assert_close(found, louder, atol=2e-3, rtol=0)
    decibels = 10 * mel_power(waveform(16000), 128).clamp(min=1e-10).log10()
    narrow = DecibelFeatures(top_db=20.0).compute(waveform(16000), 0.0, 128)
    assert float((narrow == 0).float().mean()) == pytest.approx(
        float((decibels <= decibels.max() - 20).float().mean()), abs=1e-3
    )
    assert settings.num_frames(settings.num_samples(64)) == 64 and settings.num_frames(512) == 0
