"""Read configuration, data and DeepSpeed JSON, and check each by itself and against the others.

Everything that can be wrong is reported at once, before any process group exists.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d2v2ds.config.load import config_error, read_config
from d2v2ds.config.schema import RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.data.loader import DataStream
from d2v2ds.data.order import BatchPlan
from d2v2ds.data.reader import Reader
from d2v2ds.data.schema import read_index
from d2v2ds.distributed.ds_config import load_ds_config, merge_ds_config
from d2v2ds.errors import ConfigError, MachineError, MissingExtraError, ShardError
from d2v2ds.evals.probes import fit_threads
from d2v2ds.io.machine_faults import TRANSIENT, advice, reading_error
from d2v2ds.io.read import irregular
from d2v2ds.modalities.known import known_modalities, open_reader
from d2v2ds.objectives.protocol import Objective
from d2v2ds.run.decoder_choice import search_faults
from d2v2ds.run.outputs import vocabulary_faults, with_outputs
from d2v2ds.run.probe_task import Question, Task
from d2v2ds.run.units import give_units, with_units
from d2v2ds.run.warm_start import open_warm_start
from d2v2ds.train.checkpointing import has_checkpoints

Streams = Mapping[str, DataStream]


@dataclass(frozen=True)
class Prepared:
    """Everything that is ready before the process group exists."""

    config: RunConfig
    objective: Objective
    streams: Streams
    """Data of every modality, in the order of the step."""
    held_out: Mapping[str, Mapping[str, Reader]]
    """Readers of the validation's folders, by set and modality; see `ValidSection.sets`."""
    ds_config: dict[str, Any]
    units: bytes = b""
    """Sentencepiece model of a recogniser's units; empty for every other task."""

    @property
    def held_out_readers(self) -> dict[str, Reader]:
        """Readers of the validation by the setting that names their folder."""
        return {
            _setting(name, one): reader for name, readers in self.held_out.items() for one, reader in readers.items()
        }


