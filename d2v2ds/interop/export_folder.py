"""Our own export folder: weights that load anywhere, and everything that must be known of them.

    config.json           `Description`: network, preprocessing, where the weights come from; keys of the hub besides
    model.safetensors     the student by our parameter names; above 5 GB in pieces, with model.safetensors.index.json
    teacher.safetensors   the average, where it was asked for: what a run needs to go on from these weights
    head.safetensors      what a fine-tuned official checkpoint has behind its encoder, by its own names
    tokenizer.*           of text
    README.md             the model card

A single file instead, NAME.safetensors, has the `Description` in its metadata and no tokenizer.

In: tensors one at a time, in any order and of any floating type. Out: a folder or file that is whole or not there.
Writing holds one tensor in memory, reading maps the files.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.preprocessing import Preprocessing, published_preprocessing
from d2v2ds.io.durable import sync
from d2v2ds.io.safetensors_header import DTYPES, make_header
from d2v2ds.model.trunk import Data2Vec2, ModelConfig

FORMAT = "d2v2ds-model"
SCHEMA_VERSION = 3
OLD_FILE_FORMAT = "d2v2ds-model-2"
"""What `d2v2ds.export` wrote before there were folders: one file with its description in the metadata."""
FILE_SUFFIX = ".safetensors"
DESCRIPTION_KEY = "d2v2ds"
"""Where the metadata of a single file hold what config.json holds of a folder."""
CONFIG_NAME = "config.json"
PIECE_BYTES = 5_000_000_000
"""Weights of more bytes are divided into several files."""

Part = Literal["model", "teacher", "head"]
PARTS: tuple[Part, ...] = ("model", "teacher", "head")
Weights = Literal["student", "teacher"]

_METADATA = {"format": "pt"}
"""What transformers expects in every file."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What config.json says of the weights."""

    model: ModelConfig
    preprocessing: Preprocessing
    origin: dict[str, Any]
    """Plain values: how these weights came about, such as `command`, `git_revision`, `step`, `official`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "model": TypeAdapter(ModelConfig).dump_python(self.model, mode="json"),
            "preprocessing": self.preprocessing,
            "origin": self.origin,
        }


@dataclass(frozen=True)
class Kind:
    """Shape and type of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(tensor: Tensor) -> "Kind":
        """Those of a tensor."""
        return Kind(tuple(tensor.shape), tensor.dtype)


Layout = Mapping[str, Kind]
"""Every tensor of a part, by name."""


