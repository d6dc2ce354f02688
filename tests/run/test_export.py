"""Exports of runs whose folders are not whole any more, or are no runs."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import d2v2ds.export
from d2v2ds.errors import CheckpointError, MachineError
from d2v2ds.export import main
from d2v2ds.interop.export_folder import ModelFolder
from d2v2ds.probe import main as probe
from d2v2ds.run.export import MOST_POINTS, _last_start, _metrics
from tests.runs.launching import pack_clips, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on one rank."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    train(1, pack_clips(tmp_path_factory.mktemp("speech")), run_dir, "run.total_steps=2")
    return run_dir


@pytest.mark.run
@pytest.mark.parametrize("to", ["model", "model.safetensors"])
@pytest.mark.parametrize("file", ["metrics.jsonl", "starts.jsonl"])
def test_a_run_without_its_records_gives_a_model_and_says_what_is_not_told(
    file: str, to: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / file).unlink()
    assert main([str(tmp_path / "run"), "--to", str(tmp_path / to)]) == 0
    origin = ModelFolder(tmp_path / to).description.origin
    assert origin["step"] == 2
    assert bool(origin["final_metrics"]) == (file != "metrics.jsonl")
    assert bool(origin["versions"]) == (file != "starts.jsonl")
    lacking = {"metrics.jsonl": "metrics and curves", "starts.jsonl": "command, revision and versions"}[file]
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"the model is exported without {lacking} of the run" in warning
    assert file in warning


@pytest.mark.run
def test_a_torn_last_start_is_no_obstacle(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "starts.jsonl").write_text('{"command": ["pyth')
    assert main([str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    assert "without command, revision and versions of the run" in caplog.text


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text("x"), "a file"),
        (lambda path: path.mkdir(), "an empty folder"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "a folder of checkpoints"),
        (lambda path: (path / "index.json").mkdir(parents=True), "a folder of index.json"),
    ],
)
@pytest.mark.parametrize("program", ["export", "probe"])
def test_a_folder_that_is_no_run_is_called_that(
    program: str, make: Callable[[Path], object], found: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = tmp_path / "given"
    make(given)
    if program == "export":
        assert main([str(given), "--to", str(tmp_path / "model")]) == 2
    else:
        assert probe([str(given), "--shards", str(tmp_path)]) == 2
    expected = f"{given}: expected the folder of a run (config.yaml, checkpoints), found {found}"
    assert [record.message for record in caplog.records] == [expected]


def test_records_are_read_one_by_one_and_few_are_kept(tmp_path: Path) -> None:
    count = 3 * MOST_POINTS
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(count):
            file.write(json.dumps({"step": step, "loss/regression": 1 / (step + 1), "other": math.nan}) + "\n")
        file.write('{"step": 17, "loss/re')
    found = _metrics(tmp_path, count - 10, ["loss/regression"])
    assert found.last == {"step": count - 10, "loss/regression": 1 / (count - 9)}
    assert MOST_POINTS <= len(found.drawn) <= 2 * MOST_POINTS
    assert found.drawn[1] == {"step": 2, "loss/regression": 1 / 3}


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\n",
        b"[1]\n3\n",
        b'{"step": "x"}\n{"loss": 1}\n',
        b"{" * 5_000_000,
        b'{"step": 1' + b"0" * 9000 + b"}",
        None,
    ],
)
def test_damaged_records_and_starts_are_no_obstacle(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("metrics.jsonl", "starts.jsonl"):
        if content is None:
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    assert not _metrics(tmp_path, 10, []).drawn
    assert "without metrics and curves of the run" in caplog.text
    assert not {"command", "versions"} & _last_start(tmp_path).keys()


def test_a_torn_last_start_leaves_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "starts.jsonl").write_text('{"command": ["a"]}\n{"command": ["b"]}\n{"comm')
    assert _last_start(tmp_path) == {"command": ["b"]}
    assert "1 damaged lines" in caplog.text


@pytest.mark.parametrize(("error", "code"), [(MachineError("no descriptors"), 8), (CheckpointError("damaged"), 2)])
def test_a_fault_of_the_machine_has_its_own_code(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(d2v2ds.export, "export", fail)
    assert d2v2ds.export.main([str(tmp_path), "--to", str(tmp_path / "out")]) == code
