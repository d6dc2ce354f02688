"""Files of records: another file is left as it is, and names need not be UTF-8."""

import json
import os
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
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


WINDOWS = [(0.0, None), (-1.0, None), (float("inf"), None), (8.0, 4.0), (8.0, -1.0)]


@pytest.mark.parametrize(("window", "context"), WINDOWS)
def test_windows_that_leave_nothing_are_refused(window: float, context: float | None) -> None:
    with pytest.raises(ConfigError, match=r"--(window|context)-seconds"):
        window_options(window, context)