def write_file(path: Path, description: Description, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """One file that loads with `d2v2ds.load_model`, and with safetensors alone; whole or not there.

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
    if path.exists() and not _is_exported_file(path):
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


def is_export(path: Path) -> bool:
    """Whether the folder was written by us, of whatever version; many other programs write a config.json too."""
    try:
        values = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def _is_exported_file(path: Path) -> bool:
    try:
        metadata = _metadata(path)
    except CheckpointError:
        return False
    return DESCRIPTION_KEY in metadata or metadata.get("format") == OLD_FILE_FORMAT


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
            header, offsets = make_header(kinds, {**_METADATA, **(metadata or {})})
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


class ModelFolder:
    """An export that can be read: a folder or a single file."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: with what was found and what to do.
        """
        self.path = path
        self._places: dict[Part, dict[str, Path]] = {}
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder; expected an exported model")
        values = self._read_single_file() if path.is_file() else self._read_config()
        try:
            model = TypeAdapter(ModelConfig).validate_python(values["model"])
            self.description = Description(
                model=model, preprocessing=values["preprocessing"], origin=values.get("origin", {})
            )
            lacking = set(model.modalities.active()) - set(values["preprocessing"])
            if lacking:
                raise CheckpointError(f"{path}: config.json has no preprocessing of {', '.join(sorted(lacking))}")
            if tokenizer := values["preprocessing"].get("text", {}).get("file"):
                _inside(path / CONFIG_NAME, tokenizer)
        except (KeyError, TypeError, AttributeError, ValidationError) as error:
            raise CheckpointError(f"{path}: not the description of a model: {error}") from error

    def has(self, part: Part) -> bool:
        """Whether the part is there."""
        return bool(self._files(part))

    def layout(self, part: Part) -> dict[str, Kind]:
        """Every tensor of a part; empty if it is not there."""
        found: dict[str, Kind] = {}
        for file in self._files(part):
            with _opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118  (not a dictionary)
                    piece = handle.get_slice(name)
                    dtype = DTYPES.get(piece.get_dtype())
                    if dtype is None or not dtype.is_floating_point:
                        raise CheckpointError(f"{file}: {name} is {piece.get_dtype()}, expected a floating type")
                    found[name] = Kind(tuple(piece.get_shape()), dtype)
        return found

    def tensors(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a part one after another, as stored, on the CPU."""
        for file in self._files(part):
            with _opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118
                    yield name, handle.get_tensor(name)

    def tensor(self, part: Part, name: str) -> Tensor:
        """One tensor, as stored; its bytes are read when they are used.

        Raises:
            KeyError: there is no such tensor.
        """
        if part not in self._places:
            self._places[part] = {}
            for file in self._files(part):
                with _opened(file) as handle:
                    self._places[part].update(dict.fromkeys(handle.keys(), file))
        with _opened(self._places[part][name]) as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def _files(self, part: Part) -> list[Path]:
        if self.path.is_file():
            return [self.path] if part == "model" else []
        index = self.path / f"{part}.safetensors.index.json"
        if index.is_file():
            try:
                names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: expected a weight_map, found: {error!r}") from error
            return [self.path / _inside(index, name) for name in names]
        single = self.path / f"{part}.safetensors"
        return [single] if single.is_file() else []

    def _read_config(self) -> dict[str, Any]:
        file = self.path / CONFIG_NAME
        if (self.path / "checkpoints").is_dir():
            raise CheckpointError(
                f"{self.path}: the folder of a run; python -m d2v2ds.export {self.path} --to FOLDER makes a model of it"
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: expected the description of an exported model, found: {error}") from error
        return _of_this_version(file, values)

    def _read_single_file(self) -> dict[str, Any]:
        if self.path.suffix in (".pt", ".pth"):
            raise CheckpointError(
                f"{self.path}: a file of torch.save; of an official checkpoint python -m d2v2ds.interop.fairseq import "
                f"{self.path} --out FOLDER makes a model"
            )
        metadata = _metadata(self.path)
        if DESCRIPTION_KEY in metadata:
            try:
                values = json.loads(metadata[DESCRIPTION_KEY])
            except ValueError as error:
                raise CheckpointError(f"{self.path}: metadata {DESCRIPTION_KEY} is not JSON: {error}") from error
            return _of_this_version(self.path, values)
        if metadata.get("format") != OLD_FILE_FORMAT or metadata.get("weights") != "student":
            raise CheckpointError(
                f"{self.path}: expected a file with {DESCRIPTION_KEY} in its metadata, or of format {OLD_FILE_FORMAT} "
                f"with a student; found {metadata.get('weights')} in format {metadata.get('format')}; export it again "
                "with python -m d2v2ds.export RUN --to FOLDER"
            )
        model = TypeAdapter(ModelConfig).validate_json(metadata["model"])
        return {
            "model": model,
            "preprocessing": published_preprocessing(model),
            "origin": {"kind": "run", "step": int(metadata["step"])},
        }


def _of_this_version(where: Path, values: Any) -> dict[str, Any]:
    """The description of an export, if we can read it.

    Raises:
        CheckpointError: it is another program's, or of a later version.
    """
    kind, version = (values.get(key) for key in ("format", "schema_version")) if isinstance(values, dict) else "  "
    if kind != FORMAT:
        raise CheckpointError(f"{where}: expected format {FORMAT}, found {kind!r}; was it written by another tool?")
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{where}: schema version {version}, this version of d2v2ds reads {SCHEMA_VERSION}; update d2v2ds"
        )
    return dict(values)


def _metadata(file: Path) -> dict[str, str]:
    with _opened(file) as handle:
        return dict(handle.metadata() or {})


def _inside(where: Path, name: Any) -> str:
    """A file name that a folder from elsewhere gives.

    Raises:
        CheckpointError: it leads out of the folder.
    """
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{where}: expected the name of a file beside it, found {name!r}")
    return name


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: expected a whole safetensors file, found: {error}") from error


def load_encoder(folder: ModelFolder, weights: Weights = "student") -> Data2Vec2:
    """The network without its decoders, fp32, in eval mode, on the CPU.

    Args:
        folder: the export.
        weights: the student's, or the teacher's with the student's local encoder where the teacher has none.

    Raises:
        CheckpointError: listing what is missing or has another shape.
    """
    if weights == "teacher" and not folder.has("teacher"):
        raise CheckpointError(f"{folder.path}: has no teacher; export with --teacher to have one")
    with torch.device("meta"):
        model = Data2Vec2(folder.description.model)
    model.decoders = nn.ModuleDict()
    state = {name: tensor for name, tensor in folder.tensors("model") if not name.startswith("decoders.")}
    if weights == "teacher":
        state |= folder.tensors("teacher")
    require_layout(folder.path, {name: Kind.of(tensor) for name, tensor in state.items()}, model.state_dict())
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(False).eval()


def require_layout(place: Path, found: Layout, expected: Mapping[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: listing every difference.
    """
    faults = [f"{name}: missing, expected {tuple(expected[name].shape)}" for name in expected.keys() - found.keys()]
    faults += [f"{name}: not a tensor of this network" for name in found.keys() - expected.keys()]
    for name in found.keys() & expected.keys():
        if found[name].shape != tuple(expected[name].shape):
            faults.append(f"{name}: expected {tuple(expected[name].shape)}, found {found[name].shape}")
    if faults:
        more = f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise CheckpointError(f"{place}: does not fit its own description:\n" + "\n".join(sorted(faults)[:20]) + more)
