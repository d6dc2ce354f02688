"""Small export folders for tests."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from d2v2ds.interop.export_folder import Description, Kind, new_folder, write_config, write_tensors
from d2v2ds.interop.preprocessing import published_preprocessing
from d2v2ds.model.init import initialise
from d2v2ds.model.trunk import Data2Vec2, ModalitiesConfig, ModelConfig
from d2v2ds.objectives.teacher_network import TargetNet
from tests.model.tiny_joint import joint_model_config


def tiny_config(*modalities: str) -> ModelConfig:
    """The joint tiny model, or only some modalities of it."""
    config = joint_model_config()
    kept = {name: part for name, part in config.modalities.active().items() if name in modalities or not modalities}
    return replace(config, modalities=ModalitiesConfig(**kept))  # type: ignore[arg-type]


def drawn(config: ModelConfig, seed: int = 3) -> dict[str, Tensor]:
    """Weights of a student."""
    model = Data2Vec2(config)
    initialise(model, seed=seed)
    return model.state_dict()


def write_folder(
    path: Path,
    config: ModelConfig,
    *,
    teacher: bool = False,
    piece_bytes: int = 1 << 30,
    tokenizer: tuple[str, str, bytes] | None = None,
) -> dict[str, Tensor]:
    """Write a model of random weights; returns the student's.

    Args:
        path: folder.
        config: the network.
        teacher: write one too, of other weights.
        piece_bytes: most bytes of a file.
        tokenizer: kind, file name and content.
    """
    student = drawn(config)
    preprocessing = published_preprocessing(config)
    with new_folder(path) as folder:
        write_tensors(folder, "model", {n: Kind.of(t) for n, t in student.items()}, student.items(), piece_bytes)
        if teacher:
            with torch.device("meta"):
                names = TargetNet(config).state_dict().keys()
            other = {name: tensor for name, tensor in drawn(config, seed=4).items() if name in names}
            write_tensors(folder, "teacher", {n: Kind.of(t) for n, t in other.items()}, other.items())
        if tokenizer is not None:
            kind, name, data = tokenizer
            (folder / name).write_bytes(data)
            preprocessing["text"] |= {"tokenizer": kind, "file": name}
        write_config(folder, Description(model=config, preprocessing=preprocessing, origin={"kind": "test"}), {})
    return student
