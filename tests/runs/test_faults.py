"""Faults that a run survives: kills at every moment, signals, other numbers of ranks, damaged checkpoints, late ranks.

Each with real processes; the metrics and weights are compared with those of a run that nothing happened to, started by
the deepspeed launcher. The long half is `slow`; `make faults` runs everything.
"""

import json
import random
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from d2v2ds.distributed.checkpoint.format import finished_tags, named_tag
from tests.runs.comparing import assert_same_run, finish
from tests.runs.launching import STEPS, Ranks, deterministic, fp32, records, weights

pytestmark = pytest.mark.run


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


EXACT = ["run.total_steps=12", "run.save_every_steps=4", "run.keep_checkpoints=0", "run.health_every_steps=100"]
EXACT_STEPS = 12


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
