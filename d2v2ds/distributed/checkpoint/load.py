"""Resume a student engine, its optimizer and its teacher from what `save.py` wrote. `format.py` describes the files."""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.checkpoint.format import (
    LATEST,
    MANIFEST,
    SHARD_FILE,
    Manifest,
    OtherFormatError,
    ShardReader,
    file_faults,
    finished_tags,
    named_tag,
    persistent_buffers,
    read_manifest,
    read_plain,
    shard_file,
    tags_without_manifest,
)
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import CheckpointError
from d2v2ds.io.tensor_file import BLOCK_BYTES, TensorFileReader

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
        accept: asked with the common state, before anything else of a whole checkpoint is looked at; one for which it
            is false is passed over. It may raise, and must answer alike on every rank.

    Raises:
        CheckpointError: on all ranks: no usable checkpoint; other parameters; another topology without `reshard`; a
            checkpoint of another format version.
    """
    tags, lost = comm.broadcast_object(
        ([tag], []) if tag is not None else (finished_tags(folder), tags_without_manifest(folder))
    )
    for candidate in lost:
        logger.warning("checkpoint %s cannot be read, passed over: no %s", folder / candidate, MANIFEST)
    declined = 0
    for candidate in tags:
        path = folder / candidate
        found = comm.broadcast_object(_manifest_or_error(path) if comm.rank() == 0 else None)
        if isinstance(found, OtherFormatError):
            raise found
        manifest, faults = (found, []) if isinstance(found, Manifest) else (None, [str(found)])
        if manifest is not None:
            is_same = _topology(engine) == (manifest.world_size, manifest.stage, manifest.compute_dtype)
            # On the same ranks the large files are checked while they are read, once, by the rank that needs them.
            faults = _all_faults(lambda: file_faults(path, manifest, _files_to_check(manifest, is_same)))  # noqa: B023
        if manifest is not None and not faults:
            client_state = read_plain(path / "client.pt")
            if not accept(client_state):
                declined += 1
                continue
            _check_fits(path, manifest, engine, teacher)
            if not is_same and not reshard:
                raise CheckpointError(_other_topology(path, manifest, engine))
            faults = _all_faults(lambda: _read_shards(path, manifest, engine, teacher, is_same))  # noqa: B023
            if not faults:
                return _finish(path, manifest, engine, teacher, client_state, is_same)
        if tag is not None:
            raise CheckpointError("\n".join(faults))
        logger.warning("checkpoint %s is damaged, trying the one before: %s", path, "; ".join(faults))
    counts = f"{len(tags) + len(lost) - declined} damaged" + (f", {declined} not accepted" if declined else "")
    raise CheckpointError(f"{folder}: no usable checkpoint ({counts}); start a new run in another folder, or remove it")


@contextmanager
def reading_ahead(folder: Path) -> Iterator[None]:
    """Meanwhile, bring this rank's part of the newest checkpoint from the disk into the system's memory. Local.

    A thread reads it and throws it away. `load` trusts nothing of that: it reads every byte again, from memory now,
    and checks it; a file that cannot be read is for `load` to report. On the way out the thread ends, finished or not.
    """
    enough = threading.Event()
    thread = threading.Thread(target=_read_and_forget, args=(folder, enough), name="read ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def _read_and_forget(folder: Path, enough: threading.Event) -> None:
    with suppress(OSError, ValueError):  # the latter from a damaged `latest`
        files = (folder / (named_tag(folder, LATEST) or "")).glob(f"*.rank{comm.rank():05d}.safetensors")
        block = bytearray(BLOCK_BYTES)
        for path in sorted(files, key=lambda path: path.name.startswith("optimizer.")):  # `load` reads these last
            with path.open("rb", buffering=0) as file:
                while not enough.is_set() and file.readinto(block):
                    pass


def _all_faults(find: Callable[[], list[str]]) -> list[str]:
    """What any rank finds, the same on every rank."""
    return [fault for found in comm.gather_objects(find()) for fault in found]


def _files_to_check(manifest: Manifest, is_same: bool) -> list[str]:
    """The files that this rank looks through before any is read: a share of them, less those of the large pieces."""
    files = [name for name in sorted(manifest.files) if not (is_same and SHARD_FILE.fullmatch(name))]
    return files[comm.rank() :: comm.world()]


def _read_shards(
    path: Path, manifest: Manifest, engine: DeepSpeedEngine, teacher: Teacher | None, is_same: bool
) -> list[str]:
    """Put this rank's pieces into student, optimizer and teacher. Local; returns what is wrong with the files.

    After a fault the engine holds parts of two states, until another checkpoint is read.
    """
    shards = zero.parameter_shards(engine)
    targets = {"student": {name: shard.data for name, shard in shards.items()}}
    if teacher is not None:
        targets["teacher"] = {name: shard.data for name, shard in teacher.shards().items()}
    zero.prepare_optimizer_state(engine, manifest.optimizer_keys, manifest.optimizer_scalars)
    for key in manifest.optimizer_keys:
        targets[f"optimizer.{key}"] = zero.optimizer_tensors(engine, key)
    offsets = {name: shard.offset for name, shard in shards.items()}
    try:
        for kind, tensors in targets.items():
            found = _read_own_file(path, manifest, kind, offsets, tensors) if is_same else set()
            missing = [name for name in tensors if name not in found]
            if missing:  # of other ranks, or held alike by all and saved by rank 0
                reader = ShardReader(path, manifest, kind, ranks=[0] if is_same else None)
                for name in missing:
                    tensors[name].copy_(reader.read(name, offsets[name], tensors[name].numel()))
    except (CheckpointError, SafetensorError) as error:  # the latter from a file that its own rank finds damaged
        return [str(error)]
    return []


def _read_own_file(
    path: Path, manifest: Manifest, kind: str, offsets: Mapping[str, int], tensors: Mapping[str, Tensor]
) -> set[str]:
    """Read the pieces that this rank saved itself into their places; returns which those are."""
    name = shard_file(kind, comm.rank())
    file = TensorFileReader(path / name, manifest.files[name]["bytes"], manifest.files[name]["crc32"])
    saved = json.loads(file.metadata["offsets"])
    own = {
        parameter: tensor
        for parameter, tensor in tensors.items()
        if saved.get(parameter) == offsets[parameter] and file.numel(parameter) == tensor.numel()
    }
    file.read_into(own)
    return set(own)


def _finish(
    path: Path,
    manifest: Manifest,
    engine: DeepSpeedEngine,
    teacher: Teacher | None,
    client_state: dict[str, Any],
    is_same: bool,
) -> Restored:
    """Make everything follow from the pieces that were read: buffers, compute copies, counters. Collective."""
    _load_buffers(engine.module, path / "buffers.student.safetensors")
    zero.refresh_compute_copies(engine)
    for name, count in manifest.counters.items():
        setattr(engine, name, count)
    if not is_same:
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if teacher is not None:
        _load_buffers(teacher.module, path / "buffers.teacher.safetensors")
        teacher.after_restore(manifest.num_teacher_updates)
    rank_state = None
    if is_same:
        rank_state = read_plain(path / shard_file("client", comm.rank()))
    comm.barrier()
    return Restored(tag=manifest.tag, client_state=client_state, rank_state=rank_state)


def _other_topology(path: Path, manifest: Manifest, engine: DeepSpeedEngine) -> str:
    world, stage, dtype = _topology(engine)
    return (
        f"{path}: saved on {manifest.world_size} ranks at ZeRO stage {manifest.stage} in {manifest.compute_dtype}, "
        f"this run has {world} ranks, stage {stage}, {dtype}; start as it was saved, or ask for re-sharding"
    )


def _manifest_or_error(path: Path) -> Manifest | CheckpointError:
    try:
        return read_manifest(path)
    except CheckpointError as error:
        return error


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
