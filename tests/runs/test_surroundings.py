"""Surroundings that a run survives: full disks, clocks that jump, damaged and growing data, validation, retention.

As `test_faults.py`, in a file of its own so that both run at the same time.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2v2ds.distributed.checkpoint.format import file_faults, finished_tags, named_tag, read_manifest
from tests.runs.comparing import assert_same_run, finish
from tests.runs.launching import STEPS, Ranks, deterministic, fp32, pack_clips, records, weights

pytestmark = pytest.mark.run


# ------------------------------------------------------------------ disks and clocks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("a small file system needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_ends_the_run_at_the_second_failure(shards: Path, small_disk: Path, tmp_path: Path) -> None:
    """One checkpoint of 2 MB fits, the next does not: it says so and goes on; the third ends it, the first is whole."""
    run_dir = small_disk / "run"
    with Ranks(2, shards, run_dir, "run.keep_checkpoints=0", "run.total_steps=40", logs=tmp_path) as ranks:
        assert ranks.wait() == [7, 7], ranks.printed(0)[-3000:]
        said = ranks.printed(0)
    assert said.count("was NOT written, earlier ones are intact") == 2
    assert "No space left on device" in said
    assert "the run continues; a second failure will end it" in said
    folder = run_dir / "checkpoints"
    newest = folder / finished_tags(folder)[0]
    manifest = read_manifest(newest)
    assert not file_faults(newest, manifest, manifest.files)
    assert not list(folder.glob("*.partial")), "what could not be finished does not fill the disk"


@pytest.mark.slow
def test_full_disk_that_is_cleared_costs_one_checkpoint(
    shards: Path, unbroken: Path, small_disk: Path, tmp_path: Path
) -> None:
    run_dir = small_disk / "run"
    with Ranks(2, shards, run_dir, "run.keep_checkpoints=1", "run.async_checkpoints=false", logs=tmp_path) as ranks:
        ranks.until(lambda: named_tag(run_dir / "checkpoints", "latest") == "step00000002")
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        ranks.until(lambda: "was NOT written" in ranks.printed(0))
        ballast.unlink()
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
    expected, found = weights(unbroken, STEPS), weights(run_dir, STEPS)
    assert all((expected[name] == found[name]).all() for name in expected)


def test_curves_that_cannot_be_written_do_not_stop_the_run(shards: Path, unbroken: Path, tmp_path: Path) -> None:
    """TensorBoard's folder is a file, and the metrics are taken away while the run goes on."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "tensorboard").write_text("in the way")
    with Ranks(2, shards, run_dir, logs=tmp_path) as ranks:
        ranks.until(lambda: records(run_dir) >= 3)
        (run_dir / "metrics.jsonl").unlink()
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
        said = ranks.printed(0)
    assert "TensorBoard cannot be written, the run continues without" in said
    assert "metrics.jsonl is gone; writing a new one" in said
    assert deterministic(run_dir)[-1] == deterministic(unbroken)[-1]


