"""Write an export: a folder or a file that is whole or not there. Holds one tensor in memory.

`export_folder.py` describes the files and reads them.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.export_folder import (
    CONFIG_NAME,
    DESCRIPTION_KEY,
    METADATA,
    PIECE_BYTES,
    Description,
    Kind,
    Layout,
    Part,
    is_export,
    is_exported_file,
)
from d2v2ds.io.durable import sync
from d2v2ds.io.safetensors_header import make_header


def write_file(path: Path, description: Description, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file that loads with `d2v2ds.load_model` and with safetensors alone; whole or not there.

    Args:
        path: to write; an earlier file of ours is replaced.
        description: of the weights.
        layout: all tensors that will come.
        tensors: they, each once, in any order, on any device.

    Raises:
        CheckpointError: if `path` is something else.
        ValueError: if the tensors are not those of the layout.
    """
    path = path.resolve()
    if path.exists() and not is_exported_file(path):
        raise CheckpointError(f"{path}: expected no file, or the file of an earlier export; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    values = description.to_dict()
    try:
        _write_pieces("model", layout, tensors, {partial: list(layout)}, {DESCRIPTION_KEY: json.dumps(values)})
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name only when the block ends well.

    An export folder that is already there is replaced then; anything else is not touched. Killed between the two
    renames, the earlier export waits beside under a hidden name, and the next call puts it back first.

    Raises:
        CheckpointError: if `path` is a file, the current folder, or a folder with anything but an export in it.
    """
    path = path.resolve()  # a link stays one, and `.` and `..` get the names that they stand for
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "replaced"))
    if not path.exists() and is_export(old):
        old.rename(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_export(path)):
        raise CheckpointError(f"{path}: expected no file, or the folder of an earlier export; give another name")
    if path.is_dir() and Path.cwd().is_relative_to(path):
        raise CheckpointError(f"{path}: is the current folder, which cannot be replaced; go elsewhere or give another")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            sync(file)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        sync(path.parent)
    except BaseException:
        if not path.exists() and old.exists():
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_config(folder: Path, description: Description, extra: Mapping[str, Any]) -> None:
    """Write config.json.

    Args:
        folder: being written.
        description: of the weights.
        extra: further top-level keys, which other programs read.
    """
    values = description.to_dict() | dict(extra)
    (folder / CONFIG_NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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
    _write_pieces(part, layout, tensors, {folder / name: piece for name, piece in zip(names, pieces, strict=True)})


def _write_pieces(
    part: Part,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    pieces: Mapping[Path, list[str]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Put every tensor into the file that is to hold it."""
    waiting = set(layout)
    with contextlib.ExitStack() as stack:
        places = {}
        for path, piece in pieces.items():
            file = stack.enter_context(path.open("wb"))
            kinds = {key: (layout[key].dtype, layout[key].shape) for key in piece}
            header, offsets = make_header(kinds, {**METADATA, **(metadata or {})})
            file.write(header)
            places.update({key: (file, offset) for key, offset in offsets.items()})
        for name, tensor in tensors:
            if name not in waiting or Kind.of(tensor) != layout[name]:
                raise ValueError(f"{part}: did not expect {name} {Kind.of(tensor)} (now), layout {layout.get(name)}")
            waiting.remove(name)
            file, offset = places[name]
            file.seek(offset)
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    if waiting:
        raise ValueError(f"{part}: tensors that did not come: {', '.join(sorted(waiting))}")


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
