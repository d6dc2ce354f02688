"""What a run survives: kills at every moment, signals, other numbers of ranks, damaged checkpoints, full disks.

Each with real processes; the metrics and weights are compared with those of a run that nothing happened to, started by
the deepspeed launcher. The long half is `slow`; `make faults` runs everything.
"""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2v2ds.distributed.checkpoint.format import file_faults, finished_tags, named_tag, read_manifest
from tests.runs.launching import STEPS, Ranks, deterministic, fp32, pack_clips, records, weights

pytestmark = pytest.mark.run


def finish(world: int, shards: Path, run_dir: Path, *extra: str) -> str:
    """Start the run again, to its end; returns what rank 0 said."""
    with Ranks(world, shards, run_dir, *extra, logs=run_dir.parent / "again") as ranks:
        assert ranks.wait() == [0] * world, ranks.printed(0)[-3000:]
        return ranks.printed(0)


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    """Bit for bit: every record, every weight, every average."""
    assert deterministic(run_dir) == deterministic(unbroken)
    expected, found = weights(unbroken, STEPS), weights(run_dir, STEPS)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)


# ------------------------------------------------------------------ kills


@pytest.mark.parametrize(
    "fault",
    [
        "kill_in_save,1,4",
        pytest.param("kill_in_step,1,5", marks=pytest.mark.slow),
        pytest.param("kill_in_average,0,5", marks=pytest.mark.slow),
        pytest.param("kill_in_save,0,4", marks=pytest.mark.slow),
    ],
)
def test_one_rank_killed_resumes_to_the_unbroken_run(fault: str, shards: Path, unbroken: Path, tmp_path: Path) -> None:
    run_dir, victim = tmp_path / "run", int(fault.split(",")[1])
    with Ranks(2, shards, run_dir, f"fault={fault}", logs=tmp_path) as ranks:
        codes = ranks.wait()
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] not in (0, 75), "the survivor must notice"
    assert "resumed at step" in finish(2, shards, run_dir)
    assert_same_run(run_dir, unbroken)


def kill_all_at_random(count: int, shards: Path, unbroken: Path, tmp_path: Path, seed: int) -> None:
    """SIGKILL of all ranks at random moments of a run, start-up included, until it has been killed `count` times."""
    draws, run_dir, killed = random.Random(seed), tmp_path / "run", 0
    while killed < count:
        with Ranks(2, shards, run_dir, logs=tmp_path / str(killed)) as ranks:
            goal = records(run_dir) + draws.choice([-1, 1, 1, 2])
            if goal >= 0:
                ranks.until(lambda goal=goal: records(run_dir) >= min(goal, STEPS - 1))  # type: ignore[misc]
            else:
                ranks.until(lambda: "ranks on cpu" in ranks.printed(0))  # it is about to begin
            with suppress(TimeoutError):
                ranks.processes[0].wait(timeout=draws.uniform(0.0, 0.25))
            for process in ranks.processes:
                process.kill()
            ranks.wait()
        killed += 1
        if finished_tags(run_dir / "checkpoints")[:1] == [f"step{STEPS:08d}"]:
            assert_same_run(run_dir, unbroken)
            shutil.rmtree(run_dir)
    if run_dir.exists():
        finish(2, shards, run_dir)
        assert_same_run(run_dir, unbroken)


def test_all_ranks_killed_at_random_moments(shards: Path, unbroken: Path, tmp_path: Path) -> None:
    kill_all_at_random(2, shards, unbroken, tmp_path, seed=1)


@pytest.mark.slow
def test_all_ranks_killed_at_twenty_random_moments(shards: Path, unbroken: Path, tmp_path: Path) -> None:
    kill_all_at_random(20, shards, unbroken, tmp_path, seed=2)


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    "number, whom",
    [
        (signal.SIGTERM, [0, 1]),
        pytest.param(signal.SIGUSR1, [1], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, [1], marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, [0, 1], marks=pytest.mark.slow),
    ],
)
def test_signalled_run_saves_within_a_step_and_goes_on(
    number: signal.Signals, whom: list[int], shards: Path, unbroken: Path, tmp_path: Path
) -> None:
    """All ranks are asked, or only one; all stop after the same step, which is on disk."""
    run_dir = tmp_path / "run"
    with Ranks(2, shards, run_dir, "run.save_every_steps=100", logs=tmp_path) as ranks:
        ranks.until(lambda: records(run_dir) >= 3)
        for rank in whom:
            ranks.processes[rank].send_signal(number)
        at_signal = records(run_dir)
        assert ranks.wait() == [75, 75], ranks.printed(0)[-3000:]
        said = ranks.printed(0)
    stopped_at = records(run_dir)
    assert stopped_at <= at_signal + 1, "at most the step under way is finished"
    assert f"step {stopped_at}: stopped by" in said
    assert f"{number.name} to rank 1" in said
    assert named_tag(run_dir / "checkpoints", "latest") == f"step{stopped_at:08d}"
    finish(2, shards, run_dir)
    expected, found = weights(unbroken, STEPS), weights(run_dir, STEPS)
    assert all((expected[name] == found[name]).all() for name in expected)
    losses = [[record["loss/regression"] for record in deterministic(d)] for d in (unbroken, run_dir)]
    assert losses[0] == losses[1]


