"""Make a model of a run: a folder that loads with `d2v2ds.load_model`, and goes on training with `init.weights`.

    python -m d2v2ds.export RUN --to FOLDER [--teacher] [--checkpoint TAG]
    python -m d2v2ds.export RUN --to NAME.safetensors [--teacher] [--checkpoint TAG]

A folder has the student, with --teacher the average beside it, the tokenizer and a card; a file has one of the two.
Where the run has lost its metrics or its starts, the model is written all the same, and a warning says what it lacks.
Reads the checkpoint tensor by tensor, whatever the number of ranks it was saved by: neither DeepSpeed, nor a process
group, nor memory for more than one tensor is needed. `interop/folder.py` says what lies in the folder.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from tqdm import tqdm

from d2v2ds.config.load import RunConfig, load_config
from d2v2ds.data.joined import folders_of
from d2v2ds.data.schema import read_index
from d2v2ds.distributed.checkpoint.format import (
    candidate_tags,
    iterate_student,
    iterate_teacher,
    read_manifest,
    read_plain,
)
from d2v2ds.errors import CheckpointError, ConfigError, D2V2Error, MissingExtraError, ShardError
from d2v2ds.interop.card import write_card
from d2v2ds.interop.export_folder import (
    FILE_SUFFIX,
    Description,
    Kind,
    Layout,
    Part,
    new_folder,
    write_config,
    write_file,
    write_tensors,
)
from d2v2ds.interop.hub.write import write_hub_files
from d2v2ds.interop.preprocessing import Preprocessing, published_preprocessing
from d2v2ds.model.trunk import Data2Vec2, ModelConfig
from d2v2ds.objectives.teacher_network import TargetNet
from d2v2ds.train.figures import save_curves
from d2v2ds.train.metrics import AMOUNTS, read_metrics

logger = logging.getLogger(__name__)

CURVES = ("loss/regression", "ema/decay", "optim/lr", "target/effective_rank")
"""Metrics that the card shows, of each modality where they are of one."""


def run_config(run_dir: Path) -> RunConfig:
    """The configuration a run was started with last.

    Raises:
        ConfigError: if the folder is no run's.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        if run_dir.is_dir():
            names = sorted(path.name for path in run_dir.iterdir())
            found = f"a folder of {', '.join(names[:5])}{', ...' * (len(names) > 5)}" if names else "an empty folder"
        else:
            found = "a file" if run_dir.exists() else "no such folder"
        raise ConfigError(f"{run_dir}: expected the folder of a run (config.yaml, checkpoints), found {found}")
    return load_config(str(file))


def checkpoint_folder(run_dir: Path, tag: str | None = None) -> Path:
    """The newest finished checkpoint of a run, or the one named.

    Raises:
        CheckpointError: if there is none.
    """
    folder = run_dir / "checkpoints"
    tags = candidate_tags(folder)
    if not tags:
        raise CheckpointError(f"{run_dir}: expected a run with checkpoints, found none in {folder}")
    if tag is not None and tag not in tags:
        raise CheckpointError(f"{folder}: no checkpoint {tag}; finished ones: {', '.join(tags)}")
    return folder / (tag or tags[0])


def model_of(checkpoint: Path) -> ModelConfig:
    """The network a checkpoint was saved from; the run's folder may have been started with another since."""
    state = read_plain(checkpoint / "client.pt")
    return TypeAdapter(ModelConfig).validate_python(state["model"])


def load_student(run_dir: Path, tag: str | None = None) -> tuple[Data2Vec2, int]:
    """The student of a run's checkpoint in eval mode on the CPU, and its step.

    Raises:
        CheckpointError: if there is no such checkpoint or it is damaged.
    """
    checkpoint = checkpoint_folder(run_dir, tag)
    model = Data2Vec2(model_of(checkpoint))
    model.load_state_dict(dict(iterate_student(checkpoint)))
    return model.eval(), read_manifest(checkpoint).counters["global_steps"]


def export(run_dir: Path, to: Path, *, teacher: bool = False, tag: str | None = None) -> None:
    """Write a folder, or one file if the name ends with .safetensors.

    Args:
        run_dir: folder of the run.
        to: what to write; an earlier export is replaced.
        teacher: write the average too; into a file, the encoder of the average instead of the student.
        tag: of the checkpoint; the newest if None.

    Raises:
        CheckpointError: if there is no such checkpoint, it is damaged, or `to` holds something else.
        ConfigError: if the folder is no run's.
    """
    config = run_config(run_dir)
    checkpoint = checkpoint_folder(run_dir, tag)
    model = model_of(checkpoint)
    if to.suffix == FILE_SUFFIX:
        _export_file(run_dir, to, teacher, checkpoint, config, model)
        return
    parts: dict[Part, tuple[type[nn.Module], Iterator[tuple[str, Tensor]]]] = {
        "model": (Data2Vec2, iterate_student(checkpoint))
    }
    if teacher:
        parts["teacher"] = TargetNet, iterate_teacher(checkpoint)
    records = _metrics(run_dir)
    with new_folder(to) as folder:
        preprocessing = _preprocessing(config, model, folder)
        description = Description(
            model=model,
            preprocessing=preprocessing,
            origin=_origin(run_dir, config, read_manifest(checkpoint).counters, records),
        )
        num_parameters = 0
        for part, (network, tensors) in parts.items():
            layout = layout_of(network, model)
            write_tensors(
                folder, part, layout, tqdm(tensors, part, len(layout), unit="tensor", leave=False, disable=None)
            )
            if part == "model":
                num_parameters = sum(torch.Size(kind.shape).numel() for kind in layout.values())
        shutil.copyfile(run_dir / "config.yaml", folder / "run.yaml")
        _draw_curves(records, folder, list(model.modalities.active()))
        write_card(folder, description, to.name, num_parameters)
        write_config(folder, description, write_hub_files(folder, model, preprocessing))
    logger.info("%s: %s of %s, %d parameters", to, " and ".join(parts), checkpoint, num_parameters)


