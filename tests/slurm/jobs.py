"""Pretraining jobs for tests: long enough to be hit by something, and comparable however they were interrupted."""

import json
from pathlib import Path
from typing import Any

from preprocessing.pack_audio import main as pack
from tests.runs.launching import SMALL, arguments_of, deterministic, weights
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


def with_transcripts(recordings: Path, folder: Path) -> Path:
    """Pack the recordings of `pack_clips` once more, with one or two words each."""
    lines = ["path\ttext"]
    lines += [f"{recordings / f'{number:02d}.wav'}\t{'low high'[: 3 + 5 * (number % 2)]}" for number in range(40)]
    (folder / "labelled.tsv").write_text("\n".join(lines) + "\n")
    given = ["--input", str(folder / "labelled.tsv"), "--output", str(folder / "labelled"), "--workers", "1"]
    assert pack(given) == 0
    return folder / "labelled"


def fine_tune(cluster: Cluster, shards: Path, model: Path, run_dir: Path, *options: str) -> int:
    """Submit four steps of recognition on two nodes from the export of `pretrain`; returns the job's number."""
    network = [word for word in SMALL if word.startswith("model.")]
    steps = ["run.total_steps=4", "run.save_every_steps=4", "valid.every_steps=4", "lr.warmup_steps=1"]
    sizes = ["data.audio.max_seconds=4", "data.audio.global_batch_seconds=16", "data.audio.micro_batch_seconds=4"]
    given = [f"data.shards={shards}", f"run.dir={run_dir}", f"init.weights={model}"]
    masks = ["objective.mask.channels.length=4", "lr.hold_steps=2", "data.num_workers=1"]
    script = ("slurm/finetune_audio.sh", "--config", "finetune/ctc_tiny")
    arguments = [*given, *network, *steps, *sizes, *masks]
    return cluster.submit(*TWO_NODES, "--gpus-per-node=1", *options, *script, *arguments)


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    """How each start ended."""
    return [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    """Every number of every step, every weight and every average, bit for bit."""
    assert deterministic(run_dir) == deterministic(unbroken)
    expected, found = weights(unbroken, STEPS), weights(run_dir, STEPS)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
