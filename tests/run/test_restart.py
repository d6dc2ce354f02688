"""When a run that ended goes back into the queue, and when it must not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2v2ds import pretrain
from d2v2ds.errors import CellsFailedError, D2V2Error
from d2v2ds.run import restart
from d2v2ds.run.restart import (
    FINISHED,
    FRUITLESS_CRASHES,
    SAVED,
    STARTS_AGAIN,
    STOPS,
    Attempt,
    decide,
    main,
    newest_checkpoint,
    read_attempts,
)


def attempt(code: int, checkpoint: str = "step00000004", job: int = 7, warned: str = "") -> Attempt:
    return Attempt(
        time="2026-01-01T00:00:00+00:00", job=job, restart=0, code=code, checkpoint=checkpoint, warned=warned
    )


def exit_codes(error: type[D2V2Error] = D2V2Error) -> set[int]:
    """Exit codes of an exception and of all below it; that of a sweep is left out, which is no run."""
    below = (kind for kind in error.__subclasses__() if kind is not CellsFailedError)
    return {error.exit_code}.union(*(exit_codes(kind) for kind in below))


def test_the_policy_knows_every_exit_code_of_a_run() -> None:
    assert exit_codes() == {SAVED, *STOPS, *STARTS_AGAIN}
    assert decide([attempt(code) for code in STARTS_AGAIN]).action == "requeue"
    assert decide([attempt(FINISHED)]).action == "stop"
    assert decide([attempt(SAVED)]).action == "requeue"
    for code, meaning in STOPS.items():
        verdict = decide([attempt(code)])
        assert verdict.action == "stop"
        assert meaning in verdict.reason


def test_the_command_tells_every_exit_code() -> None:
    _, told = (pretrain.__doc__ or "").split("Exit codes: ")
    assert {int(code) for code in re.findall(r"(?:^|,\s)(\d+) ", told)} == {FINISHED, *exit_codes()}


def test_a_run_that_saves_goes_on_for_ever() -> None:
    assert decide([attempt(SAVED)] * 100).action == "requeue"


@pytest.mark.parametrize("code", [1, 137, 138, 143, 247])
def test_third_crash_of_the_same_kind_without_progress_stops(code: int) -> None:
    actions = [decide([attempt(code)] * count).action for count in (1, 2, 3, 4)]
    assert actions == ["requeue", "requeue", "stop", "stop"]
    assert "GIVING UP: 3 crashes in a row with code" in decide([attempt(code)] * 3).reason


@pytest.mark.parametrize(
    "between",
    [
        [attempt(137, checkpoint="step00000002")] * 2,  # it has saved since
        [attempt(1)],  # another end
        [attempt(SAVED)],
        [attempt(137, warned="USR1")],  # somebody ended it
    ],
)
def test_crashes_do_not_add_up_over_progress_or_another_end(between: list[Attempt]) -> None:
    crash = attempt(137)
    assert decide([crash, *between, crash]).action == "requeue"
    assert decide([*between, crash, crash, crash]).action == "stop"


def test_crashes_of_an_earlier_submission_do_not_count() -> None:
    assert decide([*[attempt(137, job=6)] * 5, attempt(137)]).action == "requeue"


def test_ends_of_different_kinds_without_progress_stop_in_the_end() -> None:
    mixed = [attempt(code, warned=warned) for code, warned in [(1, ""), (137, ""), (143, "TERM")] * 2]
    assert [decide(mixed[:count]).action for count in range(1, 7)] == ["requeue"] * (FRUITLESS_CRASHES - 1) + ["stop"]


def test_attempts_are_noted_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step00000004\n")
    arguments = ["--run", str(tmp_path), "--job", "7"]
    for number in range(3):
        assert main([*arguments, "--code", "137", "--restart", str(number)]) == 0
    said = capsys.readouterr()
    assert said.out.split() == ["requeue", "requeue", "stop"]
    assert "code 137 (SIGKILL)" in said.err
    attempts = read_attempts(tmp_path)
    assert [(one.code, one.restart, one.checkpoint) for one in attempts] == [(137, n, "step00000004") for n in range(3)]


def test_a_line_cut_short_is_passed_over(tmp_path: Path) -> None:
    main(["--run", str(tmp_path), "--job", "7", "--code", "1", "--restart", "0"])
    with (tmp_path / restart.FILE_NAME).open("a") as file:
        file.write('{"time": "2026-01\n{"unknown": 1}\n')
    main(["--run", str(tmp_path), "--job", "7", "--code", "1", "--restart", "1"])
    assert [one.restart for one in read_attempts(tmp_path)] == [0, 1]


def test_a_verdict_needs_no_place_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path / "nowhere"), "--job", "7", "--code", "75", "--restart", "0"]) == 0
    said = capsys.readouterr()
    assert said.out == "requeue\n"
    assert "could not be noted" in said.err


def test_it_decides_without_torch(tmp_path: Path) -> None:
    """The job's script waits for it, perhaps with seconds left."""
    code = (
        "import sys; from d2v2ds.run.restart import main\n"
        f"main(['--run', {str(tmp_path)!r}, '--job', '7', '--code', '1', '--restart', '0'])\n"
        "print(sorted({'torch', 'numpy', 'yaml', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "requeue\n[]\n"
    assert json.loads((tmp_path / restart.FILE_NAME).read_text())["code"] == 1


def test_a_stale_file_system_is_a_crash_that_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Path, **named: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "stat", stale)
    assert newest_checkpoint(tmp_path) == ""
    assert read_attempts(tmp_path) == []
