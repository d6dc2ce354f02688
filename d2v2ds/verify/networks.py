"""Student and teacher of a golden case, with the official weights, and what the comparisons do with them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2v2ds.errors import D2V2Error
from d2v2ds.interop.fairseq.keymap import to_ours
from d2v2ds.interop.fairseq.official_config import OFFICIAL_NAMES
from d2v2ds.objectives.data2vec1 import WholeOutput
from d2v2ds.objectives.data2vec2 import Data2Vec2Config, Data2Vec2Network, StudentOutput
from d2v2ds.objectives.ema import EmaConfig
from d2v2ds.objectives.teacher_network import TeacherNetwork
from d2v2ds.verify.case import Case, Tensors
from d2v2ds.verify.report import Report

_ANY_EMA = EmaConfig(start_decay=0.999, end_decay=0.999, anneal_steps=0)
"""Not read: a case names the decay of each update."""


def build(case: Case) -> tuple[Data2Vec2Network, TeacherNetwork]:
    """Build student and teacher of a case and load its weights.

    Raises:
        D2V2Error: the tensors of the case are not those of its network.
    """
    objective = Data2Vec2Config(ema=_ANY_EMA, modalities={case.modality: case.network.objective()})
    built = objective.build(case.network.trunk, seed=0)
    student, teacher = built.build_network(activation_checkpointing=False), built.build_teacher_network().eval()
    _load_official(student, case.tensors, "student/", case.modality)
    _load_official(teacher, case.tensors, "teacher/", case.modality)
    return student, teacher


def _load_official(module: nn.Module, tensors: Tensors, prefix: str, modality: str) -> None:
    """Copy the tensors under `prefix` into `module`."""
    state = module.state_dict()
    loaded = {}
    for key in tensors:
        if not key.startswith(prefix):
            continue
        value = tensors[key]
        name = our_name(key.removeprefix(prefix), modality)
        if name is None or name not in state:
            raise D2V2Error(f"{key}: the model has no such parameter")
        if value.numel() != state[name].numel():
            raise D2V2Error(f"{key}: expected {tuple(state[name].shape)}, found {tuple(value.shape)}")
        loaded[name] = value.reshape(state[name].shape)
    missing = sorted(set(state) - set(loaded))
    if missing:
        raise D2V2Error(f"{prefix}: the file lacks {', '.join(missing)}")
    module.load_state_dict(loaded)


def our_name(official: str, modality: str) -> str | None:
    """Translate the name of an official parameter to that of an objective's network; None if there is none."""
    name = to_ours(official, modality)
    return name if name is None or name.startswith("decoders.") else f"trunk.{name}"


def set_noise(student: Data2Vec2Network, modality: str, noise: Tensor) -> None:
    """Give the decoder fixed mask noise."""
    student.decoders[modality].mask_tokens.noise = lambda like, shape: noise.view(shape).to(like)  # type: ignore[union-attr]


def without_grad(teacher: TeacherNetwork) -> Callable[..., Any]:
    """Wrap the teacher, as a student calls it."""
    return torch.no_grad()(teacher.__call__)


def total_loss(out: StudentOutput | WholeOutput) -> Tensor:
    """Sum all losses of a micro-batch."""
    return torch.stack(list(out["losses"].values())).sum()


def official_loss(name: str, modality: str) -> str:
    """Translate the name of a loss."""
    return name if name == "cls" else f"{OFFICIAL_NAMES.get(modality, modality).upper()}_{name}"


@torch.no_grad()
def ema_step(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move the teacher's parameters; those that are not trained are copied."""
    weights = dict(student.named_parameters())
    for name, value in teacher.named_parameters():
        if weights[name].requires_grad:
            value.lerp_(weights[name], 1.0 - decay)
        else:
            value.copy_(weights[name])


def compare_state(
    report: Report,
    label: str,
    module: nn.Module,
    tensors: Tensors,
    prefix: str,
    modality: str,
    *,
    with_key_bias: bool = True,
) -> None:
    """Compare all parameters of a module with the tensors under `prefix`.

    Args:
        report: takes the errors.
        label: name of the quantity in it.
        module: student or teacher.
        tensors: of the case.
        prefix: of their names.
        modality: of the case.
        with_key_bias: False leaves out the attention's bias of the keys. It shifts all logits of a query alike, so its
            true gradient is 0 and Adam moves it by rounding noise.
    """
    state = dict(module.named_parameters())
    expected = {key: value for key, value in tensors.items() if key.startswith(prefix) and key != f"{prefix}decay"}
    names = {our_name(key.removeprefix(prefix), modality): value for key, value in expected.items()}
    if set(names) != set(state):
        raise D2V2Error(f"{prefix}: the file and the model differ in {sorted(set(names) ^ set(state), key=str)}")
    for name, value in state.items():
        found, wanted = value.detach(), names[name].reshape(value.shape)
        if not with_key_bias and name.endswith("attn.qkv.bias"):
            found, wanted = without_keys(found), without_keys(wanted)
        report.compare(label, found, wanted)


def without_keys(bias: Tensor) -> Tensor:
    """Leave the keys out of an attention's bias: (3D,) -> (2D,)."""
    queries, _, values = bias.chunk(3)
    return torch.cat((queries, values))


def clipped(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Clip the gradients, 0 for none, and return their norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if most:
        for grad in grads:
            grad.mul_(torch.clamp(most / (norm + 1e-6), max=1.0))
    return norm


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Collect the outputs of modules under their names, and their first arguments under `NAME input`."""
    found: dict[str, Any] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _, given, output: found.update({name: output, f"{name} input": given[0] if given else None})

    hooks = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
