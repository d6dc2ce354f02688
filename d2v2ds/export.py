"""Write the student or the teacher of a run as one safetensors file. Neither DeepSpeed nor a process group is needed.

    python -m d2v2ds.export RUN --to model.safetensors [--weights student|teacher] [--checkpoint TAG]

The file holds whole fp32 tensors under this project's names; its metadata holds the model's configuration, the
settings of data and step, which is all that `load_model_file` needs.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2v2ds.config import load_config, to_dict
from d2v2ds.dist.consolidate import candidate_tags, iterate_student, iterate_teacher, read_manifest, read_plain
from d2v2ds.errors import CheckpointError, D2V2Error
from d2v2ds.model.data2vec2 import Data2Vec2, ModelConfig

logger = logging.getLogger(__name__)

Weights = Literal["student", "teacher"]
FORMAT = "d2v2ds-model-2"
"""Name and version of the exported file."""


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


def read_weights(checkpoint: Path, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Whole fp32 tensors of one network, by our names."""
    return iterate_student(checkpoint) if weights == "student" else iterate_teacher(checkpoint)


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
    model.load_state_dict(dict(read_weights(checkpoint, "student")))
    return model.eval(), read_manifest(checkpoint).counters["global_steps"]


def export(run_dir: Path, to: Path, weights: Weights = "student", tag: str | None = None) -> None:
    """Write the file.

    Raises:
        CheckpointError: if there is no such checkpoint or it is damaged.
    """
    config = load_config(str(run_dir / "config.yaml"))
    checkpoint = checkpoint_folder(run_dir, tag)
    tensors = {name: tensor.contiguous() for name, tensor in read_weights(checkpoint, weights)}
    metadata = {
        "format": FORMAT,
        "weights": weights,
        "model": json.dumps(to_dict(model_of(checkpoint))),
        "data": json.dumps(to_dict(config.data)),
        "step": str(read_manifest(checkpoint).counters["global_steps"]),
    }
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(to.name + ".tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(to)
    count = sum(tensor.numel() for tensor in tensors.values())
    logger.info("%s: %s of %s, %d tensors, %d parameters", to, weights, checkpoint, len(tensors), count)


def load_model_file(path: Path) -> Data2Vec2:
    """The network of an exported student, in eval mode on the CPU.

    Raises:
        CheckpointError: if the file is not an export of a student by this project.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT or metadata.get("weights") != "student":
            raise CheckpointError(
                f"{path}: expected a student exported in format {FORMAT}, found {metadata.get('weights')} "
                f"in format {metadata.get('format')}"
            )
        config = TypeAdapter(ModelConfig).validate_json(metadata["model"])
        with torch.device("meta"):
            model = Data2Vec2(config)
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)  # noqa: SIM118
    return model.eval()


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--to", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student")
    parser.add_argument("--checkpoint", help="tag of a checkpoint; the newest if not given")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        export(options.run, options.to, options.weights, options.checkpoint)
    except (D2V2Error, OSError) as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
