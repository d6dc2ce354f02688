"""Pretrain: the entry point of a run.

    deepspeed --num_gpus 2 --module d2v2ds.pretrain --config audio_large data.shards=DIR run.dir=DIR key=value...

The same module runs under `torchrun`, under `srun`, and as one process (`python -m d2v2ds.pretrain ...`). A run
whose folder holds a checkpoint goes on from it. Everything that can be wrong with the configuration is reported
at once, before any process group starts.

Exit codes: 0 done, 2 configuration or data, 3 collapse (only if health.stop_on_collapse), 4 too many steps that
were not finite, 5 no usable checkpoint, 6 too many rows that could not be read, 7 two checkpoints in a row could not
be written, 75 stopped by a signal (TERM, USR1, USR2, HUP or INT to any rank) with everything saved: start again.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml

from d2v2ds.batch import Batch
from d2v2ds.config.load import RunConfig, config_error, read_config, to_dict, to_yaml
from d2v2ds.config.summary import batch_advice
from d2v2ds.data.joined import folders_of
from d2v2ds.data.loader import DataStream, LoaderConfig, build_loader, start_worker_server
from d2v2ds.data.order import BatchPlan, SamplerState
from d2v2ds.data.readers import open_reader
from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.checkpoint.keep import Keep
from d2v2ds.distributed.ds_config import load_ds_config, merge_ds_config
from d2v2ds.distributed.engine import Engine, build_student_engine
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import (
    CheckpointError,
    CollapseError,
    ConfigError,
    D2V2Error,
    DamagedDataError,
    MissingExtraError,
    NonFiniteError,
    PreemptedError,
    SaveError,
    ShardError,
)
from d2v2ds.model.block import Block
from d2v2ds.model.flops import step_flops
from d2v2ds.model.init import initialise, undrawn
from d2v2ds.model.trunk import Data2Vec2
from d2v2ds.objectives.teacher_network import TargetNet
from d2v2ds.run import provenance
from d2v2ds.run.lock import RunLock
from d2v2ds.run.machine import matmul_peak_flops, tune_cpu
from d2v2ds.run.preempt import StopRequest
from d2v2ds.run.warm_start import WarmStart, open_warm_start
from d2v2ds.run.watchdog import Watchdog
from d2v2ds.train.checkpointing import (
    Checkpoints,
    Progress,
    differing_fields,
    has_checkpoints,
    reading_ahead,
)
from d2v2ds.train.guard import Guard
from d2v2ds.train.interval import ModalityInfo
from d2v2ds.train.loop import LoopConfig, Trainer
from d2v2ds.train.metrics import Metrics
from d2v2ds.train.optim import EarlyEpsilonAdam
from d2v2ds.train.step import Recipe
from d2v2ds.train.validate import Validation

logger = logging.getLogger("d2v2ds.pretrain")  # not __name__, which is "__main__" under a launcher

EXIT_CODES: list[tuple[type[D2V2Error], int]] = [
    (CollapseError, 3),
    (NonFiniteError, 4),
    (SaveError, 7),
    (CheckpointError, 5),
    (DamagedDataError, 6),
    (PreemptedError, 75),
    (D2V2Error, 2),
]


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="name in d2v2ds/configs or path of a YAML file")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher; not used")
    parser.add_argument(
        "--allow-grown", action="store_true", help="go on although rows were added to the data since the checkpoint"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)  # job scripts add settings behind options
    try:
        pretrain(options.config, options.overrides, allow_grown=options.allow_grown)
    except D2V2Error as error:
        logging.basicConfig(format="%(levelname)s %(message)s")
        logger.error("%s", error)
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))
    return 0


def pretrain(config_name: str, overrides: list[str], allow_grown: bool = False) -> None:
    """Everything between the command line and the last checkpoint.

    Args:
        config_name: name of a shipped configuration, or path of a YAML file.
        overrides: `section.field=value`.
        allow_grown: whether rows may have been added to the data since the checkpoint that the run goes on from.

    Raises:
        ConfigError: before any process group exists.
        CheckpointError, CollapseError, DamagedDataError, NonFiniteError, PreemptedError, SaveError: while running.
    """
    launched = os.environ | comm.launcher_environment(dict(os.environ))
    config, streams, ds_config = prepare(config_name, overrides, world=int(launched["WORLD_SIZE"]))
    timeout = timedelta(minutes=config.engine.timeout_minutes)
    with StopRequest() as stop, comm.process_group(timeout), RunLock(config.run.dir) as lock:
        start_logging(config.run.dir)
        if fault := comm.on_rank0(lock.take):
            raise ConfigError(f"run.dir {config.run.dir}: {fault}")
        if comm.device().type == "cpu":
            tune_cpu(int(os.environ.get("LOCAL_WORLD_SIZE", comm.world())))
        if config.data.num_workers > 0:
            start_worker_server()
        will_resume = has_checkpoints(config.run.dir)
        weights = None if will_resume else config.init.weights
        warm_start = None if weights is None else WarmStart(config, weights)
        with reading_ahead(config.run.dir) if will_resume else nullcontext():
            student, teacher = build_engines(config, ds_config, will_resume, warm_start)
        guard, progress = Guard(config.health), Progress(sampler={name: SamplerState() for name in streams})
        checkpoints = Checkpoints(
            student,
            teacher,
            config.run.dir,
            plans={name: stream.plan for name, stream in streams.items()},
            guard=guard,
            progress=progress,
            model=to_dict(config.model),
            keep=Keep(last=config.run.keep_checkpoints or None, every_steps=config.run.keep_every_steps),
            asynchronous=config.run.async_checkpoints,
        )
        if will_resume:
            checkpoints.resume(allow_grown)
            for change in changed_settings(config):
                warn_once(f"other than at the last start: {change}")
        restarts = provenance.count_starts(config.run.dir)
        if fault := comm.on_rank0(lambda: provenance.write(config.run.dir, to_yaml(config), ds_config)):
            raise ConfigError(f"run.dir {config.run.dir}: cannot be written: {fault}")
        describe(config, streams)
        for advice in batch_advice(config_name, config):
            warn_once(advice)
        loader = build_loader(
            streams,
            state=progress.sampler,
            rank=comm.rank(),
            world=comm.world(),
            config=LoaderConfig(num_workers=config.data.num_workers),
            pin_memory=comm.device().type == "cuda",
        )
        of_loop = loop_config(config, streams, zero.compute_dtype(student), restarts)
        validation = build_validation(config, student, teacher, of_loop) if config.valid.folders() else None
        metrics = Metrics(config.run.dir, resume_step=progress.step) if comm.rank() == 0 else None
        try:
            with Watchdog(config.health.late_factor, config.health.late_seconds) as watchdog:
                Trainer(
                    student,
                    teacher,
                    recipe=recipe(config),
                    config=of_loop,
                    guard=guard,
                    checkpoints=checkpoints,
                    stop=stop,
                    watchdog=watchdog,
                    validation=validation,
                    metrics=metrics,
                ).run(loader)
        finally:
            loader.close()
            if metrics is not None:
                metrics.close()
        logger.info("done: %d steps, run in %s", progress.step, config.run.dir)


Streams = Mapping[str, DataStream]


def prepare(config_name: str, overrides: Sequence[str], world: int) -> tuple[RunConfig, Streams, dict[str, Any]]:
    """Read configuration, data and DeepSpeed JSON, and check each by itself and against the others.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    config, problems = read_config(config_name, overrides)
    if config is None:
        raise config_error(config_name, problems)
    streams: dict[str, DataStream] = {}
    ds_config = None
    data_problems = config.data.missing()
    if not data_problems:
        streams, data_problems = open_streams(config)
    if config.model.block.attention_path == "flex" and not torch.cuda.is_available():
        problems.append("model.block.attention_path 'flex' has no backward pass on a CPU; use 'auto'")
    if config.data.active():
        try:
            ds_config = resolve_ds_config(config, {name: s.plan for name, s in streams.items()}, world)
        except ConfigError as error:
            problems += str(error).splitlines()
    problems += data_problems + run_dir_faults(config.run.dir)
    if not has_checkpoints(config.run.dir):
        problems += open_warm_start(config)[1]
    if problems or ds_config is None:
        raise config_error(config_name, problems)
    return config, streams, ds_config


