"""The checkpoint format, and reading whole tensors back from it. Needs neither DeepSpeed nor a process group.

A checkpoint is a folder `<folder>/<tag>/`:

    manifest.json                           what is inside; written last, so a folder without it is unfinished
    student.rank00000.safetensors           this rank's part of each fp32 master weight, flat
    teacher.rank00000.safetensors           this rank's part of each fp32 average (if there is a teacher)
    optimizer.exp_avg.rank00000.safetensors this rank's part of one of the optimizer's moments, and so on
    buffers.student.safetensors             whole persistent buffers
    client.pt                               the caller's state (plain containers and tensors)

Each shard file says in its metadata where its pieces begin in the flattened whole parameters, so the files of any
number of ranks and any ZeRO stage can be put together or cut anew. `<folder>/latest` names the newest finished tag,
`<folder>/best` the one with the lowest value of `Objective.selection`, such as a validation loss or an error rate.
"""

import json
import logging
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from d2v2ds.errors import CheckpointError
from d2v2ds.io import read
from d2v2ds.io.crc import crc32
from d2v2ds.io.machine_faults import reading_error

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
PARTIAL = ".partial"
"""Ending of a folder that is being written."""


COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""The engine's counts."""
MAX_PLAIN_BYTES = 256 << 20
"""Largest `client.pt`, unpacked."""
_NO_PLAIN_VALUES = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError,
    ArithmeticError, ImportError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""Errors of reading anything but plain values."""


class OtherFormatError(CheckpointError):
    """A checkpoint of another format version: it is whole, but cannot be read here."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a checkpoint folder."""

    __pydantic_config__ = {"extra": "forbid"}

    format_version: int
    tag: str
    stage: int
    """ZeRO stage of the run that saved."""
    compute_dtype: str
    world_size: int
    counters: dict[str, int]
    """The engine's step and sample counts."""
    parameters: dict[str, list[int]]
    """Full shape of every parameter of the student."""
    teacher_parameters: list[str]
    """Names in the teacher; empty without one."""
    num_teacher_updates: int
    optimizer_keys: list[str]
    """Names of the per-element optimizer states."""
    optimizer_scalars: dict[str, dict[str, Any]]
    """Optimizer states that are one number, as {"kind": "tensor" or "number", "value": ...}."""
    files: dict[str, dict[str, int]]
    """Bytes and crc32 of every file but the manifest."""
    validation_loss: float | None = None
    """Value of `Objective.selection` for these weights, the lower the better: a validation loss, an error rate, or 100
    less the mean of selected scores; None if they were not validated."""

    def to_json(self) -> str:
        """The text of manifest.json, with a checksum of itself."""
        content = asdict(self)
        return json.dumps({"checksum": _checksum(content), **content}, indent=1, sort_keys=True, allow_nan=False)

    @staticmethod
    def from_json(data: bytes, where: str) -> "Manifest":
        """Parse manifest.json.

        Raises:
            CheckpointError: if it is not valid.
            OtherFormatError: if it is of another format version.
        """
        content = read.parse_json(data, where, CheckpointError)
        if not isinstance(content, dict) or "format_version" not in content:
            raise CheckpointError(f"{where}: expected a checkpoint manifest, found other JSON")
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise OtherFormatError(
                f"{where}: expected checkpoint format {FORMAT_VERSION}, found {version!r}; read it with the version "
                "of d2v2ds that wrote it, or start a new run"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise CheckpointError(f"{where}: damaged, its checksum differs from its content")
        manifest = read.validate(Manifest, content, where, CheckpointError)
        for name, record in manifest.files.items():
            read.check_name(name, where, CheckpointError)
            if record.keys() != {"bytes", "crc32"}:
                raise CheckpointError(f"{where}: expected bytes and crc32 of {name}, found {', '.join(record)}")
        if COUNTERS[0] not in manifest.counters or not set(COUNTERS) >= manifest.counters.keys():
            raise CheckpointError(f"{where}: expected the counters {COUNTERS}, found {tuple(manifest.counters)}")
        return manifest


def _checksum(content: dict[str, Any]) -> int:
    return crc32(json.dumps(content, sort_keys=True).encode())


SHARD_FILE = re.compile(r"(student|teacher|optimizer\..+)\.rank\d{5,}\.safetensors")
"""Names of the files that hold the pieces."""


def shard_file(kind: str, rank: int) -> str:
    """Name of the file with one rank's pieces of one kind: student, teacher, optimizer.<state>."""
    return f"{kind}.rank{rank:05d}.safetensors"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: if the folder is missing or unfinished, or the manifest is damaged.
    """
    file = path / MANIFEST
    if not read.is_there(file, CheckpointError):
        raise CheckpointError(f"{path}: no {MANIFEST}; the folder is no checkpoint, or its saving was interrupted")
    return Manifest.from_json(read.read_bytes(file, CheckpointError), str(file))


def named_tag(folder: Path, name: str) -> str | None:
    """The tag that `latest` or `best` names; None, with a warning, if the file is damaged."""
    file = folder / name
    if not read.is_there(file, CheckpointError):
        return None
    try:
        tag = read.read_text(file, CheckpointError, limit=4096).strip()
        read.check_name(tag, file, CheckpointError)
    except CheckpointError as error:
        if file.exists():
            logger.warning("%s; going by step numbers", error)
        return None
    return tag


def steps_by_tag(folder: Path) -> dict[str, int]:
    """Optimizer step of each finished checkpoint; -1 where the manifest cannot be read."""
    steps: dict[str, int] = {}
    for path in _checkpoint_folders(folder):
        if (path / MANIFEST).is_file():
            try:
                steps[path.name] = read_manifest(path).counters["global_steps"]
            except CheckpointError:
                if path.is_dir():  # else removed meanwhile
                    steps[path.name] = -1
    return steps


def finished_tags(folder: Path) -> list[str]:
    """Finished checkpoints in the order in which to try them: `latest`, then by falling step number."""
    steps, latest = steps_by_tag(folder), named_tag(folder, LATEST)
    return sorted(steps, key=lambda tag: (tag != latest, -steps[tag], tag))


def tags_without_manifest(folder: Path) -> list[str]:
    """Checkpoint folders that lost their manifest, and checkpoints that `latest` or `best` names but that are gone.

    A save that was interrupted leaves none: its folder has another name until it is whole.
    """
    lost = {path.name for path in _checkpoint_folders(folder) if not (path / MANIFEST).is_file() and path.is_dir()}
    for name in (LATEST, BEST):
        tag = named_tag(folder, name)
        # a run at work removes an old `best` once it names another
        if tag is not None and not (folder / tag / MANIFEST).is_file() and named_tag(folder, name) == tag:
            lost.add(tag)
    return sorted(lost)


def _checkpoint_folders(folder: Path) -> list[Path]:
    try:
        paths = list(folder.iterdir()) if read.is_there(folder, CheckpointError) else []
        return [path for path in paths if path.is_dir() and path.suffix != PARTIAL]
    except OSError as error:
        raise reading_error(folder, error, CheckpointError) from error


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong into a checkpoint, by name."""
    kept = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def crc32_of(path: Path) -> int:
    """Checksum of a file."""
    return read.crc32_of(path, CheckpointError)


def read_plain(path: Path) -> dict[str, Any]:
    """Read the caller's state as `Saver` stored it: plain containers, numbers, strings and tensors.

    Raises:
        CheckpointError: the file holds anything else; nothing in it is run.
    """
    with read.open_regular(path, CheckpointError) as file:
        try:
            unpacked = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
            if unpacked > MAX_PLAIN_BYTES:
                raise CheckpointError(f"{path}: expected at most {MAX_PLAIN_BYTES:,} bytes, found {unpacked:,}")
            file.seek(0)
            state = torch.load(file, weights_only=True, map_location="cpu")
        except _NO_PLAIN_VALUES as error:
            said = str(error).partition("\n")[0]
            raise CheckpointError(f"{path}: expected plain values, refused to read anything else: {said}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary, found {type(state).__name__}")
    return state


def file_faults(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return one message for each damaged or missing file of a checkpoint folder."""
    faults = []
    for name in names:
        expected, file = manifest.files[name], path / name
        if not file.is_file():
            faults.append(f"{file}: missing")
            continue
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                faults.append(f"{file}: expected {expected['bytes']} bytes, found {size}")
            elif crc32_of(file) != expected["crc32"]:
                faults.append(f"{file}: damaged, its checksum differs from the manifest")
        except (FileNotFoundError, CheckpointError) as error:
            faults.append(f"{file}: {error}")
    return faults


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """Settings of network and objective with which a checkpoint was saved, as plain values.

    Raises:
        CheckpointError: it has none, or their file is damaged.
    """
    path, manifest = checkpoint / "client.pt", read_manifest(checkpoint)
    none = f"{path}: expected the settings of model and objective, found none; no run's checkpoint"
    if path.name not in manifest.files:
        raise CheckpointError(none)
    if faults := file_faults(checkpoint, manifest, [path.name]):
        raise CheckpointError(faults[0])
    settings = read_plain(path).get("settings")
    if not isinstance(settings, dict) or not {"model", "objective"} <= settings.keys():
        raise CheckpointError(none)
    return settings


class ShardReader:
    """Reads any interval of any flattened parameter from the shard files of one kind."""

    def __init__(self, path: Path, manifest: Manifest, kind: str, ranks: Iterable[int] | None = None) -> None:
        """
        Args:
            path: folder of the checkpoint.
            manifest: of the same.
            kind: of the pieces: student, teacher, optimizer.<state>.
            ranks: look into the files of these only; None looks into all.
        """
        self._path = path
        self._kind = kind
        self._shapes = manifest.parameters
        self._pieces: dict[str, list[tuple[int, int, Path]]] = {}
        for rank in range(manifest.world_size) if ranks is None else ranks:
            file = path / shard_file(kind, rank)
            for name, (offset, numel) in _pieces_of(file).items():
                self._pieces.setdefault(name, []).append((offset, numel, file))

    def names(self) -> list[str]:
        """Parameters that these files hold, sorted."""
        return sorted(self._pieces)

    def read(self, name: str, offset: int, numel: int) -> Tensor:
        """Elements `offset` to `offset + numel` of the flattened parameter.

        Returns:
            (numel,) in the stored type, on the CPU.

        Raises:
            CheckpointError: if the files do not hold all of them.
        """
        parts, reached = [], offset
        for start, length, file in sorted(self._pieces.get(name, ()), key=lambda piece: piece[:2]):
            first, last = max(start, reached), min(start + length, offset + numel)
            if first > reached or last <= first:
                continue
            with safe_open(file, "pt") as handle:
                parts.append(handle.get_slice(name)[first - start : last - start])
            reached = last
        if reached != offset + numel:
            raise CheckpointError(f"{self._path}: {self._kind} {name} lacks elements from {reached} on")
        return torch.cat(parts) if parts else torch.zeros(0)

    def whole(self, name: str) -> Tensor:
        """The parameter in its full shape, fp32, on the CPU."""
        if name not in self._shapes:
            raise CheckpointError(f"{self._path}: the manifest does not list {self._kind} {name}")
        shape = self._shapes[name]
        return self.read(name, 0, math.prod(shape)).float().reshape(shape)


def _pieces_of(file: Path) -> dict[str, tuple[int, int]]:
    """Where the pieces of a shard file begin in the whole parameters, and how many elements each has."""
    try:
        with safe_open(file, "pt") as handle:
            offsets = json.loads((handle.metadata() or {})["offsets"])
            found = {name: (int(offset), handle.get_slice(name).get_shape()) for name, offset in offsets.items()}
    except OSError as error:
        raise reading_error(file, error, CheckpointError) from error
    except (
        SafetensorError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{file}: damaged, no flat pieces with their offsets: {error!r}") from error
    if bad := [name for name, (offset, shape) in found.items() if offset < 0 or len(shape) != 1]:
        raise CheckpointError(f"{file}: damaged, expected flat pieces, found others: {', '.join(bad[:5])}")
    return {name: (offset, shape[0]) for name, (offset, shape) in found.items()}


def iterate_student(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each whole fp32 master weight and buffer of the student in a checkpoint folder, one at a time."""
    yield from _iterate(path, "student")


def iterate_teacher(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each whole fp32 average and buffer of the teacher in a checkpoint folder, one at a time.

    Raises:
        CheckpointError: if the checkpoint has no teacher.
    """
    if not read_manifest(path).teacher_parameters:
        raise CheckpointError(f"{path}: this checkpoint has no teacher")
    yield from _iterate(path, "teacher")


def _iterate(path: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    manifest = read_manifest(path)
    buffers = f"buffers.{kind}.safetensors"
    own_files = [name for name in manifest.files if name.startswith(f"{kind}.") or name == buffers]
    faults = file_faults(path, manifest, own_files)
    if faults:
        raise CheckpointError("\n".join(faults))
    try:
        reader = ShardReader(path, manifest, kind)
        for name in reader.names():
            yield name, reader.whole(name)
        with safe_open(path / buffers, "pt") as handle:
            for name in sorted(handle.keys()):
                yield name, handle.get_tensor(name)
    except (SafetensorError, FileNotFoundError) as error:
        gone = "removed while it was read; a run at work keeps few: take another tag" if not path.is_dir() else error
        raise CheckpointError(f"{path}: {gone}") from error
