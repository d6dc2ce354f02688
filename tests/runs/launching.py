"""Tiny pretraining runs for tests of whole runs: forked, or with a launcher as a user starts them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import soundfile

from d2v2ds.distributed.checkpoint.format import iterate_student, iterate_teacher
from d2v2ds.distributed.comm import free_port
from d2v2ds.train.metrics import read_metrics
from preprocessing.pack_audio import main as pack
from tests.forked import ForkedProgram

ROOT = Path(__file__).parents[2]
RATE = 16000
STEPS = 8
SMALL = [
    "model.block.width=32",
    "model.block.mlp_dropout=0.1",  # dropout draws must survive a resume too
    "model.shared_depth=3",
    "model.layer_drop=0.2",
    "objective.modalities.audio.target.num_layers=2",
    "model.modalities.audio.prenet_depth=1",
    "model.modalities.audio.conv_layers=[[16,10,5],[16,8,8],[16,4,4],[16,2,2]]",
    "objective.modalities.audio.decoder.width=16",
    "data.audio.global_batch_seconds=6",
    "data.audio.micro_batch_seconds=2",
    "data.audio.max_seconds=2",
    f"run.total_steps={STEPS}",
    "run.save_every_steps=2",
    "run.log_every_steps=1",
    "run.health_every_steps=4",
    "lr.warmup_steps=2",
    "objective.ema.anneal_steps=8",
]


def pack_clips(folder: Path, *options: str, texts: bool = False) -> Path:
    """Forty short clips of two speakers, labelled and if asked with transcripts, packed into a folder beside them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    lines = ["path\tlabel\tspeaker" + "\ttext" * texts]
    for number in range(40):
        seconds = rng.uniform(1.2, 3.0)
        tone = np.sin(2 * np.pi * (150 + 40 * (number % 4)) * np.arange(int(seconds * RATE)) / RATE)
        soundfile.write(folder / f"{number:02d}.wav", 0.3 * tone + 0.05 * rng.standard_normal(tone.shape), RATE)
        lines.append(
            f"{number:02d}.wav\t{number % 4}\t{'ab'[number % 2 ^ number // 4 % 2]}"
            + f"\t{'la' * (number % 4 + 1)}" * texts
        )
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    arguments = [
        "--input",
        str(folder / "manifest.tsv"),
        "--output",
        str(folder / "packed"),
        "--workers",
        "1",
        *options,
    ]
    assert pack(arguments) == 0
    return folder / "packed"


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return dict(os.environ, OMP_NUM_THREADS="1", PATH=path)


def arguments_of(shards: Path, run_dir: Path, *extra: str) -> list[str]:
    """What follows the module's name."""
    return ["--config", "audio_tiny", f"data.shards={shards}", f"run.dir={run_dir}", *SMALL, *extra]


def command(launcher: str, ranks: int, shards: Path, run_dir: Path, *extra: str) -> list[str]:
    """How a launcher starts a run."""
    module = ["d2v2ds.pretrain", *arguments_of(shards, run_dir, *extra)]
    bins = Path(sys.executable).parent
    port = str(free_port())
    return {
        "deepspeed": [str(bins / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, "--module", *module],
        "torchrun": [str(bins / "torchrun"), f"--nproc_per_node={ranks}", f"--master_port={port}", "-m", *module],
        "plain": [sys.executable, "-m", *module],
    }[launcher]


def launch(launcher: str, ranks: int, shards: Path, run_dir: Path, *extra: str) -> str:
    """Run to the end under a launcher, in fresh interpreters; returns what it printed."""
    done = subprocess.run(
        command(launcher, ranks, shards, run_dir, *extra),
        env=environment(), capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def train(world: int, shards: Path, run_dir: Path, *extra: str) -> str:
    """Run to the end on forked ranks; returns what they printed."""
    codes, printed = attempt(world, shards, run_dir, *extra)
    assert codes == [0] * world, printed[-5000:]
    return printed


def attempt(world: int, shards: Path, run_dir: Path, *extra: str) -> tuple[list[int], str]:
    """Run on forked ranks until they end, in whatever way; returns their exit codes and what they printed."""
    with Ranks(world, shards, run_dir, *extra, logs=run_dir.parent / f"{run_dir.name}-logs") as ranks:
        codes = ranks.wait()
        return codes, "".join(ranks.printed(rank) for rank in range(world))


def deterministic(run_dir: Path) -> list[dict[str, float]]:
    """Metrics less those of the clock and of memory."""
    records = list(read_metrics(run_dir / "metrics.jsonl"))
    return [{name: v for name, v in record.items() if not name.startswith("perf/")} for record in records]


def weights(run_dir: Path, step: int) -> dict[str, Any]:
    folder = run_dir / "checkpoints" / f"step{step:08d}"
    found = {f"student {name}": tensor for name, tensor in iterate_student(folder)}
    return found | {f"teacher {name}": tensor for name, tensor in iterate_teacher(folder)}


def fp32(stage: int, folder: Path) -> str:
    """The shipped configuration of a stage, in fp32, so that sums in another order differ by little."""
    name = f"zero{stage}_bf16.json" if stage else "zero0_fp32_debug.json"
    shipped = json.loads((ROOT / "ds_configs" / name).read_text())
    shipped["bf16"] = {"enabled": False}
    shipped.pop("data_types", None)
    path = folder / f"zero{stage}_fp32.json"
    path.write_text(json.dumps(shipped))
    return f"engine.deepspeed={path}"


class Processes:
    """The ranks of a run, each forked with the variables that a launcher sets and with a log of its own.

    A context manager: whatever still runs at its end is killed.
    """

    def __init__(self, module: str, arguments: Sequence[str], variables: Sequence[dict[str, str]], logs: Path) -> None:
        """`variables` are those of each rank, besides `environment()`."""
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank{rank}" for rank in range(len(variables))]
        self.processes = [
            ForkedProgram(module, arguments, environment() | own, log)
            for own, log in zip(variables, self.logs, strict=True)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, timeout_s: float = 240.0) -> list[int]:
        """Exit codes in rank order; negative for a signal."""
        return [process.wait(timeout=timeout_s) for process in self.processes]

    def printed(self, rank: int) -> str:
        """What a rank has said so far."""
        return self.logs[rank].read_text()

    def until(self, holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Wait for something to become true while all ranks live."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            for rank, process in enumerate(self.processes):
                assert process.poll() is None, self.printed(rank)[-3000:]
            assert time.monotonic() < deadline, self.printed(0)[-3000:]
            time.sleep(0.01)


class Ranks(Processes):
    """The ranks of a tiny run. With a `fault=` among the extra arguments, `tests.runs.faulty` runs them."""

    def __init__(self, world: int, shards: Path, run_dir: Path, *extra: str, logs: Path) -> None:
        module = "tests.runs.faulty" if any(e.startswith("fault=") for e in extra) else "d2v2ds.pretrain"
        super().__init__(module, arguments_of(shards, run_dir, *extra), rank_variables(world), logs)


def rank_variables(world: int) -> list[dict[str, str]]:
    """What `torchrun` sets for each rank, on a free port."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def records(run_dir: Path) -> int:
    """Lines of metrics so far."""
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0