def prepare(config_name: str, overrides: Sequence[str], world: int) -> Prepared:
    """Read and check everything.

    Args:
        config_name: name of a shipped configuration, or path of a YAML file.
        overrides: `section.field=value`.
        world: number of ranks.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    config, problems = read_config(config_name, overrides)
    if config is None:
        raise config_error(config_name, problems)
    data_problems, units = config.data.missing(), b""
    if not data_problems:
        try:
            config, units = with_units(config)
            config = with_outputs(config)
            data_problems = vocabulary_faults(config)
        except (ConfigError, ShardError, MissingExtraError) as error:
            data_problems = [f"objective: {error}"]
    objective = config.objective.build(config.model, config.run.seed)
    give_units(objective, units, "units of the run")
    if config.valid.decoder is not None and not data_problems:
        data_problems += search_faults(objective, config.valid.decoder, config.valid.decoder_seconds)
    streams: dict[str, DataStream] = {}
    held_out: dict[str, dict[str, Reader]] = {}
    ds_config = None
    if not data_problems:
        streams, stream_problems = open_streams(config, objective)
        data_problems += stream_problems
        held_out, held_out_problems = open_held_out(config, objective)
        data_problems += held_out_problems
        data_problems += probe_faults(config)
    if config.model.block.attention_path == "flex" and not torch.cuda.is_available():
        problems.append("model.block.attention_path 'flex' has no backward pass on a CPU; use 'auto'")
    if config.data.modalities:
        try:
            ds_config = resolve_ds_config(config, {name: s.plan for name, s in streams.items()}, world)
        except ConfigError as error:
            problems += str(error).splitlines()
    problems += data_problems + run_dir_faults(config.run.dir)
    if not has_checkpoints(config.run.dir):
        problems += open_warm_start(config)[1]
    if problems or ds_config is None:
        raise config_error(config_name, problems)
    return Prepared(config, objective, streams, held_out, ds_config, units)


def open_streams(config: RunConfig, objective: Objective) -> tuple[dict[str, DataStream], list[str]]:
    """Open the data of every modality, in the order of the step; returns problems too."""
    streams: dict[str, DataStream] = {}
    problems: list[str] = []
    for name, settings in config.data.modalities.items():
        if name not in config.model.modalities or name not in config.objective.modalities:
            continue  # `RunConfig.check` reports this
        try:
            network = config.model.modalities[name]
            reader = open_reader(name, settings, network, objective.mask(name), objective.labelled(name))
            faults = reader.faults() + row_faults(config, objective, name, folders_of(settings.shards), "data")
            if not faults:
                plan = BatchPlan(reader.datasets, config=reader.plan_config(), seed=config.run.seed)
                streams[name] = DataStream(reader, plan)
        except (ShardError, ConfigError, MissingExtraError) as error:
            faults = [f"data.{name}.shards: {error}"]
        problems += faults
    return streams, problems


def open_held_out(config: RunConfig, objective: Objective) -> tuple[dict[str, dict[str, Reader]], list[str]]:
    """Open the folders of the validation, by set and modality; returns problems too."""
    problems = []
    if config.valid.modalities:
        try:
            objective.check_validation()
        except (ConfigError, MissingExtraError) as error:
            problems.append(f"valid: {error}")
    found: dict[str, dict[str, Reader]] = {}
    for name, folders in config.valid.sets.items():
        found[name], more = _open_set(config, objective, name, folders)
        problems += more
    return found, problems


def _setting(set_name: str, modality: str) -> str:
    """Return the setting that names a folder of the validation."""
    return f"valid.more.{set_name}.{modality}" if set_name else f"valid.{modality}"


def _open_set(
    config: RunConfig, objective: Objective, set_name: str, folders: Mapping[str, Path]
) -> tuple[dict[str, Reader], list[str]]:
    """Open the folders of one set of the validation; returns problems too."""
    data, problems = config.data.modalities, list[str]()
    readers: dict[str, Reader] = {}
    for name, path in folders.items():
        setting = _setting(set_name, name)
        if name not in data or name not in config.model.modalities or name not in config.objective.modalities:
            continue  # `RunConfig.check` reports this
        if path in folders_of(data[name].shards):
            problems.append(f"{setting} is in data.{name}.shards, {path}; expected a folder that is not trained on")
        try:
            readers[name] = open_reader(
                name,
                replace(data[name], shards=path, weights=None),
                config.model.modalities[name],
                objective.mask(name),
                objective.labelled(name),
                augments=objective.labelled(name) is None,
            )
            problems += [f"{setting} {path}: {fault}" for fault in readers[name].faults()]
            problems += row_faults(config, objective, name, [path], setting.removesuffix(f".{name}"))
        except (ShardError, MissingExtraError) as error:
            problems.append(f"{setting}: {error}")
    return readers, problems


def row_faults(config: RunConfig, objective: Objective, name: str, folders: Sequence[Path], section: str) -> list[str]:
    """Return one message for each folder of a task that holds another kind of rows than its first training folder.

    Raises:
        ShardError: the index of a folder cannot be read.
    """
    if objective.labelled(name) is None:
        return []
    settings, modality = config.data.modalities[name], known_modalities()[name]
    index = read_index(folders_of(settings.shards)[0])
    preprocessing = modality.describe_preprocessing(config.model.modalities[name], settings, index)
    found = (fault for folder in folders for fault in modality.row_faults(preprocessing, folder))
    return [f"{section}.{name}: {fault}" for fault in found]


def probe_faults(config: RunConfig) -> list[str]:
    """Return one message for each probe of the run that its folder cannot answer."""
    settings, problems = config.probe, list[str]()
    for name, folder in settings.modalities.items():
        if name not in config.data.modalities or name not in config.model.modalities:
            continue  # `RunConfig.check` reports this
        folders = (folder,) if name not in settings.test else (folder, settings.test[name])
        for kind in settings.kinds:
            question = Question(
                folders=folders,
                kind=kind,
                label=settings.label,
                leave_out=settings.leave_out,
                divider=settings.divider,
            )
            try:
                with fit_threads(settings.threads):
                    task = Task.read(config, question)
                if task.modality != name:
                    problems.append(f"probe.{name} {folder}: expected {name}, found a folder of {task.modality}")
                    continue
                width = config.model.block.width if kind == "ctc" else 0
                task.check(task.probe_config(), width, settings.memory_gib)
            except (ShardError, ConfigError, MissingExtraError) as error:
                problems.append(f"probe.{name}, kind {kind}: {error}")
    return problems


def run_dir_faults(run_dir: Path) -> list[str]:
    """Return messages if the run's folder, which is made if absent, cannot be written or holds what is no file.

    Raises:
        MachineError: its disk or network failed.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in TRANSIENT:
            raise MachineError(f"run.dir {run_dir}: cannot be made: {error}; {advice(error)}") from error
        return [f"run.dir {run_dir}: cannot be made: {error}"]
    if not os.access(run_dir, os.W_OK):
        why = "a read-only file system" if os.statvfs(run_dir).f_flag & os.ST_RDONLY else "no right to"
        return [f"run.dir {run_dir}: not writable: {why}"]
    # a FIFO would hold up whoever opens it, for ever
    try:
        kinds = {
            path: irregular(path.stat().st_mode) for path in run_dir.iterdir() if path.exists() and not path.is_dir()
        }
    except FileNotFoundError:
        return []  # a run at work replaces files
    except OSError as error:
        if error.errno in TRANSIENT:
            raise reading_error(f"run.dir {run_dir}", error, ConfigError) from error
        return [f"run.dir {run_dir}: cannot be read: {error}; {advice(error)}"]
    return [f"{path}: expected a file, found {kind}; remove it" for path, kind in sorted(kinds.items()) if kind]


def resolve_ds_config(config: RunConfig, plans: Mapping[str, BatchPlan], world: int) -> dict[str, Any]:
    """Merge this run's numbers into the DeepSpeed JSON; contradictions are errors that name both sides.

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
