"""Training loop: steps, metrics, health checks, validation and checkpoints.

The loop writes a record of metrics every `log_every_steps` and at every checkpoint. Averages restart after each record,
so that a resumed run writes the same records as a run that never stopped.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from signal import Signals
from typing import Any, Protocol

from d2v2ds.batch import Batch
from d2v2ds.data.loader import StepData
from d2v2ds.data.reader import Reader
from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.engine import Engine
from d2v2ds.distributed.gradient_norms import PartNorms
from d2v2ds.errors import (
    D2V2Error,
    DamagedDataError,
    MachineError,
    MissingExtraError,
    NonFiniteError,
    PreemptedError,
    ShardError,
)
from d2v2ds.objectives.protocol import Objective
from d2v2ds.train.checkpointing import Checkpoints
from d2v2ds.train.fetch import Fetched, fetch
from d2v2ds.train.figures import alibi_figure, mask_figure
from d2v2ds.train.guard import Guard
from d2v2ds.train.health import NUM_STEPS, Sample
from d2v2ds.train.metrics import MODALITY_UNITS, Metrics, gradient_metric, peak_memory_gib
from d2v2ds.train.record_sums import ModalityRecordSums, RecordSums
from d2v2ds.train.step import Recipe, StepOutput, train_step
from d2v2ds.train.validate import Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Intervals in optimizer steps, and properties of the data and the device for metrics and figures."""

    total_steps: int
    log_every_steps: int
    health_every_steps: int
    save_every_steps: int
    validate_every_steps: int
    restarts: int
    """Earlier starts of this run."""
    readers: Mapping[str, Reader]
    """Data of each modality by name, in the order of the micro-batches."""
    grid_columns: Mapping[str, int | None]
    """Tokens per side of each modality whose tokens form a square grid, for figures of masks."""
    measure_peak: Callable[[], float]
    """Measures the matrix-product peak of this rank's device; called once, with the first record, on all ranks."""
    alibi_slopes: Sequence[float]
    """Slope of every head, for figures of the distance penalty."""
    flops_of: Callable[[Batch], float]
    """Counts the algorithmic operations of one micro-batch."""


