"""Folders of transformers' `Data2VecVisionModel` and `...ForImageClassification` -> our export folders, and back.

Tensors keep their type and their bits in both directions.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.data2vec1.images.transformers_config import VisionConfig, read_config, write_config
from d2v2ds.interop.data2vec1.images.transformers_names import MASK, PREFIX, to_ours, to_theirs
from d2v2ds.interop.export_folder import METADATA, Description, ModelFolder, Part, opened_tensors
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.read import LICENCES
from d2v2ds.interop.fairseq.torch_file import read_pickled
from d2v2ds.interop.imported_folder import write_imported
from d2v2ds.interop.task_network import task_of
from d2v2ds.io.read import read_json
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.known import modality_of
from d2v2ds.modalities.settings import read_trunk
from d2v2ds.model.trunk import Trunk
from d2v2ds.tasks.classify import ClassifyConfig

Tensors = dict[str, Tensor]
_INDEX = "relative_position_index"
"""Ending of entries of older folders that hold no weight."""


def import_folder(path: Path, folder: Path) -> list[str]:
    """Read a folder of transformers and write ours.

    Args:
        path: with config.json, and model.safetensors or pytorch_model.bin.
        folder: to write.

    Returns:
        Warnings.

    Raises:
        CheckpointError: it is of another model or damaged, or `folder` is something else.
        UnsupportedOptionError: it computes something that ours does not, with the option.
    """
    config = read_config(read_json(path / "config.json", CheckpointError), f"{path}: config.json")
    tensors = {name: value for name, value in _tensors(path).items() if not name.endswith(_INDEX)}
    outputs = tensors.get("classifier.weight")
    task = None if outputs is None else config.task(len(outputs))
    model = config.trunk()
    read_trunk(asdict(model), f"{path}: config.json")  # for the bounds of single fields
    if faults := model.check():
        raise CheckpointError(f"{path}: config.json: {'; '.join(faults)}")
    mask = tensors.get("embeddings.mask_token", tensors.get(f"{PREFIX}embeddings.mask_token"))
    shapes = _shapes(config, task, has_mask=mask is not None)
    try:
        ours = to_ours(tensors, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    is_beside = ("head.", "mask_vectors.")
    parts: dict[Part, Tensors] = {
        "model": {name: tensor for name, tensor in ours.items() if not name.startswith(is_beside)},
        "objective": {name: tensor for name, tensor in ours.items() if name.startswith(is_beside)},
    }
    warnings = _preprocessing_warnings(path, model.modalities["image"])
    if task is not None and mask is not None:
        warnings.append("left out: the mask token, which a classifier does not use")
        del parts["objective"][MASK]
    network = model.modalities["image"]
    description = Description(
        model=model,
        objective=None if task is None else json.loads(json.dumps(asdict(task))),
        preprocessing={"image": modality_of("image", str(path)).describe_preprocessing(network, None, None)},
        origin={
            "kind": "transformers",
            "source": f"the folder {path.name} of transformers, read by d2v2ds",
            "licence": f"{LICENCES['image']}; check what came with your folder, which alone is binding",
        },
    )
    write_imported(folder, description, parts, has_task=task is not None)
    return warnings


def _tensors(path: Path) -> Tensors:
    """Read the tensors of a folder of transformers."""
    if (single := path / "model.safetensors").exists():
        with opened_tensors(single) as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a dictionary)
    if (pickled := path / "pytorch_model.bin").exists():
        return {name: value for name, value in read_pickled(pickled).items() if isinstance(value, Tensor)}
    raise CheckpointError(f"{path}: expected model.safetensors or pytorch_model.bin, found neither")


def _shapes(config: VisionConfig, task: ClassifyConfig | None, *, has_mask: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors."""
    model = config.trunk()
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Trunk(model).state_dict().items()}
        if task is not None:
            head = task.head.build(config.hidden_size, task.num_outputs)
            shapes |= {f"head.{name}": tuple(value.shape) for name, value in head.state_dict().items()}
    return shapes | ({MASK: (config.hidden_size,)} if has_mask else {})


def _preprocessing_warnings(path: Path, network: ImageNetwork) -> list[str]:
    """Compare the mean and the deviation of a folder's inputs with ours."""
    file = path / "preprocessor_config.json"
    if not file.exists():
        return []
    theirs = read_json(file, CheckpointError)
    ours = modality_of("image", str(path)).describe_preprocessing(network, None, None)
    return [
        f"{file.name}: {key} is {theirs[key]}, features here are of inputs with {ours[name]}"
        for key, name in (("image_mean", "mean"), ("image_std", "std"))
        if key in theirs and theirs[key] != ours[name]
    ]


def export_folder(path: Path, folder: Path) -> list[str]:
    """Write an export of ours as a folder that transformers loads without code of ours.

    Args:
        path: of our export: an encoder of images, or a classifier.
        folder: to write; it must not exist.

    Returns:
        Warnings.

    Raises:
        CheckpointError: the export cannot be read, or `folder` exists.
        UnsupportedOptionError: transformers' model cannot compute what ours does.
    """
    source = ModelFolder(path)
    model, settings = source.description.model, source.description.objective or {}
    if list(model.modalities) != ["image"]:
        raise UnsupportedOptionError(f"{path}: expected a model of images, found {', '.join(model.modalities)}")
    beside = dict(source.tensors("objective"))
    head = {name: tensor for name, tensor in beside.items() if name.startswith("head.")}
    task = _task(settings, path) if head else None
    mask = {name: tensor for name, tensor in beside.items() if name == MASK and task is None}
    values: dict[str, Any] = write_config(model, task, has_mask=bool(mask))
    per_block = model.modalities["image"].relative_per_block
    tensors = to_theirs(dict(source.tensors("model")) | head | mask, has_head=task is not None, per_block=per_block)
    left = sorted(beside.keys() - head.keys() - mask.keys())
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; give a folder that does not")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", METADATA)
    preprocessing = source.description.preprocessing["image"]
    for name, content in (("config", values), ("preprocessor_config", _processor(preprocessing))):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [f"left out, transformers has no such parameters: {', '.join(left)}"] if left else []


def _task(settings: dict[str, Any], path: Path) -> ClassifyConfig:
    task = task_of(settings, ModelFolder(path).description.model, str(path)).config
    if not isinstance(task, ClassifyConfig):
        raise UnsupportedOptionError(f"{path}: expected a classifier, found {task.name}")
    return task


def _processor(preprocessing: dict[str, Any]) -> dict[str, Any]:
    """Write the settings of transformers' `BeitImageProcessor`: shorter side, square in the middle, normalised."""
    side = preprocessing["side"]
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": preprocessing["shorter_side"]},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }
