"""Training on file systems that lack something, with little shared memory, few descriptors and a clock that jumps."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from d2v2ds.checkpoints import main as checkpoints
from tests.environment.limits import small_shared_memory
from tests.environment.shim import can_mount, without
from tests.environment.training import SHORT, train
from tests.forked import Server
from tests.runs.launching import arguments_of, deterministic

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def expected(server: Server, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Metrics where nothing is lacking."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    code, printed = train(server, shards, run_dir)
    assert code == 0, printed[-3000:]
    return deterministic(run_dir)


def test_a_run_goes_on_without_sync_of_folders(
    server: Server, shards: Path, expected: list[dict[str, float]], tmp_path: Path
) -> None:
    code, printed = train(server, shards, tmp_path / "run", lacks="fsync-folder")
    assert code == 0, printed[-3000:]
    assert deterministic(tmp_path / "run") == expected
    assert printed.count("this file system cannot sync") in (1, 2)
    assert checkpoints(["verify", str(tmp_path / "run")]) == 0


def test_a_run_goes_on_without_all_that_a_machine_may_lack(
    library: Path, shards: Path, expected: list[dict[str, float]], tmp_path: Path
) -> None:
    """In a fresh interpreter, so that data workers and the server that forks them lack the same."""
    before, said = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh"], []
    if can_mount():
        mount = 'ulimit -n 256; mount -t tmpfs -o size=400k tmpfs /dev/shm && exec "$@"'
        before, said = ["unshare", "-m", "sh", "-c", mount, "sh"], ["batches go through pipes"]
    words = [*before, sys.executable, "-m", "d2v2ds.pretrain", *arguments_of(shards, tmp_path / "run", *SHORT)]
    lacking = without(library, "fsync-all", "locks", "links", "steady-clock")
    done = subprocess.run(words, env=lacking, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert deterministic(tmp_path / "run") == expected
    for warning in ["this file system cannot sync", "a second one there would not be noticed", *said]:
        assert done.stderr.count(warning) in (1, 2), done.stderr[-3000:]
    assert checkpoints(["verify", str(tmp_path / "run")]) == 0


def test_a_failing_disk_ends_a_run_with_its_own_words(server: Server, shards: Path, tmp_path: Path) -> None:
    code, printed = train(server, shards, tmp_path / "run", lacks="disk")
    assert code in (2, 7, 8)
    assert "the disk or its network failed" in printed
    assert "make room" not in printed and "free disk space" not in printed


def test_shared_memory_without_room_for_semaphores_is_said(server: Server, shards: Path, tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("no right to mount a small /dev/shm")
    code, printed = train(server, shards, tmp_path / "run", before=[partial(small_shared_memory, "8k")])
    assert code == 8, printed[-3000:]
    assert "cannot be started" in printed and "Traceback" not in printed
