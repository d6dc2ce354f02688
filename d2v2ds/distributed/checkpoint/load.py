"""Resume a student engine, its optimizer and its teacher from what `save.py` wrote. `format.py` describes the files."""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
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
from d2v2ds.errors import CheckpointError, D2V2Error, MachineError
from d2v2ds.io.tensor_file import BLOCK_BYTES, TensorFileReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """The checkpoint that `load` took."""

    tag: str
    client_state: dict[str, Any]
    """The state given to `Saver.save`."""


def load(
    engine: DeepSpeedEngine,
    teacher: Teacher | None,
    folder: Path,
    accept: Callable[[Mapping[str, Any]], bool] = lambda client_state: True,
) -> Restored:
    """Continue from the newest checkpoint whose files are all there and whole. Collective.

    Damaged checkpoints are passed over with a warning that names the file. The number of ranks, the ZeRO stage and the
    precision may differ from those of the save; weights, moments and averages are the same then, but the run does not
    go on bit for bit.

    Args:
        engine: a student of the same parameters.
        teacher: its teacher, if it is to be restored.
        folder: where the run's checkpoints lie.
        accept: called with the `client_state` of each whole checkpoint before its weights are read; False passes it
            over. It may raise, and must answer alike on every rank.

    Raises:
        CheckpointError: on all ranks: no usable checkpoint; other parameters; a checkpoint of another format version.
    """
    tags, lost = comm.broadcast_object(
        comm.together(lambda: (finished_tags(folder), tags_without_manifest(folder)) if comm.rank() == 0 else ([], []))
    )
    for tag in lost:
        logger.warning("checkpoint %s cannot be read, passed over: no %s", folder / tag, MANIFEST)
    num_declined = 0
    for tag in tags:
        path = folder / tag
        manifest, faults = _read_manifest(path)
        if manifest is not None:
            is_same = _topology(engine) == (manifest.world_size, manifest.stage, manifest.compute_dtype)
            # On the same ranks the large files are checked while they are read, once, by the rank that needs them.
            names = _files_to_check(manifest, is_same)
            faults = _on_any_rank(comm.together(partial(file_faults, path, manifest, names)))
        client_state: dict[str, Any] = {}
        if manifest is not None and not faults:
            try:
                client_state = comm.together(partial(read_plain, path / "client.pt"))
            except CheckpointError as error:
                faults = [str(error)]
        if manifest is not None and not faults:
            if not accept(client_state):
                num_declined += 1
                continue
            _check_fits(path, manifest, engine, teacher)
            faults = _on_any_rank(comm.together(partial(_read_shards, path, manifest, engine, teacher, is_same)))
            if not faults:
                _finish(path, manifest, engine, teacher, is_same)
                return Restored(tag=tag, client_state=client_state)
        logger.warning("checkpoint %s is damaged, trying the one before: %s", path, "; ".join(faults))
    counts = f"{len(tags) + len(lost) - num_declined} damaged"
    counts += f", {num_declined} not accepted" if num_declined else ""
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


def _read_manifest(path: Path) -> tuple[Manifest | None, list[str]]:
    """Read a manifest on rank 0 for all ranks; None with a fault where it is damaged. Collective.

    Raises:
        OtherFormatError, MachineError: on all ranks.
    """
    found: Manifest | D2V2Error | None = None
    if comm.rank() == 0:
        try:
            found = read_manifest(path)
        except (CheckpointError, MachineError) as error:
            found = error
    found = comm.broadcast_object(found)
    if isinstance(found, (OtherFormatError, MachineError)):
        raise found
    return (found, []) if isinstance(found, Manifest) else (None, [str(found)])


def _on_any_rank(faults: list[str]) -> list[str]:
    """Every rank's faults, in rank order, on every rank. Collective."""
    return [fault for found in comm.gather_objects(faults) for fault in found]


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
    try:
        saved = dict(json.loads(file.metadata["offsets"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / name}: damaged, no offsets of its pieces: {error!r}") from error
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
    is_same: bool,
) -> None:
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
    comm.barrier()


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
