"""`Saver`: checkpoints that are written while the training goes on. `format.py` describes the files.

DeepSpeed's own checkpoints are not used: they are pickles of its classes, cannot be read on another number of ranks
without a conversion, know no teacher, and their `latest` can name a tag whose files were never finished.
`torch.distributed.checkpoint` describes its files in a pickle too, and knows no flat pieces of unequal length. Here

1. every rank copies its part to host memory (the only time for which training stands still),
2. threads of every rank write its files into `<tag>.partial`, compute their checksums and sync them,
3. once *all* ranks are done, a thread of rank 0 writes the manifest, renames the folder, moves `latest`, then `best`,
   each atomically, and removes what is too old.

Between the three the ranks only exchange "is any of us still busy?", once a step. Threads never communicate. The
folder must be one that all ranks see.
"""

import io
import json
import logging
import math
import pickle
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.checkpoint.format import (
    BEST,
    COUNTERS,
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    PARTIAL,
    Manifest,
    named_tag,
    persistent_buffers,
    read_manifest,
    shard_file,
)
from d2v2ds.distributed.checkpoint.keep import KEEP_ALL, Keep, remove, remove_tree, superseded_tags
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import CheckpointError, D2V2Error, MachineError
from d2v2ds.io import durable
from d2v2ds.io.machine_faults import advice
from d2v2ds.io.tensor_file import TensorFileWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveOutcome:
    """Result of a save; the same on every rank."""

    path: Path
    """Folder of the checkpoint."""
    fault: str
    """Empty if it is whole on disk; else what went wrong, rank by rank."""


