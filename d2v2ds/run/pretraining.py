"""Run pretraining, from configuration to last checkpoint."""

import logging
import os
from contextlib import nullcontext
from datetime import timedelta

from d2v2ds.config.load import to_dict, to_yaml
from d2v2ds.config.schema import RunConfig
from d2v2ds.config.summary import batch_advice
from d2v2ds.data.loader import LoaderConfig, build_loader, start_worker_server
from d2v2ds.data.order import SamplerState
from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.checkpoint.keep import Keep
from d2v2ds.io.lock import FolderLock
from d2v2ds.run import preprocessing, provenance
from d2v2ds.run.agreement import assumptions, compare
from d2v2ds.run.build import build_engines, build_validations, loop_config, recipe
from d2v2ds.run.describe import changed_settings, describe, start_logging, warn_once
from d2v2ds.run.machine import tune_cpu
from d2v2ds.run.outputs import FILE, write_outputs
from d2v2ds.run.preempt import StopRequest
from d2v2ds.run.prepare import Prepared, prepare
from d2v2ds.run.probing import Probing
from d2v2ds.run.units import write_units
from d2v2ds.run.warm_start import WarmStart
from d2v2ds.run.watchdog import Watchdog
from d2v2ds.tasks.encoding import TaskConfig
from d2v2ds.tasks.units import FILE as UNITS_FILE
from d2v2ds.train.checkpointing import Checkpoints, Follower, Progress, has_checkpoints, reading_ahead
from d2v2ds.train.guard import Guard
from d2v2ds.train.loop import Trainer
from d2v2ds.train.metrics import MetricNames, Metrics

