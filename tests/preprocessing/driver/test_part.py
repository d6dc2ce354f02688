"""Shards packed by several commands, each a part of them, as the tasks of a job array do."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.driver.command import parse_part
from preprocessing.driver.writer import PACKING_NAME
from preprocessing.pack_audio import main
from preprocessing.pack_text import main as pack_text
from tests.preprocessing.helpers import clean_environment, contents
from tests.preprocessing.tiny_text import pack_tiny

PARTS = 3


def arguments(recordings: Path, output: Path) -> list[str]:
    return ["--input", str(recordings), "--output", str(output), "--shard-bytes", "64K", "--workers", "1"]


@pytest.mark.distributed
def test_parts_at_the_same_time_and_then_the_whole_write_the_bytes_of_a_plain_run(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, output = tmp_path / "plain", tmp_path / "parts"
    assert main(arguments(recordings, plain)) == 0
    command = [sys.executable, "-m", "preprocessing.pack_audio", *arguments(recordings, output)]
    parts = [
        subprocess.Popen([*command, "--part", f"{part}/{PARTS}"], env=clean_environment()) for part in range(PARTS)
    ]
    assert [part.wait(timeout=120) for part in parts] == [0] * PARTS
    assert not (output / "index.json").exists()
    shards = {path.name: path.stat().st_mtime_ns for path in output.glob("*.arrow")}
    assert len(shards) == len(list(plain.glob("*.arrow"))) > 2 * PARTS
    capsys.readouterr()
    assert main(arguments(recordings, output)) == 0
    assert "packing: 0 of 0 files" in capsys.readouterr().err, "all shards are there already"
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("*.arrow")} == shards
    assert contents(output) == contents(plain)


def test_a_part_packs_every_nth_shard_and_the_whole_packs_what_is_missing(recordings: Path, tmp_path: Path) -> None:
    plain, output = tmp_path / "plain", tmp_path / "parts"
    assert main(arguments(recordings, plain)) == 0
    assert main([*arguments(recordings, output), "--part", "1/4"]) == 0
    packed = sorted(path.name for path in output.glob("*.arrow"))
    assert packed == sorted(path.name for path in plain.glob("*.arrow"))[1::4]
    assert main(arguments(recordings, output)) == 0
    assert contents(output) == contents(plain)


def test_a_part_leaves_the_unfinished_files_of_another_alone(recordings: Path, tmp_path: Path) -> None:
    output = tmp_path / "parts"
    assert main([*arguments(recordings, output), "--part", "0/4"]) == 0
    being_written = output / PACKING_NAME / "audio-00001.arrow.12345.tmp"
    being_written.write_bytes(b"half a shard")
    assert main([*arguments(recordings, output), "--part", "2/4"]) == 0
    assert being_written.exists()


def test_a_part_of_other_settings_is_refused(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(recordings, tmp_path / "out"), "--part", "0/2"]) == 0
    assert main([*arguments(recordings, tmp_path / "out"), "--part", "1/2", "--codec", "flac"]) == 2
    assert "codec: the folder has 'pcm16', this command 'flac'" in capsys.readouterr().err


def test_a_part_of_a_finished_folder_is_done(recordings: Path, tmp_path: Path) -> None:
    assert main(arguments(recordings, tmp_path / "out")) == 0
    before = contents(tmp_path / "out")
    assert main([*arguments(recordings, tmp_path / "out"), "--part", "1/2"]) == 0
    assert contents(tmp_path / "out") == before


def test_a_folder_with_other_files_is_still_refused(recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert main([*arguments(recordings, tmp_path / "out"), "--part", "0/2"]) == 2


def test_more_parts_than_shards_are_fine(tmp_path: Path) -> None:
    for part in range(5):
        assert pack_tiny(tmp_path / "out", [10], part=(part, 5)) is None
    assert pack_tiny(tmp_path / "out", [10]).rows == 1


@pytest.mark.parametrize("text", ["3", "2/2", "-1/2", "1/0", "a/b", "1/2/3", ""])
def test_impossible_parts_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected I/N with I from 0 to N - 1"):
        parse_part(text)


def test_parts_do_not_train_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two kinds of processors they could come out different."""
    (tmp_path / "a.txt").write_text("a few words\n" * 50)
    train = ["--train-tokenizer", "--vocab-size", "40", "--part", "0/2"]
    with pytest.raises(SystemExit):
        pack_text(["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), *train])
    assert "train one on a sample first" in capsys.readouterr().err
