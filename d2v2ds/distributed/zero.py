"""Every touch of DeepSpeed's ZeRO internals, for stages 0 to 3.

DeepSpeed keeps the fp32 master weights of a rank in a few flat buffers. This module answers, for each named
parameter, which elements of the *flattened whole parameter* this rank holds and where they lie in those buffers,
so that other modules can read and write them without knowing the stage:

    stage 0     every rank holds every parameter; the parameter is its own master (fp32 only)
    stages 1-2  the flat group is cut into equal parts; a parameter may lie in none, one or several of them
    stage 3     each parameter is cut into `world` equal parts, the last ones padded

Checked against DeepSpeed 0.19. `unsupported` names the kinds of engines that are laid out otherwise.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as torch_dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import get_z3_leaf_modules, set_z3_leaf_modules
from torch import Tensor, nn

from d2v2ds.distributed import comm
from d2v2ds.distributed.ds_config import SECOND_COPY, STORED_INT8


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of one parameter that this rank holds."""

    name: str
    """Name of the parameter in the engine's module."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    offset: int
    """First element held here, counted in the flattened whole parameter."""
    numel: int
    """Elements held here, padding not counted; may be 0."""
    padded: Tensor
    """(numel + padding,) view of the buffer that holds them: fp32 master if trainable, else the compute copy."""
    trainable: bool
    """False for a parameter with requires_grad=False, which has no master."""
    replicated: bool
    """True if every rank holds the same whole parameter."""

    @property
    def data(self) -> Tensor:
        """(numel,) view without padding; writing to it writes the parameter's master."""
        return self.padded[: self.numel]


@dataclass(frozen=True, kw_only=True)
class FlatGroup:
    """One tensor as the optimizer sees it, and where the parameters lie in it."""

    flat: Tensor
    """The tensor that keys the optimizer's state."""
    members: tuple[tuple[str, int, int], ...]
    """(parameter name, first element in `flat`, elements without padding)."""
    group: str
    """`name` of the optimizer's group, which may have several such tensors; empty if it has no name."""


def stage(engine: DeepSpeedEngine) -> int:
    """ZeRO stage of the engine, 0 to 3."""
    return int(engine.zero_optimization_stage())


def compute_dtype(engine: DeepSpeedEngine) -> torch.dtype:
    """Type of the weights in the forward pass."""
    return torch.bfloat16 if engine.bfloat16_enabled() else torch.float32


def unsupported(engine: DeepSpeedEngine) -> list[str]:
    """Return one message for each setting of the engine with which its shards cannot be found. Local."""
    at = f"at ZeRO stage {stage(engine)}"
    faults = []
    if engine.fp16_enabled():
        faults.append(f"fp16 {at}; use bf16 at stages 1 to 3, or fp32")
    elif stage(engine) == 0 and engine.bfloat16_enabled():
        faults.append(f"bf16 {at}, which keeps no usable fp32 master; use stage 1, 2 or 3, or fp32")
    elif stage(engine) in (1, 2) and not hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
        found = type(engine.optimizer).__name__
        faults.append(f"{found} {at}; use stage 2 or 3, or remove data_types.grad_accum_dtype")
    elif engine.bf16_master_weights_and_gradients():
        faults.append(f"bf16 master weights {at}; remove bf16_master_weights_and_grads")
    if stage(engine) < 3:
        return faults
    if (ranks := engine.zero_hpz_partition_size()) > 1:
        faults.append(f"zero_hpz_partition_size = {ranks}: {SECOND_COPY}; remove it")
    if engine.zero_quantized_nontrainable_weights():
        faults.append(f"zero_quantized_nontrainable_weights: {STORED_INT8}; remove it")
    for key, section in (
        ("offload_param", engine.zero_offload_param()),
        ("offload_optimizer", engine.zero_offload_optimizer()),
    ):
        if section is not None and section.device == "nvme":
            faults.append(f'{key} to NVMe; use "cpu"')
    return faults


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 shows an empty tensor."""
    return tuple(param.ds_shape) if hasattr(param, "ds_shape") else tuple(param.shape)


def adopt_gather_units(module: nn.Module, engine: DeepSpeedEngine) -> None:
    """Mark the modules of the classes that the engine gathers as a whole, before `module` is partitioned."""
    classes = {type(unit) for unit in get_z3_leaf_modules(engine.module)}
    if classes:
        set_z3_leaf_modules(module, list(classes), raise_if_not_found=False)


def parameter_shards(engine: DeepSpeedEngine) -> dict[str, Shard]:
    """This rank's shard of every parameter of the engine's module, by name, in the module's order."""
    of_stage = {0: _stage0_shard, 1: _stage12_shard, 2: _stage12_shard, 3: _stage3_shard}[stage(engine)]
    return {name: of_stage(engine, name, param) for name, param in engine.module.named_parameters()}


