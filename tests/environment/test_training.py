"""Training on file systems that lack something, with little shared memory, few descriptors and a clock that jumps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2v2ds.checkpoints import main as checkpoints
from tests.environment.shim import can_mount, without
from tests.runs.launching import arguments_of, deterministic, pack_clips

SHORT = ("run.total_steps=4", "run.save_every_steps=2", "data.num_workers=2")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_clips(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="session")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Metrics where nothing is lacking."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    done = train(shards, run_dir, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return deterministic(run_dir)


def train(shards: Path, run_dir: Path, environment: dict[str, str], *before: str) -> subprocess.CompletedProcess[str]:
    words = [*before, sys.executable, "-m", "d2v2ds.pretrain", *arguments_of(shards, run_dir, *SHORT)]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
    return subprocess.CompletedProcess(words, process.returncode, *printed)


@pytest.mark.run
@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("fsync-folder", "this file system cannot sync"),
        ("fsync-all", "this file system cannot sync"),
        ("locks", "a second one there would not be noticed"),
        ("links", ""),
        ("steady-clock", ""),
    ],
)
def test_a_run_goes_on_without_what_the_file_system_lacks(
    library: Path, shards: Path, expected: list[dict[str, float]], tmp_path: Path, lacking: str, said: str
) -> None:
    done = train(shards, tmp_path / "run", without(library, lacking))
    assert done.returncode == 0, done.stderr[-3000:]
    assert deterministic(tmp_path / "run") == expected
    assert said in done.stderr and done.stderr.count(said) <= 2 or not said
    assert checkpoints(["verify", str(tmp_path / "run")]) == 0


@pytest.mark.run
def test_a_failing_disk_ends_a_run_with_its_own_words(library: Path, shards: Path, tmp_path: Path) -> None:
    done = train(shards, tmp_path / "run", without(library, "disk"))
    assert done.returncode in (2, 7, 8)
    assert "the disk or its network failed" in done.stderr
    assert "make room" not in done.stderr and "free disk space" not in done.stderr


@pytest.mark.run
def test_few_descriptors_are_enough(shards: Path, expected: list[dict[str, float]], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = train(shards, tmp_path / "run", environment, "sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    assert done.returncode == 0, done.stderr[-3000:]
    assert deterministic(tmp_path / "run") == expected


@pytest.mark.run
@pytest.mark.parametrize(
    ("size", "code", "said"), [("400k", 0, "batches go through pipes"), ("8k", 8, "cannot be started")]
)
def test_little_shared_memory_neither_hangs_a_run_nor_changes_it(
    shards: Path, expected: list[dict[str, float]], tmp_path: Path, size: str, code: int, said: str
) -> None:
    if not can_mount():
        pytest.skip("no right to mount a small /dev/shm")
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = train(shards, tmp_path / "run", environment, "unshare", "-m", "sh", "-c", mount, "sh")
    assert done.returncode == code, done.stderr[-3000:]
    assert said in done.stderr
    assert code or deterministic(tmp_path / "run") == expected
