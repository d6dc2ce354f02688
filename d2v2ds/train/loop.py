"""The loop around the step: data, metrics, health, checkpoints, progress.

A record of metrics is written every `log_every_steps` and at every checkpoint, and averages begin anew after
each; so a resumed run writes the very records of a run that never stopped.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.data.loader import StepData
from d2v2ds.data.sampler import SamplerState
from d2v2ds.dist import comm, zero
from d2v2ds.dist.engine import Engine
from d2v2ds.dist.teacher import Teacher
from d2v2ds.errors import MissingExtraError
from d2v2ds.model.loss import channel_variances, mean_channel_std
from d2v2ds.train.figures import alibi_figure, mask_figure
from d2v2ds.train.guard import Guard
from d2v2ds.train.health import NUM_STEPS, Sample
from d2v2ds.train.metrics import Metrics, peak_memory_gib
from d2v2ds.train.step import Recipe, StepOutput, pretrain_step

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands; stored in every checkpoint."""

    step: int = 0
    """Finished optimizer steps, skipped ones included."""
    audio_seconds: float = 0.0
    """Audio seen by all ranks."""
    sampler: SamplerState = field(default_factory=SamplerState)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often things happen (optimizer steps), and what turns steps into numbers."""

    total_steps: int
    log_every_steps: int
    health_every_steps: int
    save_every_steps: int
    sample_rate_hz: int
    peak_flops: float
    """Matrix-product peak of this rank's device, measured at start."""
    num_heads: int
    loss_scale: float | None
    """What the squared errors of the loss are multiplied with; None if the loss is not a sum of squares."""
    flops_of: Callable[[Batch], float]
    """Algorithmic operations of one micro-batch."""


@dataclass
class _Interval:
    """Sums since the last record, of this rank. Skipped steps count in time and data, not in losses and norms."""

    steps: int = 0
    applied: int = 0
    started: float = field(default_factory=time.perf_counter)
    data_wait_s: float = 0.0
    grad_norm: float = 0.0
    losses: dict[str, Tensor] = field(default_factory=dict)
    num_masked: int = 0
    masked_here: int = 0
    tokens_here: int = 0
    samples_here: int = 0
    flops: float = 0.0
    moments: Tensor | None = None

    def add(self, out: StepOutput, micro: list[Batch], wait_s: float, config: LoopConfig) -> None:
        self.steps += 1
        self.data_wait_s += wait_s
        if out.applied:
            self.applied += 1
            self.grad_norm += out.grad_norm
            self.num_masked += out.num_masked
            self.moments = out.moments if self.moments is None else self.moments + out.moments
            for name, loss in out.loss_sums.items():
                self.losses[name] = self.losses.get(name, 0.0) + loss
        for batch in micro:
            if batch.loss_weight:
                self.masked_here += batch.num_masked
                self.tokens_here += batch.masks.masked.numel()
                self.samples_here += batch.source.numel()
                self.flops += config.flops_of(batch)


