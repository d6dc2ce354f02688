"""`python -m d2v2ds.checkpoints`: what it lists, finds damaged and removes."""

import contextlib
import errno
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2v2ds.checkpoints import main
from d2v2ds.distributed.checkpoint import report
from d2v2ds.distributed.checkpoint.format import (
    FORMAT_VERSION,
    MAX_PLAIN_BYTES,
    Manifest,
    _checksum,
    crc32_of,
    finished_tags,
    named_tag,
    read_manifest,
    read_plain,
    read_settings,
    tags_without_manifest,
)
from d2v2ds.distributed.checkpoint.keep import Keep, abandon_after, remove, superseded_tags
from d2v2ds.distributed.checkpoint.save import _make_partial_folder
from d2v2ds.errors import CheckpointError, MachineError


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
    assert lines[0].split()[-1] == "selection", "a loss of pretraining, an error rate or other scores of a task"
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


def test_a_link_of_the_owner_is_neither_deleted_through_nor_in_the_way(run: Path, tmp_path_factory: Any) -> None:
    """An old checkpoint on another disk stays; a link where a save writes is removed, not what it leads to."""
    folder, disk = run / "checkpoints", tmp_path_factory.mktemp("disk")
    moved = (folder / "step00000100").rename(disk / "step00000100")
    (folder / "step00000100").symlink_to(moved)
    assert superseded_tags(folder, Keep(last=1)) == ["step00000300"]
    assert main(["verify", str(run)]) == 0
    (folder / "step00000500.partial").rmdir()
    (folder / "step00000500.partial").symlink_to(moved)
    (folder / "stray.partial").write_text("a file")
    _make_partial_folder(folder, folder / "step00000500.partial")
    assert [path.name for path in folder.glob("*.partial") if path.is_dir()] == ["step00000500.partial"]
    assert not (folder / "step00000500.partial").is_symlink()
    remove(folder / "step00000100")
    assert (moved / "manifest.json").is_file() and not (folder / "step00000100").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../../etc", b"step00000400\0", b"x" * 5000, b"a/b"])
@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_damaged_pointer_is_passed_over(run: Path, name: str, content: bytes, caplog: Any) -> None:
    folder = run / "checkpoints"
    (folder / name).write_bytes(content)
    assert named_tag(folder, name) is None
    assert f"{folder / name}: expected" in caplog.text
    assert finished_tags(folder)[0] == "step00000400"
    assert superseded_tags(folder, Keep(last=1))[0] == "step00000100"
    assert main(["list", str(run)]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xff" + text,
        lambda text: b"[" * 100_000,
        lambda text: b"",
        lambda text: text.replace(b'"files": {', b'"files": {"../x": {"bytes": 1, "crc32": 1}, ', 1),
        lambda text: text.replace(b'"world_size": 1', b'"world_size": "1"'),
        lambda text: text.replace(b'"world_size": 1', b'"world_size": 1e999'),
        lambda text: text.replace(b'"global_steps": 100', b'"global_steps": 100, "compiled": 1'),
    ],
)
def test_a_damaged_old_manifest_stops_nothing(run: Path, change: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """With a checksum of its own that fits, as an attacker writes it, and without."""
    folder = run / "checkpoints"
    file = folder / "step00000100" / "manifest.json"
    damaged = change(file.read_bytes())
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(damaged)
        content.pop("checksum")
        damaged = json.dumps({"checksum": _checksum(content), **content}).encode()
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"step00000100/manifest\.json: "):
        read_manifest(file.parent)
    assert finished_tags(folder) == ["step00000400", "step00000300", "step00000200", "step00000100"]
    assert superseded_tags(folder, Keep(last=2)) == ["step00000100"]
    assert main(["list", str(run)]) == 5
    assert main(["verify", str(run)]) == 5
    assert "Traceback" not in capsys.readouterr().err
    assert main(["prune", str(run), "--keep-last", "1"]) == 0


