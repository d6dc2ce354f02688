"""Make a model of a run: a folder, or one file.

Reads the checkpoint tensor by tensor, whatever the number of ranks it was saved by: neither DeepSpeed, nor a process
group, nor memory for more than one tensor is needed. `interop/export_folder.py` describes what is written.
"""

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from d2v2ds.config.schema import RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.data.schema import read_beside, read_index
from d2v2ds.distributed.checkpoint.format import read_manifest, read_settings
from d2v2ds.errors import CheckpointError, ConfigError, D2V2Error, MachineError, MissingExtraError, ShardError
from d2v2ds.interop.card import write_card
from d2v2ds.interop.export_folder import (
    FILE_SUFFIX,
    OBJECTIVE_PREFIX,
    Description,
    Kind,
    Layout,
    Part,
    Preprocessing,
)
from d2v2ds.interop.export_write import new_folder, write_config, write_file, write_tensors
from d2v2ds.interop.hub.write import write_hub_files
from d2v2ds.io.read import json_lines, read_bytes
from d2v2ds.modalities.known import known_modalities
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.run.folder import (
    TRUNK,
    checkpoint_folder,
    objective_tensors,
    run_config,
    trunk_config,
    trunk_tensors,
)
from d2v2ds.run.preprocessing import describe as describe_preprocessing
from d2v2ds.run.preprocessing import first_index
from d2v2ds.tasks.units import FILE as UNITS_FILE
from d2v2ds.train.figures import save_curves

logger = logging.getLogger(__name__)

CURVES = ("loss/regression", "ema/decay", "optim/lr", "target/effective_rank")
"""Metrics that the card shows, of each modality if they belong to one."""
MOST_POINTS = 2000
"""Points that a curve has at least, if the run has as many records."""
_MOST_SHOWN = 1e300
"""Numbers beyond are left out; so are NaN and infinity, which are no JSON in a model's description."""


@dataclass
class _Records:
    """Metrics of a run that an export shows."""

    last: dict[str, float] = field(default_factory=dict)
    """The newest record up to the checkpoint."""
    drawn: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the card's curves, of every n-th record: never more than `2 * MOST_POINTS` of them."""


def export(run_dir: Path, to: Path, *, teacher: bool = False, tag: str | None = None) -> None:
    """Write a folder, or one file if the name ends with .safetensors.

    Args:
        run_dir: folder of the run.
        to: what to write; an earlier export is replaced.
        teacher: write the averaged trunk too; into a file, it alone.
        tag: of the checkpoint; the newest if None.

    Raises:
        CheckpointError: if there is no such checkpoint, it is damaged, or `to` holds something else.
        ConfigError: if the folder is no run's.
    """
    config = run_config(run_dir)
    checkpoint = checkpoint_folder(run_dir, tag)
    if to.suffix == FILE_SUFFIX:
        _export_file(run_dir, to, teacher, checkpoint, config)
    else:
        _export_folder(run_dir, to, teacher, checkpoint, config)


def _export_folder(run_dir: Path, to: Path, teacher: bool, checkpoint: Path, config: RunConfig) -> None:
    model = trunk_config(checkpoint)
    records = _metrics(run_dir, _step(checkpoint), _names_of_curves(model.modalities))
    layouts = _layouts(checkpoint, config, model)
    parts: dict[Part, Iterator[tuple[str, Tensor]]] = {
        "model": trunk_tensors(checkpoint),
        "objective": objective_tensors(checkpoint),
    }
    if teacher:
        parts["teacher"] = trunk_tensors(checkpoint, teacher=True)
    with new_folder(to) as folder:
        preprocessing = describe_preprocessing(config, model, run_dir)
        _copy_files_beside(config, model, preprocessing, folder)
        description = _description(run_dir, config, checkpoint, model, preprocessing, records)
        for part, tensors in parts.items():
            if layout := layouts[part]:
                write_tensors(folder, part, layout, _with_progress(tensors, part, len(layout)))
        if (description.objective or {}).get("units"):
            (folder / UNITS_FILE).write_bytes(read_bytes(run_dir / UNITS_FILE, ConfigError))
        (folder / "run.yaml").write_bytes(read_bytes(run_dir / "config.yaml", ConfigError))
        _draw_curves(records.drawn, folder, to.name, model.modalities)
        num_parameters = sum(torch.Size(kind.shape).numel() for kind in layouts["model"].values())
        write_card(folder, description, to.name, num_parameters)
        write_config(folder, description, write_hub_files(folder, model, preprocessing, description.objective))
    logger.info("%s: %s of %s, %d parameters", to, " and ".join(parts), checkpoint, num_parameters)


