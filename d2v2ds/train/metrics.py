"""Metrics of a run: names, units, reduction over ranks, and writers.

Rank 0 writes the same names to TensorBoard (`<run>/tensorboard`) and to `<run>/metrics.jsonl`, one line per record
with its `step`. A run of several modalities puts the modality in front, as in `audio/loss/regression`. On resume, lines
after the checkpoint's step are removed, so that the file equals that of a run that never stopped.
"""

import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.tensorboard import SummaryWriter

from d2v2ds.errors import ConfigError
from d2v2ds.io import durable
from d2v2ds.io.read import json_lines

logger = logging.getLogger(__name__)

RUN_UNITS = {
    "loss/total": "weighted sum of the modalities' mean losses; only with several modalities",
    "valid/loss/total": "weighted sum of all mean losses on held-out data; `best` has the lowest",
    "optim/lr": "learning rate; same on all ranks",
    "optim/grad_norm": "global L2 norm before clipping; mean over the interval",
    "optim/grad_norm/blocks": "norm of the shared blocks' gradient before clipping; every log_every_steps; global",
    "optim/skipped_steps": "steps with a gradient that is not finite, since the run began",
    "perf/restarts": "earlier starts of this run; same on all ranks",
    "data/damaged_rows": "rows that could not be read and were skipped, since the run began; sum over ranks",
    "perf/samples_per_s": "inputs per second of wall time, masks not counted; sum over ranks",
    "perf/step_ms": "wall milliseconds per optimizer step; max over ranks",
    "perf/data_wait_ms": "milliseconds per step that a rank waited for data; max over ranks",
    "perf/data_wait_fraction": "the same as a fraction of the step",
    "perf/checkpoint_stall_ms": "milliseconds since the last record that rank 0's training waited for checkpoints",
    "perf/tflops": "algorithmic 10^12 operations per second and rank, visible tokens only; mean over ranks",
    "perf/mfu": "the same over the matrix-product peak measured at start; mean over ranks",
    "perf/memory_gib": "peak memory of a rank (device, or resident on a CPU), GiB; max over ranks",
}
"""Scalars of a run as a whole, with unit and reduction."""

MODALITY_UNITS = {
    "data/epoch": "passes over the data; same on all ranks",
    "optim/grad_norm/local": "norm of the local encoder's gradient before clipping; every log_every_steps; global",
    "optim/grad_norm/positions": "norm of the position convolutions' gradient; likewise",
    "optim/grad_norm/alibi": "norm of the learned ALiBi scales' gradient; likewise",
    "optim/grad_norm/prenet": "norm of the gradient of the modality's own blocks and their norms; likewise",
    "optim/grad_norm/other": "norm of all other gradients, such as the CLS token's; likewise",
}
"""Scalars of one modality in every objective, with unit and reduction."""

HEALTH_UNITS = {
    "effective_rank": "exp of the eigenvalue entropy of the vectors, 1 to D; mean over ranks",
    "position_share": "fraction of variance that a polynomial in the position explains; mean over ranks",
    "exact_position_share": "fraction of variance between exact positions, corrected for chance; mean over ranks",
    "std": "standard deviation of the vectors, mean over channels; mean over ranks",
}
"""Statistics of each set of `Vectors` of an objective: NAME/effective_rank and so on."""


def gradient_metric(parameter: str, modalities: Container[str], units: Container[str]) -> tuple[str | None, str]:
    """Return the gradient norm that includes a parameter: modality (None for all) and metric.

    Args:
        parameter: name in an objective's network: `trunk.blocks...`, `trunk.encoders.M.PART...`, `PARTs.M...` for
            modules of the objective for each modality M, such as decoders, or `PART...` for modules for all of them.
        modalities: names of the run's modalities.
        units: norms that have a unit; modules without one count as other.
    """
    room, *rest = parameter.removeprefix("trunk.").split(".")
    if room == "blocks":
        return None, "optim/grad_norm/blocks"
    modality = rest[0] if rest and rest[0] in modalities else None
    metric = f"optim/grad_norm/{rest[1] if room == 'encoders' else room.removesuffix('s')}"
    return modality, metric if metric in units else "optim/grad_norm/other"


class MetricNames:
    """Scalars that a run may write: those of every run, of its objective and of its modalities' units."""

    def __init__(self, run_units: Mapping[str, str], modality_units: Mapping[str, str]) -> None:
        """
        Args:
            run_units: further scalars of the run as a whole.
            modality_units: further scalars of one modality.
        """
        self.run = RUN_UNITS | dict(run_units)
        self.modality = MODALITY_UNITS | dict(modality_units)

    def is_known(self, name: str) -> bool:
        """Return True if a scalar has a unit; `valid/NAME`, `valid/SET/NAME` and `MODALITY/NAME` have that of NAME."""
        _, valid, rest = name.rpartition("valid/")
        candidates = [rest, rest.partition("/")[2]]  # without a set's name, or without a modality's
        if name in self.run or (valid and f"valid/{candidates[1]}" in self.run):
            return True
        return any(self._is_of_modality(candidate) for candidate in candidates)

    def _is_of_modality(self, name: str) -> bool:
        return name in self.modality or (name.count("/") == 1 and name.partition("/")[2] in HEALTH_UNITS)


