"""Metrics of a run: their names and units, how each is reduced over ranks, and where they are written.

Rank 0 writes the same names to TensorBoard (`<run>/tensorboard`) and to `<run>/metrics.jsonl`, one line per
record with its `step`. On resume, lines after the checkpoint's step are dropped, so the file equals that of a
run that never stopped.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

UNITS = {
    "loss/regression": "sum over channels per masked token; global sum over the interval / global masked tokens",
    "ema/decay": "weight kept by the teacher, 0 to 1; same on all ranks",
    "ema/student_distance": "|student - teacher| / |student|; norms over all ranks",
    "optim/lr": "learning rate; same on all ranks",
    "optim/grad_norm": "global L2 norm before clipping; mean over the interval",
    "optim/skipped_steps": "steps with a gradient that is not finite, since the run began",
    "mask/fraction": "masked tokens / tokens; global",
    "data/hours": "audio seen since the run began; sum over ranks, hours, not multiplied by masks",
    "data/epoch": "passes over the data; same on all ranks",
    "local/std": "mean channel standard deviation of local features; mean over ranks",
    "local/effective_rank": "exp of the eigenvalue entropy, 1 to D; mean over ranks",
    "local/position_share": "fraction of variance explained by position; mean over ranks",
    "context/std": "of the last shared block's output; mean over ranks",
    "context/effective_rank": "mean over ranks",
    "context/position_share": "mean over ranks",
    "target/std": "of the targets at masked tokens; over the interval and all ranks (target_var of the reference)",
    "target/effective_rank": "mean over ranks",
    "target/position_share": "mean over ranks",
    "target/explained": "1 - loss / (loss scale x sum of the targets' channel variances): share predicted",
    "pred/std": "of the predictions; over the interval and all ranks (pred_var of the reference)",
    "pred/effective_rank": "mean over ranks",
    "pred/position_share": "mean over ranks",
    "perf/audio_seconds_per_s": "audio seconds per second of wall time; sum over ranks",
    "perf/step_ms": "wall milliseconds per optimizer step; max over ranks",
    "perf/data_wait_ms": "milliseconds per step in which a rank waited for data; max over ranks",
    "perf/data_wait_fraction": "the same as a fraction of the step",
    "perf/tflops": "algorithmic 10^12 operations per second and rank, visible tokens only; mean over ranks",
    "perf/mfu": "the same over the matrix-product peak measured at start; mean over ranks",
    "perf/memory_gib": "peak memory of a rank (device, or resident on a CPU), GiB; max over ranks",
}
"""Every scalar of a run with its unit and reduction."""


class Metrics:
    """Writes records. Only rank 0 has one."""

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        """
        Args:
            run_dir: folder of the run.
            resume_step: step of the checkpoint the run goes on from, 0 for a new run.
        """
        self.path = run_dir / "metrics.jsonl"
        _drop_lines_after(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record.

        Raises:
            KeyError: for a name without an entry in `UNITS`.
        """
        unknown = sorted(set(values) - set(UNITS))
        if unknown:
            raise KeyError(f"metrics without a unit: {', '.join(unknown)}; add them to UNITS")
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        """Add a matplotlib figure to TensorBoard and close it."""
        self.writer.add_figure(name, figure, step)

    def flush(self) -> None:
        """Put everything on disk; called before a checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.writer.flush()

    def close(self) -> None:
        """Flush and close both files."""
        self.flush()
        self._file.close()
        self.writer.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Records of a `metrics.jsonl`, in order; a torn last line is left out with a warning."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s line %d is not a whole record (cut off by a crash?), left out", path, number)
    return records


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    temporary.replace(path)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