def open_streams(config: RunConfig) -> tuple[dict[str, DataStream], list[str]]:
    """The data of every modality, in the order of the step, and why it cannot be trained on."""
    streams: dict[str, DataStream] = {}
    problems: list[str] = []
    models = config.model.modalities.active()
    for name, section in config.data.active().items():
        if name not in models:
            continue  # said by `RunConfig.check`
        try:
            reader = open_reader(name, section, models[name])
            faults = reader.faults()
            if not faults:
                plan = BatchPlan(reader.datasets, config=reader.plan_config(), seed=config.run.seed)
                streams[name] = DataStream(reader, plan)
        except (ShardError, MissingExtraError) as error:
            faults = [f"data.{name}.shards: {error}"]
        problems += faults
    return streams, problems + held_out_faults(config)


def held_out_faults(config: RunConfig) -> list[str]:
    """Why the folders of the validation cannot be used, as sentences."""
    data, models, problems = config.data.active(), config.model.modalities.active(), []
    for name, path in config.valid.folders().items():
        if name not in data or name not in models:
            continue  # said by `RunConfig.check`
        if path in folders_of(data[name].shards):
            problems.append(f"valid.{name} is in data.{name}.shards, {path}; expected a folder that is not trained on")
        try:
            reader = open_reader(name, replace(data[name], shards=path, weights=None), models[name])
            problems += [f"valid.{name} {path}: {fault}" for fault in reader.faults()]
        except (ShardError, MissingExtraError) as error:
            problems.append(f"valid.{name}: {error}")
    return problems