class Trainer:
    """Runs optimizer steps until the run is done."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        *,
        recipe: Recipe,
        config: LoopConfig,
        guard: Guard,
        checkpoints: Checkpoints,
        stop: "StopFlag",
        watchdog: "StepClock",
        validations: Sequence[Validation],
        metrics: Metrics | None,
    ) -> None:
        """
        Args:
            engine: around the network of the objective.
            objective: losses, metrics and the action after a step.
            recipe: settings of the step.
            config: intervals.
            guard: checks for steps that are not finite, damaged rows and collapse.
            checkpoints: with the progress at the start, which the loop advances in place.
            stop: records signals that reach this rank.
            watchdog: receives a call after every step.
            validations: on held-out data, one for each set, in the order in which they run.
            metrics: writer on rank 0, None elsewhere.
        """
        self.engine, self.objective = engine, objective
        self.recipe, self.config, self.guard = recipe, config, guard
        self.checkpoints, self.progress = checkpoints, checkpoints.progress
        self.stop, self.watchdog, self.metrics = stop, watchdog, metrics
        self.validations = validations
        self.samples = self._no_samples()
        self._peak_flops: float | None = None
        self._known_faults: set[str] = set()
        self._part_norms = PartNorms(engine, self._gradient_metric)

    def run(self, data: Iterator[StepData]) -> None:
        """Train up to `total_steps`.

        Raises:
            PreemptedError: a signal stopped the run, and everything is saved.
            NonFiniteError: too many steps in a row were skipped, also after rollbacks; or every step of the run was.
            CollapseError: a health limit was crossed and `stop_on_collapse` is set.
            DamagedDataError: too many rows could not be read.
            SaveError: two checkpoints in a row could not be written.
            MachineError: data workers ended or sent nothing; everything is saved.
        """
        config, progress = self.config, self.progress
        sums, began, first = self._new_sums(), time.perf_counter(), progress.step
        fetched = fetch(data)
        if progress.step < config.total_steps and self._exchange(None, fetched):
            raise self._end(fetched, "nothing was lost")
        while progress.step < config.total_steps:
            step_data, wait_s = fetched.step_data(), fetched.wait_s
            self._part_norms.ask(self._has_part_norms(progress.step + 1))
            out = train_step(self.engine, self.objective, step_data.micro, step=progress.step, recipe=self.recipe)
            progress.step += 1
            progress.sampler = step_data.state_after
            sums.add(out, step_data.micro, wait_s, config.readers, config.flops_of)
            if out.applied:
                self._collect(out)
            else:
                self._write_bad_batch(out, step_data)
            self.watchdog.step_done(progress.step)
            fetched = fetch(data)
            is_stopping = self._exchange(step_data, fetched)
            if self.guard.after_step(progress.step, out.applied):
                self._roll_back()
                self.watchdog.touch(progress.step)
                sums, began, first = self._new_sums(), time.perf_counter(), progress.step
                if is_stopping:
                    raise self._end(fetched, "the rollback is noted; start the same command to continue")
                continue
            is_last = progress.step == config.total_steps
            is_saving = progress.step % config.save_every_steps == 0 or is_last or is_stopping
            is_validating = bool(self.validations) and (progress.step % config.validate_every_steps == 0 or is_last)
            if self._is_health_step() or progress.step % config.log_every_steps == 0 or is_saving or is_validating:
                values = self._record(out, step_data, sums, is_validating)
                elapsed = (time.perf_counter() - began) / (progress.step - first)
                self._log_record(values, elapsed * (config.total_steps - progress.step))
                sums = self._new_sums()
            if is_saving:
                if self.metrics is not None:
                    self.metrics.flush()
                self.checkpoints.begin(self.objective.selection(values))
                self.samples = self._no_samples()  # a resumed run begins without them
                self.watchdog.touch(progress.step)
                sums.started = time.perf_counter()
            if is_stopping and not is_last:
                self.checkpoints.finish()
                raise self._end(fetched, "everything is saved; start the same command to continue")
        self.checkpoints.finish()
        if progress.step > 0 and self.guard.nonfinite_total == progress.step:
            raise NonFiniteError(self.guard.nonfinite(progress.step, "all that the run had"))

    def _exchange(self, data: StepData | None, fetched: "Fetched") -> bool:
        """Exchange signals, checkpoint state and damaged rows of all ranks once a step; return True if one must stop.

        Args:
            data: of the finished step.
            fetched: for the next step.

        Raises:
            DamagedDataError: too many rows could not be read, or none on some rank.
            SaveError: as `Checkpoints.advance`.
        """
        found = [] if data is None else [fault for batch in data.micro for fault in batch.faults]
        faults = [fault for fault in dict.fromkeys(found) if fault not in self._known_faults]  # a row counts once
        self._known_faults.update(faults)
        is_needed = self.progress.step < self.config.total_steps
        no_data = isinstance(fetched.error, ShardError) and is_needed
        failed = isinstance(fetched.error, MachineError) and is_needed
        own = [self.stop.received is not None, self.checkpoints.is_busy, len(faults), no_data, failed]
        signalled, busy, damaged, unreadable, num_failed = comm.all_reduce_sum(own)
        for fault in faults:
            logger.warning("step %d: skipped a row: %s", self.progress.step, fault)
        self.guard.after_reading(int(damaged))
        if unreadable:
            raise DamagedDataError(
                str(fetched.error)
                if no_data
                else f"step {self.progress.step}: no data can be read on {unreadable:.0f} other ranks"
            )
        self.checkpoints.advance(any_busy=busy > 0)
        return signalled + num_failed > 0

    def _end(self, fetched: Fetched, result: str) -> D2V2Error:
        """Make the error that ends a run early. Collective."""
        faults = comm.gather_objects(str(fetched.error) if isinstance(fetched.error, MachineError) else "")
        for rank, fault in enumerate(faults):
            if fault:
                return MachineError(f"step {self.progress.step}: rank {rank}: {fault}; {result}")
        return PreemptedError(f"step {self.progress.step}: stopped by {self._signals()}, {result}")

    def _signals(self) -> str:
        """List the signals that ranks received. Collective."""
        received = comm.gather_objects(None if self.stop.received is None else self.stop.received.name)
        return ", ".join(f"{name} to rank {rank}" for rank, name in enumerate(received) if name is not None)

    def _write_bad_batch(self, out: StepOutput, data: StepData) -> None:
        """Write the samples of a skipped step, and the ranks on which its loss was not finite. Collective."""
        own = [{"modality": batch.modality, "ids": batch.ids.tolist()} for batch in data.micro if batch.loss_weight]
        finite = {
            name: all(math.isfinite(float(v)) for v in part.sums.losses.values()) for name, part in out.parts.items()
        }
        ranks = comm.gather_objects({"batches": own, "loss_is_finite": finite})
        if self.metrics is not None:
            epochs = {name: state.epoch for name, state in data.state_after.items()}
            self.metrics.note_bad_batch({"step": self.progress.step, "epoch_after": epochs, "ranks": ranks})

    def _roll_back(self) -> None:
        """Load the last good checkpoint and remove the records after it."""
        if self.metrics is not None:
            self.metrics.flush()
        self.checkpoints.roll_back()
        if self.metrics is not None:
            self.metrics.rewind(self.progress.step)
        self.samples = self._no_samples()

    def _new_sums(self) -> RecordSums:
        return RecordSums({name: ModalityRecordSums() for name in self.config.readers})

    def _name(self, modality: str, metric: str) -> str:
        """Return the name of a modality's metric in this run."""
        return metric if len(self.config.readers) == 1 else f"{modality}/{metric}"

    def _gradient_metric(self, parameter: str) -> str:
        """Return the gradient norm that includes a parameter."""
        units = {**MODALITY_UNITS, **self.objective.units, **self.objective.run_units}
        modality, metric = gradient_metric(parameter, self.config.readers, units)
        return metric if modality is None else self._name(modality, metric)

    def _record(self, out: StepOutput, data: StepData, sums: RecordSums, is_validating: bool) -> dict[str, float]:
        """Reduce, check and write one record; return it on every rank."""
        progress = self.progress
        seconds = time.perf_counter() - sums.started
        values = self._reduce_run(out, sums, seconds) | self._reduce_modalities(data, sums, seconds)
        values |= self.objective.run_metrics()
        if out.applied and self._has_part_norms(progress.step):
            values |= self._part_norms.take(out.grad_norm)
        if self._is_health_step():
            values |= self._health()
            self._figures(out)
        if is_validating:
            for validation in self.validations:
                values |= self._validate(validation)
        if self.metrics is not None:
            self.metrics.write(progress.step, values)
        self.guard.check_health(progress.step, values)
        if sums.applied:  # a record of skipped steps has no losses
            self.guard.diagnose(progress.step, values)
        return values

    def _reduce_modalities(self, data: StepData, sums: RecordSums, seconds: float) -> dict[str, float]:
        """Compute losses, metrics of the objective and amounts of data of every modality. Collective."""
        values: dict[str, float] = {}
        total = 0.0
        for name, part in sums.parts.items():
            unit, totals = self.config.readers[name].unit, part.sums.reduce()
            (units,) = comm.all_reduce_sum([part.units])
            if totals is not None:
                found = {f"loss/{loss}": value / totals.count for loss, value in totals.sums.items()}
                for value in found.values():
                    total += self.recipe.loss_weights[name] * value
                found |= self.objective.metrics(name, totals)
                values |= {self._name(name, metric): value for metric, value in found.items()}
            self.progress.seen[name] = self.progress.seen.get(name, 0.0) + units
            values[unit.total_metric] = self.progress.seen[name] / unit.total_size
            values[unit.speed_metric] = units / seconds
            values[self._name(name, "data/epoch")] = float(data.state_after[name].epoch)
        if len(sums.parts) > 1 and sums.applied:
            values["loss/total"] = total
        return values

    def _validate(self, validation: Validation) -> dict[str, float]:
        """Compute metrics on one set of held-out data, and the weighted sum of their losses."""
        found = validation()
        self.watchdog.touch(self.progress.step)
        values = {self._name(name, metric): v for name, part in found.items() for metric, v in part.items()}
        total = values[f"{validation.prefix}/loss/total"] = validation.total(found)
        shown = [(name, f"{validation.prefix}/{metric}") for name in found for metric in self.objective.headline]
        scores = "".join(
            f"  {metric.partition(validation.prefix + '/')[2]} {values[metric]:.2f}"
            for metric in (self._name(name, metric) for name, metric in shown)
            if metric in values
        )
        name = f"of {validation.name} " if validation.name else ""
        logger.info("step %d  validation %sloss %.4f%s", self.progress.step, name, total, scores)
        return values

    def _reduce_run(self, out: StepOutput, sums: RecordSums, seconds: float) -> dict[str, float]:
        """Compute the metrics of the run as a whole. Collective."""
        flops_per_s = sums.flops / seconds
        if self._peak_flops is None:
            comm.barrier()  # measure on all ranks at once, because ranks on a CPU also share its cores in the steps
            self._peak_flops = self.config.measure_peak()
        flops, mfu, samples = comm.all_reduce_sum(
            [flops_per_s, flops_per_s / max(self._peak_flops, 1.0), float(sums.samples)]
        )
        own = (1000 * seconds / sums.steps, 1000 * sums.data_wait_s / sums.steps, peak_memory_gib(comm.device()))
        step_ms, wait_ms, memory = (max(column) for column in zip(*comm.gather_objects(own), strict=True))
        values = {
            "optim/lr": out.lr,
            "optim/skipped_steps": float(self.guard.nonfinite_total),
            "data/damaged_rows": float(self.guard.damaged_rows),
            "perf/restarts": float(self.config.restarts),
            "perf/checkpoint_stall_ms": 1000 * self.checkpoints.stall_s,
            "perf/samples_per_s": samples / seconds,
            "perf/step_ms": step_ms,
            "perf/data_wait_ms": wait_ms,
            "perf/data_wait_fraction": wait_ms / step_ms,
            "perf/tflops": flops / comm.world() / 1e12,
            "perf/mfu": mfu / comm.world(),
            "perf/memory_gib": memory,
        }
        self.checkpoints.stall_s = 0.0
        values |= self.objective.schedules(self.progress.step)
        if sums.applied:
            values["optim/grad_norm"] = sums.grad_norm / sums.applied
        return values

    def _is_health_step(self) -> bool:
        return self.progress.step == 1 or self.progress.step % self.config.health_every_steps == 0

    def _has_part_norms(self, step: int) -> bool:
        """Return True if step number `step` measures the gradient norms of the network's parts."""
        return step == 1 or step % self.config.log_every_steps == 0

    def _collect(self, out: StepOutput) -> None:
        """Keep some vectors of the last steps before each health check."""
        ahead = -self.progress.step % self.config.health_every_steps
        if self.progress.step > 1 and ahead >= NUM_STEPS:
            return
        for name, part in out.parts.items():
            for kind in self.objective.health_vectors(part.batch, part.losses):
                sample = self.samples[name].setdefault(kind.name, Sample(reports_std=kind.reports_std))
                sample.add(kind.vectors, kind.positions, kind.length)

    def _health(self) -> dict[str, float]:
        """Compute the health statistics of all collected vectors, averaged over ranks, and drop these. Collective."""
        values: dict[str, float] = {}
        for modality, samples in self.samples.items():
            for name, sample in samples.items():
                found, key = sample.richness(), self._name(modality, name)
                values[f"{key}/effective_rank"] = found.effective_rank
                values[f"{key}/position_share"] = found.position_share
                values[f"{key}/exact_position_share"] = found.exact_position_share
                if sample.reports_std:
                    values[f"{key}/std"] = found.std
        self.samples = self._no_samples()
        means = comm.all_reduce_sum(list(values.values()))
        averages = {name: mean / comm.world() for name, mean in zip(values, means, strict=True)}
        return {name: mean for name, mean in averages.items() if math.isfinite(mean)}

    def _figures(self, out: StepOutput) -> None:
        """Write figures of one sample's masks and of the ALiBi scale to TensorBoard. Collective."""
        shards = zero.parameter_shards(self.engine)
        scales = {name: zero.gather_shard(s, s.data) for name, s in shards.items() if name.endswith("alibi.scale")}
        if self.metrics is None:
            return
        try:
            for modality, part in out.parts.items():
                if part.batch.masks is not None:
                    figure = mask_figure(part.batch.masks.masked[0], self.config.grid_columns[modality])
                    self.metrics.figure(self._name(modality, "masks"), figure, self.progress.step)
            for name, scale in scales.items():
                if scale is not None:
                    self.metrics.figure(
                        name.removeprefix("trunk.").replace(".", "/"),
                        alibi_figure(scale.cpu(), self.config.alibi_slopes),
                        self.progress.step,
                    )
        except MissingExtraError as error:
            if self.progress.step == 1:
                logger.info("no figures in TensorBoard: %s", error)

    def _log_record(self, values: dict[str, Any], seconds_left: float) -> None:
        """Log one line about a record."""
        progress, readers = self.progress, self.config.readers
        prefixes = {name: "" if len(readers) == 1 else f"{name} " for name in readers}
        losses = "  ".join(f"{prefix}{self._mean_loss(name, values):.3f}" for name, prefix in prefixes.items())
        speeds = "  ".join(
            f"{name} {values[reader.unit.speed_metric]:.0f} {reader.unit.name}/s" for name, reader in readers.items()
        )
        schedules = "  ".join(
            f"{name.replace('/', ' ')} {value:.6f}" for name, value in self.objective.schedules(progress.step).items()
        )
        logger.info(
            "step %d/%d  loss %s  %s  lr %.2e  %s  left %s",
            progress.step,
            self.config.total_steps,
            losses,
            schedules,
            values["optim/lr"],
            speeds,
            clock(seconds_left),
        )

    def _mean_loss(self, modality: str, values: Mapping[str, float]) -> float:
        """Return the sum of a modality's mean losses; NaN if every step was skipped."""
        prefix = self._name(modality, "loss/")
        found = [value for name, value in values.items() if name.startswith(prefix) and name != "loss/total"]
        return sum(found) if found else math.nan

    def _no_samples(self) -> dict[str, dict[str, Sample]]:
        return {modality: {} for modality in self.config.readers}


class StopFlag(Protocol):
    """Signal that reached this rank, such as `run.preempt.StopRequest`."""

    received: Signals | None


class StepClock(Protocol):
    """Watches how long steps take, such as `run.watchdog.Watchdog`."""

    def step_done(self, step: int) -> None: ...

    def touch(self, step: int) -> None: ...


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