def _replicated_shard(name: str, param: nn.Parameter) -> Shard:
    data = param.detach()
    return Shard(
        name=name,
        shape=tuple(param.shape),
        offset=0,
        numel=data.numel(),
        padded=data.view(-1),
        trainable=param.requires_grad,
        replicated=True,
    )


def _stage0_shard(engine: DeepSpeedEngine, name: str, param: nn.Parameter) -> Shard:
    return _replicated_shard(name, param)


def _stage12_shard(engine: DeepSpeedEngine, name: str, param: Any) -> Shard:
    if not param.requires_grad:
        return _replicated_shard(name, param)
    mapping = param._hp_mapping
    if mapping is None:  # wholly in other ranks' parts of the flat group
        flat = engine.optimizer.single_partition_of_fp32_groups[0]
        offset, padded = 0, flat.detach()[:0]
    else:
        offset, padded = int(mapping.lp_fragment_address.start), mapping.hp_fragment.detach()
    return Shard(
        name=name,
        shape=tuple(param.shape),
        offset=offset,
        numel=padded.numel(),
        padded=padded,
        trainable=True,
        replicated=False,
    )


def _stage3_shard(engine: DeepSpeedEngine, name: str, param: Any) -> Shard:
    if param.requires_grad:
        group, start, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(param)]
        # safe_get_local_fp32_param would copy an offloaded master to the device; we want the buffer itself.
        padded = engine.optimizer.fp32_partitioned_groups_flat[group].detach().narrow(0, start, length)
    else:
        padded = param.ds_tensor.detach()
    offset, numel = stage3_interval(int(param.ds_numel), comm.rank(), comm.world())
    return Shard(
        name=name,
        shape=tuple(param.ds_shape),
        offset=offset,
        numel=numel,
        padded=padded,
        trainable=param.requires_grad,
        replicated=False,
    )


def stage3_interval(numel: int, rank: int, world: int) -> tuple[int, int]:
    """First element and number of real elements of a rank's equal share, padding not counted."""
    share = math.ceil(numel / world)
    first = min(rank * share, numel)
    return first, min(share, numel - first)


def flat_groups(engine: DeepSpeedEngine) -> list[FlatGroup]:
    """The optimizer's own tensors and the parameters inside each of them."""
    optimizer = engine.optimizer
    trainable = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
    group_names = [group.get("name", "") for group in optimizer.param_groups]
    if stage(engine) == 0:
        group_of = {
            id(p): name
            for name, group in zip(group_names, optimizer.param_groups, strict=True)
            for p in group["params"]
        }
        return [
            FlatGroup(flat=p, members=((name, 0, p.numel()),), group=group_of[id(p)]) for name, p in trainable.items()
        ]
    name_of = {id(param): name for name, param in trainable.items()}
    shards = parameter_shards(engine)
    groups = []
    if stage(engine) == 3:
        flats = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        for number, (flat, params) in enumerate(flats):
            members = []
            for param in params:
                _, start, _ = optimizer.grad_position[optimizer.get_param_id(param)]
                members.append((name_of[id(param)], start, shards[name_of[id(param)]].numel))
            group = group_names[optimizer.sub_group_to_group_id[number]]
            groups.append(FlatGroup(flat=flat, members=tuple(members), group=group))
        return groups
    of_all = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, group_names, strict=True)
    for flat, params, group in of_all:
        held = [(name_of[id(p)], p._hp_mapping.hp_fragment_address) for p in params if p._hp_mapping is not None]
        groups.append(FlatGroup(flat=flat, members=tuple((name, at.start, at.numel) for name, at in held), group=group))
    return groups


def master_addresses(engine: DeepSpeedEngine) -> list[int]:
    """Addresses of the fp32 master; a change means that views taken earlier are stale."""
    if stage(engine) == 0:
        return [param.data_ptr() for param in engine.module.parameters()]
    of_stage3 = stage(engine) == 3
    optimizer = engine.optimizer
    flats = optimizer.fp32_partitioned_groups_flat if of_stage3 else optimizer.single_partition_of_fp32_groups
    return [flat.data_ptr() for flat in flats]


