"""Cells in turn: what is missing is run, a failure does not stop the others, a signal does, two sweeps do not mix."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from d2v2ds.errors import CellsFailedError, ConfigError, PreemptedError
from d2v2ds.io.lock import FolderLock
from d2v2ds.run.preempt import StopRequest
from d2v2ds.run.sweeps import work
from d2v2ds.run.sweeps.cells import Cell, expand
from d2v2ds.run.sweeps.drive import is_done, run_cell, run_sweep
from d2v2ds.run.sweeps.settings import Sweep
from d2v2ds.run.sweeps.work import CellFailedError, Work
from d2v2ds.sweep import main
from tests.run.sweeps.helpers import pack_classes, pretend, sweep_of, write_sweep

TUNING = {"config": "finetune/image_classify_tiny", "measure": "scores.accuracy", "overrides": ["lr.peak=1e-4"]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_classes(tmp_path_factory.mktemp("classes"))


class Fake:
    """Stands in for the commands of cells: notes them, and leaves what they would have left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[str] = []
        """Module, and cell or step, of each command."""
        self.words: list[Sequence[str]] = []
        self.fails: Callable[[str], bool] = lambda command: False
        self.pace_ms = 100.0
        monkeypatch.setattr(Work, "_command", lambda own, *given, **options: self.run(own, *given))
        monkeypatch.setattr(work, "steps_by_tag", self.checkpoints)
        monkeypatch.setattr(work, "superseded_tags", lambda folder, keep: [])

    def checkpoints(self, folder: Path) -> dict[str, int]:
        file = folder.parent / "fake.json"
        return {f"step{step}": step for step in json.loads(file.read_text())} if file.exists() else {}

    def run(self, own: Work, words: Sequence[str]) -> None:
        self.words.append(words)
        module = next(word for word in words if word.startswith("d2v2ds.")).removeprefix("d2v2ds.")
        given = dict(word.split("=", 1) for word in words if "=" in word)
        where = given.get("run.dir", str(own.cell.folder))
        step = words[words.index("--checkpoint") + 1] if "--checkpoint" in words else ""
        command = f"{module} {step or Path(where).name}"
        self.commands.append(command)
        if self.fails(f"{command} {own.cell.name}"):
            raise CellFailedError(f"{command} ended with code 2: lr.peak is wrong")
        getattr(self, module)(own, Path(where), given, step)

    def pretrain(self, own: Work, where: Path, given: dict[str, str], step: str) -> None:
        where.mkdir(parents=True, exist_ok=True)
        total, every = int(given["run.total_steps"]), int(given["run.save_every_steps"])
        if where != own.cell.folder:
            slow_first = [{"step": n, "perf/step_ms": self.pace_ms * (10 if n < 4 else 1)} for n in range(1, total + 1)]
            (where / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in slow_first))
            return
        pretend(own.cell, own.sweep, dict.fromkeys([0, *range(every, total, every), total], 20.0))
        (where / "probes.jsonl").unlink()
        (where / "fake.json").write_text(json.dumps([*range(every, total, every), total]))

    def probe(self, own: Work, where: Path, given: dict[str, str], step: str) -> None:
        record = {
            "step": int(step.removeprefix("step")), "kind": "one", "modality": "image", "block": 6,
            "measure": "logistic", "standard_error": 0.01,
            "student": {"6": {"logistic": 0.3}}, "random_init": {"6": {"logistic": 0.1}},
        }  # fmt: skip
        with (where / "probes.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def export(self, own: Work, where: Path, given: dict[str, str], step: str) -> None: ...

    def finetune(self, own: Work, where: Path, given: dict[str, str], step: str) -> None: ...

    def evaluate(self, own: Work, where: Path, given: dict[str, str], step: str) -> None:
        folder = where / "finetune" / "evaluation"
        folder.mkdir(parents=True)
        score = {"scores": {"accuracy": {"value": 50.0, "interval": [40.0, 60.0]}}}
        (folder / "evaluation.json").write_text(json.dumps(score))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def test_every_cell_is_trained_and_scored_in_turn(fake: Fake, tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards)
    run_sweep(sweep)
    names = ["masks_1-seed_1", "masks_4-seed_1", "masks_1-seed_2", "masks_4-seed_2"]
    assert fake.commands == [one for name in names for one in (f"pretrain {name}", "probe step10", "probe step20")]
    assert all(is_done(cell) for cell in expand(sweep))
    assert len((sweep.dir / "sweep.csv").read_text().splitlines()) == 1 + 4 * 3
    (expand(sweep)[0].folder / "fake.json").unlink()  # whoever removes the checkpoints of a cell that is done
    run_sweep(sweep)
    assert len(fake.commands) == 12, "nothing is repeated"
    assert not any("probe.image" in word for words in fake.words for word in words), "probed afterwards"


def test_second_start_goes_on_with_what_is_missing(fake: Fake, tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards, seeds=[1])
    fake.fails = lambda command: command == "probe step20 masks_1-seed_1"
    with pytest.raises(CellsFailedError, match=r"1 of 2 cells failed: masks_1-seed_1; the others are done"):
        run_sweep(sweep)
    failed = expand(sweep)[0].folder / "failed.json"
    assert "probe step20 ended with code 2" in json.loads(failed.read_text())["reason"]
    assert len((sweep.dir / "sweep.csv").read_text().splitlines()) == 1 + 2 + 3, "what is there is in the table"
    fake.fails, fake.commands = lambda command: False, []
    run_sweep(sweep)
    assert fake.commands == ["probe step20"] and not failed.exists()


def test_sweep_stops_after_failures_in_a_row(fake: Fake, tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards, max_failures=2, seeds=[1, 2, 3])
    fake.fails = lambda command: command.startswith("pretrain") and "masks_1-seed_1" not in command
    with pytest.raises(CellsFailedError, match="stopped: 2 cells failed in a row, the last masks_1-seed_2"):
        run_sweep(sweep)
    assert [command for command in fake.commands if command.startswith("pretrain")] == [
        "pretrain masks_1-seed_1", "pretrain masks_4-seed_1", "pretrain masks_1-seed_2",
    ]  # fmt: skip


def test_failures_that_are_not_in_a_row_do_not_stop_it(fake: Fake, tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards, max_failures=2, seeds=[1, 2, 3])
    fake.fails = lambda command: "pretrain masks_4" in command
    with pytest.raises(CellsFailedError, match="3 of 6 cells failed: masks_4-seed_1, masks_4-seed_2, masks_4-seed_3"):
        run_sweep(sweep)


def test_exit_codes(fake: Fake, tmp_path: Path, shards: Path) -> None:
    file = str(write_sweep(tmp_path, shards, seeds=[1]))
    assert main([file, "lr.peek=1"]) == 2
    fake.fails = lambda command: "masks_4" in command
    assert main([file]) == 9
    fake.fails = lambda command: False
    assert main([file, "--cell", "1"]) == 0
    assert main([file, "--cell", "2"]) == 2
    assert main([file, "--report"]) == 0
    assert main([file]) == 0


def test_run_at_another_pace_than_measured_says_so(
    fake: Fake, tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.pace_ms = 50.0  # and 100 ms in the run
    with caplog.at_level("INFO", logger="d2v2ds"):
        run_sweep(sweep_of(tmp_path, shards, budget={"minutes": 0.1, "pace_steps": 12}, seeds=[1]))
    assert "trained for 0.2 minutes, budget.minutes is 0.1: the pace of the machine changed" in caplog.text


def test_pace_gives_the_steps_of_a_time_once(
    fake: Fake, tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = sweep_of(tmp_path, shards, budget={"minutes": 0.1, "pace_steps": 12}, seeds=[1])
    with caplog.at_level("INFO", logger="d2v2ds"):
        run_sweep(sweep)
    assert "pace of the machine changed" not in caplog.text
    assert fake.commands[:2] == ["pretrain pace", "pretrain masks_1-seed_1"]
    assert "run.total_steps=60" in fake.words[1] and "lr.warmup_steps=6" in fake.words[1], "6 s of 100 ms each"
    folder = expand(sweep)[0].folder
    assert not (folder / "pace").exists()
    (folder / "done.json").unlink()
    fake.pace_ms, fake.commands = 50.0, []
    run_sweep(sweep)
    assert fake.commands == []
    assert json.loads((folder / "done.json").read_text())["steps"] == 60


def test_probes_beside_the_run_are_settings_of_the_run(fake: Fake, tmp_path: Path, shards: Path) -> None:
    probe = {"shards": str(shards), "test_shards": str(shards), "points": 2, "when": "beside", "label": "label"}
    sweep = sweep_of(tmp_path, shards, score={"probe": probe}, seeds=[1])
    run_sweep(sweep)
    words = fake.words[0]
    for word in (f"probe.image={shards}", f"probe.test.image={shards}", "probe.every_steps=10", "probe.kinds=[one]",
                 "probe.label=label", "run.keep_checkpoints=1"):  # fmt: skip
        assert word in words
    assert "probe step20" in fake.commands, "made up for, because the run did not"


def test_fine_tuning_starts_from_the_cell_and_keeps_its_network(fake: Fake, tmp_path: Path, shards: Path) -> None:
    tuning = TUNING | {"shards": str(shards), "test_shards": str(shards)}
    grid = {"depth": {"choices": {"six": {"overrides": ["model.shared_depth=6", "lr.peak=3e-3"]}}}}
    sweep = sweep_of(tmp_path, shards, score={"finetune": tuning}, grid=grid, seeds=[3])
    run_sweep(sweep)
    folder = expand(sweep)[0].folder
    assert [one.split()[0] for one in fake.commands] == ["pretrain", "export", "finetune", "evaluate"]
    tuned = fake.words[2]
    assert [word for word in tuned if "=" in word] == [
        "model.shared_depth=6", "lr.peak=1e-4", f"init.weights={folder / 'model'}", f"data.shards={shards}",
        "run.seed=3", f"run.dir={folder / 'finetune'}",
    ]  # fmt: skip
    assert "finetune/scores.accuracy" in (sweep.dir / "sweep.csv").read_text()


def test_several_ranks_start_under_the_launcher(fake: Fake, tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards, launch={"ranks": 2}, seeds=[1])
    run_sweep(sweep)
    assert Path(fake.words[0][0]).name == "deepspeed" and list(fake.words[0][1:3]) == ["--num_gpus", "2"]
    assert fake.words[1][:3] == [sys.executable, "-m", "d2v2ds.probe"]


# -------------------------------------------------------------------- locks


class Holder:
    """Another process that holds a lock."""

    def __init__(self, path: Path, shared: bool) -> None:
        code = (
            "import sys, pathlib\nfrom d2v2ds.io.lock import FolderLock\n"
            f"lock = FolderLock(pathlib.Path({str(path)!r}), shared={shared})\nlock.take()\n"
            "print('held', flush=True)\nsys.stdin.read()"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None and self.process.stdout.readline() == b"held\n"

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.process.communicate(timeout=60)


def test_two_sweeps_in_one_folder_are_refused_and_tasks_of_an_array_are_not(
    fake: Fake, tmp_path: Path, shards: Path
) -> None:
    sweep = sweep_of(tmp_path, shards)
    with Holder(sweep.dir / "lock", shared=False):
        with pytest.raises(ConfigError, match="another one is at work there"):
            run_sweep(sweep)
        with pytest.raises(ConfigError, match="another one is at work there"):
            run_cell(sweep, 0)
    with Holder(sweep.dir / "lock", shared=True):
        with pytest.raises(ConfigError, match="another one is at work there"):
            run_sweep(sweep)
        run_cell(sweep, 0)
    assert fake.commands[0] == "pretrain masks_1-seed_1"
    cell = expand(sweep)[1]
    with Holder(cell.folder / "cell.lock", shared=False), pytest.raises(ConfigError, match="another one is at work"):
        run_cell(sweep, 1)
    with FolderLock(sweep.dir / "lock") as lock:
        lock.take()


# -------------------------------------------------------------------- processes


def working(tmp_path: Path, shards: Path, stop: StopRequest) -> Work:
    sweep: Sweep = sweep_of(tmp_path, shards)
    cell: Cell = expand(sweep)[0]
    cell.folder.mkdir(parents=True, exist_ok=True)
    return Work(sweep, cell, stop, lambda what: None)


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code, "d2v2ds.pretrain"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('12:00:01 step 3'); print('ERROR lr.peak is wrong'); exit(2)",
         "d2v2ds.pretrain ended with code 2: ERROR lr.peak is wrong"),
        ("print('ERROR image_tiny: 2 problem(s)\\n  - lr.peak\\n  - data'); print('[launch.py:3] exits'); exit(2)",
         "2: ERROR image_tiny: 2 problem(s) - lr.peak - data"),
        ("raise ValueError('bad')", "code 1: ValueError: bad"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9: it printed nothing"),
    ],
)  # fmt: skip
def test_failure_says_code_and_reason(code: str, message: str, tmp_path: Path, shards: Path) -> None:
    one = working(tmp_path, shards, StopRequest())
    one._command(command("print('Error: of an earlier command')"))
    with pytest.raises(CellFailedError) as caught:
        one._command(command(code))
    assert message in str(caught.value) and "earlier" not in str(caught.value)
    assert "of an earlier command" in (one.cell.folder / "cell.log").read_text()


def test_command_beyond_its_limit_is_ended(tmp_path: Path, shards: Path) -> None:
    began = time.monotonic()
    with pytest.raises(CellFailedError, match="was ended after limit_minutes"):
        working(tmp_path, shards, StopRequest())._command(command("import time; time.sleep(60)"), limit_s=1.0)
    assert time.monotonic() - began < 30


def test_threads_are_those_of_the_launch(tmp_path: Path, shards: Path) -> None:
    one = working(tmp_path, shards, StopRequest())
    one._command(command("import os; print('threads', os.environ['OMP_NUM_THREADS'])"), threads=7)
    assert "threads 7" in (one.cell.folder / "cell.log").read_text()


SAVES = (
    "import pathlib, signal, sys, time\n"
    "def save(*given):\n    print('saved', flush=True)\n    sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, save)\npathlib.Path({!r}).touch()\ntime.sleep(60)"
)


def test_signal_lets_the_command_save_and_ends_the_sweep(tmp_path: Path, shards: Path) -> None:
    ready = tmp_path / "ready"

    def ask() -> None:
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    with StopRequest() as stop:
        one = working(tmp_path, shards, stop)
        thread = threading.Thread(target=ask)
        thread.start()
        with pytest.raises(PreemptedError, match="stopped by SIGUSR1; start the same command to continue"):
            one._command(command(SAVES.format(str(ready))))
        thread.join()
        assert "saved" in (one.cell.folder / "cell.log").read_text()
        with pytest.raises(PreemptedError):
            one._command(command("print('never')"))
    assert "\nnever" not in (one.cell.folder / "cell.log").read_text()


# -------------------------------------------------------------------- job array


def test_script_of_the_array_has_a_task_for_each_cell(tmp_path: Path, shards: Path) -> None:
    file = str(write_sweep(tmp_path, shards, launch={"ranks": 4}))
    assert main([file, "--slurm", "lr.peak=1e-3", f"dir={tmp_path / 'a $b'}"]) == 0
    script = tmp_path / "a $b" / "sweep.sh"
    done: Any = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --array=0-3" in lines and "#SBATCH --gpus-per-node=4" in lines and "#SBATCH --requeue" in lines
    assert not [line for line in lines[:-2] if line and not line.startswith("#")], "sbatch reads no further"
    assert lines[-1].endswith(f"slurm/sweep.sh\" {file} lr.peak=1e-3 'dir={tmp_path / 'a $b'}'")


def test_array_is_not_written_for_cells_that_cannot_run(tmp_path: Path, shards: Path) -> None:
    file = str(write_sweep(tmp_path, shards, overrides=["data.shards=/nowhere"]))
    assert main([file, "--slurm"]) == 2
    assert not (tmp_path / "sweep" / "sweep.sh").exists()
