"""Exports of runs whose folders are not whole any more, or are no runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v2ds.export import main
from d2v2ds.interop.export_folder import ModelFolder
from d2v2ds.probe import main as probe
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