_TAIL_BYTES = 1 << 20


class Metrics:
    """Writes records. Only rank 0 has one.

    Training continues if metrics cannot be written (full disk, folder not writable, file removed): the writer warns
    once and tries again at each record.
    """

    def __init__(self, run_dir: Path, names: MetricNames, *, resume_step: int) -> None:
        """
        Args:
            run_dir: folder of the run.
            names: scalars that have a unit.
            resume_step: step of the checkpoint that the run resumes from, 0 for a new run.
        """
        self._names = names
        self.path, self.bad_batches_path = run_dir / "metrics.jsonl", run_dir / "bad_batches.jsonl"
        self._tensorboard_dir = run_dir / "tensorboard"
        self._warned: set[str] = set()
        self._known: set[Path] = set()
        self._writer: SummaryWriter | None = None
        _silence_tensorboard_threads()
        self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Remove the records after a step."""
        self._attempt("metrics.jsonl", lambda: _drop_lines_after(self.path, step))
        if self._writer is not None:
            self._attempt("TensorBoard", self._writer.close)
        self._purge_step = step + 1
        self._writer = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record.

        Raises:
            KeyError: a name has no unit.
        """
        unknown = sorted(name for name in values if not self._names.is_known(name))
        if unknown:
            raise KeyError(
                f"metrics without a unit: {', '.join(unknown)}; add them to train/metrics.py or to the objective"
            )
        self._append(self.path, {"step": step, **values})

        def scalars(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._to_tensorboard(scalars)

    def note_bad_batch(self, record: Mapping[str, Any]) -> None:
        """Append the samples of a skipped step to `bad_batches.jsonl`."""
        self._append(self.bad_batches_path, record)

    def figure(self, name: str, figure: Any, step: int) -> None:
        """Add a matplotlib figure to TensorBoard and close it."""
        self._to_tensorboard(lambda writer: writer.add_figure(name, figure, step))

    def flush(self) -> None:
        """Flush TensorBoard's file; called before a checkpoint."""
        self._to_tensorboard(lambda writer: writer.flush())

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        if self._writer is not None:
            self._attempt("TensorBoard", self._writer.close)

    def _append(self, path: Path, record: Mapping[str, Any]) -> None:
        """Append one line and sync it. Opens the file each time, because it may have been removed."""
        line = json.dumps(record)

        def append() -> None:
            if path in self._known and not path.exists():
                logger.warning("%s is gone; writing a new one", path)
            durable.append_line(path, line)
            self._known.add(path)

        self._attempt(path.name, append)

    def _to_tensorboard(self, write: Callable[[SummaryWriter], None]) -> None:
        def attempt() -> None:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._tensorboard_dir), purge_step=self._purge_step)
            write(self._writer)

        if not self._attempt("TensorBoard", attempt):
            self._writer = None  # the error has ended its thread; the next record starts another

    def _attempt(self, what: str, action: Callable[[], object]) -> bool:
        """Run `action`; return False if it failed. Warns at the first failure, and when writing works again."""
        try:
            action()
        except OSError as error:
            if what not in self._warned:
                logger.warning("%s cannot be written, the run continues without: %s", what, error)
            self._warned.add(what)
            return False
        if what in self._warned:
            logger.warning("%s can be written again; the records in between are lost", what)
            self._warned.discard(what)
        return True


@functools.cache
def _silence_tensorboard_threads() -> None:
    """Keep TensorBoard's thread from printing a traceback when it cannot write; the next record reports the error."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = hook


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Yield the records of a `metrics.jsonl`, in order, one at a time; incomplete lines are left out with a warning.

    Raises:
        ConfigError: it is no file that can be read.
    """
    return (record for record in json_lines(path, ConfigError) if isinstance(record.get("step"), int | float))


def _drop_lines_after(path: Path, step: int) -> None:
    """Cut off the records after a step. Reads from the end, for a long run's file has gigabytes."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        kept = end
        for start, line in _lines_backwards(file, end):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int | float) and record["step"] <= step:
                break
            kept = start
        if kept < end:
            file.truncate(kept)
            durable.fsync(file.fileno(), path)


def _lines_backwards(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield where each line begins, and the line without its end, from the last line to the first."""
    rest = b""
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        file.seek(start)
        first, *lines = (file.read(end - start) + rest).split(b"\n")
        place = start + len(first) + sum(len(line) + 1 for line in lines)
        for line in reversed(lines):
            place -= len(line)
            if line:
                yield place, line
            place -= 1
        rest, end = first, start
    if rest:
        yield 0, rest


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
