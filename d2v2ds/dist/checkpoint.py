"""Resume a student engine, its optimizer and its teacher from what `saver.py` wrote. Files: `consolidate.py`."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file
from torch import nn

from d2v2ds.dist import comm, zero
from d2v2ds.dist.consolidate import (
    MANIFEST,
    Manifest,
    ShardReader,
    candidate_tags,
    file_faults,
    lost_tags,
    persistent_buffers,
    read_manifest,
    shard_file,
)
from d2v2ds.dist.teacher import Teacher
from d2v2ds.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What `load` gives back to the caller."""

    tag: str
    client_state: dict[str, Any]
    """The common state given to `Saver.save`."""
    rank_state: dict[str, Any] | None
    """This rank's state given to `Saver.save`; None after re-sharding, where old ranks have no counterpart."""


def load(
    engine: DeepSpeedEngine,
    teacher: Teacher | None,
    folder: Path,
    tag: str | None = None,
    reshard: bool = False,
    accept: Callable[[Mapping[str, Any]], bool] = lambda client_state: True,
) -> Restored:
    """Continue from a checkpoint. Collective.

    Without a tag it takes the newest one whose files are all there and whole; damaged ones are passed over with a
    warning that names the file.

    Args:
        engine: a student of the same parameters.
        teacher: its teacher, if it is to be restored.
        folder: where the run's checkpoints lie.
        tag: exactly this checkpoint.
        reshard: allow another number of ranks, ZeRO stage or precision than the checkpoint's. Weights, moments and
            averages are the same then, but the run does not go on bit for bit, and there is no `rank_state`.
        accept: pass over checkpoints for whose common state it is false; must answer alike on every rank.

    Raises:
        CheckpointError: on all ranks: no usable checkpoint; other parameters; another topology without `reshard`.
    """
    path, manifest, client_state = _choose(folder, tag, accept)
    _check_fits(path, manifest, engine, teacher)
    same_topology = _topology(engine) == (manifest.world_size, manifest.stage, manifest.compute_dtype)
    if not same_topology and not reshard:
        world, stage, dtype = _topology(engine)
        raise CheckpointError(
            f"{path}: saved on {manifest.world_size} ranks at ZeRO stage {manifest.stage} in {manifest.compute_dtype}, "
            f"this run has {world} ranks, stage {stage}, {dtype}; start as it was saved, or ask for re-sharding"
        )
    student = ShardReader(path, manifest, "student")
    for name, shard in zero.parameter_shards(engine).items():
        shard.data.copy_(student.read(name, shard.offset, shard.numel))
    _load_buffers(engine.module, path / "buffers.student.safetensors")
    readers = {key: ShardReader(path, manifest, f"optimizer.{key}") for key in manifest.optimizer_keys}
    zero.write_optimizer_state(
        engine, {key: reader.read for key, reader in readers.items()}, manifest.optimizer_scalars
    )
    zero.refresh_compute_copies(engine)
    for name, count in manifest.counters.items():
        setattr(engine, name, count)
    if not same_topology:
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if teacher is not None:
        averages = ShardReader(path, manifest, "teacher")
        for name, shard in teacher.shards().items():
            shard.data.copy_(averages.read(name, shard.offset, shard.numel))
        _load_buffers(teacher.module, path / "buffers.teacher.safetensors")
        teacher.restored(manifest.num_teacher_updates)
    rank_state = None
    if same_topology:
        rank_file = path / shard_file("client", comm.rank())
        rank_state = torch.load(rank_file, weights_only=True, map_location="cpu")
    comm.barrier()
    return Restored(tag=manifest.tag, client_state=client_state, rank_state=rank_state)


def _choose(
    folder: Path, tag: str | None, accept: Callable[[Mapping[str, Any]], bool]
) -> tuple[Path, Manifest, dict[str, Any]]:
    """The checkpoint to load and its common state, the same on every rank; each checks its share of the files."""
    tags, lost = comm.broadcast_object(([tag], []) if tag is not None else (candidate_tags(folder), lost_tags(folder)))
    for candidate in lost:
        logger.warning("checkpoint %s cannot be read, passed over: no %s", folder / candidate, MANIFEST)
    for candidate in tags:
        path = folder / candidate
        manifest, fault = comm.broadcast_object(_read_manifest_or_fault(path) if comm.rank() == 0 else (None, ""))
        faults = [fault] if fault else []
        if manifest is not None:
            mine = sorted(manifest.files)[comm.rank() :: comm.world()]
            faults = [f for found in comm.gather_objects(file_faults(path, manifest, mine)) for f in found]
            if not faults:
                client_state = torch.load(path / "client.pt", weights_only=True, map_location="cpu")
                if accept(client_state):
                    return path, manifest, client_state
                continue
        if tag is not None:
            raise CheckpointError("\n".join(faults))
        logger.warning("checkpoint %s is damaged, trying the one before: %s", path, "; ".join(faults))
    raise CheckpointError(
        f"{folder}: no usable checkpoint ({len(tags) + len(lost)} damaged); start a new run in another folder, or "
        "remove it"
    )


def _read_manifest_or_fault(path: Path) -> tuple[Manifest | None, str]:
    try:
        return read_manifest(path), ""
    except CheckpointError as error:
        return None, str(error)


def _topology(engine: DeepSpeedEngine) -> tuple[int, int, str]:
    return comm.world(), zero.stage(engine), str(zero.compute_dtype(engine))


def _check_fits(path: Path, manifest: Manifest, engine: DeepSpeedEngine, teacher: Teacher | None) -> None:
    """Raise unless the checkpoint holds this model."""
    own = {name: list(zero.full_shape(param)) for name, param in engine.module.named_parameters()}
    saved = manifest.parameters
    faults = [f"{name}: only in the checkpoint" for name in sorted(saved.keys() - own.keys())]
    faults += [f"{name}: only in this model" for name in sorted(own.keys() - saved.keys())]
    faults += [
        f"{name}: checkpoint {saved[name]}, this model {own[name]}"
        for name in sorted(own.keys() & saved.keys())
        if own[name] != saved[name]
    ]
    if teacher is not None:
        mine, theirs = set(teacher.shards()), set(manifest.teacher_parameters)
        faults += [f"teacher {name}: only in the checkpoint" for name in sorted(theirs - mine)]
        faults += [f"teacher {name}: not in the checkpoint" for name in sorted(mine - theirs)]
    if faults:
        listed = "\n".join(faults[:20])
        raise CheckpointError(f"{path}: belongs to another model, {len(faults)} differences:\n{listed}")


def _load_buffers(module: nn.Module, file: Path) -> None:
    saved = load_file(file)
    for name, buffer in persistent_buffers(module):
        if name not in saved or saved[name].shape != buffer.shape:
            raise CheckpointError(f"{file}: no buffer {name} of shape {tuple(buffer.shape)}")
        buffer.copy_(saved[name])