@dataclass
class _Snapshot:
    """Copy in host memory of everything that one rank will write."""

    path: Path
    manifest: Manifest
    """Complete but for the list of files."""
    shards: dict[str, tuple[dict[str, Tensor], dict[str, int]]] = field(default_factory=dict)
    """By kind: flat pieces by parameter name, and where each begins in the flattened whole parameter."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """By file name: the caller's state and the modules' buffers, serialised."""


_WrittenFiles = tuple[dict[str, dict[str, int]], str]
"""Bytes and crc32 of the files of one rank, and why writing them failed."""


class Saver:
    """Writes checkpoints of one run. All methods are collective: every rank calls them in the same order."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        teacher: Teacher | None,
        folder: Path,
        keep: Keep = KEEP_ALL,
        asynchronous: bool = True,
        needed: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        """
        Args:
            engine: the student.
            teacher: its teacher, if any.
            folder: where the run's checkpoints lie.
            keep: what is not removed.
            asynchronous: write while training goes on. It needs as much host memory as this rank's part of a
                checkpoint has bytes (16 / ranks for each parameter), page-locked if there is a GPU.
            needed: tags that are not removed now, besides; asked in a thread of rank 0.
        """
        self._engine, self._teacher = engine, teacher
        self._folder, self._keep, self._asynchronous, self._needed = folder, keep, asynchronous, needed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._host_copies: dict[str, Tensor] = {}
        self._snapshot: _Snapshot | None = None
        self._writing: Future[_WrittenFiles] | None = None
        self._committing: Future[str] | None = None

    def save(
        self,
        tag: str,
        client_state: Mapping[str, Any],
        selection: float | None = None,
    ) -> SaveOutcome | None:
        """Begin a checkpoint; only between optimizer steps, and once the one before is finished.

        Args:
            tag: name of this one; an existing one of that name is replaced.
            client_state: the caller's state, the same on all ranks: schedule, data position. Plain containers, numbers,
                strings and tensors only, so that reading it back runs no code.
            selection: value of the weights saved by which `best` is chosen, such as a validation loss or an error
                rate; the lowest one makes its checkpoint `best`.

        Returns:
            How it ended, where that is known at once: without `asynchronous`, or if its folder cannot be made.

        Raises:
            ValueError: between accumulation boundaries, or for states of other types.
            RuntimeError: while another checkpoint is under way; call `finish` first.
        """
        engine = self._engine
        if self._snapshot is not None:
            raise RuntimeError(f"Saver.save: {self._snapshot.path} is still being written; call finish first")
        if engine.micro_steps % engine.gradient_accumulation_steps():
            raise ValueError("Saver.save: called between the micro-batches of a step; call it after optimizer_step")
        client = _to_bytes(client_state)  # on every rank: a fault must be everywhere
        path = self._folder / tag
        partial = self._folder / f"{tag}{PARTIAL}"
        if fault := comm.on_rank0(lambda: _make_partial_folder(self._folder, partial)):
            return SaveOutcome(path, fault)
        self._snapshot = self._take_snapshot(path, selection)
        if comm.rank() == 0:
            self._snapshot.blobs["client.pt"] = client
        self._writing = self._thread.submit(_write_files, self._snapshot, partial)
        return None if self._asynchronous else self.finish()

    @property
    def is_busy(self) -> bool:
        """True while this rank's thread writes. Local; `advance` needs it of all ranks."""
        return any(job is not None and not job.done() for job in (self._writing, self._committing))

    def advance(self, any_busy: bool) -> SaveOutcome | None:
        """Take a checkpoint one stage further once no rank's thread is busy. Call it once a step.

        Args:
            any_busy: whether `is_busy` holds on any rank; the same on every rank.

        Returns:
            How the checkpoint ended, if it just did.
        """
        if self._snapshot is None or any_busy:
            return None
        if self._writing is not None:
            return self._begin_commit()
        return self._end_commit()

    def finish(self) -> SaveOutcome | None:
        """Wait until the checkpoint under way is on disk; returns how it ended, None if there was none."""
        outcome = None
        while self._snapshot is not None:
            outcome = self._begin_commit() if self._writing is not None else self._end_commit()
        return outcome

    def _take_snapshot(self, path: Path, selection: float | None) -> _Snapshot:
        """This rank's part of the checkpoint, copied into host memory that is kept for the next one."""
        engine, teacher = self._engine, self._teacher
        optimizer_keys, scalars = zero.optimizer_layout(engine)
        student = zero.parameter_shards(engine)
        teacher_shards = {} if teacher is None else teacher.shards()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tag=path.name,
            stage=zero.stage(engine),
            compute_dtype=str(zero.compute_dtype(engine)),
            world_size=comm.world(),
            counters={name: int(getattr(engine, name)) for name in COUNTERS},
            parameters={name: list(zero.full_shape(p)) for name, p in engine.module.named_parameters()},
            teacher_parameters=list(teacher_shards),
            num_teacher_updates=0 if teacher is None else teacher.num_updates,
            optimizer_keys=optimizer_keys,
            optimizer_scalars=scalars,
            validation_loss=selection if selection is None or math.isfinite(selection) else None,
            files={},
        )
        snapshot = _Snapshot(path, manifest)
        kinds: dict[str, tuple[Mapping[str, zero.Shard], Mapping[str, Tensor]]] = {"student": (student, {})}
        if teacher is not None:
            kinds["teacher"] = (teacher_shards, {})
        trained = {name: shard for name, shard in student.items() if shard.trainable}
        for key in optimizer_keys:
            kinds[f"optimizer.{key}"] = (trained, zero.optimizer_tensors(engine, key))
        for kind, (shards, values) in kinds.items():
            # What all ranks hold alike is written by rank 0 alone.
            own = {n: s for n, s in shards.items() if s.numel and (comm.rank() == 0 or not s.replicated)}
            pieces = {
                name: self._copy_to_host(f"{kind}/{name}", values.get(name, shard.data)) for name, shard in own.items()
            }
            snapshot.shards[kind] = pieces, {name: shard.offset for name, shard in own.items()}
        if comm.rank() == 0:
            modules = {"student": engine.module} | ({} if teacher is None else {"teacher": teacher.module})
            for kind, module in modules.items():
                buffers = {name: buffer.detach().cpu() for name, buffer in persistent_buffers(module)}
                snapshot.blobs[f"buffers.{kind}.safetensors"] = safetensors.torch.save(buffers)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies were only queued
        return snapshot

    def _copy_to_host(self, key: str, values: Tensor) -> Tensor:
        """Return a copy in host memory; without `asynchronous` a CPU tensor itself, as nothing changes it meanwhile."""
        if values.device.type == "cpu" and not self._asynchronous:
            return values.detach()
        held = self._host_copies.get(key)
        if held is None or held.shape != values.shape or held.dtype != values.dtype:
            on_gpu = values.device.type == "cuda"
            held = self._host_copies[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
        return held.copy_(values.detach(), non_blocking=True)

    def _begin_commit(self) -> SaveOutcome | None:
        """Gather which files each rank wrote; rank 0 begins to commit them, or removes a failed attempt. Collective."""
        assert self._snapshot is not None
        assert self._writing is not None
        snapshot, written = self._snapshot, self._writing.result()
        self._writing = None
        reports = comm.gather_objects(written)
        faults = [fault for _, fault in reports if fault]
        partial = snapshot.path.with_name(f"{snapshot.path.name}{PARTIAL}")
        if faults:
            self._snapshot = None
            if comm.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # its space may be what the next attempt needs
            return SaveOutcome(snapshot.path, "\n".join(faults))
        if comm.rank() == 0:
            files = {name: record for found, _ in reports for name, record in found.items()}
            manifest = replace(snapshot.manifest, files=files)
            self._committing = self._thread.submit(_commit, partial, snapshot.path, manifest, self._keep, self._needed)
        return None

    def _end_commit(self) -> SaveOutcome:
        """Wait for rank 0's commit and return how the checkpoint ended. Collective."""
        assert self._snapshot is not None
        path = self._snapshot.path
        fault = self._committing.result() if self._committing is not None else ""
        self._snapshot = self._committing = None
        return SaveOutcome(path, comm.broadcast_object(fault))


# ----------------------------------------------------------- in the threads


def _write_files(snapshot: _Snapshot, partial: Path) -> _WrittenFiles:
    """Write and sync this rank's files; return their sizes and checksums, and what went wrong."""
    writer = TensorFileWriter()
    try:
        for kind, (pieces, offsets) in snapshot.shards.items():
            writer.add_tensors(partial / shard_file(kind, comm.rank()), pieces, {"offsets": json.dumps(offsets)})
        for name, blob in snapshot.blobs.items():
            writer.add_bytes(partial / name, [memoryview(blob)])
        return writer.finish(), ""
    except OSError as error:
        return {}, f"rank {comm.rank()}: {error}; {advice(error)}"
    except MemoryError:
        return {}, f"rank {comm.rank()}: no memory left"


def _commit(partial: Path, target: Path, manifest: Manifest, keep: Keep, needed: Callable[[], Collection[str]]) -> str:
    """Give the finished folder its name, move `latest` and `best`, drop what is too old; returns what went wrong."""
    folder = target.parent
    try:
        durable.write_text(partial / MANIFEST, manifest.to_json())
        durable.sync(partial)
        if target.exists():
            remove(target)
        partial.rename(target)
        durable.sync(folder)
        durable.replace_text(folder / LATEST, target.name)
        if manifest.validation_loss is not None and _is_best(folder, manifest.validation_loss):
            durable.replace_text(folder / BEST, target.name)
    except OSError as error:
        return f"rank 0: {error}; {advice(error)}"
    except D2V2Error as error:
        return f"rank 0: {error}"
    try:
        for tag in superseded_tags(folder, keep):
            if tag not in needed():
                remove(folder / tag)
    except (OSError, D2V2Error) as error:  # this checkpoint is whole
        logger.warning("%s: older checkpoints are not removed: %s", folder, error)
    return ""


def _is_best(folder: Path, selection: float) -> bool:
    if not math.isfinite(selection):
        return False
    try:
        best = named_tag(folder, BEST)
        if best is None:
            return True
        before = read_manifest(folder / best).validation_loss
    except (CheckpointError, MachineError):
        return True  # it is gone or damaged
    return before is None or selection < before


def _make_partial_folder(folder: Path, partial: Path) -> None:
    """Remove what interrupted saves left, and make the folder to write into."""
    for leftover in folder.glob(f"*{PARTIAL}"):
        remove_tree(leftover)
    partial.mkdir(parents=True)


def _to_bytes(state: Mapping[str, Any]) -> bytes:
    """Serialise plain data, and make sure now that it can be read back without running code."""
    buffer = io.BytesIO()
    try:
        torch.save(dict(state), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise ValueError(
            f"Saver.save: state may hold only plain containers, numbers, strings and tensors: {error}"
        ) from error
    return buffer.getvalue()
