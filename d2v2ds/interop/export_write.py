"""Write an export: a folder or a file that is whole or not there. Holds one tensor in memory.

`export_folder.py` describes the files and reads them.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.export_folder import (
    CHECKSUMS_KEY,
    CONFIG_NAME,
    DESCRIPTION_KEY,
    FILES_KEY,
    METADATA,
    PIECE_BYTES,
    Description,
    Kind,
    Layout,
    Part,
    bytes_of,
    is_export,
    is_exported_file,
)
from d2v2ds.io.crc import crc32
from d2v2ds.io.durable import sync
from d2v2ds.io.output import beside, sole_writer, whole_file
from d2v2ds.io.read import read_json
from d2v2ds.io.safetensors_header import make_header

logger = logging.getLogger(__name__)


def write_file(path: Path, description: Description, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file that loads with `d2v2ds.load_model` and with safetensors alone; whole or not there.

    Args:
        path: to write; an earlier file of ours is replaced.
        description: of the weights.
        layout: all tensors that will come.
        tensors: they, each once, in any order, on any device.

    Raises:
        CheckpointError: if `path` is something else, or another process writes it.
        ValueError: if the tensors are not those of the layout.
    """
    metadata = {DESCRIPTION_KEY: json.dumps(description.to_dict(), allow_nan=False)}
    with sole_writer(path, CheckpointError):
        if path.exists() and not is_exported_file(path):
            raise CheckpointError(f"{path}: expected no file, or the file of an earlier export; give another name")
        with whole_file(path) as file:
            _write_pieces("model", layout, tensors, {file: list(layout)}, metadata)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name only when the block ends well.

    An export folder that is already there is replaced then; anything else, and a folder with files that no export
    wrote, is not touched. Killed between the two renames, the earlier export waits beside under a hidden name, and the
    next call puts it back first.

    Raises:
        CheckpointError: if `path` is a file, the current folder, or a folder with anything but an export in it, or
            another process writes it.
    """
    path = path.resolve()  # a link stays one, and `.` and `..` get the names that they stand for
    partial, old = beside(path, "partial"), beside(path, "replaced")
    with sole_writer(path, CheckpointError):
        if not path.exists() and is_export(old) and not old.is_symlink():
            old.rename(path)
        _require_replaceable(path)
        _remove_leftover(partial)
        _remove_leftover(old)
        partial.mkdir()
        (partial / _WRITING).touch()
        try:
            yield partial
            for file in (*partial.iterdir(), partial):
                sync(file)
            if path.exists():
                path.rename(old)
            partial.rename(path)
            (path / _WRITING).unlink()
            sync(path.parent)
        except BaseException:
            if not path.exists() and old.exists():
                old.rename(path)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _remove_export(old)


_WRITING = ".writing"
"""File in a folder that is being written: what a killed export leaves can be told from what somebody else put there."""
_FORMER_FILES = (
    CONFIG_NAME, "README.md", "run.yaml", "curves.png", "*.safetensors", "*.safetensors.index.json", "*.py",
    "tokenizer*", "*_config.json",
)  # fmt: skip
"""Files of exports that have no list of them."""


def _require_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not is_export(path)):
        raise CheckpointError(f"{path}: expected no file, or the folder of an earlier export; give another name")
    if foreign := sorted({entry.name for entry in path.iterdir()} - _own_files(path)):
        shown = ", ".join(foreign[:8]) + ", ..." * (len(foreign) > 8)
        raise CheckpointError(
            f"{path}: expected the files of an earlier export alone, found {shown}, which no export wrote; move them "
            "elsewhere, or give another name"
        )
    if Path.cwd().is_relative_to(path):
        raise CheckpointError(f"{path}: is the current folder, which cannot be replaced; go elsewhere or give another")


def _own_files(folder: Path) -> set[str]:
    """Names in a folder that its export wrote; no folders."""
    if not (folder / CONFIG_NAME).exists():
        return set()
    listed = read_json(folder / CONFIG_NAME, CheckpointError).get(FILES_KEY)
    names = {entry.name for entry in folder.iterdir() if entry.is_symlink() or not entry.is_dir()}
    if isinstance(listed, list):
        return names & {_WRITING, *(name for name in listed if isinstance(name, str))}
    return {name for name in names if any(fnmatch(name, pattern) for pattern in _FORMER_FILES)}


def _remove_leftover(folder: Path) -> None:
    """Remove what a killed export left under a hidden name.

    Raises:
        CheckpointError: it is of somebody else.
    """
    if folder.is_symlink():
        folder.unlink()
    elif (folder / _WRITING).is_file():
        shutil.rmtree(folder)
    elif folder.is_dir() and {entry.name for entry in folder.iterdir()} <= _own_files(folder):
        _remove_export(folder)
    elif folder.exists():
        raise CheckpointError(f"{folder}: expected nothing, or what a killed export left, found files of somebody else")


def _remove_export(folder: Path) -> None:
    """Remove the files that an export wrote, and the folder if it is empty then."""
    if not folder.exists():
        return
    try:
        for name in sorted(_own_files(folder), key=lambda name: name == CONFIG_NAME):  # last: it has the list
            (folder / name).unlink()
        folder.rmdir()
    except OSError as error:
        logger.warning("%s: the earlier export could not be removed: %s", folder, error)


def write_config(folder: Path, description: Description, extra: Mapping[str, Any]) -> None:
    """Write config.json, last of all: it lists the files beside it.

    Args:
        folder: being written.
        description: of the weights.
        extra: further top-level keys, which other programs read.
    """
    files = {CONFIG_NAME, *(entry.name for entry in folder.iterdir() if entry.name != _WRITING)}
    values = description.to_dict() | dict(extra) | {FILES_KEY: sorted(files)}
    (folder / CONFIG_NAME).write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(
    folder: Path, part: Part, layout: Layout, tensors: Iterable[tuple[str, Tensor]], piece_bytes: int = PIECE_BYTES
) -> None:
    """Write one part of a model, a tensor at a time.

    Args:
        folder: being written.
        part: which; decides the names of the files.
        layout: all tensors that will come.
        tensors: they, each once, in any order, on any device.
        piece_bytes: most bytes of a file.

    Raises:
        ValueError: if the tensors are not those of the layout.
    """
    pieces = _divide(layout, piece_bytes)
    names = [f"{part}.safetensors"]
    if len(pieces) > 1:
        names = [f"{part}-{number:05d}-of-{len(pieces):05d}.safetensors" for number in range(1, len(pieces) + 1)]
        index = {
            "metadata": {"total_size": sum(kind.num_bytes for kind in layout.values())},
            "weight_map": {name: file for file, piece in zip(names, pieces, strict=True) for name in piece},
        }
        (folder / f"{part}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in names]
        _write_pieces(part, layout, tensors, dict(zip(files, pieces, strict=True)))


def _write_pieces(
    part: Part,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    pieces: Mapping[IO[bytes], list[str]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Put every tensor into the file that is to hold it."""
    waiting = set(layout)
    places, checksums = {}, dict.fromkeys(layout, "00000000")

    def write_header(file: IO[bytes], piece: list[str]) -> dict[str, int]:
        kinds = {key: (layout[key].dtype, layout[key].shape) for key in piece}
        own = {CHECKSUMS_KEY: json.dumps({key: checksums[key] for key in piece})}
        header, offsets = make_header(kinds, {**METADATA, **(metadata or {}), **own})
        file.seek(0)
        file.write(header)
        return offsets

    for file, piece in pieces.items():
        places.update({key: (file, offset) for key, offset in write_header(file, piece).items()})
    for name, tensor in tensors:
        if name not in waiting or Kind.of(tensor) != layout[name]:
            raise ValueError(f"{part}: did not expect {name} {Kind.of(tensor)} (now), layout {layout.get(name)}")
        waiting.remove(name)
        file, offset = places[name]
        file.seek(offset)
        content = bytes_of(tensor)
        checksums[name] = f"{crc32(content):08x}"
        file.write(content)
    if waiting:
        raise ValueError(f"{part}: tensors that did not come: {', '.join(sorted(waiting))}")
    for file, piece in pieces.items():
        write_header(file, piece)  # of the same length, with the checksums


def _divide(layout: Layout, piece_bytes: int) -> list[list[str]]:
    """Names in the order of the layout, cut where a file would become too large."""
    pieces: list[list[str]] = [[]]
    size = 0
    for name, kind in layout.items():
        if pieces[-1] and size + kind.num_bytes > piece_bytes:
            pieces.append([])
            size = 0
        pieces[-1].append(name)
        size += kind.num_bytes
    return pieces
