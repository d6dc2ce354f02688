"""The run's folder before anything is opened in it."""

import errno
import os
from pathlib import Path

import pytest

from d2v2ds.errors import MachineError
from d2v2ds.run.prepare import run_dir_faults


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "lock"])
def test_a_fifo_in_the_folder_of_a_run_is_named_instead_of_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert run_dir_faults(tmp_path) == [f"{tmp_path / name}: expected a file, found a FIFO; remove it"]


def test_links_and_folders_of_the_owner_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert run_dir_faults(tmp_path) == []


def test_a_disk_that_fails_is_no_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node may do; code 2 would end the job for good."""

    def fail(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    for name in ("mkdir", "iterdir"):
        with monkeypatch.context() as patch, pytest.raises(MachineError, match="network file system changed"):
            patch.setattr(Path, name, fail)
            run_dir_faults(tmp_path)
