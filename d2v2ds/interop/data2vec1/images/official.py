"""Official data2vec 1.0 files of images -> our export folders, and back; nothing in a file is run.

Two layouts: fairseq's port (`cfg.model`, teacher under `_ema`), and the fork of BEiT that made the published models (no
configuration but the arguments of its command, teacher under `model_ema`). Files of the fork may be fine-tuned: a table
of offsets in every block, `head` and `fc_norm`. Tensors keep their type and their bits.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from d2v2ds.errors import CheckpointError, D2V2Error
from d2v2ds.interop.data2vec1.images.sections import FAIRSEQ, beit_network, official_arguments
from d2v2ds.interop.export_folder import Description, ModelFolder, Part
from d2v2ds.interop.fairseq.data2vec1_config import FirstNetwork, Layout, first_network_of
from d2v2ds.interop.fairseq.data2vec1_keymap import is_buffer, to_official, to_ours
from d2v2ds.interop.fairseq.pickles import plain
from d2v2ds.interop.fairseq.read import MADE_BY, OWN_LICENCE, TEACHER, followed, licence_of, require_bytes
from d2v2ds.interop.fairseq.torch_file import read_pickled
from d2v2ds.interop.imported_folder import write_imported
from d2v2ds.io.output import whole_file
from d2v2ds.io.read import validate
from d2v2ds.modalities.known import modality_of
from d2v2ds.modalities.settings import read_trunk, write_trunk
from d2v2ds.model.positions import relative_index
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.objectives.data2vec1 import Data2Vec1Config
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.heads import PatchHeadConfig

Tensors = dict[str, Tensor]
_TRUNK = "trunk."
_ANCHORS: dict[str, Layout] = {"encoder.blocks.0.attn.q_bias": "image", "blocks.0.attn.q_bias": "image of BEiT"}
"""Layout by a parameter that every file of it has."""
_AVERAGES: dict[Layout, str] = {"image": TEACHER, "image of BEiT": "model_ema"}
_OWN_TABLE = re.compile(r"blocks\.(\d+)\.attn\.relative_position_bias_table")
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
_HEAD = {"head.weight": "head.proj.weight", "head.bias": "head.proj.bias",
         "fc_norm.weight": "head.norm.weight", "fc_norm.bias": "head.norm.bias"}  # fmt: skip
"""Our names of the head of a fine-tuned file."""
_NO_NETWORK = (TypeError, ValueError, KeyError, AttributeError, SyntaxError, ZeroDivisionError, OverflowError)


def import_official(path: Path, folder: Path) -> list[str]:
    """Read an official file and write our folder.

    Returns:
        Warnings, and what was left out.

    Raises:
        CheckpointError: it is damaged, wants to run code, is no data2vec 1.0 of images, or its tensors are not those of
            its network; or `folder` is something else.
        UnsupportedOptionError: its network computes something that ours does not, with the option.
    """
    content = read_pickled(path)
    tensors, layout = _weights(path, content)
    teacher = content["model"].get(TEACHER) if layout == "image" else content.get(_AVERAGES[layout])
    head = {_HEAD[name]: tensors.pop(name) for name in _HEAD if name in tensors}
    per_block = _joined_tables(tensors)
    try:
        roots = {key: plain(content.get(key)) for key in ("cfg", "args")}
        network, arguments = _network(roots, tensors, layout)
        model = _checked(network, path)
        if head or per_block:
            model = _finetuned_trunk(model, tensors, per_block)
        notes: list[str] = []
        student = _fitted(to_ours(tensors, layout), _states(network, model)[0], notes)
    except D2V2Error as error:
        raise type(error)(f"{path}: {error}") from error
    except _NO_NETWORK as error:
        raise CheckpointError(f"{path}: not the configuration of a network: {error}") from error
    task = _task(head) if head else None
    notes = ["the file has no names of classes: they have numbers"] if head else notes
    parts = _parts(student, head)
    if isinstance(teacher, dict) and teacher and not head:
        parts["teacher"] = _teacher(teacher, student, network, notes)
    elif not head:
        notes.append("no teacher in the file: a run that goes on from it starts with the student's")
    objective = asdict(network.objective) if task is None else asdict(task)
    write_imported(
        folder,
        Description(
            model=model,
            objective=json.loads(json.dumps(objective)),
            preprocessing={"image": modality_of("image", path.name).describe_preprocessing(
                model.modalities["image"], None, None
            )},
            origin={
                "kind": "official",
                "source": f"the data2vec 1.0 checkpoint {path.name}, read by d2v2ds",
                "licence": licence_of("image", roots["cfg"]),
                "official": {"file": path.name, "layout": layout, "arguments": arguments},
            },
        ),
        parts,
        has_task=task is not None,
    )  # fmt: skip
    return notes


def _weights(path: Path, content: Mapping[str, Any]) -> tuple[Tensors, Layout]:
    """Find the tensors of the student, and the layout of their names."""
    weights = content.get("model")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{path}: expected official weights under `model`, found none")
    require_bytes(path, weights)
    layout = next((one for name, one in _ANCHORS.items() if name in weights), None)
    if layout is None:
        names = ", ".join(sorted(weights)[:4])
        raise CheckpointError(f"{path}: expected a data2vec 1.0 of images, found {names or 'nothing'}")
    tensors = {name: one.detach() for name, one in weights.items() if isinstance(one, Tensor) and not is_buffer(name)}
    if any(one.is_meta for one in tensors.values()):
        raise CheckpointError(f"{path}: expected weights, found names and shapes alone (of torch's device meta)")
    return tensors, layout


def _joined_tables(tensors: Tensors) -> bool:
    """Join the tables of all blocks, if they have some, to one (L, offsets + 3, H), in place."""
    names = {int(found[1]): name for name in tensors if (found := _OWN_TABLE.fullmatch(name))}
    if names:
        tensors[_SHARED_TABLE] = torch.stack([tensors.pop(names[i]) for i in sorted(names)])
    return bool(names)


def _network(roots: Mapping[str, Any], tensors: Tensors, layout: Layout) -> tuple[FirstNetwork, dict[str, Any]]:
    """Find the settings of a file."""
    cfg, args = (one if isinstance(one, dict) else {} for one in (roots["cfg"], roots["args"]))
    if layout == "image of BEiT":
        table = tensors.get(_SHARED_TABLE)
        flat = tensors if table is None or table.ndim == 2 else tensors | {_SHARED_TABLE: table[0]}
        return beit_network(flat, args)
    model = cfg.get("model")
    section: dict[str, Any] = model if isinstance(model, dict) else args
    if "embed_dim" not in section and "num_mask_patches" not in section:
        raise CheckpointError("expected a configuration of data2vec_vision under cfg.model or args, found none")
    section = {**followed(section, (section, cfg)), "_name": FAIRSEQ}
    for key in [key for key, value in section.items() if isinstance(value, str) and value.startswith("${")]:
        del section[key]  # refers to what the file does not have
    return first_network_of(section, "image"), section


def _checked(network: FirstNetwork, path: Path) -> TrunkConfig:
    """Check every number of settings from a file."""
    model = network.trunk
    read_trunk(write_trunk(model), str(path))
    TypeAdapter(Data2Vec1Config).validate_python(asdict(network.objective))
    if problems := model.check() + network.objective.check(model):
        raise CheckpointError("; ".join(problems))
    return model


def _finetuned_trunk(model: TrunkConfig, tensors: Tensors, per_block: bool) -> TrunkConfig:
    network = replace(model.modalities["image"], relative_per_block=per_block)
    return replace(model, modalities={"image": network}, final_norm="norm.weight" in tensors)


def _states(network: FirstNetwork, model: TrunkConfig) -> tuple[Tensors, Tensors]:
    """Parameters of student and teacher by our names, without memory."""
    objective = network.objective.build(network.trunk, seed=0)
    with torch.device("meta"):
        student = objective.build_network(activation_checkpointing=False).state_dict()
        teacher = objective.build_teacher_network().state_dict()
        trunk = {_TRUNK + name: one for name, one in Trunk(model).state_dict().items()}
    beside = {name: one for name, one in student.items() if not name.startswith(_TRUNK)}
    return trunk | beside, teacher


def _fitted(found: Tensors, expected: Tensors, notes: list[str]) -> Tensors:
    """Bring tensors into our shapes. Head and mask vector may be missing; a head that nothing calls is kept.

    Raises:
        CheckpointError: with what is missing or of another size.
    """
    fitted, faults = {}, []
    for name, value in found.items():
        shape = tuple(expected[name].shape) if name in expected else tuple(value.shape)
        if value.numel() != torch.Size(shape).numel() or (name not in expected and name.startswith(_TRUNK)):
            faults.append(f"{name}: expected {shape if name in expected else 'no such tensor'}, found {value.shape}")
            continue
        fitted[name] = value.reshape(shape)
    missing = sorted(expected.keys() - found.keys())
    faults += [f"{name}: missing" for name in missing if name.startswith(_TRUNK)]
    notes += [f"the file lacks {name}, which pretraining draws anew" for name in missing if not name.startswith(_TRUNK)]
    if faults:
        raise CheckpointError("not the tensors of its own configuration:\n  " + "\n  ".join(faults[:20]))
    return fitted


def _task(head: Tensors) -> ClassifyConfig:
    has_norm = "head.norm.weight" in head
    pooling = PatchHeadConfig(pooling="mean" if has_norm else "cls", norm=has_norm)
    return ClassifyConfig(modality="image", num_outputs=len(head["head.proj.weight"]), head=pooling)


def _parts(student: Tensors, head: Tensors) -> dict[Part, Tensors]:
    trunk = {name.removeprefix(_TRUNK): one for name, one in student.items() if name.startswith(_TRUNK)}
    beside = {name: one for name, one in student.items() if not name.startswith(_TRUNK)}
    return {"model": trunk, "objective": head or beside}


def _teacher(official: Mapping[str, Any], student: Tensors, network: FirstNetwork, notes: list[str]) -> Tensors:
    """Translate the teacher; what it copies and the file leaves out is the student's."""
    prefix, own = network.teacher_prefix, network.own
    tensors = {prefix + key: one.detach() for key, one in official.items() if isinstance(one, Tensor)}
    found = to_ours({name: one for name, one in tensors.items() if not is_buffer(name)}, network.layout)
    idle = sorted(name for name in found if not name.startswith(_TRUNK))
    if idle:
        notes.append(f"left out, the teacher's targets do not depend on it: {', '.join(idle)}")
    copied = tuple(f"{_TRUNK}encoders.image.{part}" for part in own.copied)
    whole = {name: one for name, one in student.items() if copied and name.startswith(copied)}
    whole |= {name: one for name, one in found.items() if name.startswith(_TRUNK)}
    fitted = _fitted(whole, _states(network, network.trunk)[1], notes)
    return {name.removeprefix(_TRUNK): one for name, one in fitted.items()}


