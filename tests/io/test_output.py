"""Outputs that are whole or not there, written by one process at a time."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v2ds.errors import CheckpointError
from d2v2ds.io import output
from d2v2ds.io.output import sole_writer, whole_file


@contextlib.contextmanager
def another_writer(path: Path) -> Iterator[int]:
    """Another process that writes an output; killed at the end, and its lock file removed with it."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        with sole_writer(path, CheckpointError):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        output.beside(path, "lock").unlink(missing_ok=True)
        os.close(reading)
        os.close(writing)


def test_a_second_writer_is_told_who_is_at_work_and_may_come_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with another_writer(path) as process:
        said = f"x: another process is at work on it \\(process {process} on .*; let it end"
        with pytest.raises(CheckpointError, match=said), sole_writer(path, CheckpointError):
            pytest.fail("held by another")
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / ".x.lock").exists()
        with sole_writer(path, CheckpointError):
            assert str(os.getpid()) in (tmp_path / ".x.lock").read_text()
    assert not list(tmp_path.iterdir())


def test_a_file_of_somebody_else_under_a_locks_name_is_left_alone(tmp_path: Path) -> None:
    lock = tmp_path / ".x.lock"
    lock.write_text("my own lock, and long")
    with pytest.raises(CheckpointError, match="a file of somebody else"), sole_writer(tmp_path / "x", CheckpointError):
        pytest.fail("not ours")
    assert lock.read_text() == "my own lock, and long"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(CheckpointError, match="a file of somebody else"), sole_writer(tmp_path / "x", CheckpointError):
        pytest.fail("not ours")


def test_links_under_hidden_names_are_removed_and_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in (".x.lock", ".x.partial"):
        (tmp_path / name).symlink_to(mine)
    with sole_writer(tmp_path / "x", CheckpointError), whole_file(tmp_path / "x") as file:
        file.write(b"new")
    assert mine.read_text() == "mine"
    assert (tmp_path / "x").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "x"]


def test_an_output_that_is_a_link_of_its_owner_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "x")
    with whole_file(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "x").is_symlink()
    assert (tmp_path / "disk" / "x").read_bytes() == b"new"


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ValueError, match="half"), whole_file(tmp_path / "x") as file:
        file.write(b"half")
        raise ValueError("half")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
