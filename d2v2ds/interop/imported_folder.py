"""Write an export folder of weights that were read whole, such as those of an official file."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from d2v2ds.interop.card import write_card
from d2v2ds.interop.export_folder import Description, Kind, Layout, Part
from d2v2ds.interop.export_write import new_folder, write_config, write_tensors
from d2v2ds.interop.hub.write import write_hub_files


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Shapes and types of tensors."""
    return {name: Kind.of(tensor) for name, tensor in tensors.items()}


def write_imported(
    path: Path,
    description: Description,
    parts: Mapping[Part, Mapping[str, Tensor]],
    *,
    files: Mapping[str, bytes] | None = None,
    has_task: bool = False,
) -> None:
    """Write weights, files beside them, model card, config.json and what transformers needs.

    Args:
        path: of the folder.
        description: of the weights.
        parts: tensors by our names; an empty part is left out.
        files: content by name, such as of a tokenizer.
        has_task: whether the objective of the description is a task.

    Raises:
        CheckpointError: something else is in the way.
    """
    with new_folder(path) as folder:
        for part, tensors in parts.items():
            if tensors:
                write_tensors(folder, part, layout_of(tensors), tensors.items())
        for name, data in (files or {}).items():
            (folder / name).write_bytes(data)
        num_parameters = sum(tensor.numel() for tensor in parts["model"].values())
        write_card(folder, description, path.name, num_parameters)
        task = description.objective if has_task else None
        write_config(folder, description, write_hub_files(folder, description.model, description.preprocessing, task))
