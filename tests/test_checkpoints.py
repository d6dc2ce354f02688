"""`python -m d2v2ds.checkpoints`: what it lists, finds damaged and removes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2v2ds.checkpoints import main
from d2v2ds.distributed.checkpoint.format import (
    FORMAT_VERSION,
    Manifest,
    crc32_of,
    finished_tags,
    read_manifest,
)
from d2v2ds.distributed.checkpoint.keep import Keep, abandon_after, superseded_tags
from d2v2ds.errors import CheckpointError


def checkpoint(folder: Path, step: int, loss: float | None = None) -> Path:
    """A checkpoint of one small file."""
    path = folder / f"step{step:08d}"
    path.mkdir(parents=True)
    file = path / "student.rank00000.safetensors"
    save_file({"w": torch.full((16,), float(step))}, file, metadata={"offsets": '{"w": 0}'})
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tag=path.name,
        stage=3,
        compute_dtype="torch.bfloat16",
        world_size=1,
        counters={"global_steps": step},
        parameters={"w": [16]},
        teacher_parameters=[],
        num_teacher_updates=0,
        optimizer_keys=[],
        optimizer_scalars={},
        files={file.name: {"bytes": file.stat().st_size, "crc32": crc32_of(file)}},
        validation_loss=loss,
    )
    (path / "manifest.json").write_text(manifest.to_json())
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    for step, loss in ((100, None), (200, 0.25), (300, 0.5), (400, None)):
        checkpoint(folder, step, loss)
    (folder / "latest").write_text("step00000400")
    (folder / "best").write_text("step00000200")
    (folder / "step00000500.partial").mkdir()
    return tmp_path


def test_list_says_what_there_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        [f"step{step:08d}", str(step)] for step in (400, 300, 200, 100)
    ]  # fmt: skip
    assert lines[1].endswith("latest")
    assert lines[3].split()[-2:] == ["0.25", "best"]
    assert lines[5].startswith("step00000500.partial: being written")


def test_verify_names_the_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole") == 4
    file = run / "checkpoints" / "step00000300" / "student.rank00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (run / "checkpoints" / "step00000100" / "manifest.json").unlink()
    assert main(["verify", str(run)]) == 5
    printed = capsys.readouterr().out
    assert "step00000300: DAMAGED\n" in printed
    assert f"{file}: damaged" in printed
    assert "step00000100: DAMAGED" in printed
    assert main(["list", str(run)]) == 5
    assert "step00000100     LOST" in capsys.readouterr().out
    assert main(["verify", str(run), "--tag", "step00000200"]) == 0


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1])
def test_checkpoint_of_another_format_is_refused_in_one_sentence(run: Path, version: int) -> None:
    path = run / "checkpoints" / "step00000400"
    (path / "manifest.json").write_text(replace(read_manifest(path), format_version=version).to_json())
    sentence = (
        f"expected checkpoint format 1, found {version}; read it with the version of d2v2ds that wrote it, or start"
    )
    with pytest.raises(CheckpointError, match=f"manifest.json: {sentence} a new run$"):
        read_manifest(path)


def test_prune_keeps_newest_best_and_milestones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    assert main(["prune", str(run), "--keep-last", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would remove") == 2
    assert len(finished_tags(folder)) == 4
    assert main(["prune", str(run), "--keep-last", "1", "--keep-every", "300"]) == 0
    assert finished_tags(folder) == ["step00000400", "step00000300", "step00000200"]
    assert main(["prune", str(run), "--keep-last", "1"]) == 0
    assert finished_tags(folder) == ["step00000400", "step00000200"]


def test_damaged_manifest_does_not_stop_pruning_or_a_return(run: Path) -> None:
    folder = run / "checkpoints"
    (folder / "step00000100" / "manifest.json").write_text("{")
    abandon_after(folder, "step00000300")
    assert finished_tags(folder) == ["step00000300", "step00000200", "step00000100"]
    assert superseded_tags(folder, Keep(last=1, every_steps=300)) == ["step00000100"]


def test_impossible_requests_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path)]) == 2
    assert "expected a run with checkpoints" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["prune", str(tmp_path), "--keep-last", "0"])