def _export_file(
    run_dir: Path, to: Path, teacher: bool, checkpoint: Path, config: RunConfig, model: ModelConfig
) -> None:
    """The student, or the average with what it has of the student's, in one file."""
    layout, tensors = layout_of(Data2Vec2, model), iterate_student(checkpoint)
    if teacher:
        own = layout_of(TargetNet, model)
        layout = {name: kind for name, kind in layout.items() if not name.startswith("decoders.")}
        borrowed = ((name, tensor) for name, tensor in tensors if name in layout and name not in own)
        tensors = chain(borrowed, iterate_teacher(checkpoint))
    preprocessing = published_preprocessing(model)
    _set_rate(config, preprocessing)
    origin = _origin(run_dir, config, read_manifest(checkpoint).counters, _metrics(run_dir)) | {
        "weights": "teacher" if teacher else "student"
    }
    shown = tqdm(tensors, to.name, len(layout), unit="tensor", leave=False, disable=None)
    write_file(to, Description(model=model, preprocessing=preprocessing, origin=origin), layout, shown)
    if "text" in preprocessing:
        logger.warning("%s: a single file has no tokenizer; a folder has it", to)
    logger.info("%s: the %s of %s, %d tensors", to, origin["weights"], checkpoint, len(layout))


def layout_of(network: type[nn.Module], model: ModelConfig) -> Layout:
    """What a checkpoint holds of a network: everything in fp32."""
    with torch.device("meta"):
        return {name: Kind.of(tensor.float()) for name, tensor in network(model).state_dict().items()}


def _preprocessing(config: RunConfig, model: ModelConfig, folder: Path) -> Preprocessing:
    """The published one with the run's own rate; the tokenizer is copied from the run's shards."""
    described = published_preprocessing(model)
    _set_rate(config, described)
    if config.data.text is not None:
        shards = folders_of(config.data.text.shards)[0]
        try:
            index = read_index(shards)
            for entry in index.files_beside:
                shutil.copyfile(shards / entry.file, folder / entry.file)
                described["text"] |= {"tokenizer": index.format["tokenizer"], "file": entry.file}
        except (ShardError, OSError) as error:
            logger.warning("no tokenizer is exported, the run's shards cannot be read: %s", error)
    return described


def _set_rate(config: RunConfig, described: Preprocessing) -> None:
    if config.data.audio is not None:
        described["audio"]["sample_rate_hz"] = config.data.audio.sample_rate_hz


def _origin(
    run_dir: Path, config: RunConfig, counters: dict[str, int], records: list[dict[str, float]]
) -> dict[str, Any]:
    """What is known of the run, as plain values."""
    last = _last_start(run_dir)
    records = [r for r in records if r["step"] <= counters["global_steps"]]
    shown = ("loss/", "target/effective_rank", "target/std", "pred/std", *(amount for amount, _, _ in AMOUNTS.values()))
    final = {
        key: value for key, value in (records[-1] if records else {}).items() if any(part in key for part in shown)
    }
    return {
        "kind": "run",
        "source": "a run of d2v2ds",
        "step": counters["global_steps"],
        "of_steps": config.total_steps,
        "command": last.get("command", []),
        "world_size": last.get("world_size"),
        "started": last.get("time"),
        "git_revision": last.get("git_revision"),
        "versions": last.get("versions", {}),
        "final_metrics": final,
        "data": {name: _data_facts(section) for name, section in config.data.active().items()},
    }


def _last_start(run_dir: Path) -> dict[str, Any]:
    """How the run was started last; empty, with a warning, where that cannot be read."""
    path = run_dir / "starts.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(json.loads(lines[-1])) if lines else {}
    except (OSError, ValueError) as error:
        logger.warning("the model is exported without command, revision and versions of the run: %s: %s", path, error)
        return {}


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    """Records of the run; none, with a warning, where they cannot be read."""
    path = run_dir / "metrics.jsonl"
    try:
        return read_metrics(path)
    except OSError as error:
        logger.warning("the model is exported without metrics and curves of the run: %s: %s", path, error)
        return []


def _data_facts(section: Any) -> dict[str, Any]:
    """Names of the folders, and their sums where they can be read."""
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


def _draw_curves(records: list[dict[str, float]], folder: Path, modalities: list[str]) -> None:
    """curves.png, where matplotlib is installed and the run has metrics."""
    prefixes = ["", *(f"{name}/" for name in modalities)]
    names = [prefix + name for name in CURVES for prefix in prefixes if any(prefix + name in r for r in records)]
    if not names:
        return
    try:
        save_curves(records, names, folder / "curves.png", f"{folder.stem}, {int(records[-1]['step'])} steps")
    except MissingExtraError as error:
        logger.warning("no curves in the card: %s", error)


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--to", type=Path, required=True, help="folder to write, or one file: NAME.safetensors")
    parser.add_argument("--teacher", action="store_true", help="the average too; in one file, it alone")
    parser.add_argument("--checkpoint", help="tag of a checkpoint; the newest if not given")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        export(options.run, options.to, teacher=options.teacher, tag=options.checkpoint)
    except (D2V2Error, OSError) as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
