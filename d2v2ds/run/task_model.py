"""Load a fine-tuned model from the folder of a run or from an export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2v2ds.data.folders import folders_of
from d2v2ds.distributed.checkpoint.format import iterate_student, read_manifest, read_settings
from d2v2ds.errors import CheckpointError
from d2v2ds.interop.export_folder import ModelFolder, is_export
from d2v2ds.interop.task_network import folder_task, loaded_network, task_of
from d2v2ds.run.folder import checkpoint_folder, run_config, trunk_config
from d2v2ds.run.preprocessing import describe
from d2v2ds.run.units import read_units
from d2v2ds.tasks.encoding import TaskNetwork
from d2v2ds.tasks.task import Task


@dataclass(frozen=True)
class TaskModel:
    """A fine-tuned model that can be run."""

    task: Task[Any]
    network: TaskNetwork
    """In eval mode, fp32, without gradient, on the CPU."""
    preprocessing: dict[str, Any]
    """Settings of the preprocessing of an input, by name."""
    origin: dict[str, Any]
    """Where the weights come from."""
    folder: Path | None = None
    """The export; None for a run."""
    files: Path = Path()
    """Folder with files of the preprocessing, such as a tokenizer: the export, or packed rows of the run."""

    @property
    def modality(self) -> str:
        """Modality of the inputs."""
        return str(self.task.config.modality)


def load_task(source: Path, tag: str | None = None) -> TaskModel:
    """Load a run's checkpoint or an export.

    Args:
        source: folder of a run, or an export.
        tag: of a run's checkpoint; the best by validation if None and there is one, else the newest.

    Raises:
        CheckpointError: it is no fine-tuned model, or damaged.
        ConfigError: the folder is no run's.
    """
    if is_export(source):
        folder = ModelFolder(source)
        task, network = folder_task(folder)
        preprocessing = folder.description.preprocessing[task.config.modality]
        read_units(task, source)
        return TaskModel(task, network, preprocessing, folder.description.origin, source, source)
    config = run_config(source)
    checkpoint = checkpoint_folder(source, tag or _best(source))
    model = trunk_config(checkpoint)
    task = task_of(read_settings(checkpoint)["objective"], model, str(checkpoint))
    read_units(task, source)
    name = task.config.modality
    preprocessing = describe(config, model, source)[name]
    origin = {
        "run": source.name,
        "checkpoint": checkpoint.name,
        "step": read_manifest(checkpoint).counters["global_steps"],
    }
    network = loaded_network(task, iterate_student(checkpoint), str(checkpoint))
    return TaskModel(task, network, preprocessing, origin, files=folders_of(config.data.modalities[name].shards)[0])


def _best(run_dir: Path) -> str | None:
    """Name the checkpoint with the lowest validation value; None without any."""
    folder = run_dir / "checkpoints"
    found = []
    for path in sorted(folder.glob("step*")) if folder.is_dir() else ():
        try:
            value = read_manifest(path).validation_loss
        except CheckpointError:
            continue
        if value is not None:
            found.append((value, path.name))
    return min(found)[1] if found else None


def device_of(name: str | None) -> torch.device:
    """Return a device by name; None: a GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
