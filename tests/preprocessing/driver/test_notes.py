"""Notes on files that lost something: table, counts, limit, restart; with a packer of made-up tokens."""

import argparse
import json
from pathlib import Path

import pytest

from preprocessing import inspect, verify
from preprocessing.driver.command import common_parser, parse_share, run
from preprocessing.driver.notes import count_notes, said_notes
from preprocessing.driver.shard_plan import Noted
from tests.preprocessing.helpers import contents
from tests.preprocessing.tiny_text import TinyPacker, TinySettings, pack_tiny

NOTED = {33: 0.5, 44: 0.0}
LENGTHS = [100, 33, 100, 44, 33, 100]
SAID = "3 unknown (16.67% of the content)"


def command(output: Path, *options: str, lengths: list[int] = LENGTHS) -> int:
    """Run the command line that all packers share."""
    arguments = ["--input", "nothing", "--output", str(output), "--workers", "1", *options]
    packer = TinyPacker(TinySettings(tuple(lengths), noted=NOTED, shard_bytes=400))
    return run(packer, common_parser("tiny", None, "PATH", "").parse_args(arguments), arguments)


def test_notes_stand_in_table_index_summary_inspect_and_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert command(output, "--max-noted", "0.2") == 0
    assert SAID in capsys.readouterr().out
    assert (output / "notes.tsv").read_text().splitlines() == [
        "path\tnote\tdetail\tlost",
        "1\tunknown\t50% of the tokens\t0.5",
        "3\tunknown\t0% of the tokens\t0",
        "4\tunknown\t50% of the tokens\t0.5",
    ]
    notes = json.loads((output / "index.json").read_text())["notes"]
    assert notes == {"unknown": {"files": 3, "lost": pytest.approx(1 / 6)}}
    verify.main([str(output), "--workers", "1"])
    assert SAID in capsys.readouterr().out
    index = pack_tiny(output, LENGTHS, noted=NOTED, shard_bytes=400)
    assert said_notes(index) == SAID


def test_inspect_shows_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tmp_path / "out")
    monkeypatch.setattr("preprocessing.text.report.headline", lambda index: "tokens")
    monkeypatch.setattr("preprocessing.text.report.lines", lambda shards: [])
    assert inspect.main([str(tmp_path / "out")]) == 0
    assert f"notes     {SAID} (files in notes.tsv)" in capsys.readouterr().out


def test_more_than_the_allowed_share_is_an_error_after_the_index_and_again_on_the_finished_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert command(tmp_path / "out", "--max-noted", "0.1") == 3
        said = capsys.readouterr().err
        assert "too much of the content has notes (unknown 16.67%), --max-noted allows 10.00%" in said
        assert f"{tmp_path}/out/notes.tsv" in said and "complete and usable" in said
    assert (tmp_path / "out" / "index.json").exists()


def test_without_notes_there_is_no_table(tmp_path: Path) -> None:
    assert command(tmp_path / "out", lengths=[100, 100]) == 0
    assert not (tmp_path / "out" / "notes.tsv").exists()


def test_notes_of_finished_shards_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    whole = pack_tiny(tmp_path / "whole", LENGTHS, noted=NOTED, shard_bytes=400)
    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.driver.packing.write_skipped", stop)
        with pytest.raises(KeyboardInterrupt):
            pack_tiny(tmp_path / "out", LENGTHS, noted=NOTED, shard_bytes=400)
    (tmp_path / "out" / ".packing" / "text-00001.arrow.json").unlink()
    assert len(whole.shards) > 1
    assert pack_tiny(tmp_path / "out", LENGTHS, noted=NOTED, shard_bytes=400).notes == whole.notes
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_counts_once_in_each_kind_with_what_it_lost_most() -> None:
    noted = [Noted(order=n, source="a", kind=kind, detail="", lost=lost) for n, kind, lost in
             [(0, "clipped", 0.1), (0, "clipped", 0.4), (1, "clipped", 0.0), (0, "silent", 1.0)]]  # fmt: skip
    counted = count_notes(noted, 4)
    assert counted == {"clipped": {"files": 2, "lost": 0.1}, "silent": {"files": 1, "lost": 0.25}}


@pytest.mark.parametrize("text", ["nan", "-0.1", "1.5", "1%", ""])
def test_a_limit_is_a_share(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 1"):
        parse_share(text)
