"""Recordings as files of strangers: length against header, machine faults, odd names, special files, bounds."""

import errno
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from d2v2ds.errors import MachineError
from d2v2ds.io import machine_faults
from d2v2ds.modalities.audio.extent import MOST_CHUNKS
from d2v2ds.modalities.audio.sound_bytes import BadAudioError
from d2v2ds.modalities.audio.sound_file import most_samples, open_sound, resampled
from tests.odd_sounds import RATE, encoded, hum, with_flac_length, with_rate, with_size

WHOLE = [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("AIFF", "PCM_16"),
    ("AU", "PCM_16"), ("CAF", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip


def read(data: bytes | Path) -> tuple[np.ndarray, list[str]]:
    """Samples of a sound file, and the kinds of what was remarked."""
    with open_sound(data) as sound:
        samples = np.concatenate([np.empty(0, dtype=np.float32), *sound.blocks()])
        return samples, [one.kind for one in sound.remarks]


@pytest.mark.parametrize(("format", "subtype"), WHOLE)
@pytest.mark.parametrize("seconds", [0.2, 3.0])
def test_a_whole_recording_has_no_remarks(format: str, subtype: str, seconds: float) -> None:
    samples = hum(seconds)
    for channels in (samples, np.stack([samples, 0.5 * hum(seconds, seed=1)], axis=1)):
        found, remarks = read(encoded(channels, format, subtype))
        assert remarks == []
        assert abs(len(found) - len(samples)) < 600  # MP3 and Opus pad


@pytest.mark.parametrize("count", [1, 100, 5000])
@pytest.mark.parametrize("format", ["WAV", "FLAC", "AU"])
def test_a_file_of_few_bytes_has_none_before_its_beginning(tmp_path: Path, format: str, count: int) -> None:
    (tmp_path / "a").write_bytes(encoded(np.full(count, 0.25), format))
    assert len(read(tmp_path / "a")[0]) == count


@pytest.mark.parametrize(("format", "subtype"), WHOLE)
def test_a_recording_that_was_cut_off_is_refused(format: str, subtype: str) -> None:
    data = encoded(hum(3.0), format, subtype)
    with pytest.raises(BadAudioError, match=r"cut off"):
        read(data[: len(data) // 2])


@pytest.mark.parametrize("format", ["RF64", "W64", "AU", "CAF", "MP3", "OGG"])
def test_samples_behind_the_end_that_a_header_says_are_remarked(format: str) -> None:
    subtype = {"MP3": "MPEG_LAYER_III", "OGG": "VORBIS"}.get(format, "PCM_16")
    data = encoded(hum(3.0), format, subtype)
    with open_sound(data + data) as sound:
        for _ in sound.blocks():
            pass
        (remark,) = sound.remarks
    assert remark.kind == "goes on" and 0.4 < remark.lost < 0.6


@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("stated", [10, 20000])
def test_flac_that_goes_on_behind_its_stated_length_is_read_to_its_end(bits: int, stated: int) -> None:
    samples, remarks = read(with_flac_length(encoded(hum(3.0), "FLAC", f"PCM_{bits}"), stated))
    assert (len(samples), remarks) == (48000, ["streamed"])


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF - 36, 0x7FFFF000, 0x80000000])
def test_a_wav_whose_writer_did_not_know_the_length_is_read_to_its_end_and_remarked(size: int) -> None:
    whole = encoded(hum())
    samples, remarks = read(with_size(whole, size))
    np.testing.assert_array_equal(samples, read(whole)[0])
    assert remarks == ["streamed"]


def test_a_large_size_that_no_streaming_writer_leaves_is_a_file_that_was_cut_off() -> None:
    with pytest.raises(BadAudioError, match="header says 3000000000 bytes of samples, found 32000"):
        read(with_size(encoded(hum()), 3_000_000_000))


def test_chunks_and_padding_behind_the_samples_are_no_samples() -> None:
    odd = encoded(hum()[:15999] * 0.5, "WAV", "PCM_U8")
    odd = odd if len(odd) % 2 == 0 else odd + b"\0"
    for tail in (b"LIST\4\0\0\0abcd", b"xyzw\2\0\0\0ab", bytes(500), b"id3 \xff\xff\0\0cut"):
        assert read(odd + tail)[1] == []
    assert read(odd + b"\xff\x01junk" * 20)[1] == ["goes on"]


def test_looking_for_samples_ends_in_a_file_of_nothing_but_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(os, "pread", lambda *given, pread=os.pread: reads.append(1) or pread(*given))
    path = Path("/proc/self/fd") / str(os.memfd_create("chunks"))
    path.write_bytes(b"RIFF\xff\xff\xff\xffWAVE" + b"junk\0\0\0\0" * (3 * MOST_CHUNKS))
    with pytest.raises(BadAudioError):
        read(path)
    assert len(reads) < MOST_CHUNKS + 20


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOMEM])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize(("format", "subtype"), [("WAV", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS")])
def test_a_failed_read_is_the_machines_fault_wherever_it_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, subtype: str, after: int, code: int
) -> None:
    (tmp_path / "a").write_bytes(encoded(hum(3.0), format, subtype))
    reads = iter(range(1000))

    def preadv(*given: Any, real: Any = os.preadv) -> int:
        if next(reads) >= after:
            raise OSError(code, os.strerror(code))
        return real(*given)  # type: ignore[no-any-return]

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(MachineError, match=os.strerror(code)):
        read(tmp_path / "a")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE])