def _export_file(run_dir: Path, to: Path, teacher: bool, checkpoint: Path, config: RunConfig) -> None:
    """Write the student, or the averaged trunk with what it has of the student's, into one file."""
    model = trunk_config(checkpoint)
    layouts = _layouts(checkpoint, config, model)
    layout = dict(layouts["model"])
    tensors: Iterable[tuple[str, Tensor]] = trunk_tensors(checkpoint)
    if teacher:
        own = layouts["teacher"]
        borrowed = ((name, tensor) for name, tensor in tensors if name not in own)
        tensors = chain(borrowed, trunk_tensors(checkpoint, teacher=True))
    else:
        layout |= {OBJECTIVE_PREFIX + name: kind for name, kind in layouts["objective"].items()}
        beside = ((OBJECTIVE_PREFIX + name, tensor) for name, tensor in objective_tensors(checkpoint))
        tensors = chain(tensors, beside)
    preprocessing = describe_preprocessing(config, model, run_dir)
    description = _description(
        run_dir, config, checkpoint, model, preprocessing, _metrics(run_dir, _step(checkpoint), ())
    )
    description.origin["weights"] = "teacher" if teacher else "student"
    write_file(to, description, layout, _with_progress(tensors, to.name, len(layout)))
    if any(known_modalities()[name].files_beside(found) for name, found in preprocessing.items()):
        logger.warning("%s: a single file has no tokenizer; a folder has it", to)
    if (description.objective or {}).get("units"):
        logger.warning("%s: a single file has no %s, which spells words in units; a folder has it", to, UNITS_FILE)
    logger.info("%s: the %s of %s, %d tensors", to, description.origin["weights"], checkpoint, len(layout))


def _with_progress(tensors: Iterable[tuple[str, Tensor]], name: str, count: int) -> Iterable[tuple[str, Tensor]]:
    shown: Iterable[tuple[str, Tensor]] = tqdm(tensors, name, count, unit="tensor", leave=False, disable=None)
    return shown


def _layouts(checkpoint: Path, config: RunConfig, model: TrunkConfig) -> dict[Part, Layout]:
    """Tensors of each part, in fp32, as the checkpoint holds them."""
    objective = config.objective.build(model, config.run.seed)
    with torch.device("meta"):
        network, averaged = objective.build_network(activation_checkpointing=False), objective.build_teacher_network()
    student = _layout(network)
    teacher = {} if averaged is None else _layout(averaged)
    return {
        "model": {name.removeprefix(TRUNK): kind for name, kind in student.items() if name.startswith(TRUNK)},
        "objective": {name: kind for name, kind in student.items() if not name.startswith(TRUNK)},
        "teacher": {name.removeprefix(TRUNK): kind for name, kind in teacher.items()},
    }


def _layout(network: nn.Module) -> dict[str, Kind]:
    return {name: Kind.of(tensor.float()) for name, tensor in network.state_dict().items()}


def _description(
    run_dir: Path,
    config: RunConfig,
    checkpoint: Path,
    model: TrunkConfig,
    preprocessing: Preprocessing,
    records: _Records,
) -> Description:
    settings = read_settings(checkpoint)
    return Description(
        model=model,
        objective=settings["objective"],
        preprocessing=preprocessing,
        origin=_origin(run_dir, config, _step(checkpoint), records.last),
    )


def _copy_files_beside(config: RunConfig, model: TrunkConfig, preprocessing: Preprocessing, folder: Path) -> None:
    """Copy files of the preprocessing from the run's shards; one that cannot be read is not described either."""
    for name, described in preprocessing.items():
        modality, data, index = known_modalities()[name], config.data.modalities.get(name), first_index(config, name)
        if data is None:
            continue
        if index is None:
            logger.warning("%s: files beside the run's shards are not exported, such as a tokenizer", name)
            continue
        packed = {entry.file: entry for entry in index.files_beside}
        for file in modality.files_beside(described):
            try:
                if file not in packed:
                    raise ShardError(f"{folders_of(data.shards)[0]}: {file} is not listed in its index")
                content = read_beside(folders_of(data.shards)[0], packed[file])
            except (ShardError, MachineError) as error:
                logger.warning("no %s is exported, the run's shards cannot be read: %s", file, error)
                described |= modality.describe_preprocessing(model.modalities[name], data, None)
            else:
                (folder / file).write_bytes(content)


