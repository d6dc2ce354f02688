"""A few bytes of every file of packed folders, a run and an export are flipped; `make hostile` flips all of them."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
from tests.hostile import sweep
from tests.runs.launching import environment


@pytest.mark.run
@pytest.mark.parametrize(("part", "each"), [("packed", 6), ("runs", 4)])
def test_a_flipped_byte_gives_a_right_result_or_an_error_that_names_the_file(part: str, each: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.sweep", "--each", str(each), "--only", part],
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " 0 fault" in done.stdout.splitlines()[-1]


def test_the_sweep_notices_what_it_looks_for(tmp_path: Path) -> None:
    """Another result, another kind of exception, an error without a name, a hang, a file beside the folder."""
    folder = tmp_path / "parent" / "folder"
    folder.mkdir(parents=True)
    file = folder / "file"
    file.write_bytes(b"abcdefg")

    def use(found: Path) -> str:
        content = file.read_bytes()
        if content[0] != ord("a"):
            return "another result"
        if content[1] != ord("b"):
            raise KeyError("b")
        if content[2] != ord("c"):
            raise ConfigError("something is wrong")
        if content[3] != ord("d"):
            (found.parent / "beside").touch()
        if content[4] != ord("e"):
            raise ConfigError(f"{file}: wrong")
        if content[5] != ord("f"):
            return "before"
        return "damage" if content[6] != ord("g") else "right"

    outcome = sweep.sweep(folder, {"use": use}, None, {"use": {"before"}})
    assert outcome.counts == Counter({"fault": 4, "right": 1, "error": 1, "before": 1, "damage reported": 1})
    assert [fault.split(": ")[0] for fault in outcome.faults] == [
        "file byte 0", "file byte 1", "file byte 2", str(folder),
    ]  # fmt: skip


def test_a_hang_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(sweep, "LIMIT_S", 1)
    assert sweep._result(lambda folder: time.sleep(10) or "", tmp_path)[0] == "fault"
