"""Head of a fine-tuned export, in one form for all tasks, and what a graph tells of it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from d2v2ds.interop.export_folder import ModelFolder
from d2v2ds.interop.task_network import folder_task
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.heads import TokenHead
from d2v2ds.tasks.known import TASKS


@dataclass(frozen=True)
class GraphHead:
    """Head of a fine-tuned model."""

    module: nn.Module
    """(features (B, E + T, D), E, padding (B, T) or None) -> logits; fp32, on the CPU."""
    about: dict[str, Any]
    """Plain values for the metadata of the graph."""


class _TokenLogits(nn.Module):
    """Head of every token in the form of those of whole inputs."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, num_extra: int, padding: Tensor | None) -> Tensor:
        """(B, E + T, D) -> (B, T, V)."""
        logits: Tensor = self.head(features[:, num_extra:])
        return logits


def graph_head(folder: ModelFolder) -> GraphHead | None:
    """Load the head of an export; None if it is an encoder.

    Raises:
        CheckpointError: it is damaged.
    """
    if (folder.description.objective or {}).get("name") not in TASKS:
        return None
    task, network = folder_task(folder)
    config = task.config
    about = {
        "task": config.name,
        "outputs": list(task.output_names),
        "preprocessing": folder.description.preprocessing[config.modality],
        **({"kind": config.kind, "scale": config.scale} if isinstance(config, ClassifyConfig) else {}),
    }
    is_of_tokens = isinstance(network.head, TokenHead)
    return GraphHead(_TokenLogits(network.head) if is_of_tokens else network.head, about)
