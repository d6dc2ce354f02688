"""Files of records: another file is left as it is, and names need not be UTF-8."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
from d2v2ds.io import durable
from d2v2ds.run import record_file
from d2v2ds.run.file_inputs import window_options
from d2v2ds.run.record_file import open_records


@pytest.mark.parametrize("content", [b"RIFF\x00\x01\n\x02no end", b'{"a": 1}', b"text without an end"])
def test_another_file_is_refused_and_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "talk.wav"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"talk\.wav: expected records of an earlier start, found another file"):
        open_records(path, "work", "file").__enter__()
    assert path.read_bytes() == content


def test_a_torn_record_is_dropped_and_a_name_of_any_bytes_is_written(tmp_path: Path) -> None:
    path, name = tmp_path / "found.jsonl", os.fsdecode(b"caf\xe9.wav")
    path.write_text('{"file": "a", "text": "b", "by": "work"}\n{"fi')
    with open_records(path, "work", "file") as records:
        records.write(name, {"text": "c"})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["file"] for line in lines][-1] == name


def test_only_names_are_in_memory_and_few_records_are_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, syncs = tmp_path / "found.jsonl", list[Path]()
    monkeypatch.setattr(durable, "fsync", lambda descriptor, where: syncs.append(where))
    with open_records(path, "work", "file") as records:
        for number in range(200):
            records.write(f"{number}.wav", {"text": "word " * 500})
            assert len(path.read_text().splitlines()) == number + 1, "a kill of the process takes nothing"
        assert len(syncs) == 1, "the first one; the others come within SYNC_SECONDS"
        monkeypatch.setattr(record_file, "SYNC_SECONDS", 0.0)
        records.write("slow.wav", {})
        assert len(syncs) == 2
        monkeypatch.setattr(record_file, "SYNC_SECONDS", 10.0)
        records.write("last.wav", {})
    assert len(syncs) == 3, "the end"
    tracemalloc.start()
    with open_records(path, "work", "file") as records:
        assert len(records.done) == 202
        kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 202 * 500, "bytes; the texts have 2,500 each"


def test_records_of_changed_inputs_are_removed_and_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "found.jsonl"
    with open_records(path, "work", "file") as records:
        for name in "abcd":
            records.write(name, {"text": name}, stamp="1 2")
    is_stale = lambda record: record["file"] in "bd" and record["stamp"] == "1 2"  # noqa: E731
    with open_records(path, "work", "file", is_stale) as records:
        assert (records.done, records.changed) == ({"a", "c"}, {"b", "d"})
        records.write("b", {"text": "new"}, stamp="1 3")
    assert caplog.text.count("2 inputs changed since and are done again, such as ") == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["file"], line["stamp"]) for line in lines] == [("a", "1 2"), ("c", "1 2"), ("b", "1 3")]


def test_an_error_of_the_work_is_not_said_to_be_one_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the work"), open_records(tmp_path / "x.jsonl", "work", "file"):
        raise OSError("of the work")


@pytest.mark.parametrize("name", ['["a"]', "null"])
def test_a_record_without_a_name_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"file": ' + name + ', "by": "work"}\n')
    with pytest.raises(ConfigError, match="expected records with 'file'"):
        open_records(tmp_path / "x.jsonl", "work", "file").__enter__()


WINDOWS = [(0.0, None), (-1.0, None), (float("inf"), None), (8.0, 4.0), (8.0, -1.0)]


@pytest.mark.parametrize(("window", "context"), WINDOWS)
def test_windows_that_leave_nothing_are_refused(window: float, context: float | None) -> None:
    with pytest.raises(ConfigError, match=r"--(window|context)-seconds"):
        window_options(window, context)
