"""Whole weights of an engine, and the memory that the tensors of an engine and its teacher take on one rank."""

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from d2v2ds.distributed import zero
from d2v2ds.distributed.teacher import Teacher


def whole_masters(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Each parameter's whole master on rank 0's CPU; an empty dictionary elsewhere. Collective."""
    masters = {name: zero.gather_shard(shard, shard.data) for name, shard in zero.parameter_shards(engine).items()}
    return {name: master for name, master in masters.items() if master is not None}


def bytes_in_use(engine: DeepSpeedEngine, teacher: Teacher) -> dict[str, int]:
    """Bytes of tensors on this rank, by the purposes of `memory.expected_bytes`; shared memory counts once."""
    seen: set[int] = set()
    tensors = _tensors(engine) | {
        "teacher_average": [teacher._ema],
        "teacher_weights": [teacher._working, *(param.data for param in teacher.module.parameters())],
    }
    return {purpose: sum(_new_bytes(tensor, seen) for tensor in found) for purpose, found in tensors.items()}


def _tensors(engine: DeepSpeedEngine) -> dict[str, list[Tensor]]:
    params: list[Any] = list(engine.module.parameters())
    optimizer = engine.optimizer
    states = zero.client_optimizer(engine).state.values()
    flats = [group.flat for group in zero.flat_groups(engine)]
    found = {
        "weights": [p.data for p in params],
        "master": flats,
        "optimizer": [value for state in states for value in state.values() if torch.is_tensor(value)],
        "gradients": [p.grad for p in params if p.grad is not None],
        "reduce_bucket": [],
    }
    if zero.stage(engine) == 3:
        found["weights"] += [p.ds_tensor for p in params]
        found["gradients"].append(optimizer.grad_partitions_flat_buffer)
        found["gradients"] += [flat.grad for flat in flats if flat.grad is not None]
        found["reduce_bucket"] = [b.buffer for b in optimizer.ipg_buckets.values() if torch.is_tensor(b.buffer)]
    return found


def _new_bytes(tensor: Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()