logger = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""Seconds to wait for a run that may be ending: one that saves, or that died with its node, whose locks expire on a
network file system after a minute and a half."""


def pretrain(config_name: str, overrides: list[str], allow_grown: bool = False) -> None:
    """Run to the end, or to a signal.

    Args:
        config_name: name of a shipped configuration, or path of a YAML file.
        overrides: `section.field=value`.
        allow_grown: whether rows may have been added to the data since the checkpoint that the run goes on from.

    Raises:
        ConfigError: before any process group exists.
        CheckpointError, CollapseError, DamagedDataError, NonFiniteError, PreemptedError, SaveError: while running.
    """
    launched = os.environ | comm.launcher_environment(dict(os.environ))
    if launched["RANK"] != "0":  # what a rank warns of while it prepares, all find; `start_logging` sets the level anew
        logging.getLogger("d2v2ds").setLevel(logging.ERROR)
    prepared = prepare(config_name, overrides, world=int(launched["WORLD_SIZE"]))
    config = prepared.config
    timeout = timedelta(minutes=config.engine.timeout_minutes)
    probing = Probing(config.run.dir, config.probe, config.total_steps)  # its end waits for a probe, without the group
    # no handlers before the group: a signal to a rank that waits for the others there ends it, and nothing is lost
    with (
        probing,
        comm.process_group(timeout),
        StopRequest() as stop,
        FolderLock(config.run.dir / "lock", PATIENCE_S) as lock,
    ):
        compare(assumptions(prepared))
        start_logging(config.run.dir)
        comm.require_on_rank0(lambda: lock.take(lambda: stop.received is not None), f"run.dir {config.run.dir}")
        if comm.device().type == "cpu":
            tune_cpu(int(os.environ.get("LOCAL_WORLD_SIZE", comm.world())))
        if config.data.num_workers > 0:
            start_worker_server()
        checkpoints = start(prepared, config_name, allow_grown, lock, probing)
        train(prepared, checkpoints, stop)
        logger.info("done: %d steps, run in %s", checkpoints.progress.step, config.run.dir)


def start(
    prepared: Prepared, config_name: str, allow_grown: bool, lock: FolderLock, follower: Follower | None = None
) -> Checkpoints:
    """Build engine and teacher, restore the newest checkpoint if there is one, and write down what starts."""
    config, streams = prepared.config, prepared.streams
    will_resume = has_checkpoints(config.run.dir)
    weights = None if will_resume else config.init.weights
    warm_start = None if weights is None else WarmStart(config, weights)
    with reading_ahead(config.run.dir) if will_resume else nullcontext():
        engine, teacher = build_engines(config, prepared.objective, prepared.ds_config, will_resume, warm_start)
    checkpoints = Checkpoints(
        engine,
        teacher,
        config.run.dir,
        plans={name: stream.plan for name, stream in streams.items()},
        guard=Guard(
            config.health,
            prepared.objective.health_limits(config.health),
            prepared.objective.symptoms,
            config.lr.peak,
        ),
        progress=Progress(sampler={name: SamplerState() for name in streams}),
        settings={"model": to_dict(config.model), "objective": to_dict(config.objective)},
        keep=Keep(last=config.run.keep_checkpoints or None, every_steps=config.run.keep_every_steps),
        asynchronous=config.run.async_checkpoints,
        lock_state=lambda: lock.state() if comm.rank() == 0 else "",
        follower=follower if comm.rank() == 0 else None,
    )
    if will_resume:
        checkpoints.resume(allow_grown)
        for change in changed_settings(config):
            warn_once(f"changed since the last start: {change}")
    comm.require_on_rank0(lambda: _write_start(config, prepared), f"run.dir {config.run.dir}")
    describe(config, streams)
    for section, reader in prepared.held_out_readers.items():
        for remark in reader.remarks():
            logger.info("%s: %s", section, remark)
    for advice in batch_advice(config_name, config):
        warn_once(advice)
    return checkpoints


def _write_start(config: RunConfig, prepared: Prepared) -> None:
    """Write what the run was made of. On one rank alone."""
    provenance.write(config.run.dir, to_yaml(config), prepared.ds_config)
    preprocessing.write(config)
    if isinstance(config.objective, TaskConfig) and config.objective.names:
        write_outputs(config.run.dir / FILE, config.objective.names)
    if prepared.units:
        write_units(config.run.dir / UNITS_FILE, prepared.units)


def train(prepared: Prepared, checkpoints: Checkpoints, stop: StopRequest) -> None:
    """Load data and run the loop."""
    config, objective, engine = prepared.config, prepared.objective, checkpoints.student
    wait_s = min(config.data.max_wait_seconds, 0.8 * 60 * config.engine.timeout_minutes)
    loader = build_loader(
        prepared.streams,
        state=checkpoints.progress.sampler,
        rank=comm.rank(),
        world=comm.world(),
        config=LoaderConfig(num_workers=config.data.num_workers, max_wait_s=wait_s),
        pin_memory=comm.device().type == "cuda",
        is_stopping=lambda: stop.received is not None,
    )
    restarts = provenance.count_starts(config.run.dir) - 1
    metrics = None
    if comm.rank() == 0:
        units = [stream.reader.unit for stream in prepared.streams.values()]
        amounts = {unit.total_metric: unit.total_help for unit in units}
        speeds = {unit.speed_metric: unit.speed_help for unit in units}
        names = MetricNames(amounts | speeds | dict(objective.run_units), objective.units)
        metrics = Metrics(config.run.dir, names, resume_step=checkpoints.progress.step)
    try:
        with Watchdog(config.health.late_factor, config.health.late_seconds) as watchdog:
            Trainer(
                engine,
                objective,
                recipe=recipe(config),
                config=loop_config(config, objective, prepared.streams, zero.compute_dtype(engine), restarts),
                guard=checkpoints.guard,
                checkpoints=checkpoints,
                stop=stop,
                watchdog=watchdog,
                validations=build_validations(config, engine, objective, prepared.held_out),
                metrics=metrics,
            ).run(loader)
    finally:
        loader.close()
        if metrics is not None:
            metrics.close()
