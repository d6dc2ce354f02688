"""Raw recordings for feature extraction: what is one recording, what are several, and what is none."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v2ds.errors import MachineError
from d2v2ds.modalities.audio.inference import read_waveform
from tests.odd_sounds import RATE, encoded, hum, with_rate, with_size

HUM = hum(1.0).astype(np.float32)


def read(given: Any, rate: Any = None, in_list: bool = True) -> np.ndarray:
    return read_waveform(given, rate, RATE, "input 0", in_list)


@pytest.mark.parametrize("count", [2, 4, 8, 32, 64])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_an_array_that_may_be_several_recordings_is_refused(count: int, make: Any) -> None:
    several = make(np.stack([hum(1.0, seed=seed) for seed in range(count)]))
    with pytest.raises(ValueError, match=r"give list\(x\) for several recordings"):
        read(several, RATE, in_list=False)


def test_channels_are_mixed_where_the_array_can_only_be_one_recording() -> None:
    stereo = np.stack([HUM, hum(1.0, seed=1).astype(np.float32)])
    for given, in_list in ((stereo, True), (stereo.T, True), (stereo.T, False)):
        np.testing.assert_allclose(read(given, RATE, in_list), stereo.mean(axis=0), atol=1e-7)
    np.testing.assert_array_equal(read(HUM[None], RATE, in_list=False), HUM)


@pytest.mark.parametrize("shape", [(9, 16000), (100, 100), (8, 200), (2, 3, 16000), ()])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input 0: expected samples \(S,\), or"):
        read(np.zeros(shape, dtype=np.float32), RATE)


@pytest.mark.parametrize("given", [np.stack([HUM, -HUM]), encoded(np.stack([HUM, -HUM], axis=1))])
def test_channels_that_cancel_each_other_are_refused_as_in_packing(given: Any) -> None:
    with pytest.raises(ValueError, match="input 0: .*2 channels cancel each other"):
        read(given, None if isinstance(given, bytes) else RATE)


def test_recordings_of_datasets_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(HUM, "WAV", "FLOAT"))
    rows = (
        {"path": "gone.wav", "array": HUM, "sampling_rate": RATE},
        {"path": None, "bytes": encoded(HUM, "WAV", "FLOAT")},
        {"path": str(tmp_path / "a.wav"), "bytes": None},
    )
    for row in rows:
        np.testing.assert_array_equal(read(row), HUM)
    np.testing.assert_array_equal(read(rows[0], RATE), HUM)


def test_files_in_memory_are_read(tmp_path: Path) -> None:
    data = encoded(HUM, "WAV", "FLOAT")
    (tmp_path / "a.wav").write_bytes(data)
    with (tmp_path / "a.wav").open("rb") as file:
        for given in (data, bytearray(data), memoryview(data), io.BytesIO(data), file):
            np.testing.assert_array_equal(read(given), HUM)


@pytest.mark.parametrize(
    ("given", "rate", "said"),
    [
        ({"array": HUM}, RATE, r"'sampling_rate', found \['array'\]"),
        ({"array": HUM, "sampling_rate": 8000}, RATE, "says 8000 Hz, sample_rate is 16000"),
        ({"text": "x"}, None, "expected a dict with 'array' and 'sampling_rate'"),
        ({"array": HUM, "sampling_rate": True}, None, "expected sample_rate in Hz, found True"),
        (HUM, 1, "found 1; sampling rate 1 Hz: expected 1,000 to 768,000 Hz"),
        (HUM, float("nan"), "expected sample_rate in Hz, found nan"),
        (b"", None, "empty file"),
        (b"no sound", None, "a file of 8 bytes cannot be decoded"),
        (object(), RATE, "expected a path, samples, .* found object"),
        ([[0.5, 0.5], [0.5]], RATE, "expected samples of one recording"),
    ],
)
def test_what_is_no_recording_is_named(given: Any, rate: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(given, rate)


@pytest.mark.parametrize("suffix", ["WAV", "MP3", "FLAC"])
def test_files_of_odd_names_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.snd")
    path.write_bytes(encoded(HUM, suffix))
    assert len(read(path)) == len(HUM)


def test_a_file_is_whole_or_refused_as_in_packing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.wav")
    wav = encoded(HUM)
    for name, data, said in (
        ("cut.wav", wav[:-100], "cut off: its header says 32000 bytes of samples"),
        ("hertz.wav", with_rate(wav, 1), "sampling rate 1 Hz"),
        ("fifo.wav", None, "expected a file, found a FIFO"),
        ("none.wav", None, "no file"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=said):
            read(tmp_path / name)
    (tmp_path / "pipe.wav").write_bytes(with_size(wav, 0))
    assert len(read(tmp_path / "pipe.wav")) == len(HUM)


def test_a_fault_of_the_machine_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **named: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    (tmp_path / "a.wav").write_bytes(encoded(HUM))
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(MachineError, match="ulimit -n"):
        read(tmp_path / "a.wav")