def export_official(path: Path, file: Path) -> list[str]:
    """Write an export of ours that was pretrained as data2vec 1.0 of images in the official layout.

    A network without head (`head_layers: 0`) is written as fairseq does, one with a head as the fork of BEiT does.

    Returns:
        Warnings.

    Raises:
        CheckpointError: it cannot be read, or is of another objective.
        UnsupportedOptionError: the official model cannot compute what ours does.
    """
    source = ModelFolder(path)
    model, settings = source.description.model, source.description.objective or {}
    if settings.get("name") != "data2vec1" or list(model.modalities) != ["image"]:
        raise CheckpointError(f"{path}: expected a data2vec 1.0 of images, found {settings.get('name')!r}")
    objective = validate(Data2Vec1Config, dict(settings), f"{path}: objective", CheckpointError)
    own = objective.modalities["image"]
    layout: Layout = "image" if own.head_layers == 0 else "image of BEiT"
    student = {_TRUNK + name: one for name, one in source.tensors("model")} | dict(source.tensors("objective"))
    teacher = {_TRUNK + name: one for name, one in source.tensors("teacher")}
    official, notes = to_official(student, layout), list[str]()
    network, arguments = official_arguments(model, objective, official, layout)
    if layout == "image" and "final_proj.weight" not in official:
        width = model.block.width
        official |= {"final_proj.weight": torch.zeros(width, width), "final_proj.bias": torch.zeros(width)}
        notes.append("final_proj, which the official model has and does not call, is written as zeros")
    prefix = "encoder." if layout == "image" else ""
    rows, columns = (model.modalities["image"].grid_side,) * 2
    index = {f"{prefix}rel_pos_bias.relative_position_index": relative_index(rows, columns)}
    weights: dict[str, Any] = _alone(official | index)
    content: dict[str, Any] = {"model": weights}
    made_by = {MADE_BY: {"licence": source.description.origin.get("licence", OWN_LICENCE)}}
    if layout == "image":
        content |= {"args": None, "cfg": {"model": arguments, **made_by}}
    else:
        content |= {"args": arguments, "cfg": made_by}
    if teacher:
        averaged = _official_teacher(teacher, official, network) | index
        named = _alone({name.removeprefix(network.teacher_prefix): one for name, one in averaged.items()})
        if layout == "image":
            weights[TEACHER] = named
        else:
            content[_AVERAGES[layout]] = named
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as opened:
        torch.save(content, opened)
    return notes


def _official_teacher(teacher: Tensors, student: Tensors, network: FirstNetwork) -> Tensors:
    """Translate the teacher; entries of a whole model that give no target are the student's."""
    copied = tuple(f"{_TRUNK}encoders.image.{part}" for part in network.own.copied)
    kept = {name: one for name, one in teacher.items() if not (copied and name.startswith(copied))}
    found = to_official(kept, network.layout)
    if network.teacher_prefix:
        return found
    return {name: found.get(name, one) for name, one in student.items()}


def _alone(tensors: Mapping[str, Tensor]) -> Tensors:
    """Give each tensor a storage of its own: `torch.save` writes whole storages."""
    return {name: tensor.clone() for name, tensor in tensors.items()}