def _step(checkpoint: Path) -> int:
    return read_manifest(checkpoint).counters["global_steps"]


def _origin(run_dir: Path, config: RunConfig, step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """Facts about the run, as plain values."""
    last = _last_start(run_dir)
    amounts = [modality.unit.total_metric for modality in known_modalities().values()]
    shown = ("loss/", "effective_rank", "target/std", "pred/std", *amounts)
    final = {key: value for key, value in metrics.items() if any(part in key for part in shown)}
    return {
        "kind": "run",
        "source": "a run of d2v2ds",
        "step": step,
        "of_steps": config.total_steps,
        "command": last.get("command", []),
        "world_size": last.get("world_size"),
        "started": last.get("time"),
        "git_revision": last.get("git_revision"),
        "versions": last.get("versions", {}),
        "final_metrics": final,
        "data": {name: _data_facts(section) for name, section in config.data.modalities.items()},
    }


def _last_start(run_dir: Path) -> dict[str, Any]:
    """Read how the run was started last; empty, with a warning, if that cannot be read."""
    path, reason = run_dir / "starts.jsonl", "no start in it"
    last: dict[str, Any] | None = None
    try:
        for start in json_lines(path, CheckpointError):
            last = start
    except D2V2Error as error:
        last, reason = None, str(error)
    if last is None:
        logger.warning("the model is exported without command, revision and versions of the run: %s: %s", path, reason)
    return last or {}


def _is_shown(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < _MOST_SHOWN


def _metrics(run_dir: Path, step: int, drawn: Collection[str]) -> _Records:
    """Read the records of the run one by one; none, with a warning, if they cannot be read.

    Args:
        run_dir: folder of the run.
        step: of the checkpoint.
        drawn: names of the metrics of the curves.
    """
    path, found, reason = run_dir / "metrics.jsonl", _Records(), "no record in it"
    every = 1
    try:
        for number, record in enumerate(json_lines(path, CheckpointError)):
            values = {
                key: one for key, one in record.items() if isinstance(one, int | float) and abs(one) < _MOST_SHOWN
            }
            if not isinstance(values.get("step"), int):
                continue
            if values["step"] <= step:
                found.last = values
            if number % every == 0:
                found.drawn.append({key: values[key] for key in ("step", *drawn) if key in values})
            if len(found.drawn) >= 2 * MOST_POINTS:
                found.drawn, every = found.drawn[::2], 2 * every
    except D2V2Error as error:
        reason = str(error)
    if not found.drawn:
        logger.warning("the model is exported without metrics and curves of the run: %s: %s", path, reason)
    return found


def _data_facts(section: Any) -> dict[str, Any]:
    """Names of the folders, and their sums if they can be read."""
    folders = folders_of(section.shards)
    facts: dict[str, Any] = {"folders": " and ".join(folder.name for folder in folders)}
    for folder in folders:
        try:
            index = read_index(folder)
        except ShardError:
            continue  # moved or deleted since; the name stays
        for key, value in {"rows": index.rows, **index.totals}.items():
            if isinstance(value, int | float):
                facts[key] = facts.get(key, 0) + value
    return facts


def _names_of_curves(modalities: Iterable[str]) -> list[str]:
    prefixes = ["", *(f"{name}/" for name in modalities)]
    return [prefix + name for name in CURVES for prefix in prefixes]


def _draw_curves(records: list[dict[str, float]], folder: Path, title: str, modalities: Iterable[str]) -> None:
    """Draw curves.png, if matplotlib is installed and the run has metrics."""
    names = [name for name in _names_of_curves(modalities) if any(name in record for record in records)]
    if not names:
        return
    try:
        save_curves(records, names, folder / "curves.png", f"{title}, {int(records[-1]['step'])} steps")
    except MissingExtraError as error:
        logger.warning("no curves in the card: %s", error)
