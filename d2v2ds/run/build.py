"""Build what a run trains: engine, sharded teacher, loop and validation."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from d2v2ds.batch import Batch
from d2v2ds.config.schema import RunConfig
from d2v2ds.data.reader import Reader
from d2v2ds.distributed import comm
from d2v2ds.distributed.engine import Engine, build_student_engine
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.model.alibi import alibi_slopes
from d2v2ds.model.block import Block
from d2v2ds.model.init import skip_init
from d2v2ds.objectives.protocol import Objective
from d2v2ds.run.machine import matmul_peak_flops
from d2v2ds.run.prepare import Streams
from d2v2ds.run.warm_start import WarmStart
from d2v2ds.train.loop import LoopConfig
from d2v2ds.train.optim import EarlyEpsilonAdam, parameter_groups
from d2v2ds.train.step import Recipe
from d2v2ds.train.validate import Validation


def build_engines(
    config: RunConfig,
    objective: Objective,
    ds_config: dict[str, Any],
    will_resume: bool = False,
    warm_start: WarmStart | None = None,
) -> tuple[Engine, Teacher | None]:
    """Build the trained network and, if the objective has one, its teacher: the same weights on every rank.

    Args:
        config: of the run.
        objective: which network; it gets the teacher.
        ds_config: from `prepare`.
        will_resume: draw no first weights, because a checkpoint overwrites them: saves seconds for a large model.
        warm_start: weights to begin with in place of drawn ones.
    """
    is_overwritten = will_resume or (warm_start is not None and not warm_start.fresh())
    with skip_init() if is_overwritten else nullcontext():
        network = objective.build_network(activation_checkpointing=config.engine.activation_checkpointing)
        if not is_overwritten:
            objective.initialise(network, config.run.seed)
        elif ds_config.get("bf16", {}).get("enabled", False):
            for param in network.parameters():  # converting them would touch memory that holds nothing yet
                param.data = torch.empty_like(param.data, dtype=torch.bfloat16)
    groups = parameter_groups(
        network,
        objective.lr_scale,
        objective.held_steps,
        decay_vectors=config.optim.decay_vectors,
        decays=objective.decays,
    )
    optimizer = EarlyEpsilonAdam(groups, lr=0.0, config=config.optim)
    engine = build_student_engine(network, optimizer, ds_config, gather_units=[Block])
    engine.train()
    with skip_init():  # `Teacher` makes it a copy of the student
        teacher_network = objective.build_teacher_network()
    teacher = None
    if teacher_network is not None:
        teacher = Teacher(teacher_network, engine, will_be_restored=will_resume, is_copied=objective.is_copied)
    objective.follow(teacher)
    if warm_start is not None:
        warm_start.load(engine, teacher)
    return engine, teacher


def recipe(config: RunConfig) -> Recipe:
    """Numbers of the step."""
    return Recipe(
        lr=config.lr,
        total_steps=config.total_steps,
        seed=config.run.seed,
        loss_weights={name: settings.loss_weight for name, settings in config.data.modalities.items()},
    )


def loop_config(
    config: RunConfig, objective: Objective, streams: Streams, dtype: torch.dtype, restarts: int
) -> LoopConfig:
    """Numbers of the loop; its peak is that of the engine's compute type."""

    def flops_of(batch: Batch) -> float:
        return objective.flops(batch.modality, batch.source.shape[0], batch.source.shape[-1])

    return LoopConfig(
        alibi_slopes=alibi_slopes(config.model.block.num_heads),
        readers={name: stream.reader for name, stream in streams.items()},
        grid_columns={name: settings.grid_columns for name, settings in config.model.modalities.items()},
        total_steps=config.total_steps,
        log_every_steps=config.run.log_every_steps,
        health_every_steps=config.run.health_every_steps,
        save_every_steps=config.run.save_every_steps,
        validate_every_steps=config.valid.every_steps,
        restarts=restarts,
        measure_peak=lambda: matmul_peak_flops(comm.device(), dtype, seconds=0.1),
        flops_of=flops_of,
    )


def build_validations(
    config: RunConfig, engine: Engine, objective: Objective, held_out: Mapping[str, Mapping[str, Reader]]
) -> list[Validation]:
    """Build the validation of every set of held-out folders."""
    return [
        Validation(
            engine,
            objective,
            readers,
            loss_weights={one: settings.loss_weight for one, settings in config.data.modalities.items()},
            micro_batches=config.valid.micro_batches,
            name=name,
        )
        for name, readers in held_out.items()
        if readers
    ]