def test_a_failed_open_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*given: Any, **named: Any) -> int:
        raise OSError(code, os.strerror(code))

    (tmp_path / "a").write_bytes(encoded(hum()))
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MachineError, match=os.strerror(code)):
        read(tmp_path / "a")


def test_memory_that_ran_out_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(soundfile.SoundFile, "read", refuse)
    with pytest.raises(MachineError, match="no memory left"):
        read(encoded(hum()))


@pytest.mark.parametrize("error", [TypeError, UnicodeEncodeError, ZeroDivisionError, RecursionError])
def test_whatever_a_library_raises_is_a_bad_recording(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise error("utf-8", "a", 0, 1, "surrogates not allowed") if error is UnicodeEncodeError else error("odd")

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    with pytest.raises(BadAudioError, match=error.__name__):
        read(encoded(hum()))


def test_transient_faults_are_tried_again_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_faults.time, "sleep", lambda seconds: None)
    for code, calls in ((errno.ESTALE, 3), (errno.EMFILE, 1)):
        left = [OSError(code, "odd")] * 2
        tried = []

        def attempt(left: list[OSError] = left, tried: list[int] = tried) -> str:
            tried.append(1)
            if left:
                raise MachineError("odd") from left.pop()
            return "read"

        if calls == 3:
            assert machine_faults.retried(attempt) == "read"
        else:
            with pytest.raises(MachineError):
                machine_faults.retried(attempt)
        assert len(tried) == calls


def test_special_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    named = {tmp_path / "fifo": "a FIFO", tmp_path / "socket": "a socket", Path("/dev/zero"): "a device"}
    for path, name in (*named.items(), (tmp_path, "a folder")):
        with pytest.raises(BadAudioError, match=f"expected a file, found {name}"):
            read(path)
    server.close()


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_rates_that_no_recorder_has_are_refused(rate: int) -> None:
    with pytest.raises(BadAudioError, match=f"sampling rate {rate:,} Hz: expected 1,000 to 768,000 Hz"):
        read(with_rate(encoded(hum()), rate))


@pytest.mark.parametrize("rate", [1000, 1001, 767_999])
def test_resampling_takes_one_block_at_a_time(rate: int) -> None:
    blocks = [np.zeros(1 << 18, dtype=np.float32)] * 3
    longest = max(map(len, resampled(iter(blocks), rate, RATE)))
    assert longest <= (1 << 18) * RATE / rate * 2 + 10_000


def test_a_block_of_many_channels_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    real = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, frames, **named: wanted.append(frames) or real(self, frames, **named)
    )
    read(encoded(np.random.default_rng(0).normal(0, 0.1, (300, 1024))))
    assert max(wanted) * 1024 * 4 <= 8 << 20


def test_a_length_that_the_bytes_cannot_have_is_not_believed() -> None:
    data = with_flac_length(encoded(hum(), "FLAC", "PCM_24"), 2**36 - 1)
    with open_sound(data) as sound:
        assert sound.frames <= len(data)
    assert most_samples(len(data)) < 1 << 28


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_cancel_each_other_are_refused_or_remarked(channels: int) -> None:
    one = hum()
    signs = np.resize([1.0, -1.0], channels)
    with pytest.raises(BadAudioError, match=f"{channels} channels cancel each other"):
        read(encoded(one[:, None] * signs, "WAV", "PCM_16"))
    weak = np.where(signs > 0, 1.0, -0.8)
    assert read(encoded(one[:, None] * weak, "WAV", "FLOAT"))[1] == ["cancelled"]
    independent = np.random.default_rng(0).normal(0, 0.1, (16000, channels))
    for fine in (independent, independent + 0.5, one[:, None] * (signs > 0), np.zeros((16000, channels))):
        assert read(encoded(fine, "WAV", "FLOAT"))[1] == []
