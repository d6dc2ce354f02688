"""One optimizer step of any objective, without logging and saving.

The gradient is that of the summed loss of all ranks and micro-batches divided by their global number of items, such as
masked tokens; with several modalities it is the weighted sum of one such mean for each. Dropout and mask noise depend
on the index of a micro-batch in the global batch of its modality, not on its rank, so that a run continues with the
same random numbers on another number of ranks.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from d2v2ds.batch import Batch
from d2v2ds.distributed import comm
from d2v2ds.distributed.engine import Engine, gradient_sum_factor, optimizer_step, set_lr
from d2v2ds.objectives.protocol import Losses, Objective
from d2v2ds.train.schedule import LearningRateConfig, learning_rate
from d2v2ds.train.sums import Sums


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a step that do not belong to the objective."""

    lr: LearningRateConfig
    total_steps: int
    seed: int
    loss_weights: Mapping[str, float]
    """Weight of each modality's mean loss, by name; the order is that of the micro-batches."""


@dataclass(frozen=True)
class ModalityStep:
    """Result of one optimizer step for the micro-batches of one modality."""

    sums: Sums
    """Sums over this rank's micro-batches without fillers."""
    batch: Batch
    """Last micro-batch on this rank."""
    losses: Losses
    """Losses of that micro-batch."""


@dataclass(frozen=True)
class StepOutput:
    """Result of one optimizer step."""

    parts: dict[str, ModalityStep]
    """Results by modality."""
    applied: bool
    """False if the step was skipped because the gradient was not finite."""
    grad_norm: float
    lr: float


def step_seed(seed: int, step: int, modality: str, index: int) -> int:
    """Derive a seed for one micro-batch of one step; `index` is that in the modality's global batch."""
    entropy = (seed, step, zlib.crc32(modality.encode()), index)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def total_loss(losses: Losses) -> torch.Tensor:
    """Return the sum of all losses of a micro-batch."""
    return torch.stack(list(losses.sums.values())).sum()


def train_step(
    engine: Engine, objective: Objective, micro_batches: Sequence[Batch], *, step: int, recipe: Recipe
) -> StepOutput:
    """Run forward, backward and update, then `Objective.after_step`.

    Args:
        engine: around the network of the objective.
        objective: computes the losses.
        micro_batches: this rank's part of the global batch, modality by modality; every rank has as many of each.
        step: number of finished steps, 0 at the start.
        recipe: schedule, weights and seed.
    """
    lr = learning_rate(step, recipe.lr, recipe.total_steps)
    set_lr(engine, lambda scale: learning_rate(step, recipe.lr, recipe.total_steps, scale), step)
    counts = _global_counts(objective, micro_batches, list(recipe.loss_weights))
    sums = {name: Sums() for name in counts}
    indices = dict.fromkeys(counts, comm.rank())
    parts, outcome = {}, None
    for batch in micro_batches:
        name = batch.modality
        torch.manual_seed(step_seed(recipe.seed, step, name, indices[name]))
        indices[name] += comm.world()
        losses = objective.losses(engine, batch.to(comm.device(), non_blocking=True), step)
        # The count is 0 if every row of the step was damaged and all ranks run other rows with weight 0.
        factor = recipe.loss_weights[name] * gradient_sum_factor(engine) / (counts[name] or 1.0)
        engine.backward(total_loss(losses) * (batch.loss_weight * factor))
        outcome = optimizer_step(engine)
        sums[name].add(losses, 1.0 if batch.loss_weight else 0.0)
        parts[name] = ModalityStep(sums[name], batch, losses)
    assert outcome is not None, "the engine's accumulation differs from the number of micro-batches"
    if outcome.applied:
        objective.after_step(step + 1)
    return StepOutput(parts, outcome.applied, outcome.grad_norm, lr)


def _global_counts(objective: Objective, micro_batches: Sequence[Batch], modalities: Sequence[str]) -> dict[str, float]:
    """Count the items of all ranks by modality. Collective."""
    mine = [
        sum(objective.count(b) for b in micro_batches if b.loss_weight and b.modality == name) for name in modalities
    ]
    return dict(zip(modalities, comm.all_reduce_sum(mine), strict=True))
