"""One writer per folder, whatever way the other one ends."""

import errno
import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from d2v2ds.io.lock import FolderLock
from tests.runs.launching import arguments_of, environment, pack_clips

HOLD = "import sys, time; from pathlib import Path; from d2v2ds.io.lock import FolderLock\n"
HOLD += (
    "with FolderLock(Path(sys.argv[1]) / 'lock') as lock:\n    lock.take(); print('taken', flush=True); time.sleep(120)"
)


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with other_process(tmp_path) as first, FolderLock(tmp_path / "lock", patience_s=0.2) as second:
        with pytest.raises(
            BlockingIOError, match=rf"lock: another one is at work there \(process {first.pid} on \S+ since 20"
        ):
            second.take()
        assert caplog.text.count("waiting for its end") == 1
        first.send_signal(signal.SIGKILL)
        first.wait()
        second.take()


def test_a_run_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "lock", patience_s=60) as second, other_process(tmp_path) as first:
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill {first.pid}"])
        second.take()
    with FolderLock(tmp_path / "lock") as third:
        third.take()


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with FolderLock(tmp_path / "lock") as lock:
        lock.take()
    assert "a second one there would not be noticed" in caplog.text


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with FolderLock(tmp_path / "lock") as lock, pytest.raises(OSError, match="symbolic links"):
        lock.take()
    assert (tmp_path / "mine").read_text() == "mine"


def test_those_who_share_it_keep_out_only_others(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "lock", shared=True) as first:
        first.take()
        code = "import sys; from pathlib import Path; from d2v2ds.io.lock import FolderLock\n"
        code += "with FolderLock(Path(sys.argv[1]), shared=sys.argv[2] == 'shared') as lock: lock.take()"
        ended = [
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / "lock"), kind], capture_output=True, text=True, check=False
            )
            for kind in ("shared", "alone")
        ]
    assert ended[0].returncode == 0, ended[0].stderr
    assert "BlockingIOError" in ended[1].stderr


@pytest.mark.run
def test_a_run_into_the_folder_of_another_ends_before_it_writes_anything(tmp_path: Path) -> None:
    shards, run_dir = pack_clips(tmp_path / "clips"), tmp_path / "run"
    code = "import sys, d2v2ds.run.pretraining as r; r.PATIENCE_S = 0.2; from d2v2ds.pretrain import main; "
    code += "sys.exit(main(sys.argv[1:]))"
    with other_process(run_dir):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments_of(shards, run_dir)],
            env=environment(), capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert f"run.dir {run_dir}: rank 0: {run_dir}/lock: another one is at work there" in done.stderr
    assert {path.name for path in run_dir.iterdir()} <= {"lock", "log.txt"}


def test_a_lock_whose_folder_was_moved_or_taken_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with FolderLock(folder / "lock") as lock:
        lock.take()
        assert lock.state() == "held"
        folder.rename(tmp_path / "moved")
        assert lock.state() == "gone"
        with FolderLock(folder / "lock") as other:
            other.take()
            assert (lock.state(), other.state()) == ("taken", "held")
