"""Official MAE files and transformers' ViTMAE folders -> our export folders, and back; tensors keep their bits."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.export_folder import Description, ModelFolder, Part, opened_tensors
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.read import MADE_BY, OWN_LICENCE
from d2v2ds.interop.imported_folder import write_imported
from d2v2ds.interop.mae import transformers_names
from d2v2ds.interop.mae.keymap import to_official
from d2v2ds.interop.mae.read import MaeCheckpoint, ReadOptions, Tensors, checkpoint_of, read_file
from d2v2ds.interop.mae.settings import MODALITY, arguments_of
from d2v2ds.io.output import whole_file
from d2v2ds.io.read import read_json, validate
from d2v2ds.modalities.known import modality_of
from d2v2ds.objectives.mae import MaeModality
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.heads import PatchHeadConfig

_TABLE = "encoders.image.fixed_positions.table"


def import_mae(source: Path, folder: Path, options: ReadOptions | None = None) -> MaeCheckpoint:
    """Read an official file, or a folder of transformers, and write our folder.

    Returns:
        What was read, with warnings about it.

    Raises:
        CheckpointError: it cannot be read, or is no MAE; or `folder` is something else.
        UnsupportedOptionError: its network computes something that ours does not.
    """
    checkpoint = _read_hub_folder(source, options or ReadOptions()) if source.is_dir() else read_file(source, options)
    trunk, task = checkpoint.network.trunk, checkpoint.task
    own = {MODALITY: asdict(checkpoint.network.objective)} if checkpoint.beside else {}
    objective = {"name": "mae", "modalities": own} if task is None else asdict(task)
    description = Description(
        model=trunk,
        objective=json.loads(json.dumps(objective)),
        preprocessing={
            MODALITY: modality_of(MODALITY, source.name).describe_preprocessing(trunk.modalities[MODALITY], None, None)
        },
        origin={
            "kind": "official",
            "source": f"the MAE checkpoint {source.name}, read by d2v2ds",
            "licence": checkpoint.licence,
            "official": {"file": source.name, "arguments": checkpoint.arguments, "ignored": checkpoint.ignored},
        },
    )
    parts: dict[Part, Tensors] = {"model": checkpoint.trunk, "objective": checkpoint.beside}
    write_imported(folder, description, parts, has_task=task is not None)
    return checkpoint


def _read_hub_folder(path: Path, options: ReadOptions) -> MaeCheckpoint:
    settings = read_json(path / "config.json", CheckpointError)
    if settings.get("model_type") != transformers_names.MODEL_TYPE:
        raise CheckpointError(
            f"{path / 'config.json'}: expected model_type {transformers_names.MODEL_TYPE}, found "
            f"{settings.get('model_type')!r}"
        )
    if (found := settings.get("hidden_act", "gelu")) != "gelu":
        raise UnsupportedOptionError(f"{path}: hidden_act={found!r}")
    with opened_tensors(path / "model.safetensors") as file:
        weights = transformers_names.to_official({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return checkpoint_of(path, weights, options, transformers_names.known_arguments(settings))


def export_mae(path: Path, target: Path, *, as_transformers: bool = False) -> None:
    """Write an export folder of ours as an official file, or as a folder of transformers.

    Args:
        path: of our folder.
        target: file or folder to write.
        as_transformers: write a folder that `ViTMAEForPreTraining.from_pretrained` loads.

    Raises:
        CheckpointError: the folder cannot be read, or has no decoder for transformers.
        UnsupportedOptionError: the official model lacks something of this one.
    """
    folder = ModelFolder(path)
    trunk, objective = folder.description.model, _objective(folder)
    arguments = arguments_of(trunk, objective)
    tensors = dict(folder.tensors("model")) | dict(folder.tensors("objective"))
    if not trunk.modalities[MODALITY].has_extra_positions:
        tensors[_TABLE] = F.pad(tensors[_TABLE], (0, 0, 1, 0))
    official = {to_official(name) or name: tensor.contiguous() for name, tensor in tensors.items()}
    licence = folder.description.origin.get("licence") or OWN_LICENCE
    if as_transformers:
        if objective is None:
            raise CheckpointError(f"{path}: ViTMAEForPreTraining has a decoder, this folder has none")
        _write_hub_folder(target, official, arguments)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        torch.save({"model": official, MADE_BY: {"arguments": arguments, "licence": licence}}, file)


def _objective(folder: ModelFolder) -> MaeModality | None:
    """Settings of the objective; None for a folder without decoder."""
    stored: Any = folder.description.objective or {}
    if stored.get("name") == "classify":
        _require_official_head(folder, stored)
        return None
    if stored.get("name") != "mae":
        raise CheckpointError(f"{folder.path}: expected a model pretrained as MAE, found {stored.get('name')!r}")
    if not folder.has("objective"):
        return None
    found = (stored.get("modalities") or {}).get(MODALITY)
    where = f"{folder.path}: objective.modalities.{MODALITY}"
    return validate(MaeModality, found, where, CheckpointError)


def _require_official_head(folder: ModelFolder, stored: Any) -> None:
    """Refuse a classifier that the official models_vit.py lacks."""
    task = validate(ClassifyConfig, stored, f"{folder.path}: objective", CheckpointError)
    is_known = isinstance(task.head, PatchHeadConfig) and task.head.pooling == "mean" and task.head.norm
    if not is_known or task.kind != "one" or folder.description.model.final_norm:
        raise UnsupportedOptionError(
            f"{folder.path}: expected one class, a head with the mean of patches and a norm, and model.final_norm=false"
        )


def _write_hub_folder(target: Path, official: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> None:
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target}: expected a new folder, found files in it; give another name")
    target.mkdir(parents=True, exist_ok=True)
    settings = transformers_names.config_json(arguments)
    save_file(transformers_names.from_official(official), target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def findings(checkpoint: MaeCheckpoint) -> str:
    """Describe what an import found, one line for each finding."""
    tensors = checkpoint.trunk | checkpoint.beside
    count = sum(tensor.numel() for tensor in tensors.values())
    lines = [f"MAE of {len(tensors)} tensors, {count:,} parameters"]
    lines += [f"ignored: {', '.join(checkpoint.ignored)}"] if checkpoint.ignored else []
    lines += [f"WARNING: {warning}" for warning in checkpoint.warnings]
    return "\n".join([*lines, f"licence: {checkpoint.licence}"])
