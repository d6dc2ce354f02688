"""Pretraining jobs for tests: long enough to be hit by something, and comparable however they were interrupted."""

import json
from pathlib import Path
from typing import Any

from tests.runs.launching import arguments_of, deterministic, weights
from tests.slurm.cluster import Cluster

STEPS = 24
SETTINGS = (
    f"run.total_steps={STEPS}",
    "data.num_workers=1",
    "run.save_every_steps=1000",  # what is saved before the end is saved because of a warning
    "run.health_every_steps=1000",  # it looks at vectors since the last checkpoint, which an interruption moves
)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")


def pretrain(cluster: Cluster, shards: Path, run_dir: Path, *options: str, extra: tuple[str, ...] = ()) -> int:
    """Submit a run on two nodes with one GPU each; returns the job's number.

    Args:
        cluster: where.
        shards: packed data.
        run_dir: of the run.
        options: of sbatch.
        extra: more settings of the run.
    """
    arguments = arguments_of(shards, run_dir, *SETTINGS, *extra)
    return cluster.submit(*TWO_NODES, "--gpus-per-node=1", *options, "slurm/pretrain_audio.sh", *arguments)


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    """How each start ended."""
    return [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    """Every number of every step, every weight and every average, bit for bit."""
    assert deterministic(run_dir) == deterministic(unbroken)
    expected, found = weights(unbroken, STEPS), weights(run_dir, STEPS)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
