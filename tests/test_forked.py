"""A forked program is like a started one: arguments, variables, output, signals and exit code are its own."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from tests.forked import ForkedProgram


def main() -> int:
    """What the tests fork."""
    print(sys.argv[1:], os.environ["OWN"], os.environ.get("OTHERS"), torch.get_num_threads(), flush=True)
    print("said on stderr", file=sys.stderr)
    if sys.argv[1] == "sleep":
        time.sleep(60)
    return int(sys.argv[1])


def start(argument: str, log: Path) -> ForkedProgram:
    return ForkedProgram(__name__, [argument], {"OWN": argument}, log)


def test_program_has_its_own_arguments_variables_output_and_exit_code(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OTHERS", "those of the test")
    logs = [tmp_path / str(code) for code in (0, 75)]
    programs = [start(log.name, log) for log in logs]
    assert [program.wait(60) for program in programs] == [0, 75]
    for log in logs:
        assert log.read_text().splitlines() == [f"['{log.name}'] {log.name} None 1", "said on stderr"]


def test_killed_program_ends_with_the_signal(tmp_path: Path) -> None:
    program = start("sleep", tmp_path / "log")
    while "stderr" not in (tmp_path / "log").read_text():
        assert program.poll() is None
        time.sleep(0.01)
    program.kill()
    assert program.wait(60) == -signal.SIGKILL
    assert not Path(f"/proc/{program.pid}").exists()
