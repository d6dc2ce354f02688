"""What packing recordings loses: noted with its share, or skipped with the reason; never without a word."""

import errno
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from preprocessing import inspect, verify
from preprocessing.audio.levels import Levels
from preprocessing.audio.waveform import BadAudioError, Decoder
from preprocessing.driver.input_files import said_ignored
from preprocessing.pack_audio import main
from tests.odd_sounds import RATE, encoded, hum, with_flac_length, with_rate, with_size

FINE = encoded(hum(2.0))


def pack(folder: Path, files: dict[str, bytes], *options: str) -> tuple[int, Path]:
    """Pack files; the exit code, and the shard folder."""
    (folder / "in").mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / "in" / name).write_bytes(data)
    arguments = ["--input", str(folder / "in"), "--output", str(folder / "out"), "--workers", "1", *options]
    return main(arguments), folder / "out"


def table(path: Path) -> dict[str, list[str]]:
    """Lines of a table beside the shards by their file."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return {line.split("\t")[0]: line.split("\t")[1:] for line in lines}


NOTED = {
    "peaks.wav": (encoded(hum(2.0, 0.4), "WAV", "FLOAT"), "clipped", 0.012),
    "silent.wav": (encoded(np.zeros(RATE)), "silent", 1.0),
    "constant.flac": (encoded(np.full(RATE, 0.25), "FLAC"), "silent", 1.0),
    "half.wav": (encoded(np.concatenate([np.zeros(2 * RATE), hum(2.0)])), "silent", 0.49),
    "quiet.wav": (encoded(hum(2.0, 2e-5), "WAV", "PCM_24"), "quiet", 0.2),
    "weak.wav": (encoded(np.stack([hum(2.0), -0.8 * hum(2.0)], axis=1), "WAV", "PCM_16"), "cancelled", 0.97),
    "tail.wav": (encoded(hum(2.0)) + b"more" * 8000, "goes on", 0.33),
    "pipe.wav": (with_size(FINE, 0xFFFFFFFF), "streamed", 0.0),
    "pipe_zero.wav": (with_size(FINE, 0), "streamed", 0.0),
    "short.flac": (with_flac_length(encoded(hum(2.0), "FLAC"), 8000), "streamed", 0.0),
}


@pytest.mark.parametrize("name", NOTED)
def test_a_loss_is_noted_counted_limited_and_shown(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, kind, lost = NOTED[name]
    options = ["--max-seconds", "2.2"] if name == "half.wav" else []
    code, output = pack(tmp_path, {name: data, "fine.wav": FINE}, *options)
    said = capsys.readouterr()
    assert table(output / "notes.tsv").keys() == {name}
    found, detail, share = table(output / "notes.tsv")[name]
    assert found == kind and detail
    assert float(share) == pytest.approx(lost, rel=0.2)
    notes = json.loads((output / "index.json").read_text())["notes"]
    assert notes == {kind: {"files": 1, "lost": pytest.approx(lost / 2, rel=0.2)}}
    assert f"1 {kind}" in said.out
    assert code == (3 if lost / 2 > 0.01 else 0)
    assert (f"{kind} " in said.err and "notes.tsv" in said.err) == (code == 3)
    for command in (inspect.main, verify.main):
        command([str(output)])
        assert f"1 {kind}" in capsys.readouterr().out


SKIPPED = {
    "sigma50.wav": (encoded(hum(2.0, 50.0), "WAV", "FLOAT"), "clipped: .* samples lie beyond full scale, peak 2"),
    "integers.wav": (encoded(hum(2.0) * 32768, "WAV", "DOUBLE"), "clipped: .* scale the recording"),
    "micro.wav": (encoded(hum(2.0, 1e-6), "WAV", "FLOAT"), "too quiet: its range is 0.2"),
    "micro24.wav": (encoded(hum(2.0, 3e-6) + 0.25, "WAV", "DOUBLE"), "too quiet: .* peak 0.25"),
    "opposite.wav": (encoded(np.stack([hum(2.0), -hum(2.0)], axis=1)), "2 channels cancel each other"),
    "opposite.flac": (encoded(np.stack([hum(2.0), -hum(2.0)], axis=1), "FLAC"), "2 channels cancel each other"),
    "cut.wav": (FINE[:-500], "cut off: its header says 64000 bytes of samples, found 63500"),
    "cut.mp3": (encoded(hum(9.0), "MP3")[:20000], "cut off: its header says 144000 samples, found"),
    "cut.ogg": (encoded(hum(9.0), "OGG")[:20000], "cut off: its last page"),
    "hertz.wav": (with_rate(FINE, 1), "sampling rate 1 Hz: expected 1,000 to 768,000 Hz"),
    "none.wav": (with_size(encoded(np.zeros(0)), 0) + b"LIST\0\0\0\0", "no samples: its header says none"),
    "loud.wav": (encoded(np.full((RATE, 2), 3e38), "WAV", "FLOAT"), "NaN or infinite"),
}


@pytest.mark.parametrize("name", SKIPPED)
@pytest.mark.parametrize("more", [[], ["--join-seconds", "3", "6"]])
def test_a_recording_of_which_nothing_would_be_left_is_skipped_with_the_reason(
    name: str, more: list[str], tmp_path: Path
) -> None:
    data, reason = SKIPPED[name]
    (tmp_path / "in").mkdir()
    manifest = tmp_path / "in" / "m.tsv"
    manifest.write_text(f"path\tspeaker\n{name}\tanna\nfine.wav\tanna\n")
    for file, content in ((name, data), ("fine.wav", FINE)):
        (tmp_path / "in" / file).write_bytes(content)
    arguments = ["--input", str(manifest), "--output", str(tmp_path / "out"), "--workers", "1", "--resample", *more]
    assert main(arguments) == 3
    skipped = table(tmp_path / "out" / "skipped.tsv")
    assert skipped.keys() == {name}
    assert re.search(reason, skipped[name][0]), skipped[name][0]


def test_full_scale_is_no_clipping_and_loud_files_are_not_quiet() -> None:
    levels, out = Levels(), np.empty(4, dtype=np.int16)
    levels.store(np.array([1.0, -1.0, 0.0, 0.5], dtype=np.float32), out)
    assert levels.remarks() == [] and out.tolist() == [32767, -32768, 0, 16384]


def test_quietness_is_judged_over_the_whole_recording() -> None:
    levels = Levels()
    for scale in (1e-6, 0.1, 1e-6):
        levels.store((hum(0.1) * scale).astype(np.float32), np.empty(RATE // 10, dtype=np.int16))
    assert levels.remarks() == []


def test_silence_that_was_silence_before_is_noted_once_per_file_however_many_rows_it_fills(tmp_path: Path) -> None:
    code, output = pack(tmp_path, {"long.wav": encoded(np.zeros(5 * RATE))}, "--max-seconds", "1", "--max-noted", "1")
    assert code == 0
    assert (output / "notes.tsv").read_text().count("silent") == 1
    assert json.loads((output / "index.json").read_text())["rows"] > 4


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_names_that_are_no_utf8_are_packed(suffix: str, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9." + suffix.encode())
    code, output = pack(tmp_path, {name: encoded(hum(2.0), suffix.upper()), "fine.wav": FINE})
    assert code == 0
    assert json.loads((output / "index.json").read_text())["rows"] == 2


def test_an_output_of_such_a_name_is_refused_before_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert pack(folder, {"fine.wav": FINE})[0] == 2
    assert "expected a name in UTF-8" in capsys.readouterr().err


def test_suffixes_that_are_no_utf8_can_be_printed() -> None:
    assert said_ignored({os.fsdecode(b".t\xe9"): 2}).encode("utf-8") == b"2 files ignored: 2 .t\\udce9"


def test_a_librispeech_tree_of_such_names_is_packed(tmp_path: Path) -> None:
    chapter = tmp_path / "in" / os.fsdecode(b"r\xe9n\xe9") / "1"
    chapter.mkdir(parents=True)
    (chapter / f"{chapter.parent.name}-1.trans.txt").write_text("a HELLO\n")
    (chapter / "a.wav").write_bytes(FINE)
    assert pack(tmp_path, {})[0] == 0


def test_transcripts_that_are_no_utf8_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chapter = tmp_path / "in" / "19" / "198"
    chapter.mkdir(parents=True)
    (chapter / "19-198.trans.txt").write_bytes(b"a CAF\xe9\n")
    (chapter / "a.wav").write_bytes(FINE)
    assert pack(tmp_path, {})[0] == 2
    assert "19-198.trans.txt: expected UTF-8, found byte 0xe9 at 5" in capsys.readouterr().err


def test_special_files_in_a_folder_are_skipped_and_as_input_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.wav", "b.flac"):
        os.mkfifo(tmp_path / "in" / name)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "in" / "c.wav"))
    (tmp_path / "in" / "d.wav").symlink_to("/dev/zero")
    code, output = pack(tmp_path, {"fine.wav": FINE})
    assert code == 3
    skipped = table(output / "skipped.tsv")
    assert {name: reason for name, (reason,) in skipped.items()} == {
        "a.wav": "expected a file, found a FIFO", "b.flac": "expected a file, found a FIFO",
        "c.wav": "expected a file, found a socket", "d.wav": "expected a file, found a device",
    }  # fmt: skip
    for given, what in (("in/a.wav", "a FIFO"), ("in/c.wav", "a socket"), ("in/d.wav", "a device")):
        assert main(["--input", str(tmp_path / given), "--output", str(tmp_path / "none")]) == 2
        assert f"found {what}" in capsys.readouterr().err
    server.close()


def test_a_fifo_that_takes_the_place_of_a_recording_is_no_hang(tmp_path: Path) -> None:
    for name in ("a.wav", "a.flac"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadAudioError, match="found a FIFO"):
            Decoder(RATE).decode(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.ENOMEM])
def test_a_fault_of_the_machine_stops_the_packing_and_is_booked_on_no_file(
    suffix: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d2v2ds.io.machine_faults.time.sleep", lambda seconds: None)

    def fail(*given: Any, **named: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    if suffix == "flac":
        monkeypatch.setattr("preprocessing.audio.waveform.open_bytes", fail)
    exit_code, output = pack(tmp_path, {f"a.{suffix}": encoded(hum(2.0), suffix.upper())})
    said = capsys.readouterr().err
    assert exit_code == 4
    assert os.strerror(code) in said and "the same command goes on" in said
    assert not (output / "index.json").exists()


def test_one_odd_exception_of_a_library_skips_one_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = soundfile.SoundFile.read

    def fail(self: Any, *given: Any, **named: Any) -> Any:
        if self.frames == RATE:
            raise KeyError("odd")
        return real(self, *given, **named)

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    code, output = pack(tmp_path, {"a.wav": encoded(hum(1.0)), "fine.wav": FINE}, "--max-skipped", "1")
    assert code == 0
    assert "KeyError: 'odd'" in table(output / "skipped.tsv")["a.wav"][0]


def test_more_samples_than_the_bytes_of_a_file_can_have_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2v2ds.modalities.audio.sound_file._MOST_SILENCE", 1 << 16)
    (tmp_path / "a.flac").write_bytes(with_flac_length(encoded(np.zeros(1 << 17), "FLAC"), 0))
    with pytest.raises(BadAudioError, match="more than 65,536 samples|more than 6"):
        Decoder(RATE).decode(str(tmp_path / "a.flac"))
