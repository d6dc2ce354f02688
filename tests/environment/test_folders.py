"""Folders that are read-only, or that vanish while a run is at work, and too little memory."""

import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from d2v2ds.checkpoints import main as checkpoints
from tests.environment.limits import address_space, lose, read_only, vanishes_at_row
from tests.environment.shim import can_mount
from tests.environment.training import log_of, start, train
from tests.forked import ForkedProgram, Server
from tests.runs.launching import deterministic, environment, records

pytestmark = pytest.mark.run
MIB = 1 << 20


def test_a_run_folder_that_is_read_only_is_named(server: Server, shards: Path, tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("no right to mount a folder")
    for run_dir in (tmp_path, tmp_path / "run"):
        code, printed = train(server, shards, run_dir, before=[partial(read_only, str(tmp_path))])
        assert code == 2, printed[-3000:]
        assert f"run.dir {run_dir}: " in printed and "read-only file system" in printed.lower()
        assert "Traceback" not in printed


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_run_folder_that_vanishes_ends_the_run_with_all_saved(
    how: str, server: Server, shards: Path, tmp_path: Path
) -> None:
    """The steps are in one of the folders, and the same command does not begin from the start without a word."""
    run_dir = tmp_path / "run"
    code, printed = vanish(server, shards, run_dir, lambda: lose(run_dir, how))
    assert code == 7, printed[-3000:]
    assert f"{run_dir}: the run's folder was moved, removed or unmounted; this step is saved" in printed
    assert "Traceback" not in printed
    assert checkpoints(["verify", str(run_dir)]) == 0


def test_a_run_folder_that_another_run_took_is_left_alone(server: Server, shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def take() -> None:
        lose(run_dir, "moved")
        run_dir.mkdir()
        (run_dir / "lock").write_text("process 1 on another since today\n")

    code, printed = vanish(server, shards, run_dir, take)
    assert code == 7, printed[-3000:]
    assert f"{run_dir}: another run has taken the place of this one's folder" in printed
    assert not (run_dir / "checkpoints").exists()
    assert checkpoints(["verify", str(tmp_path / "moved")]) == 0


def test_shards_that_vanish_are_read_to_the_end(server: Server, shards: Path, tmp_path: Path) -> None:
    """All of them are mapped by then. The next start says that they are gone."""
    code, printed = train(server, shards, tmp_path / "unbroken", "run.total_steps=10", "run.save_every_steps=4")
    assert code == 0, printed[-3000:]
    copy, run_dir = tmp_path / "packed", tmp_path / "run"
    shutil.copytree(shards, copy)
    code, printed = vanish(server, copy, run_dir, lambda: shutil.rmtree(copy), "run.total_steps=10")
    assert code == 0, printed[-3000:]
    assert deterministic(run_dir) == deterministic(tmp_path / "unbroken")
    code, printed = train(server, copy, run_dir)
    assert code == 2
    assert str(copy) in printed and "Traceback" not in printed


def test_too_little_memory_is_said_as_such(server: Server, shards: Path, tmp_path: Path) -> None:
    """In the engine, and in the steps, where the libraries sometimes end the process themselves."""
    code, printed = train(server, shards, tmp_path / "engine", before=[partial(address_space, 150 * MIB)])
    assert code == 8, printed[-3000:]
    assert "you tried to allocate 100000000 bytes" in printed and "has no memory left; lower workers" in printed
    assert "Traceback" not in printed
    code, printed = train(server, shards, tmp_path / "steps", before=[partial(address_space, 1000 * MIB)])
    assert code in (0, 8, -signal.SIGSEGV, -signal.SIGABRT), printed[-3000:]
    assert "Traceback" not in printed


def test_a_packer_with_too_little_memory_says_so(server: Server, recordings: Path, tmp_path: Path) -> None:
    """And the same command goes on where there is enough."""
    codes = []
    for mib in (0, 2, 6, 12, 24, 600):
        limit = partial(address_space, mib * MIB, "preprocessing.pack_audio")
        code, printed = pack(server, recordings, tmp_path / "out", limit)
        assert code in (0, 4), printed
        assert code == 0 or "memory" in printed
        codes.append(code)
        assert (tmp_path / "out" / "index.json").exists() == (0 in codes)
    assert (codes[0], codes[-1]) == (4, 0)


def test_an_output_folder_that_is_read_only_is_named(server: Server, recordings: Path, tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("no right to mount a folder")
    for output in (tmp_path, tmp_path / "out"):
        code, printed = pack(server, recordings, output, partial(read_only, str(tmp_path)))
        assert code == 4, printed
        assert str(output) in printed and "mounted for reading only; mount it anew" in printed


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_an_output_folder_that_vanishes_is_named(how: str, server: Server, recordings: Path, tmp_path: Path) -> None:
    """And the same command packs everything."""
    output = tmp_path / "out"
    code, printed = pack(server, recordings, output, partial(vanishes_at_row, 3, str(output), how))
    assert code == 4, printed
    assert str(output) in printed
    assert not (output / "index.json").exists()
    assert pack(server, recordings, output)[0] == 0


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_recordings_that_vanish_are_not_skipped_as_damaged(
    how: str, server: Server, recordings: Path, tmp_path: Path
) -> None:
    inputs, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(recordings, inputs)
    code, printed = pack(server, inputs, output, partial(vanishes_at_row, 3, str(inputs), how))
    assert code == 4, printed
    assert str(inputs) in printed
    assert not (output / "index.json").exists()


def pack(server: Server, recordings: Path, output: Path, *before: Callable[[], None]) -> tuple[int, str]:
    """Pack in a forked process that calls `before` first; returns exit code and what was printed."""
    words = ["--input", str(recordings), "--output", str(output), "--workers", "1"]
    log = recordings.parent / "pack.log"
    program = ForkedProgram("preprocessing.pack_audio", words, environment(), log, server=server, before=before)
    code, printed = program.wait(60), log.read_text()
    assert "Traceback" not in printed
    return code, printed


def vanish(server: Server, shards: Path, run_dir: Path, lose_it: Callable[[], object], *extra: str) -> tuple[int, str]:
    """Start a long run, call `lose_it` after its first records; returns exit code and what was printed."""
    program = start(server, shards, run_dir, "run.total_steps=400", "run.save_every_steps=4", *extra)
    try:
        while records(run_dir) < 5:
            assert program.poll() is None, log_of(run_dir).read_text()[-3000:]
            time.sleep(0.02)
        lose_it()
        return program.wait(60), log_of(run_dir).read_text()
    finally:
        program.kill()