def run_dir_faults(run_dir: Path) -> list[str]:
    """Why the run's folder cannot be written, as sentences; makes it if it is absent."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"run.dir {run_dir}: cannot be made: {error}"]
    return [] if os.access(run_dir, os.W_OK) else [f"run.dir {run_dir}: not writable"]


def resolve_ds_config(config: RunConfig, plans: Mapping[str, BatchPlan], world: int) -> dict[str, Any]:
    """The DeepSpeed JSON with this run's numbers; contradictions are errors that name both sides.

    Without plans, because there is no data, everything but the accumulation is checked.
    """
    accumulation = sum(plan.config.accumulation(world) for plan in plans.values()) or 1
    numbers = {
        "train_micro_batch_size_per_gpu": 1,  # ours are seconds, images or tokens; DeepSpeed only multiplies with it
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * world,
        "gradient_clipping": config.optim.clip_norm,
    }
    return merge_ds_config(load_ds_config(config.engine.deepspeed), numbers, f"ds_configs {config.engine.deepspeed}")


def start_logging(run_dir: Path) -> None:
    """Ours at INFO on rank 0, everything else at WARNING; rank 0 also appends to `<run>/log.txt`."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if comm.rank() == 0:
        handlers.append(logging.FileHandler(run_dir / "log.txt"))
    logging.basicConfig(
        format="%(asctime)s %(message)s" if comm.rank() == 0 else f"%(asctime)s rank {comm.rank()} %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    logging.getLogger("d2v2ds").setLevel(logging.INFO if comm.rank() == 0 else logging.WARNING)
    if comm.rank() > 0:  # what all ranks see alike is said once
        logging.getLogger("d2v2ds.train.guard").setLevel(logging.ERROR)


def build_engines(
    config: RunConfig,
    ds_config: dict[str, Any],
    will_resume: bool = False,
    warm_start: WarmStart | None = None,
) -> tuple[Engine, Teacher]:
    """Student and teacher with the same weights on every rank, whatever their number.

    Args:
        config: of the run.
        ds_config: from `prepare`.
        will_resume: draw no first weights, for a checkpoint overwrites them: seconds for a large model.
        warm_start: what to begin with in place of drawn weights.
    """
    is_overwritten = will_resume or (warm_start is not None and not warm_start.fresh())
    with undrawn() if is_overwritten else nullcontext():
        model = Data2Vec2(config.model, activation_checkpointing=config.engine.activation_checkpointing)
        if not is_overwritten:
            initialise(model, config.run.seed)
        elif ds_config.get("bf16", {}).get("enabled", False):
            for param in model.parameters():  # converting them would touch memory that holds nothing yet
                param.data = torch.empty_like(param.data, dtype=torch.bfloat16)
    optimizer = EarlyEpsilonAdam([p for p in model.parameters() if p.requires_grad], lr=0.0, config=config.optim)
    student = build_student_engine(model, optimizer, ds_config, gather_units=[Block])
    student.train()
    with undrawn():  # `Teacher` makes it a copy of the student
        network = TargetNet(config.model)
    teacher = Teacher(network, student, will_be_restored=will_resume)
    if warm_start is not None:
        warm_start.load(student, teacher)
    return student, teacher


def recipe(config: RunConfig) -> Recipe:
    """The numbers of the step."""
    return Recipe(
        lr=config.lr,
        ema=config.ema,
        total_steps=config.total_steps,
        seed=config.run.seed,
        layer_drop=config.model.layer_drop,
        num_shared_blocks=config.model.shared_depth,
        loss_weights={name: section.loss_weight for name, section in config.data.active().items()},
    )


def loop_config(config: RunConfig, streams: Streams, dtype: torch.dtype, restarts: int) -> LoopConfig:
    """The numbers of the loop; its peak is that of the engine's compute type."""

    def flops_of(batch: Batch) -> float:
        return step_flops(
            config.model,
            batch.modality,
            num_samples=batch.source.shape[0],
            size=batch.source.shape[-1],
            num_masks=batch.masks.num_masks,
            visible=batch.masks.num_visible,
        ).total

    modalities = {}
    for name, model in config.model.modalities.active().items():
        scale = model.loss.scale if model.loss.scale is not None else config.model.block.width**-0.5
        modalities[name] = ModalityInfo(
            reader=streams[name].reader, loss_scale=None if model.loss.beta else scale, grid_side=model.grid_side
        )
    return LoopConfig(
        num_heads=config.model.block.num_heads,
        modalities={name: modalities[name] for name in streams},
        total_steps=config.total_steps,
        log_every_steps=config.run.log_every_steps,
        health_every_steps=config.run.health_every_steps,
        save_every_steps=config.run.save_every_steps,
        validate_every_steps=config.valid.every_steps,
        restarts=restarts,
        measure_peak=lambda: matmul_peak_flops(comm.device(), dtype, seconds=0.3),
        flops_of=flops_of,
    )


def build_validation(config: RunConfig, student: Engine, teacher: Teacher, loop: LoopConfig) -> Validation:
    """What looks at the held-out folders; `prepare` has checked that they can be read."""
    data, models = config.data.active(), config.model.modalities.active()
    return Validation(
        student,
        teacher,
        {
            n: open_reader(n, replace(data[n], shards=path, weights=None), models[n])
            for n, path in config.valid.folders().items()
        },
        loss_scales={name: info.loss_scale for name, info in loop.modalities.items()},
        loss_weights={name: section.loss_weight for name, section in data.items()},
        micro_batches=config.valid.micro_batches,
    )


def changed_settings(config: RunConfig) -> list[str]:
    """`field: value before -> value now` of everything that the last start of this run had otherwise."""
    try:
        before = yaml.safe_load((config.run.dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    found = differing_fields(before, to_dict(config)) if isinstance(before, dict) else []
    return [line for line in found if not line.startswith("run.dir:")]  # the folder has been moved


def warn_once(message: str) -> None:
    """A warning from rank 0 alone, where every rank would say the same."""
    if comm.rank() == 0:
        logger.warning("%s", message)


def describe(config: RunConfig, streams: Streams) -> None:
    """Say what is about to run: sizes, derived steps and accumulation, length of an epoch, what may not be meant."""
    logger.info(
        "%d ranks on %s, %s: %d steps", comm.world(), comm.device().type, config.engine.deepspeed, config.total_steps
    )
    for name, stream in streams.items():
        reader, plan, epoch = stream.reader, stream.plan, stream.plan.estimate_epoch()
        folders = ", ".join(str(folder) for folder in folders_of(config.data.active()[name].shards))
        logger.info(
            "%s: %s, %d rows; global batch %.6g %s in %d micro-batches, accumulation %d; epoch of %.0f steps, %.6g %s; "
            "%.1f epochs in all",
            name, folders, len(reader), _units(stream, epoch.size_per_step), reader.unit,
            plan.config.num_micro, plan.config.accumulation(comm.world()), epoch.steps, _units(stream, epoch.size),
            reader.unit, config.total_steps / max(epoch.steps, 1e-9),
        )  # fmt: skip
        count, turns = plan.config.num_micro, plan.config.accumulation(comm.world()) * comm.world()
        if count < turns:
            warn_once(
                f"{name}: {turns - count} of the {turns} turns of a step have no data, for {comm.world()} ranks do not "
                f"divide its {count} micro-batches; take micro-batches of another size, or fewer ranks"
            )
        for remark in reader.remarks():
            logger.info("%s", remark)
    logger.info("watch: tensorboard --logdir %s", config.run.dir / "tensorboard")


def _units(stream: DataStream, size: float) -> float:
    """A sum of sizes in the reader's unit."""
    largest = stream.plan.config.max_size
    return stream.reader.units(1, largest) * size / largest


if __name__ == "__main__":
    sys.exit(main())