class Trainer:
    """Runs optimizer steps until the run is done."""

    def __init__(
        self,
        student: Engine,
        teacher: Teacher,
        *,
        recipe: Recipe,
        config: LoopConfig,
        guard: Guard,
        progress: Progress,
        metrics: Metrics | None,
        save: Callable[[Progress], None],
    ) -> None:
        """
        Args:
            student, teacher: engine and sharded average.
            recipe: numbers of the step.
            config: intervals.
            guard: non-finite and collapse checks.
            progress: where to begin; advanced in place.
            metrics: writer on rank 0, None elsewhere.
            save: writes a checkpoint; collective.
        """
        self.student, self.teacher = student, teacher
        self.recipe, self.config, self.guard = recipe, config, guard
        self.progress, self.metrics, self.save = progress, metrics, save
        self.samples = _empty_samples()

    def run(self, data: Iterator[StepData]) -> None:
        """Train up to `total_steps`.

        Raises:
            NonFiniteError: too many steps in a row were skipped.
            CollapseError: a health floor was crossed and the run asked to stop there.
        """
        config, progress = self.config, self.progress
        interval, began, first = _Interval(), time.perf_counter(), progress.step
        while progress.step < config.total_steps:
            asked = time.perf_counter()
            step_data = next(data)
            wait_s = time.perf_counter() - asked
            out = pretrain_step(self.student, self.teacher, step_data.micro, step=progress.step, recipe=self.recipe)
            progress.step += 1
            progress.sampler = step_data.state_after
            self.guard.after_step(progress.step, out.applied)
            interval.add(out, step_data.micro, wait_s, config)
            if out.applied:
                self._collect(out, step_data.micro[-1])
            is_saving = progress.step % config.save_every_steps == 0 or progress.step == config.total_steps
            if self._is_health_step() or progress.step % config.log_every_steps == 0 or is_saving:
                values = self._record(out, step_data, interval)
                elapsed = (time.perf_counter() - began) / (progress.step - first)
                self._say(values, elapsed * (config.total_steps - progress.step))
                interval = _Interval()
            if is_saving:
                if self.metrics is not None:
                    self.metrics.flush()
                self.save(progress)
                self.samples = _empty_samples()  # a resumed run begins without them
                interval.started = time.perf_counter()

    def _record(self, out: StepOutput, data: StepData, interval: _Interval) -> dict[str, float]:
        """Reduce, check and write one record; returns it on every rank."""
        progress = self.progress
        seconds = time.perf_counter() - interval.started
        values = self._reduce(out, interval, seconds)
        values["data/epoch"] = float(data.state_after.epoch)
        values["data/hours"] = progress.audio_seconds / 3600
        values["ema/student_distance"] = self.teacher.student_distance()
        if self._is_health_step():
            values |= self._health()
            self._figures(data.micro[-1])
        if self.metrics is not None:
            self.metrics.write(progress.step, values)
        self.guard.check_health(progress.step, values)
        return values

    def _reduce(self, out: StepOutput, interval: _Interval, seconds: float) -> dict[str, float]:
        """Everything that is a sum, a mean or a maximum over ranks."""
        config, width = self.config, out.last["target"].shape[-1]
        names = sorted(interval.losses)
        moments = torch.zeros(2, 2, width, dtype=torch.float64) if interval.moments is None else interval.moments
        flops_per_s = interval.flops / seconds
        sums = comm.all_reduce_sum(
            [
                interval.masked_here,
                interval.tokens_here,
                interval.samples_here,
                flops_per_s,
                flops_per_s / max(config.peak_flops, 1.0),
                *moments.flatten().tolist(),
                *(float(interval.losses[name]) for name in names),
            ]
        )
        masked, tokens, samples, flops, mfu = sums[:5]
        own = (
            1000 * seconds / interval.steps,
            1000 * interval.data_wait_s / interval.steps,
            peak_memory_gib(comm.device()),
        )
        step_ms, wait_ms, memory = (max(column) for column in zip(*comm.gather_objects(own), strict=True))
        self.progress.audio_seconds += samples / config.sample_rate_hz
        values = {
            "optim/lr": out.lr,
            "optim/skipped_steps": float(self.guard.nonfinite_total),
            "ema/decay": out.decay,
            "mask/fraction": masked / tokens,
            "perf/audio_seconds_per_s": samples / config.sample_rate_hz / seconds,
            "perf/step_ms": step_ms,
            "perf/data_wait_ms": wait_ms,
            "perf/data_wait_fraction": wait_ms / step_ms,
            "perf/tflops": flops / comm.world() / 1e12,
            "perf/mfu": mfu / comm.world(),
            "perf/memory_gib": memory,
        }
        if interval.applied:
            losses = {
                f"loss/{name}": s / interval.num_masked for name, s in zip(names, sums[-len(names) :], strict=True)
            }
            pred, target = torch.tensor(sums[5 : 5 + 4 * width], dtype=torch.float64).view(2, 2, width)
            values |= losses
            values["optim/grad_norm"] = interval.grad_norm / interval.applied
            values["pred/std"] = mean_channel_std(pred, interval.num_masked)
            values["target/std"] = mean_channel_std(target, interval.num_masked)
            if config.loss_scale is not None:
                variance = float(channel_variances(target, interval.num_masked).sum())
                values["target/explained"] = 1.0 - losses["loss/regression"] / (
                    config.loss_scale * max(variance, 1e-12)
                )
        return values

    def _is_health_step(self) -> bool:
        return self.progress.step == 1 or self.progress.step % self.config.health_every_steps == 0

    def _collect(self, out: StepOutput, batch: Batch) -> None:
        """Keep some vectors of the last steps before health is looked at."""
        ahead = -self.progress.step % self.config.health_every_steps
        if self.progress.step > 1 and ahead >= NUM_STEPS:
            return
        keep, masked = batch.masks.rows()  # (R, K), (R, T)
        length = masked.shape[1]
        every = torch.arange(length).repeat(len(out.last["local"])) / length  # (B*T,)
        self.samples["local"].add(out.last["local"].flatten(0, 1), every)
        self.samples["context"].add(out.last["context"].flatten(0, 1), keep.flatten() / length)
        self.samples["target"].add(out.last["target"].flatten(0, 1), every)
        self.samples["pred"].add(out.last["pred"], masked.nonzero()[:, 1] / length)

    def _health(self) -> dict[str, float]:
        """Richness of four sets of vectors, averaged over ranks; collecting begins anew."""
        values: dict[str, float] = {}
        for name, sample in self.samples.items():
            found = sample.richness()
            values[f"{name}/effective_rank"] = found.effective_rank
            values[f"{name}/position_share"] = found.position_share
            if name in ("local", "context"):
                values[f"{name}/std"] = found.std
        self.samples = _empty_samples()
        means = comm.all_reduce_sum(list(values.values()))
        averages = {name: mean / comm.world() for name, mean in zip(values, means, strict=True)}
        return {name: mean for name, mean in averages.items() if math.isfinite(mean)}

    def _figures(self, batch: Batch) -> None:
        """Masks of one sample and the ALiBi scale, to TensorBoard. Collective."""
        shards = zero.parameter_shards(self.student)
        scales = {name: zero.gather_shard(s, s.data) for name, s in shards.items() if name.endswith("alibi.scale")}
        if self.metrics is None:
            return
        try:
            self.metrics.figure("masks", mask_figure(batch.masks.masked[0]), self.progress.step)
            for name, scale in scales.items():
                if scale is not None:
                    self.metrics.figure(
                        name.replace(".", "/"), alibi_figure(scale.cpu(), self.config.num_heads), self.progress.step
                    )
        except MissingExtraError as error:
            if self.progress.step == 1:
                logger.info("no figures in TensorBoard: %s", error)

    def _say(self, values: dict[str, Any], seconds_left: float) -> None:
        progress = self.progress
        logger.info(
            "step %d/%d  loss %.3f  ema %.6f  lr %.2e  audio %.0f s/s  left %s",
            progress.step,
            self.config.total_steps,
            values.get("loss/regression", float("nan")),
            values["ema/decay"],
            values["optim/lr"],
            values["perf/audio_seconds_per_s"],
            clock(seconds_left),
        )


def _empty_samples() -> dict[str, Sample]:
    return {name: Sample() for name in ("local", "context", "target", "pred")}


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
