"""Read a data2vec 1.0 checkpoint, a file of fairseq or a folder of transformers, without running anything in it."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from d2v2ds.errors import CheckpointError, ConfigError, D2V2Error
from d2v2ds.interop.data2vec1 import transformers_names
from d2v2ds.interop.export_folder import opened_tensors, require_layout
from d2v2ds.interop.fairseq.data2vec1_config import FirstNetwork, first_network_of
from d2v2ds.interop.fairseq.data2vec1_keymap import is_buffer, to_ours, translate
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.pickles import plain
from d2v2ds.interop.fairseq.read import TEACHER, followed, licence_of, require_bytes
from d2v2ds.interop.fairseq.torch_file import read_pickled
from d2v2ds.interop.imported_folder import layout_of
from d2v2ds.io.read import read_json
from d2v2ds.modalities.settings import read_trunk, write_trunk
from d2v2ds.objectives.data2vec1 import Data2Vec1Config

Tensors = dict[str, Tensor]
_TRUNK = "trunk."
_OLD_NAMES = (
    (r"^decoder\.", "encoder."),
    (r"\.emb_layer_norm\.", ".layernorm_embedding."),
    (r"\.lm_head\.", ".regression_head."),
    (r"^final_proj\.0\.", "final_proj."),
)
"""Names in released files, and what the code calls them now."""
_DROPPED = re.compile(r"encoder\.target_model\..*")
_TOKENS = "encoder.sentence_encoder.embed_tokens.weight"
_KINDS = {"post_extract_proj.weight": "audio", _TOKENS: "text"}
"""Modality by a parameter that every file of it has."""
_NO_NETWORK = (ConfigError, ValidationError, TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError)


@dataclass(frozen=True, kw_only=True)
class FirstCheckpoint:
    """Contents of a checkpoint by our names, in our shapes."""

    network: FirstNetwork
    trunk: Tensors
    objective: Tensors
    """Mask vector and head; incomplete, or empty, where the file lacks them."""
    teacher: Tensors | None
    ignored: list[str]
    """Other contents, as `name=value` or `name`."""
    licence: str
    warnings: list[str] = field(default_factory=list)


def read_first(path: Path) -> FirstCheckpoint:
    """Read a file of fairseq, or a folder of transformers.

    Raises:
        CheckpointError: it is damaged, wants to run code, or is no data2vec 1.0 of speech or text; or its tensors are
            not those of its own configuration, with every difference.
        UnsupportedOptionError: its network computes something that ours does not.
        MachineError: the machine is at fault.
    """
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> FirstCheckpoint:
    content = read_pickled(path)
    weights = content.get("model")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{path}: expected official weights under `model`, found none")
    require_bytes(path, weights)
    student, teacher = _divided(weights)
    modality = next((one for name, one in _KINDS.items() if name in student), None)
    if modality is None:
        names = ", ".join(sorted(student)[:4])
        raise CheckpointError(
            f"{path}: expected a data2vec 1.0 of {' or '.join(_KINDS.values())}, found {names or 'none'}"
        )
    notes = [str(key) for key in content if key not in ("model", "cfg", "args")]
    network = _network(path, _section(path, content, modality), modality, student, notes)
    return _checkpoint(path, network, student, teacher, notes, licence_of(modality, content.get("cfg")))


def _divided(weights: Mapping[str, Any]) -> tuple[Tensors, Tensors | None]:
    """Student under the names of today, and teacher."""
    student: Tensors = {}
    teacher: Tensors | None = None
    for name, value in weights.items():
        for pattern, now in _OLD_NAMES:
            name = re.sub(pattern, now, name)
        if name in (TEACHER, f"encoder.{TEACHER}"):
            if isinstance(value, dict) and value:
                teacher = {key: one.detach() for key, one in value.items() if isinstance(one, Tensor)}
        elif isinstance(value, Tensor) and not _DROPPED.fullmatch(name):
            student[name] = value.detach()
    return student, teacher


def _section(path: Path, content: Mapping[str, Any], modality: str) -> dict[str, Any]:
    try:
        roots = {key: plain(content.get(key)) for key in ("cfg", "args")}
    except ValueError as error:
        raise CheckpointError(f"{path}: expected a configuration of plain values, found {error}") from error
    cfg = roots["cfg"] if isinstance(roots["cfg"], dict) else {}
    for found in (cfg.get("model"), roots["args"]):
        if isinstance(found, dict) and str(found.get("_name", found.get("arch"))).startswith(f"data2vec_{modality}"):
            section = followed(found, (found, cfg))
            return {**section, "_name": f"data2vec_{modality}"}
    raise CheckpointError(
        f"{path}: expected a configuration of data2vec_{modality} under cfg.model or args, found none; without it the "
        "network is not known"
    )


def _network(path: Path, section: Mapping[str, Any], modality: str, student: Tensors, notes: list[str]) -> FirstNetwork:
    """Translate a section from a file, and check every number in it."""
    context: dict[str, Any] = {"notes": notes}
    if _TOKENS in student:
        context |= {"vocab_size": len(student[_TOKENS]), "mask_token": "last"}
    try:
        network = first_network_of(section, modality, **context)
        read_trunk(write_trunk(network.trunk), str(path))  # for the bounds of single fields
        TypeAdapter(Data2Vec1Config).validate_python(asdict(network.objective))
        problems = network.trunk.check() + network.objective.check(network.trunk)
    except UnsupportedOptionError as error:
        raise UnsupportedOptionError(f"{path}: not supported: {error}") from error
    except _NO_NETWORK as error:
        raise CheckpointError(f"{path}: not the configuration of a network: {error}") from error
    if problems:
        raise CheckpointError(f"{path}: not the configuration of a network: {'; '.join(problems)}")
    return network


def _read_folder(path: Path) -> FirstCheckpoint:
    layout, section = transformers_names.official_section(read_json(path / "config.json", CheckpointError), str(path))
    stored = path / "model.safetensors"
    if stored.exists():
        with opened_tensors(stored) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    else:
        weights = {
            name: one for name, one in read_pickled(path / "pytorch_model.bin").items() if isinstance(one, Tensor)
        }
    student, beside = transformers_names.to_official(weights, layout)
    notes: list[str] = []
    network = _network(path, section, layout, student, notes)
    found = _checkpoint(path, network, student, None, [*notes, *beside], licence_of(layout, None))
    found.warnings.append("settings of the objective are those of the published base model: the folder has none")
    return found


def _checkpoint(
    path: Path, network: FirstNetwork, student: Tensors, teacher: Tensors | None, notes: list[str], licence: str
) -> FirstCheckpoint:
    """Translate the tensors, and compare them with those of the network."""
    states = network_states(network)
    ours = _our_tensors(path, student, network.layout)
    has_head = any(name.startswith("heads.") for name in ours)
    expected = {name: one for name, one in states[0].items() if name.startswith(_TRUNK) or has_head or name in ours}
    ours = _in_our_shapes(ours, expected)
    require_layout(path, layout_of(ours), expected)
    warnings = [] if has_head else ["no head in the file: pretraining from it draws one anew"]
    averaged: Tensors | None = None
    if teacher is None:
        warnings.append("no teacher in the file: a run that goes on from it starts with the student's")
    else:
        averaged = _our_tensors(path, _with_prefix(teacher, network), network.layout)
        averaged = {name: one for name, one in ours.items() if name in states[1]} | averaged
        averaged = _in_our_shapes(averaged, states[1])
        require_layout(path, layout_of(averaged), states[1])
        averaged = {name.removeprefix(_TRUNK): one for name, one in averaged.items()}
    return FirstCheckpoint(
        network=network,
        trunk={name.removeprefix(_TRUNK): one for name, one in ours.items() if name.startswith(_TRUNK)},
        objective={name: one for name, one in ours.items() if not name.startswith(_TRUNK)},
        teacher=averaged,
        ignored=notes,
        licence=licence,
        warnings=warnings,
    )


def network_states(network: FirstNetwork) -> tuple[Tensors, Tensors]:
    """Build student and teacher without memory for their weights."""
    objective = network.objective.build(network.trunk, seed=0)
    with torch.device("meta"):
        student = objective.build_network(activation_checkpointing=False)
        return student.state_dict(), objective.build_teacher_network().state_dict()


def _with_prefix(teacher: Tensors, network: FirstNetwork) -> Tensors:
    """Give the teacher's tensors the student's names, without those that its output does not depend on."""
    found = {}
    for key, value in teacher.items():
        name = f"{network.teacher_prefix}{key}"
        translated = translate(name, network.layout)
        if translated is None or translated[0].startswith(_TRUNK):
            found[name] = value
    return found


def _our_tensors(path: Path, official: Tensors, layout: str) -> Tensors:
    unknown = [name for name in official if not is_buffer(name) and translate(name, layout) is None]
    if unknown:
        raise CheckpointError(f"{path}: unknown to our network: {', '.join(sorted(unknown)[:8])}")
    try:
        return to_ours(official, layout)
    except D2V2Error as error:
        raise CheckpointError(f"{path}: {error}") from error


def _in_our_shapes(tensors: Tensors, expected: Tensors) -> Tensors:
    """Give tensors of as many elements our shape; others keep theirs, for the comparison that follows."""
    return {
        name: one.reshape(expected[name].shape) if name in expected and one.numel() == expected[name].numel() else one
        for name, one in tensors.items()
    }
