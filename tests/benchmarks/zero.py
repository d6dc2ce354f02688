"""What ZeRO costs and saves: step time by phase and memory per rank, for each stage, in one run.

    torchrun --nproc_per_node=2 tests/benchmarks/zero.py --config audio_base --seconds 5 --steps 3

Each stage trains the same model on the same random audio, one clip on each rank. Times are medians of rank 0.
`held` is what model, optimizer and teacher hold on rank 0 (tensors counted) beside the formula of
`d2v2ds/distributed/memory.py`; `peak` is the resident size of the process, activations and libraries included. Stage 0
exists in fp32 only, so stage 3 is measured in fp32 too. `kept` is what the forward of the last step leaves behind for
the backward: compare it with and without engine.activation_checkpointing=false.
"""

import argparse
import ctypes
import gc
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from d2v2ds.batch import Batch
from d2v2ds.config.load import RunConfig, load_config
from d2v2ds.data.collate import Collator
from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.order import MicroBatch
from d2v2ds.distributed import comm
from d2v2ds.distributed.ds_config import load_ds_config, merge_ds_config
from d2v2ds.distributed.engine import Engine, gradient_sum_factor, optimizer_step, set_lr
from d2v2ds.distributed.memory import expected_bytes
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.distributed.zero import full_shape
from d2v2ds.modalities.audio.reader import AudioReader
from d2v2ds.objectives.protocol import Objective
from d2v2ds.run.build import build_engines
from d2v2ds.run.machine import tune_cpu
from d2v2ds.train.metrics import peak_memory_gib
from d2v2ds.train.step import total_loss
from tests.distributed.engine_state import bytes_in_use


def memory_in_use() -> int:
    """Bytes allocated on the device, or resident on a CPU once malloc has given back what it kept."""
    if comm.device().type == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PHASES = ("forward", "backward", "optimizer", "ema")


class RandomAudio:
    """A dataset of one clip of noise, as the collator wants it."""

    def __init__(self, num_samples: int, sample_rate_hz: int) -> None:
        self.sizes = np.array([num_samples])
        self.sample_rate_hz = sample_rate_hz

    def __len__(self) -> int:
        return 1

    def read_audio(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.random.default_rng(comm.rank()).integers(-3000, 3000, stop - start).astype(np.int16)  # type: ignore[operator]

    def read_stats(self, index: int) -> tuple[float, float]:
        return 0.0, 0.003


def make_batch(config: RunConfig, seconds: float) -> Batch:
    """One clip of noise with masks as the run draws them."""
    data, network = config.data.modalities["audio"], config.model.modalities["audio"]
    length = round(seconds * data.sample_rate_hz)
    shards: Any = JoinedShards([RandomAudio(length, data.sample_rate_hz)])
    reader = AudioReader(shards, data, network, config.objective.modalities["audio"].mask)
    return Collator(reader=reader, seed=1)(MicroBatch(0, np.array([0]), length))


def build(config: RunConfig, source: dict[str, Any]) -> tuple[Objective, Engine, Teacher, dict[str, Any]]:
    """Objective, engine and teacher for one clip on each rank, and the merged DeepSpeed JSON."""
    numbers = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": comm.world(),
        "gradient_clipping": config.optim.clip_norm,
    }
    ds_config = merge_ds_config(source, numbers)
    objective = config.objective.build(config.model, config.run.seed)
    engine, teacher = build_engines(config, objective, ds_config)
    assert teacher is not None
    return objective, engine, teacher, ds_config


@dataclass
class Timer:
    """Seconds of each phase of each step."""

    laps: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    last: float = 0.0

    def start(self) -> None:
        comm.barrier()
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if comm.device().type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[phase].append(now - self.last)
        self.last = now

    def median(self, phase: str) -> float:
        """Without the first step, in which buffers are made and ZeRO-3 records its trace."""
        return statistics.median(self.laps[phase][1:])


def measure(config: RunConfig, name: str, seconds: float, steps: int) -> dict[str, Any]:
    """Train a few steps with one DeepSpeed configuration."""
    source = load_ds_config(name.removesuffix(" fp32"))
    if name.endswith(" fp32"):
        source["bf16"] = {"enabled": False}
    objective, student, teacher, ds_config = build(config, source)
    batch = make_batch(config, seconds).to(comm.device())
    factor = gradient_sum_factor(student) / comm.all_reduce_sum([batch.num_masked])[0]
    timer = Timer()
    mean_losses = []
    for _ in range(steps + 1):
        set_lr(student, lambda scale: 1e-5)
        torch.manual_seed(0)
        before = memory_in_use()
        timer.start()
        losses = objective.losses(student, batch, 0)
        timer.lap("forward")
        kept = memory_in_use() - before
        timer.start()
        student.backward(total_loss(losses) * factor)
        timer.lap("backward")
        optimizer_step(student)
        timer.lap("optimizer")
        teacher.update(0.999)
        timer.lap("ema")
        mean_losses.append(float(total_loss(losses).detach()) / losses.count)
    sizes = [int(np.prod(full_shape(p))) for p in student.module.parameters()]
    threshold = ds_config["zero_optimization"].get("stage3_param_persistence_threshold", 100_000)
    expected = expected_bytes(
        sum(sizes),
        sum(int(np.prod(full_shape(p))) for p in teacher.module.parameters()),
        comm.world(),
        ds_config,
        kept_whole=sum(size for size in sizes if size <= threshold),
    )
    held = bytes_in_use(student, teacher)
    result = {
        "name": name,
        "loss": mean_losses[-1],
        "kept": kept / 2**30,
        "held": sum(held.values()) / 2**30,
        "formula": sum(expected.values()) / 2**30,
        "peak": peak_memory_gib(comm.device()),
    } | {phase: timer.median(phase) for phase in PHASES}
    student.destroy()
    return result


def main() -> None:
    """Print one line per stage on rank 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="audio_base")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the clip on each rank")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; one more goes before them")
    parser.add_argument(
        "--stages", default="zero0_fp32_debug,zero3_bf16 fp32,zero1_bf16,zero2_bf16,zero3_bf16", help="comma-separated"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    with comm.process_group():
        if comm.device().type == "cpu":
            tune_cpu(comm.world())
        if comm.rank() == 0:
            recompute = "on" if config.engine.activation_checkpointing else "off"
            print(f"{options.config}, {comm.world()} ranks on {comm.device().type}, one clip of {options.seconds:g} s "
                  f"each, activation checkpointing {recompute}")  # fmt: skip
            print(f"{'stage':18} {'step s':>7} " + " ".join(f"{phase:>9}" for phase in PHASES)
                  + f" {'held GiB':>9} {'formula':>8} {'ratio':>6}"
                  + f" {'kept GiB':>9} {'peak GiB':>9} {'loss':>9}")  # fmt: skip
        for name in options.stages.split(","):
            found = measure(config, name, options.seconds, options.steps)
            gc.collect()
            if comm.rank() == 0:
                phases = [found[phase] for phase in PHASES]
                print(f"{name:18} {sum(phases):7.2f} " + " ".join(f"{t:9.2f}" for t in phases)
                      + f" {found['held']:9.2f} {found['formula']:8.2f} {found['held'] / found['formula']:6.2f}"
                      + f" {found['kept']:9.2f} {found['peak']:9.1f} {found['loss']:9.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