def client_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper."""
    return cast(torch.optim.Optimizer, engine.optimizer if stage(engine) == 0 else engine.optimizer.optimizer)


def optimizer_layout(engine: DeepSpeedEngine) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Names of the optimizer's per-element states, and its single numbers such as `step`.

    Returns:
        (names, {name: {"kind": "tensor" or "number", "value": number}}), equal on all ranks; both empty before the
        first step. If groups differ in a number, it also has "groups": {name of the group: number}.

    Raises:
        TypeError: for a state that is neither one number nor one number for each weight.
    """
    keys: set[str] = set()
    scalars: dict[str, dict[str, Any]] = {}
    by_group: dict[str, dict[str, Any]] = {}
    state = client_optimizer(engine).state
    for group in flat_groups(engine):
        for key, value in state.get(group.flat, {}).items():
            if torch.is_tensor(value) and value.shape == group.flat.shape and key != "step":
                keys.add(key)
            elif torch.is_tensor(value) and value.numel() == 1:
                scalars[key] = {"kind": "tensor", "value": value.item()}
            elif isinstance(value, int | float):
                scalars[key] = {"kind": "number", "value": value}
            else:
                raise TypeError(
                    f"optimizer state {key!r}: expected one number, or one for each weight, found {value!r}"
                )
            if key in scalars:  # at stage 0 a skipped block has counted fewer steps than others of its group
                own = by_group.setdefault(key, {})
                own[group.group] = max(own.get(group.group, 0), scalars[key]["value"])
    for key, values in by_group.items():
        for group in flat_groups(engine):  # at stage 0 a group that waits has no state yet
            values.setdefault(group.group, 0)
        if len(set(values.values())) > 1:
            scalars[key]["groups"] = values
    return sorted(keys), scalars


def optimizer_tensors(engine: DeepSpeedEngine, key: str) -> dict[str, Tensor]:
    """This rank's part of one per-element optimizer state, by parameter name, each (shard.numel,)."""
    state = client_optimizer(engine).state
    return {
        name: state[group.flat][key].view(-1).narrow(0, start, numel)
        for group in flat_groups(engine)
        for name, start, numel in group.members
    }


def prepare_optimizer_state(
    engine: DeepSpeedEngine, keys: Collection[str], scalars: Mapping[str, Mapping[str, Any]]
) -> None:
    """Make room for a saved state, which is then written into `optimizer_tensors`.

    Args:
        engine: the student.
        keys: the per-element states.
        scalars: the single numbers, as `optimizer_layout` gives them.
    """
    state = client_optimizer(engine).state
    if not keys and not scalars:
        state.clear()  # saved before the first step
    for group in flat_groups(engine):
        for key in keys:
            if key not in state[group.flat]:
                state[group.flat][key] = torch.zeros_like(group.flat, requires_grad=False)
        for key, scalar in scalars.items():
            value = scalar.get("groups", {}).get(group.group, scalar["value"])
            is_tensor = scalar["kind"] == "tensor"  # a fused optimizer wants its step count where its parameters are
            state[group.flat][key] = torch.tensor(float(value), device=group.flat.device) if is_tensor else value


def refresh_compute_copies(engine: DeepSpeedEngine) -> None:
    """Make the weights of the forward pass those of the fp32 master. Collective at stages 1 and 2."""
    if stage(engine) in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage(engine) == 3:
        for group in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        drop_gathered_copies(engine)


def drop_gathered_copies(engine: DeepSpeedEngine) -> None:
    """Forget the whole copies of small parameters, so that the next forward gathers them anew. Local.

    ZeRO-3 keeps parameters below its persistence threshold gathered from the second forward on and then
    ignores their shards.
    """
    persistent = [param for param in engine.module.parameters() if getattr(param, "ds_persist", False)]
    if persistent:
        persistent[0].partition(persistent)


def finish_gradients(engine: DeepSpeedEngine) -> None:
    """With an offloaded optimizer, hand over the gradients of every parameter that took part in the step.

    DeepSpeed hands over those that arrive in the last micro-batch only, and would lose the gradient of a block that
    ran in an earlier one and was skipped in the last.
    """
    if stage(engine) == 3 and engine.optimizer.offload_optimizer:
        engine.optimizer.finalize_gradient_accumulation_boundary()


def clear_gradient_shards(engine: DeepSpeedEngine) -> None:
    """Zero ZeRO-3's gradient shards.

    ZeRO-3 overwrites a parameter's gradient shard when a gradient arrives and never clears it: a parameter that
    took no part in a step (layer drop) would be updated with the gradient of the last step it took part in.
    """
    if stage(engine) == 3:
        engine.optimizer.grad_partitions_flat_buffer.zero_()
        for flat in engine.optimizer.fp32_partitioned_groups_flat:
            if flat.grad is not None:  # kept between steps with an offloaded optimizer
                flat.grad.zero_()


def gather_shard(shard: Shard, values: Tensor) -> Tensor | None:
    """The whole parameter on rank 0's CPU. Collective unless replicated.

    Args:
        shard: which part of the parameter this rank holds.
        values: (shard.numel,) this rank's values of any quantity laid out like the parameter.

    Returns:
        The tensor in its full shape on rank 0, None elsewhere.
    """
    if shard.replicated:
        return values.detach().reshape(shard.shape).cpu().clone() if comm.rank() == 0 else None
    full = torch.zeros(math.prod(shard.shape), dtype=values.dtype, device=comm.device())
    full[shard.offset : shard.offset + shard.numel] = values.to(full.device)
    if comm.world() > 1:
        torch_dist.reduce(full, dst=0)
    return full.reshape(shard.shape).cpu() if comm.rank() == 0 else None
