"""Small files are read as if a stranger had written them."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from d2v2ds.errors import ConfigError, MachineError, ShardError
from d2v2ds.io import machine_faults, read


@dataclass(frozen=True)
class Thing:
    """A schema."""

    __pydantic_config__ = {"extra": "forbid"}
    name: str
    counts: tuple[int, ...]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xff{}", "expected UTF-8, found byte 0xff at 0"),
        (b"[" * 100_000, "nested too deeply|expected JSON"),
        (b"{", "expected JSON, found: Expecting"),
        (b'{"a": NaN}', "expected JSON, found: expected a finite number, found NaN"),
        (b'{"a": 1e999}', "expected a finite number, found 1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON, found: Exceeds the limit"),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_json_that_is_none(tmp_path: Path, data: bytes, expected: str) -> None:
    file = tmp_path / "index.json"
    file.write_bytes(data)
    with pytest.raises(ShardError, match=f"^{file}: .*({expected})"):
        read.read_json(file, ShardError)


def test_too_large_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"x" * 11)
    assert read.read_text(file, ShardError, limit=11) == "x" * 11
    with pytest.raises(ShardError, match="expected at most 10 bytes, found more"):
        read.read_text(file, ShardError, limit=10)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, expected in (("fifo", "a FIFO"), ("", "a folder"), ("absent", "No such file")):
        with pytest.raises(ConfigError, match=expected):
            read.read_bytes(tmp_path / name, ConfigError)
    with pytest.raises(ConfigError, match="a device"):
        read.read_bytes("/dev/zero", ConfigError)


def test_faults_of_the_machine_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(MachineError, match=r"Too many open files; .*ulimit -n"):
        read.read_bytes(tmp_path / "any", ShardError)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"name": 1, "counts": []}, "name: Input should be a valid string"),
        ({"name": "a", "counts": ["1"]}, "counts.0: Input should be a valid integer"),
        ({"name": "a", "counts": [1], "more": 2}, "more: Unexpected keyword"),
        ({"counts": [1]}, "name: Field required"),
    ],
)
def test_schema_is_strict(value: Any, expected: str) -> None:
    with pytest.raises(ShardError, match=f"^here: expected the fields of Thing, found {expected}"):
        read.validate(Thing, value, "here", ShardError)
    assert read.validate(Thing, {"name": "a", "counts": [1, 2]}, "here", ShardError) == Thing("a", (1, 2))


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    good = [{"step": 1, "loss": float("nan")}, {"step": 2}]
    lines = [
        json.dumps(good[0]).encode(),
        b"\xff\xfe",
        b"",
        b"[1]",
        b"x" * (read.LINE_BYTES + 5),
        json.dumps(good[1]).encode(),
    ]
    file.write_bytes(b"\n".join(lines) + b'\n{"step": 3')
    found = list(read.json_lines(file, ConfigError))
    assert [one["step"] for one in found] == [1, 2]
    assert "4 damaged lines (cut off by a crash?) are left out: 2, 4, 5, 7" in caplog.text
    assert list(read.json_lines(tmp_path / "absent", ConfigError)) == []


def test_anchors_that_multiply_are_refused() -> None:
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    with pytest.raises(ConfigError, match="expected at most 20,000 values, found more"):
        read.parse_yaml(bomb, "x.yaml", ConfigError)
    with pytest.raises(ConfigError, match="contains itself"):
        read.parse_yaml("a: &a [*a]", "x.yaml", ConfigError)
    assert read.parse_yaml("a: &a [1, 2]\nb: *a", "x.yaml", ConfigError) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "text", ["a: [", "a: " + "9" * 5000, "a: 2024-13-45", "[" * 2000, "a: !!python/name:os.system"]
)
def test_yaml_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^x.yaml: not valid YAML: "):
        read.parse_yaml(text, "x.yaml", ConfigError)


def test_every_fault_of_the_machine_has_advice() -> None:
    for number in machine_faults.ADVICE:
        assert machine_faults.is_machine_fault(OSError(number, "x"))
        assert machine_faults.advice(OSError(number, "x"))
    assert not machine_faults.is_machine_fault(FileNotFoundError(2, "x"))
    assert machine_faults.advice(OSError(2, "x"))


def test_a_limit_reserves_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "small"
    file.write_bytes(b"x")
    assert read.read_bytes(file, ShardError, limit=1 << 45) == b"x"


def test_a_link_to_itself_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    read.is_inside(tmp_path / "loop", tmp_path)
    with pytest.raises(ShardError, match="cannot be read"):
        read.read_bytes(tmp_path / "loop", ShardError)


@pytest.mark.parametrize("text", ["a: [" + "1, " * 300_000 + "]", "[" * 1_000_000, "a: 1\n" * 500_000])
def test_yaml_is_bounded_before_anything_is_made_of_it(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="not valid YAML"):
        read.parse_yaml(text, "x.yaml", ConfigError)
    assert time.process_time() - began < 5  # half an hour before
