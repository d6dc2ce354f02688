"""Open the folder of a run: its configuration, its checkpoints and the weights in them."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from d2v2ds.config.load import load_config
from d2v2ds.config.schema import RunConfig
from d2v2ds.distributed.checkpoint.format import (
    finished_tags,
    iterate_student,
    iterate_teacher,
    read_manifest,
    read_settings,
)
from d2v2ds.errors import CheckpointError, ConfigError
from d2v2ds.modalities.settings import read_trunk
from d2v2ds.model.trunk import Trunk, TrunkConfig

TRUNK = "trunk."
"""Prefix of the trunk's parameters in a checkpoint."""


def run_config(run_dir: Path) -> RunConfig:
    """Read the configuration that a run was started with last.

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
    """Find the newest finished checkpoint of a run, or the one named.

    Raises:
        CheckpointError: if there is none.
    """
    folder = run_dir / "checkpoints"
    tags = finished_tags(folder)
    if not tags:
        raise CheckpointError(f"{run_dir}: expected a run with checkpoints, found none in {folder}")
    if tag is not None and tag not in tags:
        raise CheckpointError(f"{folder}: no checkpoint {tag}; finished ones: {', '.join(tags)}")
    return folder / (tag or tags[0])


def trunk_config(checkpoint: Path) -> TrunkConfig:
    """Read the settings of the trunk that a checkpoint was saved from; the run's may have changed since."""
    return read_trunk(read_settings(checkpoint)["model"], str(checkpoint))


def trunk_tensors(checkpoint: Path, *, teacher: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the student's trunk, or of the teacher's, by the trunk's own names."""
    for name, tensor in iterate_teacher(checkpoint) if teacher else iterate_student(checkpoint):
        if name.startswith(TRUNK):
            yield name.removeprefix(TRUNK), tensor


def objective_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the student's tensors outside the trunk, such as decoders."""
    return ((name, tensor) for name, tensor in iterate_student(checkpoint) if not name.startswith(TRUNK))


def load_student(run_dir: Path, tag: str | None = None) -> tuple[Trunk, int]:
    """Load the student's trunk of a run's checkpoint in eval mode on the CPU, and its step.

    Raises:
        CheckpointError: if there is no such checkpoint or it is damaged.
    """
    checkpoint = checkpoint_folder(run_dir, tag)
    trunk = Trunk(trunk_config(checkpoint))
    trunk.load_state_dict(dict(trunk_tensors(checkpoint)))
    return trunk.eval(), read_manifest(checkpoint).counters["global_steps"]
