"""The packer from end to end: what it writes, and what it does with bad input, restarts and a full disk."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from preprocessing.audio.shard_plan import AudioSettings
from preprocessing.driver.packing import pack as pack_all
from preprocessing.driver.team.local import LocalTeam
from preprocessing.driver.writer import PACKING_NAME, pack_shard
from preprocessing.pack_audio import AudioPacker, main
from tests.preprocessing.helpers import clean_environment, contents, noise, run_module

SMALL_SHARDS = ("--shard-bytes", "128K", "--workers", "1")


def pack(source: Path, output: Path, *options: object) -> int:
    return main(["--input", str(source), "--output", str(output), *SMALL_SHARDS, *map(str, options)])


def table_of(folder: Path) -> pa.Table:
    shards = json.loads((folder / "index.json").read_text())["shards"]
    return pa.concat_tables(pa.ipc.open_file(str(folder / shard["file"])).read_all() for shard in shards)


def test_shards_open_with_plain_pyarrow(recordings: Path, tmp_path: Path) -> None:
    assert pack(recordings, tmp_path / "out") == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    table = table_of(tmp_path / "out")
    assert table.num_rows == index["rows"] == 24 and len(index["shards"]) > 3
    row = table.to_pylist()[0]
    samples, rate = soundfile.read(recordings / row["source"], dtype="int16")
    assert rate == index["format"]["sample_rate_hz"] == 16000
    np.testing.assert_array_equal(np.frombuffer(row["audio"], dtype="<i2"), samples)
    assert table.schema.field("audio").type == pa.large_binary()
    assert {str(table.schema.field(name).type) for name in ("id", "text", "label", "speaker")} == {"large_string"}


def test_shards_open_with_datasets(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    pack(recordings, tmp_path / "out")
    files = sorted(str(path) for path in (tmp_path / "out").glob("*.arrow"))
    loaded = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["id"][:] == table_of(tmp_path / "out")["id"].to_pylist()
    assert np.frombuffer(loaded[0]["audio"], dtype="<i2").size == loaded[0]["num_samples"]


def test_record_batches_are_capped_by_bytes(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.driver.writer.BATCH_BYTES", 100_000)
    main(["--input", str(recordings), "--output", str(tmp_path / "out"), "--workers", "1"])
    reader = pa.ipc.open_file(str(tmp_path / "out" / "audio-00000.arrow"))
    sizes = [reader.get_batch(number).column("audio").nbytes for number in range(reader.num_record_batches)]
    assert len(sizes) > 5 and max(sizes) <= 100_000 + 1000


def test_flac_codec_is_lossless_and_smaller(recordings: Path, tmp_path: Path) -> None:
    for codec in ("pcm16", "flac"):
        main(["--input", str(recordings), "--output", str(tmp_path / codec), "--workers", "1", "--codec", codec])
    plain, packed = (table_of(tmp_path / codec) for codec in ("pcm16", "flac"))
    same = [name for name in plain.column_names if name not in ("audio", "crc32", "fields_crc32")]
    assert plain.select(same).equals(packed.select(same))
    sizes = [json.loads((tmp_path / codec / "index.json").read_text())["shards"][0]["bytes"] for codec in
             ("pcm16", "flac")]  # fmt: skip
    assert sizes[1] < 0.85 * sizes[0]


@pytest.mark.distributed
def test_bytes_do_not_depend_on_the_number_of_workers(recordings: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        assert pack(recordings, tmp_path / f"{workers}", "--workers", workers) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert not (tmp_path / "2" / PACKING_NAME).exists()


def test_long_recordings_are_cut_and_put_together_again(tmp_path: Path) -> None:
    samples = noise(25.0, 1)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "long.flac", samples, 16000)
    pack(tmp_path / "in", tmp_path / "out", "--max-seconds", 10)
    rows = table_of(tmp_path / "out").to_pylist()
    assert [row["id"] for row in rows] == [f"long.flac#{piece:04d}" for piece in range(len(rows))]
    assert max(row["num_samples"] for row in rows) <= 160000
    assert [row["start_sample"] for row in rows] == np.cumsum([0, *(row["num_samples"] for row in rows)])[:-1].tolist()
    np.testing.assert_array_equal(np.frombuffer(b"".join(row["audio"] for row in rows), "<i2"), samples)
    pack(tmp_path / "in", tmp_path / "whole", "--max-seconds", 0)
    assert table_of(tmp_path / "whole")["num_samples"].to_pylist() == [400000]


def test_text_of_a_cut_recording_is_dropped_and_its_label_kept(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(6.0, 1), 16000)
    (tmp_path / "m.tsv").write_text("path\ttext\tlabel\tspeaker\na.wav\tsome words\tnews\tanna\n")
    pack(tmp_path / "m.tsv", tmp_path / "out", "--max-seconds", 4)
    for row in table_of(tmp_path / "out").to_pylist():
        assert (row["text"], row["label"], row["speaker"]) == (None, "news", "anna")


def digits_manifest(folder: Path) -> Path:
    """40 clips of half a second by two speakers, one of them shorter than the rest and undecodable."""
    lines = ["path\ttext\tlabel\tspeaker"]
    for number in range(40):
        soundfile.write(folder / f"{number}.wav", noise(0.5, number), 16000)
        lines.append(f"{number}.wav\tword{number}\t{number % 10}\t{'ab'[number % 2]}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.tsv"


def test_short_clips_of_a_speaker_are_joined(tmp_path: Path) -> None:
    manifest = digits_manifest(tmp_path)
    assert pack(manifest, tmp_path / "plain") == 0
    assert pack(manifest, tmp_path / "joined", "--join-seconds", 3, 6) == 0
    clips = {row["source"]: row for row in table_of(tmp_path / "plain").to_pylist()}
    assert clips["7.wav"]["label"] == "7" and len(clips) == 40
    joined = table_of(tmp_path / "joined").to_pylist()
    assert sorted(source for row in joined for source in row["source"].split("\n")) == sorted(clips)
    for row in joined:
        parts = [clips[source] for source in row["source"].split("\n")]
        assert row["audio"] == b"".join(part["audio"] for part in parts)
        assert row["text"] == " ".join(part["text"] for part in parts)
        assert {row["speaker"]} == {part["speaker"] for part in parts}
        assert row["label"] is None and row["id"] == f"{parts[0]['id']}+{len(parts) - 1}"


def test_joining_leaves_out_a_clip_that_does_not_decode(tmp_path: Path) -> None:
    manifest = digits_manifest(tmp_path)
    values = np.full(8000, 0.1)
    values[100] = np.nan
    soundfile.write(tmp_path / "4.wav", values, 16000, subtype="FLOAT")
    assert pack(manifest, tmp_path / "out", "--join-seconds", 3, 6, "--max-skipped", 0.1) == 0
    sources = [source for row in table_of(tmp_path / "out").to_pylist() for source in row["source"].split("\n")]
    assert len(sources) == 39 and "4.wav" not in sources
    assert (tmp_path / "out" / "skipped.tsv").read_text() == "path\treason\n4.wav\tNaN or infinite samples\n"


# --- bad input -------------------------------------------------------------------------------------------------------


def bad_files(folder: Path) -> dict[str, str]:
    """One file of every kind that is skipped, with a word of its reason."""
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.flac").write_text("this is not audio")
    (folder / "text.mp3").write_bytes(bytes(range(256)) * 9)  # of which libsndfile says that it does not exist
    (folder / "gone.wav").symlink_to("nowhere/b.wav")
    soundfile.write(folder / "silent.wav", np.zeros(0, dtype=np.int16), 16000)
    soundfile.write(folder / "short.wav", noise(0.05, 0), 16000)
    soundfile.write(folder / "zero_channels.wav", noise(0.5, 0), 16000)
    data = bytearray((folder / "zero_channels.wav").read_bytes())
    data[22:24] = b"\0\0"
    (folder / "zero_channels.wav").write_bytes(data)
    values = noise(0.5, 0) / 32768
    values[7] = np.nan
    soundfile.write(folder / "nan.wav", values, 16000, subtype="FLOAT")
    soundfile.write(folder / "cut.flac", noise(3.0, 0), 16000)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:30000])
    return {
        "empty.wav": "empty file",
        "text.flac": "not audio that libsndfile can read, or its beginning is damaged (libsndfile: ",
        "text.mp3": "not audio that libsndfile can read, or its beginning is damaged (libsndfile: ",
        "gone.wav": "a link to nowhere/b.wav, where nothing is",
        "silent.wav": "no samples",
        "short.wav": "shorter than --min-seconds",
        "zero_channels.wav": "",
        "nan.wav": "NaN",
        "cut.flac": "damaged or cut off: does not decode (libsndfile: ",
    }


def test_bad_files_are_skipped_with_their_reason_and_too_many_are_an_error_after_the_index(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = bad_files(recordings)
    assert pack(recordings, tmp_path / "out") == 3
    assert "--max-skipped" in capsys.readouterr().err
    lines = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()[1:]
    found = dict(line.split("\t") for line in lines)
    assert found.keys() == reasons.keys()
    for name, word in reasons.items():
        assert found[name] and word in found[name]
        assert str(tmp_path) not in found[name]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["files"], index["files_skipped"], index["rows"]) == (33, 9, 24)
    assert pack(recordings, tmp_path / "out", "--max-skipped", 0.5) == 0


@pytest.mark.parametrize("allowed", [0.01, 1])
def test_a_folder_without_rows_is_an_error_however_many_may_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], allowed: float
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(b"")
    assert pack(tmp_path / "in", tmp_path / "out", "--max-skipped", allowed) == 3
    message = capsys.readouterr().err
    assert "no rows came out of 1 files" in message and "skipped.tsv" in message and "usable" not in message
    assert json.loads((tmp_path / "out" / "index.json").read_text())["rows"] == 0


def test_wrong_rate_stops_before_packing_and_names_files_and_option(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(recordings / "slow.wav", noise(1.0, 0, rate=8000), 8000)
    assert pack(recordings, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "--resample" in message and "slow.wav: 8000 Hz" in message
    assert not (tmp_path / "out").exists()
    assert pack(recordings, tmp_path / "out", "--resample") == 0
    rows = {row["source"]: row for row in table_of(tmp_path / "out").to_pylist()}
    assert rows["slow.wav"]["num_samples"] == 16000


def test_missing_files_of_a_manifest_are_named_with_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", noise(0.5, 0), 16000)
    (tmp_path / "m.tsv").write_text("path\na.wav\ngone.wav\n")
    assert pack(tmp_path / "m.tsv", tmp_path / "out") == 2
    assert "m.tsv line 3: gone.wav" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_are_never_mixed_into_a_folder(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(recordings, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert pack(recordings, tmp_path / "out", "--codec", "flac", "--max-seconds", 20) == 2
    message = capsys.readouterr().err
    assert "codec: the folder has 'pcm16', this command 'flac'" in message
    assert "max_seconds: the folder has 40.0, this command 20.0" in message
    assert "min_seconds" not in message
    soundfile.write(recordings / "new.wav", noise(1.0, 0), 16000)
    assert pack(recordings, tmp_path / "out") == 2
    assert "files: the folder has 24, this command 25" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_folder_with_foreign_files_is_refused(recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert pack(recordings, tmp_path / "out") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.distributed
def test_files_that_are_not_read_are_counted_by_suffix_and_do_not_change_the_folder(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(recordings, tmp_path / "plain") == 0
    assert "ignored" not in "".join(capsys.readouterr())
    names = ["a.m4a", "part0/b.m4a", "part1/c.M4A", "d.txt", "part2/e.txt", "Makefile", ".hidden", ".git/f.txt"]
    names += [f"{letter}.{letter}" for letter in "ghijk"]
    for name in names:
        (recordings / name).parent.mkdir(exist_ok=True)
        (recordings / name).write_bytes(b"")
    for workers in (1, 2):
        assert pack(recordings, tmp_path / f"{workers}", "--workers", workers) == 0
        said = capsys.readouterr()
        line = "11 files ignored: 3 .m4a, 2 .txt, 1 without suffix, 1 .g, 1 .h, 3 others"
        assert said.out.splitlines()[-1].endswith(f"0 of 24 files skipped; {line}")
        assert line in said.err.splitlines(), "before hours of packing too"
        assert contents(tmp_path / f"{workers}") == contents(tmp_path / "plain")


def test_packing_a_finished_folder_again_changes_nothing(recordings: Path, tmp_path: Path) -> None:
    pack(recordings, tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert pack(recordings, tmp_path / "out") == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("finished", [1, 5, 9])
def test_killed_and_started_again_ends_with_the_same_bytes(tmp_path: Path, finished: int) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(40):
        soundfile.write(source / f"{number:02d}.flac", noise(6.0, number), 16000)
    options = ("--shard-bytes", "256K", "--codec", "flac")
    assert main(["--input", str(source), "--output", str(tmp_path / "whole"), *options, "--workers", "1"]) == 0
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "preprocessing.pack_audio", "--input", source, "--output", output, *options]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2"], env=clean_environment(), stderr=subprocess.DEVNULL
    )
    while len(list(output.glob("*.arrow"))) < finished and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (output / PACKING_NAME).glob("*.arrow.json")}
    shards = {path: path.stat().st_mtime_ns for path in (output / Path(note.stem).name for note in kept)}
    assert main(["--input", str(source), "--output", str(output), *options, "--workers", "1"]) == 0
    assert contents(output) == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "finished shards are kept"


def test_shard_without_its_sidecar_or_of_another_size_is_packed_again(recordings: Path, tmp_path: Path) -> None:
    assert pack(recordings, tmp_path / "whole") == 0
    output = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", output)
    unfinish(recordings, output, tmp_path)
    (output / "audio-00001.arrow").write_bytes(b"half")
    (output / PACKING_NAME / "audio-00002.arrow.json").unlink()
    (output / PACKING_NAME / "audio-00003.arrow.12345.tmp").write_bytes(b"left over")
    assert pack(recordings, output) == 0
    assert contents(output) == contents(tmp_path / "whole")


def unfinish(recordings: Path, output: Path, tmp_path: Path) -> None:
    """Bring a packed folder into the state just before its index was written."""
    shutil.rmtree(output)
    result = run_module("tests.preprocessing.stop_before_index", recordings, output, *SMALL_SHARDS)
    assert result.returncode == 9, result.stderr
    assert not (output / "index.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_a_clear_error_and_finished_shards_go_on(tmp_path: Path, workers: int) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(16):
        soundfile.write(source / f"{number:02d}.wav", noise(4.0, number), 16000)
    small = tmp_path / "small"
    small.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        options = ("--shard-bytes", "256K", "--workers", workers)
        arguments = ("--input", source, "--output", small / "out", *options)
        result = run_module("preprocessing.pack_audio", *arguments)
        assert result.returncode == 4, result.stderr
        assert "No space left on device" in result.stderr and "same command again" in result.stderr
        assert "Traceback" not in result.stderr
        finished = {path.name: path.read_bytes() for path in (small / "out").glob("*.arrow")}
        assert finished and not list((small / "out" / PACKING_NAME).glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        assert run_module("preprocessing.pack_audio", *arguments).returncode == 0
        whole = tmp_path / "whole"
        assert main(["--input", str(source), "--output", str(whole), *map(str, options)]) == 0
        assert contents(small / "out") == contents(whole)
        assert finished.items() <= contents(whole).items()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_file_that_vanishes_while_packing_is_skipped(recordings: Path, tmp_path: Path) -> None:
    class Vanishing(LocalTeam):
        def map(self, work, jobs, report):  # type: ignore[no-untyped-def]
            if work is pack_shard:
                next(recordings.rglob("clip05*")).unlink()
            return super().map(work, jobs, report)

    packer = AudioPacker(AudioSettings())
    team = Vanishing(1)
    index = pack_all(team, packer.scan(team, [recordings]), tmp_path / "out", packer)
    assert index is not None
    assert (index.files_skipped, index.rows) == (1, 23)
    assert (
        (tmp_path / "out" / "skipped.tsv")
        .read_text()
        .endswith("\tno such file: it was there when the input was listed\n")
    )


@pytest.mark.parametrize("output", ["a file", "a file/below"])
def test_an_output_that_cannot_be_made_is_one_line(
    recordings: Path, tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").write_bytes(b"")
    assert main(["--input", str(recordings), "--output", str(tmp_path / output), "--workers", "1"]) == 4
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "a file" in said


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_lengths_are_finite(recordings: Path, tmp_path: Path, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--input", str(recordings), "--output", str(tmp_path / "out"), "--min-seconds", seconds]) == 2
    assert "must be finite and not negative" in capsys.readouterr().err
