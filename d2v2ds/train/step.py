"""One optimizer step of pretraining, free of logging and saving (spec sections 8, 9 and 12).

The gradient is that of the summed loss of all ranks and micro-batches divided by their global number of masked
tokens; with several modalities it is the weighted sum of one such mean for each. Dropout and mask noise depend on the
place of a micro-batch in the global batch of its modality, not on the rank that computes it, so a run continues with
the same numbers on another number of ranks.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.distributed import comm
from d2v2ds.distributed.engine import Engine, gradient_sum_factor, optimizer_step, set_lr
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.model.trunk import StudentOutput, total_loss
from d2v2ds.objectives.loss import channel_moments
from d2v2ds.train.schedule import EmaConfig, LearningRateConfig, ema_decay, learning_rate


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers a step needs."""

    lr: LearningRateConfig
    ema: EmaConfig
    total_steps: int
    seed: int
    layer_drop: float
    num_shared_blocks: int
    loss_weights: Mapping[str, float]
    """Of each modality's mean loss, by name; the order is that of the micro-batches."""


@dataclass
class ModalityOutput:
    """What one optimizer step did with the micro-batches of one modality."""

    num_masked: int
    """Masked tokens of all ranks and micro-batches."""
    loss_sums: dict[str, Tensor]
    """This rank's loss sums over its micro-batches, fillers left out, on the device; the same names on every rank."""
    moments: Tensor
    """(2, 2, D) fp64, `channel_moments` of predictions and of targets over the same micro-batches."""
    batch: Batch
    """Last micro-batch on this rank."""
    last: StudentOutput | None = None
    """Output of the last micro-batch on this rank."""

    def add(self, batch: Batch, out: StudentOutput) -> None:
        """Take in one micro-batch; a filler with zeros, so that every rank has the same names."""
        weight = 1.0 if batch.loss_weight else 0.0
        for name, loss in out["losses"].items():
            self.loss_sums[name] = loss.detach() * weight + self.loss_sums.get(name, 0.0)
        here = torch.stack((channel_moments(out["pred"]), channel_moments(out["wanted"])))
        self.moments = self.moments.to(here.device) + here * weight
        self.batch, self.last = batch, out


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step did."""

    parts: dict[str, ModalityOutput]
    """By modality."""
    applied: bool
    """False if the step was skipped because the gradient was not finite."""
    grad_norm: float
    lr: float
    decay: float


def step_seed(seed: int, step: int, modality: str, place: int) -> int:
    """A seed for one micro-batch of one step; `place` counts within the modality's global batch."""
    entropy = (seed, step, zlib.crc32(modality.encode()), place)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def draw_kept_blocks(recipe: Recipe, step: int) -> list[bool] | None:
    """Layer drop of one step: the same blocks on all ranks, or ZeRO-3 would wait for ever. None keeps all."""
    if recipe.layer_drop == 0.0:
        return None
    draws = np.random.default_rng((recipe.seed, step, 0x1A7E)).random(recipe.num_shared_blocks)
    return [bool(draw >= recipe.layer_drop) for draw in draws]


def pretrain_step(
    student: Engine, teacher: Teacher, micro_batches: Sequence[Batch], *, step: int, recipe: Recipe
) -> StepOutput:
    """Forward, backward, update, average.

    Args:
        student: engine around `Data2Vec2`.
        teacher: sharded average around `TargetNet`.
        micro_batches: this rank's part of the global batch, modality by modality; of each as many on every rank.
        step: number of finished steps, 0 at the start.
        recipe: schedules, weights and seeds.
    """
    lr = learning_rate(step, recipe.lr, recipe.total_steps)
    set_lr(student, lr)
    parts = _count_masked(micro_batches, list(recipe.loss_weights))
    kept_blocks = draw_kept_blocks(recipe, step)
    places = dict.fromkeys(parts, comm.rank())
    outcome = None
    for batch in micro_batches:
        name = batch.modality
        torch.manual_seed(step_seed(recipe.seed, step, name, places[name]))
        places[name] += comm.world()
        out: StudentOutput = student(batch.to(comm.device(), non_blocking=True), teacher, kept_blocks)
        # None are masked where every row of the step was damaged, and all ranks run on stand-ins: it learns nothing.
        factor = recipe.loss_weights[name] * gradient_sum_factor(student) / max(parts[name].num_masked, 1)
        student.backward(total_loss(out) * (batch.loss_weight * factor))
        outcome = optimizer_step(student)
        parts[name].add(batch, out)
    assert outcome is not None, "the engine's accumulation differs from the number of micro-batches"
    decay = ema_decay(step + 1, recipe.ema)
    if outcome.applied:
        teacher.update(decay)
    return StepOutput(parts, outcome.applied, outcome.grad_norm, lr, decay)


def _count_masked(micro_batches: Sequence[Batch], modalities: Sequence[str]) -> dict[str, ModalityOutput]:
    """An empty output for each modality, with the masked tokens of all ranks."""
    mine = [sum(b.num_masked for b in micro_batches if b.loss_weight and b.modality == name) for name in modalities]
    counts = comm.all_reduce_sum(mine)
    first = {name: next(b for b in micro_batches if b.modality == name) for name in modalities}
    nothing = torch.zeros((), dtype=torch.float64)
    return {name: ModalityOutput(int(n), {}, nothing, first[name]) for name, n in zip(modalities, counts, strict=True)}
