"""Task of a description, and its network with weights: what a run, an export and an ONNX graph share."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.export_folder import ModelFolder
from d2v2ds.io.read import validate
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.tasks.encoding import TaskNetwork
from d2v2ds.tasks.known import TASKS
from d2v2ds.tasks.task import Task


def task_of(settings: Mapping[str, Any] | None, model: TrunkConfig, where: str) -> Task[Any]:
    """Build the task of a description.

    Args:
        settings: of the objective, as plain values.
        model: settings of the trunk.
        where: of the description, for messages.

    Raises:
        CheckpointError: they are none of a fine-tuned model, or damaged.
    """
    name = (settings or {}).get("name")
    if settings is None or name not in TASKS:
        raise CheckpointError(
            f"{where}: expected a fine-tuned model ({', '.join(TASKS)}), found {name or 'no task'}; "
            "python -m d2v2ds.finetune makes one"
        )
    return validate(TASKS[name], dict(settings), f"{where}: objective", CheckpointError).build(model, seed=0)


def loaded_network(task: Task[Any], state: Iterable[tuple[str, Tensor]], where: str) -> TaskNetwork:
    """Build a task's network with given weights: eval mode, fp32, without gradient, on the CPU.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    network = task.build_network(activation_checkpointing=False)
    assert isinstance(network, TaskNetwork)
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in state})
    except RuntimeError as error:
        raise CheckpointError(f"{where}: does not fit its own description: {error}") from error
    return network.requires_grad_(False).eval()


def folder_task(folder: ModelFolder) -> tuple[Task[Any], TaskNetwork]:
    """Load task and network of an export.

    Raises:
        CheckpointError: it is no fine-tuned model, or damaged.
    """
    found, where = folder.description, str(folder.path)
    task = task_of(found.objective, found.model, where)
    state = {f"trunk.{name}": tensor for name, tensor in folder.tensors("model")}
    state |= dict(folder.tensors("objective"))
    return task, loaded_network(task, state.items(), where)