def test_a_run_at_work_may_remove_what_is_being_listed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Retention removes a checkpoint between the listing and the reading: that is no damage."""
    folder = run / "checkpoints"

    def racing(read: Any) -> Any:
        def read_late(path: Path) -> Any:
            if path.name == "step00000100" and path.exists():
                remove(path)
            return read(path)

        return read_late

    monkeypatch.setattr(report, "read_manifest", racing(read_manifest))
    kept = shutil.copytree(folder / "step00000100", run / "kept")
    assert main(["list", str(run)]) == 0
    assert "DAMAGED" not in capsys.readouterr().out
    shutil.copytree(kept, folder / "step00000100")
    assert main(["verify", str(run)]) == 0
    assert "step00000100: removed meanwhile" in capsys.readouterr().out


def test_the_best_checkpoint_may_move_while_it_is_looked_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read, calls = run / "checkpoints", named_tag, []

    def moving(where: Path, name: str) -> str | None:
        calls.append(name)
        if calls.count("best") == 1 and name == "best":
            tag = read(where, name)
            (where / "best").write_text("step00000300")
            remove(where / str(tag))
            return tag
        return read(where, name)

    monkeypatch.setattr("d2v2ds.distributed.checkpoint.format.named_tag", moving)
    assert tags_without_manifest(folder) == []
    assert calls.count("best") == 2


def test_client_state_that_is_no_plain_values_or_unpacks_to_too_much_is_refused(run: Path) -> None:
    file = run / "checkpoints" / "step00000400" / "client.pt"
    torch.save({"step": 4}, file)
    assert read_plain(file) == {"step": 4}
    with pytest.raises(CheckpointError, match=r"client\.pt: expected the settings of model and objective, found none"):
        read_settings(file.parent)
    manifest, whole = read_manifest(file.parent), file.read_bytes()
    listed = replace(manifest, files={**manifest.files, "client.pt": {"bytes": len(whole), "crc32": crc32_of(file)}})
    (file.parent / "manifest.json").write_text(listed.to_json())
    with pytest.raises(CheckpointError, match=r"client\.pt: expected the settings of model and objective, found none"):
        read_settings(file.parent)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"client\.pt: damaged, its checksum differs from the manifest"):
        read_settings(file.parent)
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            read_plain(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("client/data.pkl", bytes(MAX_PLAIN_BYTES + 1))
    assert file.stat().st_size < 2_000_000
    with pytest.raises(CheckpointError, match=r"client\.pt: expected at most 268,435,456 bytes, found 268,435,457"):
        read_plain(file)


def failing_reads(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Let the system refuse to open files of a name."""
    real = os.open

    def refuse(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).endswith(name):
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_fault_of_the_machine_removes_no_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    """A manifest that cannot be read now is not the oldest one."""
    folder = run / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    with monkeypatch.context() as patched:
        failing_reads(patched, "step00000400/manifest.json", code)
        with pytest.raises(MachineError):
            superseded_tags(folder, Keep(last=1))
        with pytest.raises(MachineError):
            abandon_after(folder, "step00000400")
        assert main(["prune", str(run), "--keep-last", "1"]) == 8
        assert main(["list", str(run)]) == 8
        assert f"cannot be read: {os.strerror(code)}" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        failing_reads(patched, "step00000300/manifest.json", code)
        with pytest.raises(MachineError):
            abandon_after(folder, "step00000200")
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert (folder / "latest").read_text() == "step00000400"


def test_a_return_to_a_damaged_checkpoint_removes_nothing(run: Path) -> None:
    folder = run / "checkpoints"
    (folder / "step00000300" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="step00000300"):
        abandon_after(folder, "step00000300")
    assert (folder / "step00000400").is_dir()


def test_a_manifest_holds_no_nan(run: Path) -> None:
    manifest = replace(read_manifest(run / "checkpoints" / "step00000400"), validation_loss=float("nan"))
    with pytest.raises(ValueError, match="JSON compliant"):
        manifest.to_json()
