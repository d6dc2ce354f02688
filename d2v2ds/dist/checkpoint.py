"""Save and resume a student engine, its optimizer and its teacher. The files are described in `consolidate.py`.

DeepSpeed's own checkpoints are not used: they are pickles of its classes, cannot be read on another number of
ranks, know no teacher, and their `latest` can name a tag whose files were never finished. Here every rank writes its
part into `<tag>.partial`, and only when all are on disk is the folder renamed and `latest` moved, each atomically.
The folder must be one that all ranks see.
"""

import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2v2ds.dist import comm, zero
from d2v2ds.dist.consolidate import (
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    PARTIAL,
    Manifest,
    ShardReader,
    candidate_tags,
    crc32_of,
    file_faults,
    read_manifest,
    shard_file,
)
from d2v2ds.dist.teacher import Teacher
from d2v2ds.errors import CheckpointError

logger = logging.getLogger(__name__)

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What `load` gives back to the caller."""

    tag: str
    client_state: dict[str, Any]
    """The common state given to `save`."""
    rank_state: dict[str, Any] | None
    """This rank's state given to `save`; None after re-sharding, where old ranks have no counterpart."""


def save(
    engine: DeepSpeedEngine,
    teacher: Teacher | None,
    folder: Path,
    tag: str,
    client_state: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    keep_last: int | None = None,
) -> Path:
    """Write a checkpoint. Collective, and only between optimizer steps.

    Args:
        engine: the student.
        teacher: its teacher, if any.
        folder: where the run's checkpoints lie.
        tag: name of this one; an existing one of that name is replaced.
        client_state: the caller's state common to all ranks (rank 0's is written): schedule, data position.
        rank_state: the caller's state of this rank: random generators. Both hold plain containers, numbers,
            strings and tensors only, so that reading them back runs no code.
        keep_last: remove all but this many of the newest checkpoints afterwards; None keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on all ranks, if any of them could not write its files.
        ValueError: between accumulation boundaries, or for states of other types.
    """
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise ValueError("checkpoint.save: called between the micro-batches of a step; call it after optimizer_step")
    states = {"client.pt": client_state, shard_file("client", comm.rank()): rank_state}
    blobs = {name: _to_bytes(state) for name, state in states.items()}  # on every rank: a fault must be everywhere
    if comm.rank() > 0:
        del blobs["client.pt"]
    target, partial = folder / tag, folder / f"{tag}{PARTIAL}"
    _on_rank0(lambda: _begin(folder, partial), target)
    own_files: dict[str, dict[str, int]] = {}
    fault = ""
    optimizer_keys, scalars = zero.optimizer_layout(engine)
    try:
        own_files = _write_own_files(engine, teacher, partial, optimizer_keys, blobs)
    except (OSError, SafetensorError) as error:
        fault = f"rank {comm.rank()}: {error}"
    reports = comm.gather_objects((own_files, fault))
    _raise_faults([reported for _, reported in reports if reported], target)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tag=tag,
        stage=zero.stage(engine),
        compute_dtype=str(zero.compute_dtype(engine)),
        world_size=comm.world(),
        counters={name: int(getattr(engine, name)) for name in COUNTERS},
        parameters={name: list(zero.full_shape(p)) for name, p in engine.module.named_parameters()},
        teacher_parameters=[] if teacher is None else list(teacher.shards()),
        num_teacher_updates=0 if teacher is None else teacher.num_updates,
        optimizer_keys=optimizer_keys,
        optimizer_scalars=scalars,
        files={name: record for files, _ in reports for name, record in files.items()},
    )
    _on_rank0(lambda: _commit(partial, target, manifest, keep_last), target)
    return target


