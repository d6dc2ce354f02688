"""Decoding, statistics and cuts."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from preprocessing.audio.levels import to_int16
from preprocessing.audio.waveform import BadAudioError, Decoder, cut_points, mean_and_variance
from tests.preprocessing.helpers import noise


def test_mono_int16_files_are_stored_sample_for_sample(tmp_path: Path) -> None:
    samples = noise(1.0, 0)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"a.{suffix}", samples, 16000, subtype="PCM_16")
        np.testing.assert_array_equal(Decoder(16000).decode(str(tmp_path / f"a.{suffix}")), samples)


def test_decoder_reuses_its_buffer_for_shorter_and_longer_files(tmp_path: Path) -> None:
    decoder = Decoder(16000)
    for number, seconds in enumerate((0.5, 2.0, 0.1)):
        samples = noise(seconds, number)
        soundfile.write(tmp_path / "a.wav", samples, 16000)
        np.testing.assert_array_equal(decoder.decode(str(tmp_path / "a.wav")), samples)


@pytest.mark.parametrize("subtype", ["PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wider_sources_are_rounded_and_clipped(tmp_path: Path, subtype: str) -> None:
    values = np.array([0.0, 0.25, -1.0, 0.9999999, 100.4 / 32768, 100.6 / 32768, -100.6 / 32768] * 300)
    soundfile.write(tmp_path / "a.wav", values, 16000, subtype=subtype)
    expected = [0, 8192, -32768, 32767, 100, 101, -101] * 300
    np.testing.assert_array_equal(Decoder(16000).decode(str(tmp_path / "a.wav")), expected)


def test_values_beyond_full_scale_are_clipped_not_wrapped() -> None:
    assert to_int16(np.array([1.5, -1.5], dtype=np.float32)).tolist() == [32767, -32768]


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = noise(0.5, 1), noise(0.5, 2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000)
    mixed = np.rint((left.astype(np.float64) + right) / 2)
    np.testing.assert_array_equal(Decoder(16000).decode(str(tmp_path / "a.wav")), mixed)


def test_resampling_in_blocks_equals_resampling_at_once(tmp_path: Path) -> None:
    samples = noise(40.0, 3, rate=8000)  # more than one block of 2**18 frames
    soundfile.write(tmp_path / "a.wav", samples, 8000)
    whole = soxr.resample((samples / 32768).astype(np.float32), 8000, 16000)
    found = Decoder(16000).decode(str(tmp_path / "a.wav"))
    assert len(found) == len(whole) == 640000
    assert np.abs(found - to_int16(whole)).max() <= 1


def test_nan_samples_are_refused(tmp_path: Path) -> None:
    values = noise(1.0, 4) / 32768
    values[500] = np.nan
    soundfile.write(tmp_path / "a.wav", values, 16000, subtype="FLOAT")
    with pytest.raises(BadAudioError, match="NaN"):
        Decoder(16000).decode(str(tmp_path / "a.wav"))


def test_flac_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", noise(4.0, 5), 16000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadAudioError):
        Decoder(16000).decode(str(tmp_path / "a.flac"))


@pytest.mark.parametrize("bits", [16, 24])
def test_flac_of_unknown_length_is_read_to_its_end(tmp_path: Path, bits: int) -> None:
    """As an encoder writes into a pipe."""
    soundfile.write(tmp_path / "a.flac", noise(30.0, 5), 16000, subtype=f"PCM_{bits}")
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    np.testing.assert_array_equal(Decoder(16000).decode(str(tmp_path / "a.flac")), noise(30.0, 5))


@pytest.mark.parametrize("format", ["WAV", "WAVEX"])
def test_wav_that_was_cut_off_is_refused(tmp_path: Path, format: str) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1.0, 5), 16000, format=format)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(data[:-2])
    with pytest.raises(BadAudioError, match="cut off: its header says 32000 bytes of samples, found 31998"):
        Decoder(16000).decode(str(tmp_path / "a.wav"))
    place = data.index(b"data") + 4  # streamed: the header says everything that fits, or nothing
    for size in (0xFFFFFFFF, 0x7FFFFFFF - 36):
        (tmp_path / "a.wav").write_bytes(data[:place] + size.to_bytes(4, "little") + data[place + 4 :])
        np.testing.assert_array_equal(Decoder(16000).decode(str(tmp_path / "a.wav")), noise(1.0, 5))


def test_memory_is_taken_once_for_a_long_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", noise(3.0, 5), 16000)
    monkeypatch.setattr("preprocessing.audio.waveform._LARGEST_PIECE", 1000)
    decoder = Decoder(16000)
    np.testing.assert_array_equal(decoder.decode(str(tmp_path / "a.wav")), noise(3.0, 5))
    assert len(decoder._buffer) == 48000


@pytest.mark.parametrize("count", [1, 4095, 4096, 300_001])
def test_mean_and_variance_are_exact_functions_of_the_integers(count: int) -> None:
    samples = np.random.default_rng(count).integers(-32768, 32768, count).astype(np.int16)
    values = [Fraction(int(value), 32768) for value in samples]
    mean = sum(values, Fraction()) / count
    squares = sum((value * value for value in values), Fraction()) / count
    assert mean_and_variance(samples) == (float(mean), float(squares - mean * mean))


def test_statistics_of_full_scale_do_not_overflow() -> None:
    assert mean_and_variance(np.full(600_000, -32768, dtype=np.int16)) == (-1.0, 0.0)


def test_recordings_are_cut_in_their_pauses() -> None:
    samples = noise(25.0, 6)
    pauses = [7.5, 15.2]
    for pause in pauses:
        samples[int((pause - 0.1) * 16000) : int((pause + 0.1) * 16000)] //= 100
    bounds = cut_points(samples, 10 * 16000, 16000, 16000)
    np.testing.assert_allclose(np.array(bounds[1:-1]) / 16000, pauses, atol=0.1)


@pytest.mark.parametrize("seconds", [10.0, 10.01, 10.5, 19.9, 20.0, 20.5, 61.3])
def test_no_piece_is_longer_than_the_limit_or_shorter_than_the_minimum(seconds: float) -> None:
    samples = noise(seconds, 7)
    lengths = np.diff(cut_points(samples, 10 * 16000, 2 * 16000, 16000))
    assert lengths.sum() == len(samples)
    assert lengths.max() <= 10 * 16000 and lengths.min() >= 2 * 16000


def test_silence_is_cut_as_late_as_possible() -> None:
    bounds = cut_points(np.zeros(30 * 16000, dtype=np.int16), 10 * 16000, 16000, 16000)
    assert bounds[1] == pytest.approx(10 * 16000, abs=1600)