@pytest.mark.slow
def test_clock_that_jumps_changes_nothing(shards: Path, unbroken: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Ranks(2, shards, run_dir, "fault=clock,0,3", logs=tmp_path) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
    assert_same_run(run_dir, unbroken)
    curve = read_scalars(run_dir, "loss/regression")
    assert curve == read_scalars(unbroken, "loss/regression")
    assert len(curve) == STEPS


def read_scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """A curve as TensorBoard shows it."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


# ------------------------------------------------------------------ damaged data


LARGE_BATCHES = ["data.audio.global_batch_seconds=12", "data.audio.micro_batch_seconds=6"]
"""An epoch of seven steps."""


def test_flipped_byte_costs_its_row_and_is_counted(shards: Path, tmp_path: Path) -> None:
    """In the audio of one row: that row is left out each time it is drawn, and nothing else is."""
    copy = tmp_path / "packed"
    shutil.copytree(shards, copy)
    (file,) = copy.glob("audio-*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    extra = [*LARGE_BATCHES, "run.total_steps=8", "run.save_every_steps=8"]
    with Ranks(2, copy, tmp_path / "run", *extra, logs=tmp_path) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
        said = ranks.printed(0) + ranks.printed(1)
    found = deterministic(tmp_path / "run")
    assert found[-1]["data/damaged_rows"] >= 1.0
    assert said.count("skipped a row") == found[-1]["data/damaged_rows"]
    assert file.name in said
    with Ranks(2, copy, tmp_path / "strict", "health.max_damaged_rows=0", *extra, logs=tmp_path) as ranks:
        assert ranks.wait() == [6, 6], ranks.printed(0)[-3000:]
        assert "health.max_damaged_rows allows 0" in ranks.printed(0)


@pytest.mark.parametrize("how", [pytest.param("truncated", marks=pytest.mark.slow), "deleted"])
def test_shard_that_is_spoilt_while_the_run_goes_on(how: str, shards: Path, unbroken: Path, tmp_path: Path) -> None:
    """Cut off, its rows cannot be read: a clear stop. Deleted, a mapped file stays readable: nothing changes."""
    copy, run_dir = tmp_path / "packed", tmp_path / "run"
    shutil.copytree(shards, copy)
    (file,) = copy.glob("audio-*.arrow")
    extra = [] if how == "deleted" else ["run.total_steps=400", "health.max_damaged_rows=5"]
    with Ranks(2, copy, run_dir, *extra, logs=tmp_path) as ranks:
        ranks.until(lambda: records(run_dir) >= 3)
        if how == "deleted":
            file.unlink()
            assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
            assert_same_run(run_dir, unbroken)
        else:
            os.truncate(file, file.stat().st_size // 2)
            assert ranks.wait() == [6, 6], ranks.printed(0)[-3000:]
            said = ranks.printed(0) + ranks.printed(1)
            assert "the file was cut off or overwritten" in said
            assert "none of them can be read" in said or "rows could not be read and were skipped so far" in said


# ------------------------------------------------------------------ data that grows


def test_data_that_grew_is_an_error_until_it_is_allowed(shards: Path, tmp_path: Path) -> None:
    """A second folder beside the first, from the next epoch on."""
    run_dir, more = tmp_path / "run", pack_clips(tmp_path / "more", "--max-seconds", "1.9")
    extra = [*LARGE_BATCHES, "run.total_steps=20", "run.health_every_steps=100", "run.save_every_steps=20"]
    with Ranks(2, shards, run_dir, *extra, logs=tmp_path / "first") as ranks:
        ranks.until(lambda: records(run_dir) >= 3)
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.wait() == [75, 75]
    both = [*extra, f"data.audio.shards=[{shards},{more}]"]
    with Ranks(2, shards, run_dir, *both, logs=tmp_path / "refused") as ranks:
        assert ranks.wait() == [2, 2], ranks.printed(0)[-3000:]
        assert "dataset 1 is new; start with --allow-grown" in ranks.printed(0)
    finish(2, shards, run_dir, "--allow-grown", *both)
    found = deterministic(run_dir)
    assert [record["step"] for record in found] == list(range(1, 21))
    steps_in_epoch = [sum(record["data/epoch"] == epoch for record in found) for epoch in (0, 1)]
    assert steps_in_epoch[1] > 1.5 * steps_in_epoch[0], "the second epoch has both folders"


# ------------------------------------------------------------------ which checkpoints stay


def test_best_and_milestones_are_kept(shards: Path, unbroken: Path, tmp_path: Path) -> None:
    """And the validation that chooses the best leaves the training alone."""
    run_dir = tmp_path / "run"
    held_out = pack_clips(tmp_path / "held_out", "--shard-bytes", "1000000")
    extra = [
        f"valid.audio={held_out}", "valid.every_steps=2", "run.keep_checkpoints=1", "run.keep_every_steps=4",
    ]  # fmt: skip
    with Ranks(2, shards, run_dir, *extra, logs=tmp_path) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
    losses = {r["step"]: r["valid/loss/total"] for r in deterministic(run_dir) if "valid/loss/total" in r}
    assert list(losses) == [2, 4, 6, 8]
    best = min(losses, key=lambda step: losses[step])
    folder = run_dir / "checkpoints"
    assert named_tag(folder, "best") == f"step{best:08d}"
    assert read_manifest(folder / f"step{best:08d}").validation_loss == losses[best]
    assert set(finished_tags(folder)) == {f"step{step:08d}" for step in (4, 8, best)}
    without = [{name: v for name, v in r.items() if not name.startswith("valid/")} for r in deterministic(run_dir)]
    assert without == deterministic(unbroken)


def test_validation_is_the_same_on_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    """After a first step, which has a learning rate of 0."""
    held_out = pack_clips(tmp_path / "held_out", "--shard-bytes", "1000000")
    extra = [f"valid.audio={held_out}", "valid.every_steps=1", "run.save_every_steps=100", "run.total_steps=2"]
    found = []
    for world in (1, 2):
        run_dir = tmp_path / str(world) / "run"
        with Ranks(world, shards, run_dir, *extra, fp32(3, tmp_path), logs=run_dir.parent) as ranks:
            assert ranks.wait() == [0] * world, ranks.printed(0)[-3000:]
        found.append(deterministic(run_dir)[0])
    for name in ("valid/loss/total", "valid/loss/regression", "valid/target/std", "valid/pred/std"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name
    assert found[0]["valid/loss/total"] > 0
