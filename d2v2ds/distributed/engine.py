"""The student's DeepSpeed engine: build it, scale its loss, step it safely.

What DeepSpeed 0.19 does to a loss, the same at stages 0 to 3 (`tests/distributed/test_engine.py`): `engine.backward`
divides it by `gradient_accumulation_steps`, gradients of the micro-batches are summed, and the sum is averaged over
ranks. `gradient_sum_factor` undoes both divisions. The reported gradient norm is that of the averaged gradient
before clipping.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from d2v2ds.distributed import zero

Engine = DeepSpeedEngine
"""Type that `build_student_engine` returns; other rooms use this name and import no deepspeed."""


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """Result of one optimizer step; the same on every rank."""

    applied: bool
    """False if the gradient was not finite: weights, moments and step counts of the optimizer are untouched."""
    grad_norm: float
    """L2 norm of the averaged gradient over all parameters, before clipping; inf if it was not finite."""


def build_student_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ds_config: Mapping[str, Any],
    gather_units: Sequence[type[nn.Module]] = (),
) -> DeepSpeedEngine:
    """Wrap a model and its torch optimizer into a DeepSpeed engine of the stage that the JSON says.

    The model is built whole on every rank first and then partitioned, which is right up to about a billion
    parameters. In bf16 the fp32 master starts from the weights rounded to bf16.

    Args:
        model: fp32 module on the CPU.
        optimizer: any torch optimizer over the model's parameters that keeps one tensor of state per element.
        ds_config: a JSON from `merge_ds_config`.
        gather_units: classes of modules that ZeRO-3 gathers and releases as a whole, such as transformer blocks.
            A unit that trains needs at least one input that requires grad: DeepSpeed takes its backward for done
            when that of its *inputs* is, and otherwise releases the weights first ("size of tensor a (0)").

    Returns:
        The engine; the model is its `.module`.
    """
    if ds_config.get("zero_optimization", {}).get("stage", 0) == 3 and gather_units:
        set_z3_leaf_modules(model, list(gather_units))
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(ds_config))
    return engine


def set_lr(engine: DeepSpeedEngine, lr: Callable[[float], float], finished_steps: int = 0) -> None:
    """Set the learning rate of the next step.

    Args:
        engine: the student.
        lr: `lr_scale` of a group -> its learning rate; groups without one have 1.
        finished_steps: groups with more `held_steps` than these get 0 and the mark `is_held`.
    """
    for group in engine.optimizer.param_groups:
        group["is_held"] = group.get("held_steps", 0) > finished_steps
        group["lr"] = 0.0 if group["is_held"] else lr(group.get("lr_scale", 1.0))


def gradient_sum_factor(engine: DeepSpeedEngine) -> float:
    """Factor for a loss that makes the step see the *sum* of its gradients over ranks and micro-batches.

    For a loss that is a sum over items, pass `loss * gradient_sum_factor(engine) / global_count` to
    `engine.backward`, where `global_count` counts the items of all ranks and micro-batches of the step: the gradient
    is then that of the mean over items, wherever they lie.
    """
    return float(engine.gradient_accumulation_steps() * engine.dp_world_size)


def optimizer_step(engine: DeepSpeedEngine) -> StepOutcome | None:
    """Finish a micro-batch; on the last one of a step, update the weights unless the gradient is not finite.

    Call it after every `engine.backward`. All ranks skip together, because they all see the same norm; a loss that
    is not finite on one rank makes the averaged gradient, and so the norm, not finite on all of them.

    Returns:
        What happened, or None between accumulation boundaries.
    """
    is_boundary = bool(engine.is_gradient_accumulation_boundary())
    if is_boundary and zero.stage(engine) == 0:
        outcome = _stage0_step(engine)
    else:
        if is_boundary:
            zero.finish_gradients(engine)
        engine.step()
        if not is_boundary:
            return None
        norm = float(engine.get_global_grad_norm())
        outcome = StepOutcome(applied=engine.was_step_applied(), grad_norm=norm)
    zero.clear_gradient_shards(engine)
    return outcome


def _stage0_step(engine: DeepSpeedEngine) -> StepOutcome:
    """Stage 0 has neither a norm nor a check of its own."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        engine.step()
        return StepOutcome(applied=True, grad_norm=norm)
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.skipped_steps += 1
    engine.global_samples += engine.train_batch_size()
    return StepOutcome(applied=False, grad_norm=math.inf)