def load(
    engine: DeepSpeedEngine, teacher: Teacher | None, folder: Path, tag: str | None = None, reshard: bool = False
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

    Raises:
        CheckpointError: on all ranks: no usable checkpoint; other parameters; another topology without `reshard`.
    """
    path, manifest = _choose(folder, tag)
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
    client_state = torch.load(path / "client.pt", weights_only=True, map_location="cpu")
    rank_state = None
    if same_topology:
        rank_file = path / shard_file("client", comm.rank())
        rank_state = torch.load(rank_file, weights_only=True, map_location="cpu")
    comm.barrier()
    return Restored(tag=manifest.tag, client_state=client_state, rank_state=rank_state)


# -------------------------------------------------------------------- writing


def _write_own_files(
    engine: DeepSpeedEngine,
    teacher: Teacher | None,
    path: Path,
    optimizer_keys: list[str],
    blobs: Mapping[str, bytes],
) -> dict[str, dict[str, int]]:
    """This rank's files, on disk and accounted for."""
    student = zero.parameter_shards(engine)
    kinds: dict[str, dict[str, zero.Shard]] = {"student": student}
    if teacher is not None:
        kinds["teacher"] = teacher.shards()
    written = [_write_shards(path, kind, shards, {}) for kind, shards in kinds.items()]
    for key in optimizer_keys:
        moments = zero.optimizer_tensors(engine, key)
        trained = {name: shard for name, shard in student.items() if shard.trainable}
        written.append(_write_shards(path, f"optimizer.{key}", trained, moments))
    if comm.rank() == 0:
        modules = {"student": engine.module} | ({} if teacher is None else {"teacher": teacher.module})
        for kind, module in modules.items():
            written.append(path / f"buffers.{kind}.safetensors")
            save_file({n: b.detach().cpu().contiguous() for n, b in _persistent_buffers(module)}, written[-1])
    for name, blob in blobs.items():
        written.append(path / name)
        written[-1].write_bytes(blob)
    for file in written:
        _sync(file)
    return {file.name: {"bytes": file.stat().st_size, "crc32": crc32_of(file)} for file in written}


def _write_shards(path: Path, kind: str, shards: Mapping[str, zero.Shard], values: Mapping[str, Tensor]) -> Path:
    """One safetensors file with this rank's pieces; what all ranks hold alike is written by rank 0 alone.

    Args:
        path: folder of the checkpoint.
        kind: first part of the file's name.
        shards: which elements this rank holds.
        values: (shard.numel,) what to write for them; the shard's own data where absent.
    """
    own = {n: s for n, s in shards.items() if s.numel and (comm.rank() == 0 or not s.replicated)}
    tensors = {name: values.get(name, shard.data).cpu().contiguous() for name, shard in own.items()}
    offsets = json.dumps({name: shard.offset for name, shard in own.items()})
    file = path / shard_file(kind, comm.rank())
    save_file(tensors, file, metadata={"offsets": offsets})
    return file


def _persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    kept = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def _to_bytes(state: Mapping[str, Any]) -> bytes:
    """Serialise plain data, and make sure now that it can be read back without running code."""
    buffer = io.BytesIO()
    try:
        torch.save(dict(state), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise ValueError(
            f"checkpoint.save: state may hold only plain containers, numbers, strings and tensors: {error}"
        ) from error
    return buffer.getvalue()


def _sync(path: Path) -> None:
    """Make a file's or folder's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _replace_text(path: Path, text: str) -> None:
    """Change a small file in one step: readers see the old text or the new one."""
    fresh = path.with_name(path.name + ".tmp")
    _write_text(fresh, text)
    fresh.replace(path)
    _sync(path.parent)


def _on_rank0(action: Callable[[], None], target: Path) -> None:
    """Let rank 0 act while the others wait; if it cannot, all ranks raise."""
    fault = ""
    if comm.rank() == 0:
        try:
            action()
        except OSError as error:
            fault = f"rank 0: {error}"
    fault = comm.broadcast_object(fault)
    _raise_faults([fault] if fault else [], target)


def _raise_faults(faults: list[str], target: Path) -> None:
    if faults:
        raise CheckpointError(f"checkpoint {target} was not written, earlier ones are intact:\n" + "\n".join(faults))


def _begin(folder: Path, partial: Path) -> None:
    """Clear what interrupted saves left, and make the folder to write into."""
    for leftover in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _commit(partial: Path, target: Path, manifest: Manifest, keep_last: int | None) -> None:
    """Write the manifest, give the finished folder its name, move `latest`, drop what is too old."""
    _write_text(partial / MANIFEST, manifest.to_json())
    _sync(partial)
    if target.exists():
        _remove(target)
    partial.rename(target)
    _sync(target.parent)
    _replace_text(target.parent / LATEST, target.name)
    if keep_last is not None:
        _prune(target.parent, keep_last, target.name)


def _remove(path: Path) -> None:
    """Delete a checkpoint, the manifest first: a removal that is interrupted leaves no half checkpoint."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _prune(folder: Path, keep_last: int, newest: str) -> None:
    others = [tag for tag in candidate_tags(folder) if tag != newest]
    for tag in others[max(keep_last, 1) - 1 :]:
        _remove(folder / tag)


# -------------------------------------------------------------------- reading


def _choose(folder: Path, tag: str | None) -> tuple[Path, Manifest]:
    """The checkpoint to load, the same on every rank; each rank checks its share of the files."""
    tags = comm.broadcast_object([tag] if tag is not None else candidate_tags(folder))
    for candidate in tags:
        path = folder / candidate
        manifest, fault = comm.broadcast_object(_read_manifest_or_fault(path) if comm.rank() == 0 else (None, ""))
        faults = [fault] if fault else []
        if manifest is not None:
            mine = sorted(manifest.files)[comm.rank() :: comm.world()]
            faults = [f for found in comm.gather_objects(file_faults(path, manifest, mine)) for f in found]
            if not faults:
                return path, manifest
        if tag is not None:
            raise CheckpointError("\n".join(faults))
        logger.warning("checkpoint %s is damaged, trying the one before: %s", path, "; ".join(faults))
    raise CheckpointError(
        f"{folder}: no usable checkpoint ({len(tags)} damaged); start a new run in another folder, or remove it"
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
    for name, buffer in _persistent_buffers(module):
        if name not in saved or saved[name].shape != buffer.shape:
            raise CheckpointError(f"{file}: no buffer {name} of shape {tuple(buffer.shape)}")
        buffer.copy_(saved[name])
