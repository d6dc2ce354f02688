"""Recordings that are read in blocks give what the whole file gives."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from d2v2ds.modalities.audio import long_sound
from d2v2ds.modalities.audio.inference import AudioInference, normalised, read_waveform
from d2v2ds.modalities.audio.long_sound import LongSound, Moments
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.inference import InputOptions
from tests.model.tiny import CONV_LAYERS

RATE = 16000
NETWORK = AudioNetwork(conv_layers=CONV_LAYERS, prenet_depth=1)


def inference() -> AudioInference:
    return AudioInference(NETWORK, {"sample_rate_hz": RATE, "variance_eps": 1e-5})


def record(path: Path, seconds: float, rate: int = 44100, channels: int = 2) -> Path:
    """Noise that becomes louder, far from zero in the mean."""
    count = int(seconds * rate)
    noise = np.random.default_rng(0).standard_normal((count, channels))
    soundfile.write(path, 0.05 * noise * np.linspace(0.1, 1, count)[:, None] + 0.3, rate)
    return path


def test_moments_of_blocks_are_those_of_the_whole() -> None:
    samples = (1000 + np.random.default_rng(0).standard_normal(10_001)).astype(np.float32)
    moments = Moments()
    for block in np.split(samples, [0, 1, 77, 5000]):
        moments.add(block)
    wide = samples.astype(np.float64)
    assert moments.count == 10_001
    assert moments.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert moments.variance == pytest.approx(wide.var(), rel=1e-9)
    assert Moments().variance == 0.0


@pytest.mark.parametrize("kept", [1 << 22, 1000], ids=["from memory", "from the file again"])
def test_pieces_of_a_file_are_those_of_the_whole_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(long_sound, "_KEPT_SAMPLES", kept)
    path = record(tmp_path / "long.wav", 14.3)
    options = InputOptions(window_seconds=2.0, context_seconds=0.3)
    whole = normalised(read_waveform(path, None, RATE, "x"), 1e-5)
    expected, found = inference().cut(3, whole, options), list(inference().pieces(3, path, options, "x"))
    assert len(found) == len(expected) > 8
    for one, other in zip(found, expected, strict=True):
        assert (one.index, one.first, one.last, one.place) == (3, other.first, other.last, other.place)
        assert torch.allclose(one.source, other.source, rtol=0, atol=1e-6)
    # every token once, and the middle of the overlap divides two windows
    assert [one.place for one in found] == np.cumsum([0, *(one.last - one.first for one in found)])[:-1].tolist()
    assert all(one.first == int(0.3 / inference().token_seconds) for one in found[1:-1])


def test_a_short_file_is_one_piece_normalised_as_a_whole(tmp_path: Path) -> None:
    path = record(tmp_path / "short.wav", 1.5)
    (piece,) = inference().pieces(0, path, InputOptions(), "x")
    whole = normalised(read_waveform(path, None, RATE, "x"), 1e-5)
    assert piece.source.shape == whole.shape and torch.allclose(piece.source, whole, rtol=0, atol=1e-6)
    assert (piece.first, piece.last) == (0, NETWORK.num_tokens(len(whole)))


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_sound, "_KEPT_SAMPLES", 1000)
    peaks = []
    for seconds in (120, 480):
        path = record(tmp_path / "long.wav", seconds, 8000, 1)
        tracemalloc.start()
        for _ in inference().pieces(0, path, InputOptions(window_seconds=5.0), "x"):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0], peaks


def test_a_file_that_became_shorter_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_sound, "_KEPT_SAMPLES", 1000)
    sound = LongSound(record(tmp_path / "x.wav", 4.0, RATE, 1), RATE, "input")
    record(tmp_path / "x.wav", 2.0, RATE, 1)
    with pytest.raises(ValueError, match=r"input: expected 50000 samples as when it was first read, found 32000"):
        list(sound.ranges([(0, 50000)]))


@pytest.mark.parametrize("context", [1.0, 5.0, -0.1])
def test_a_context_that_leaves_nothing_is_refused(tmp_path: Path, context: float) -> None:
    path = record(tmp_path / "x.wav", 6.0)
    options = InputOptions(window_seconds=2.0, context_seconds=context)
    with pytest.raises(ValueError, match="expected less than half of a window of 2"):
        list(inference().pieces(0, path, options, "x"))
