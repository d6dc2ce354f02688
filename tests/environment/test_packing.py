"""Packing on file systems that lack something, with few descriptors, and beside another packing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment.shim import without
from tests.preprocessing.helpers import contents


@pytest.fixture(scope="session")
def packed(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a packing where nothing is lacking."""
    output = tmp_path_factory.mktemp("packed") / "out"
    done = pack(recordings, output, dict(os.environ))
    assert done.returncode == 0, done.stderr
    return whole(output)


def pack(recordings: Path, output: Path, environment: dict[str, str], *before: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "preprocessing.pack_audio", "--input", recordings, "--output", output]
    return subprocess.run(
        [*before, *map(str, words), "--workers", "1"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def whole(output: Path) -> dict[str, bytes]:
    """The files of a folder less the one with date and command."""
    return {name: data for name, data in contents(output).items() if name != "index.json"}


@pytest.mark.run
@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("fsync-folder", "this file system cannot sync"),
        ("fsync-all", "this file system cannot sync"),
        ("direct-write", "no direct writes here"),
        ("locks", "no lock"),
        ("links", ""),
        ("steady-clock", ""),
    ],
)
def test_a_file_system_that_lacks_something_is_used_without(
    library: Path, recordings: Path, packed: dict[str, bytes], tmp_path: Path, lacking: str, said: str
) -> None:
    done = pack(recordings, tmp_path / "out", without(library, lacking))
    assert done.returncode == 0, done.stderr
    assert whole(tmp_path / "out") == packed
    assert done.stderr.count(said) == 1 if said else "warning" not in done.stderr.lower()


@pytest.mark.run
def test_a_failing_disk_is_named_as_such(library: Path, recordings: Path, tmp_path: Path) -> None:
    done = pack(recordings, tmp_path / "out", without(library, "disk"))
    assert done.returncode == 4
    assert "Input/output error" in done.stderr and "disk or its network failed" in done.stderr
    assert "Traceback" not in done.stderr and "make room" not in done.stderr
    assert not (tmp_path / "out" / "index.json").exists()
    assert pack(recordings, tmp_path / "out", dict(os.environ)).returncode == 0, "the same command goes on"


@pytest.mark.run
def test_few_descriptors_are_no_damage(recordings: Path, packed: dict[str, bytes], tmp_path: Path) -> None:
    done = pack(recordings, tmp_path / "enough", dict(os.environ), "sh", "-c", 'ulimit -n 64; exec "$@"', "sh")
    assert done.returncode == 0, done.stderr
    assert whole(tmp_path / "enough") == packed
    for count in (8, 12, 16):
        output = tmp_path / f"{count}"
        done = pack(recordings, output, dict(os.environ), "sh", "-c", f'ulimit -n {count}; exec "$@"', "sh")
        is_finished = (output / "index.json").exists()
        assert (done.returncode == 0) == is_finished
        assert not is_finished or whole(output) == packed, "nothing was skipped as damaged"


@pytest.mark.run
def test_the_second_of_two_packers_says_that_another_is_at_work(recordings: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code = (
        "import sys, time; from pathlib import Path; from d2v2ds.io.lock import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])) as lock:\n    lock.take(); print('taken', flush=True); time.sleep(120)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(output / ".packing" / "lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "taken\n"
        done = pack(recordings, output, dict(os.environ))
        assert done.returncode == 2
        assert f"another one is at work there (process {first.pid}" in done.stderr
    finally:
        first.kill()
        first.communicate()
    assert pack(recordings, output, dict(os.environ)).returncode == 0