# ------------------------------------------------------------------ other ranks, other stages


EXACT = ["run.total_steps=24", "run.save_every_steps=4", "run.keep_checkpoints=0", "run.health_every_steps=100"]
EXACT_STEPS = 24


@pytest.fixture(scope="module")
def exact(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks at stage 3 in fp32, without a break."""
    folder = tmp_path_factory.mktemp("exact")
    with Ranks(2, shards, folder / "run", *EXACT, fp32(3, folder), logs=folder) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
    return folder / "run"


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([(2, 3), (1, 3)], id="2-to-1"),
        pytest.param([(2, 3), (2, 1), (2, 3)], id="stage-3-to-1-to-3", marks=pytest.mark.slow),
        pytest.param([(2, 3), (4, 3)], id="2-to-4", marks=pytest.mark.slow),
        pytest.param([(4, 3), (2, 3)], id="4-to-2", marks=pytest.mark.slow),
        pytest.param([(1, 2), (3, 1), (1, 0), (2, 3)], id="all-stages", marks=pytest.mark.slow),
    ],
)
def test_run_goes_on_with_other_ranks_and_stages(
    parts: list[tuple[int, int]], shards: Path, exact: Path, tmp_path: Path
) -> None:
    """Each part but the last is stopped by a signal; the whole has seen the same batches and learned the same."""
    run_dir, stops = tmp_path / "run", [EXACT_STEPS * (i + 1) // len(parts) for i in range(len(parts) - 1)]
    for number, (world, stage) in enumerate(parts):
        extra = [*EXACT, fp32(stage, tmp_path)]
        with Ranks(world, shards, run_dir, *extra, logs=tmp_path / str(number)) as ranks:
            if number < len(stops):
                ranks.until(lambda goal=stops[number] - 2: records(run_dir) >= goal)  # type: ignore[misc]
                ranks.processes[-1].send_signal(signal.SIGTERM)
                assert ranks.wait() == [75] * world, ranks.printed(0)[-3000:]
            else:
                assert ranks.wait() == [0] * world, ranks.printed(0)[-3000:]
    expected, found = deterministic(exact), deterministic(run_dir)
    for a, b in zip(expected, found, strict=True):
        for name in ("step", "data/hours", "data/epoch", "mask/fraction", "optim/lr", "ema/decay"):
            assert a[name] == b[name], name
        assert b["loss/regression"] == pytest.approx(a["loss/regression"], rel=1e-4)
    wanted, got = weights(exact, EXACT_STEPS), weights(run_dir, EXACT_STEPS)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(tensor, got[name], rtol=1e-3, atol=2e-5), name


# ------------------------------------------------------------------ damaged checkpoints


def damage(folder: Path, how: str) -> str:
    """Spoil a checkpoint; returns the name of the file."""
    file = folder / ("manifest.json" if how.endswith("manifest") else "optimizer.exp_avg.rank00001.safetensors")
    content = bytearray(file.read_bytes())
    if how.startswith("missing"):
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[:-7])
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    return file.name


@pytest.mark.parametrize(
    "how",
    [
        "flipped",
        "missing manifest",
        pytest.param("missing", marks=pytest.mark.slow),
        pytest.param("truncated", marks=pytest.mark.slow),
        pytest.param("flipped manifest", marks=pytest.mark.slow),
    ],
)
def test_damaged_newest_checkpoint_is_passed_over_and_named(
    how: str, shards: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    name = damage(run_dir / "checkpoints" / f"step{STEPS:08d}", how)
    said = finish(2, shards, run_dir)
    assert f"resumed at step {STEPS - 2}" in said
    warning = next(line for line in said.splitlines() if f"step{STEPS:08d}" in line and "checkpoint" in line)
    assert name in warning
    assert_same_run(run_dir, unbroken)


def test_run_that_lost_all_its_checkpoints_does_not_begin_anew(shards: Path, unbroken: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    for tag in finished_tags(run_dir / "checkpoints"):
        shutil.rmtree(run_dir / "checkpoints" / tag)
    with Ranks(1, shards, run_dir, logs=tmp_path) as ranks:
        assert ranks.wait() == [5]
        assert "no usable checkpoint (1 damaged)" in ranks.printed(0)
    assert records(run_dir) == STEPS, "its metrics are left alone"


# ------------------------------------------------------------------ steps that are not finite


def test_bad_data_is_noted_and_left_behind(shards: Path, unbroken: Path, tmp_path: Path) -> None:
    """Steps 4 to 7 of one rank are poisoned: after three the run goes back to step 2 and on with the data after."""
    run_dir = tmp_path / "run"
    extra = ["health.max_nonfinite_steps=3", "fault=poison,1,4"]
    with Ranks(2, shards, run_dir, *extra, logs=tmp_path) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
        said = ranks.printed(0)
    assert "went back from step 6 to step 2 (return 1 of 3)" in said
    found = deterministic(run_dir)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert found[:2] == deterministic(unbroken)[:2]
    assert found[-1]["optim/skipped_steps"] == 4.0, "three before the return, the last poisoned one after it"
    bad = [json.loads(line) for line in (run_dir / "bad_batches.jsonl").read_text().splitlines()]
    assert [record["step"] for record in bad] == [4, 5, 6, 3]
    assert [rank["loss_is_finite"]["audio"] for rank in bad[0]["ranks"]] == [True, False]
    assert all(len(batch["ids"]) > 0 for batch in bad[0]["ranks"][1]["batches"])
    (back,) = [json.loads(line) for line in (run_dir / "rollbacks.jsonl").read_text().splitlines()]
    assert (back["at_step"], back["to_step"]) == (6, 2)


@pytest.mark.slow
def test_run_that_went_back_remembers_the_data_it_left_behind(shards: Path, tmp_path: Path) -> None:
    """Killed right after the return, it does not run into the same data again."""
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    extra = ["health.max_nonfinite_steps=4", "run.total_steps=12"]
    with Ranks(2, shards, whole, *extra, "fault=poison,1,4", logs=whole.parent) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
    with Ranks(2, shards, killed, *extra, "fault=kill_in_return,1,4", logs=killed.parent) as ranks:
        assert ranks.wait() == [-signal.SIGKILL, -signal.SIGKILL]
    finish(2, shards, killed, *extra)  # without the poison: it lies behind
    assert deterministic(killed)[3:] == deterministic(whole)[3:]


def test_run_ends_where_going_back_does_not_help(shards: Path, tmp_path: Path) -> None:
    extra = ["health.max_nonfinite_steps=2", "health.max_rollbacks=1", "run.save_every_steps=1", "fault=poison,1,3"]
    with Ranks(2, shards, tmp_path / "run", *extra, logs=tmp_path) as ranks:
        assert ranks.wait() == [4, 4], ranks.printed(0)[-3000:]
        assert "2 steps in a row had a loss or gradient that is not finite, after 1 returns" in ranks.printed(0)


# ------------------------------------------------------------------ ranks that are late


LATE = ["health.late_seconds=2", "health.late_factor=5"]


def test_late_rank_is_named_with_the_line_it_is_in(shards: Path, tmp_path: Path) -> None:
    with Ranks(2, shards, tmp_path / "run", *LATE, "fault=sleep,1,4", logs=tmp_path) as ranks:
        ranks.until(lambda: "rank 1 is late in" in ranks.printed(0))
        ranks.until(lambda: "wait for others" in ranks.printed(0))
        said = ranks.printed(0)
    assert "the step after 3 takes" in said
    assert "time.sleep(30)" in said.split("rank 1 is late in")[1]
    assert "ranks 0 wait for others" in said


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_rank_is_missed(stopped: int, shards: Path, tmp_path: Path) -> None:
    """A process that does nothing at all leaves no word; if it is rank 0, the others cannot even ask."""
    with Ranks(2, shards, tmp_path / "run", *LATE, f"fault=stop,{stopped},4", logs=tmp_path) as ranks:
        other = 1 - stopped
        expected = "no word from ranks 1: stopped, gone" if stopped else "rank 0 does not answer: it is stopped or gone"
        ranks.until(lambda: expected in ranks.printed(other))


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


def test_flipped_byte_costs_its_row_and_is_counted(shards: Path, tmp_path: Path) -> None:
    """In the audio of one row: that row is left out each time it is drawn, and nothing else is."""
    copy = tmp_path / "packed"
    shutil.copytree(shards, copy)
    (file,) = copy.glob("audio-*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with Ranks(2, copy, tmp_path / "run", "run.total_steps=16", logs=tmp_path) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
        said = ranks.printed(0) + ranks.printed(1)
    found = deterministic(tmp_path / "run")
    assert found[-1]["data/damaged_rows"] >= 1.0
    assert said.count("skipped a row") == found[-1]["data/damaged_rows"]
    assert file.name in said
    with Ranks(2, copy, tmp_path / "strict", "health.max_damaged_rows=0", "run.total_steps=16", logs=tmp_path) as ranks:
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
    extra = ["run.total_steps=40", "run.health_every_steps=100"]
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
    assert [record["step"] for record in found] == list(range(1, 41))
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
