"""What a run survives: kills at every moment, signals, other numbers of ranks, damaged checkpoints, full disks.

Each with real processes; the metrics and weights are compared with those of a run that nothing happened to. The long
half is `slow`; `make faults` runs everything.
"""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v2ds.dist.consolidate import candidate_tags, named_tag, read_manifest
from tests.runs import STEPS, Ranks, deterministic, pack_clips, records, weights

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_clips(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, ZeRO-3, bf16, a checkpoint every second step, every step on record."""
    folder = tmp_path_factory.mktemp("unbroken")
    with Ranks(2, shards, folder / "run", logs=folder) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
    return folder / "run"


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


@pytest.mark.parametrize("fault", ["kill_in_step,1,5", "kill_in_average,0,5", "kill_in_save,1,4", "kill_in_save,0,4"])
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
            threshold = draws.uniform(0.0, 0.25)
            try:
                ranks.processes[0].wait(timeout=threshold)
            except Exception as error:  # noqa: BLE001
                assert type(error).__name__ == "TimeoutExpired"
            for process in ranks.processes:
                process.kill()
            ranks.wait()
        killed += 1
        if candidate_tags(run_dir / "checkpoints")[:1] == [f"step{STEPS:08d}"]:
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("whom", [[0, 1], [1]])
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


@pytest.fixture
def half_way(unbroken: Path, tmp_path: Path) -> Path:
    """The unbroken run as it stood after step 4."""
    shutil.copytree(unbroken, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for tag in candidate_tags(folder):
        if tag > "step00000004":
            shutil.rmtree(folder / tag)
    (folder / "latest").write_text("step00000004")
    return tmp_path / "run"


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


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "missing manifest", "flipped manifest"])
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
    for tag in candidate_tags(run_dir / "checkpoints"):
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


def test_run_that_went_back_remembers_the_data_it_left_behind(shards: Path, tmp_path: Path) -> None:
    """Killed right after the return, it does not run into the same data again."""
    run_dir = tmp_path / "run"
    extra = ["health.max_nonfinite_steps=3", "fault=poison,1,4", "run.total_steps=12"]
    with Ranks(2, shards, run_dir, *extra, logs=tmp_path / "whole") as ranks:
        assert ranks.wait() == [0, 0]
    shutil.copytree(run_dir, tmp_path / "other")
    folder = tmp_path / "other" / "checkpoints"
    assert named_tag(folder, "latest") == "step00000012"
    # As it stood after the return: the checkpoint it went back to is still the newest.
    with Ranks(2, shards, tmp_path / "first", *extra, "run.keep_checkpoints=0", logs=tmp_path / "first") as ranks:
        ranks.until(lambda: (tmp_path / "first" / "rollbacks.jsonl").exists())
        for process in ranks.processes:
            process.kill()
    tags = candidate_tags(tmp_path / "first" / "checkpoints")
    if tags[0] != "step00000002":
        pytest.skip("it had saved again before the kill")
    finish(2, shards, tmp_path / "first", "run.total_steps=12", "run.keep_checkpoints=0")
    after, expected = deterministic(tmp_path / "first"), deterministic(run_dir)
    assert [record["loss/regression"] for record in after[4:]] == [r["loss/regression"] for r in expected[4:]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    import subprocess

    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("a small file system needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_best_and_milestones_are_kept(shards: Path, tmp_path: Path) -> None:
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
    assert set(candidate_tags(folder)) == {f"step{step:08d}" for step in (4, 8, best)}
