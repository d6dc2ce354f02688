"""One optimizer step of pretraining, free of logging and saving (spec sections 8, 9 and 12).

The gradient is that of the summed loss of all ranks and micro-batches divided by their global number of masked
tokens. Dropout and mask noise depend on the place of a micro-batch in the global batch, not on the rank that
computes it, so a run continues with the same numbers on another number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.dist import comm
from d2v2ds.dist.engine import Engine, gradient_sum_factor, optimizer_step, set_lr
from d2v2ds.dist.teacher import Teacher
from d2v2ds.model.data2vec2 import StudentOutput, total_loss
from d2v2ds.model.loss import channel_moments
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


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step did."""

    loss_sums: dict[str, Tensor]
    """This rank's loss sums over its micro-batches, fillers left out, on the device; the same names on every rank."""
    moments: Tensor
    """(2, 2, D) fp64, `channel_moments` of predictions and of targets over the same micro-batches."""
    num_masked: int
    """Masked tokens of all ranks and micro-batches."""
    applied: bool
    """False if the step was skipped because the gradient was not finite."""
    grad_norm: float
    lr: float
    decay: float
    last: StudentOutput
    """Output of the last micro-batch on this rank."""


def step_seed(seed: int, step: int, place: int) -> int:
    """A seed for one micro-batch of one step; `place` counts within the global batch."""
    return int(np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0] >> 1)


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
        micro_batches: this rank's part of the global batch, as many on every rank.
        step: number of finished steps, 0 at the start.
        recipe: schedules and seeds.
    """
    lr = learning_rate(step, recipe.lr, recipe.total_steps)
    set_lr(student, lr)
    mine = sum(batch.num_masked for batch in micro_batches if batch.loss_weight)
    num_masked = comm.all_reduce_sum([mine])[0]
    factor = gradient_sum_factor(student) / num_masked
    kept_blocks = draw_kept_blocks(recipe, step)
    sums: dict[str, Tensor] = {}
    moments = torch.zeros((), dtype=torch.float64)
    outcome = None
    for number, batch in enumerate(micro_batches):
        torch.manual_seed(step_seed(recipe.seed, step, number * comm.world() + comm.rank()))
        out: StudentOutput = student(batch.to(comm.device(), non_blocking=True), teacher, kept_blocks)
        student.backward(total_loss(out) * (batch.loss_weight * factor))
        outcome = optimizer_step(student)
        counts = bool(batch.loss_weight)
        for name, loss in out["losses"].items():
            sums[name] = (loss.detach() if counts else torch.zeros_like(loss)) + sums.get(name, 0.0)
        here = torch.stack((channel_moments(out["pred"]), channel_moments(out["wanted"])))
        moments = moments.to(here.device) + (here if counts else torch.zeros_like(here))
    assert outcome is not None, "the engine's accumulation differs from the number of micro-batches"
    decay = ema_decay(step + 1, recipe.ema)
    if outcome.applied:
        teacher.update(decay)
    return StepOutput(sums, moments, int(num_masked), outcome.applied, outcome.grad_norm, lr, decay, out)
