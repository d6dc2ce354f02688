"""Small export folders for tests."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from d2v2ds.interop.export_folder import Description, Kind, Part, Preprocessing
from d2v2ds.interop.export_write import new_folder, write_config, write_tensors
from d2v2ds.modalities.known import known_modalities
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec2 import Data2Vec2Config
from tests.model.tiny_joint import joint_trunk_config
from tests.objectives.tiny import joint_objective_config


def tiny_config(*modalities: str) -> TrunkConfig:
    """The joint tiny trunk, or only some modalities of it."""
    config = joint_trunk_config()
    kept = {name: part for name, part in config.modalities.items() if name in modalities or not modalities}
    return replace(config, modalities=kept)


def tiny_objective(config: TrunkConfig) -> Data2Vec2Config:
    """The tiny objective, for the modalities of a trunk."""
    objective = joint_objective_config()
    return replace(objective, modalities={name: objective.modalities[name] for name in config.modalities})


def published_preprocessing(config: TrunkConfig) -> Preprocessing:
    """Describe the inputs of published weights."""
    return {
        name: known_modalities()[name].describe_preprocessing(network, None, None)
        for name, network in config.modalities.items()
    }


def drawn(
    config: TrunkConfig, seed: int = 3, objective: Data2Vec2Config | None = None
) -> dict[Part, dict[str, Tensor]]:
    """Draw the weights of a student and of a teacher that is its copy, by the parts of an export."""
    built = (objective or tiny_objective(config)).build(config, seed=0)
    network = built.build_network(activation_checkpointing=False)
    built.initialise(network, seed)
    with torch.device("meta"):
        averaged = built.build_teacher_network().trunk.state_dict()
    trunk = network.trunk.state_dict()
    decoders = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("decoders.")}
    return {"model": trunk, "objective": decoders, "teacher": {name: trunk[name] for name in averaged}}


def write_folder(
    path: Path,
    config: TrunkConfig,
    *,
    objective: Data2Vec2Config | None = None,
    teacher: bool = False,
    piece_bytes: int = 1 << 30,
    tokenizer: tuple[str, str, bytes] | None = None,
) -> dict[Part, dict[str, Tensor]]:
    """Write a model of random weights; returns them by part.

    Args:
        path: folder.
        config: settings of the trunk.
        objective: the objective; None for the tiny one.
        teacher: write one too, of other weights.
        piece_bytes: most bytes of a file.
        tokenizer: kind, file name and content.
    """
    objective = objective or tiny_objective(config)
    parts = drawn(config, objective=objective)
    del parts["teacher"]
    if teacher:
        parts["teacher"] = drawn(config, 4, objective)["teacher"]
    preprocessing = published_preprocessing(config)
    with new_folder(path) as folder:
        for part, tensors in parts.items():
            write_tensors(folder, part, {n: Kind.of(t) for n, t in tensors.items()}, tensors.items(), piece_bytes)
        if tokenizer is not None:
            kind, name, data = tokenizer
            (folder / name).write_bytes(data)
            preprocessing["text"] |= {"tokenizer": kind, "file": name}
        description = Description(
            model=config, objective=asdict(objective), preprocessing=preprocessing, origin={"kind": "test"}
        )
        write_config(folder, description, {})
    return parts
