"""Our own export folder: weights that load anywhere, and everything that must be known of them.

    config.json             `Description`: network, preprocessing, where the weights come from; keys of the hub besides
    model.safetensors       the student's trunk; above 5 GB in pieces, with model.safetensors.index.json
    objective.safetensors   what the objective trains beside the trunk, such as decoders: for runs that go on
    teacher.safetensors     the averaged trunk, where it was asked for
    head.safetensors        what a fine-tuned official checkpoint has behind its encoder, by its own names
    tokenizer.*             of text
    README.md               the model card

A single file instead, NAME.safetensors, has the `Description` in its metadata, the objective's tensors under
`objective.` and no tokenizer.

In: tensors one at a time, in any order and of any floating type. Out: a folder or file that is whole or not there.
Writing holds one tensor in memory, reading maps the files.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2v2ds.errors import CheckpointError, ConfigError
from d2v2ds.io.safetensors_header import DTYPES
from d2v2ds.modalities.known import modality_of
from d2v2ds.modalities.settings import read_trunk, write_trunk
from d2v2ds.model.trunk import Trunk, TrunkConfig

FORMAT = "d2v2ds-model"
SCHEMA_VERSION = 1
FILE_SUFFIX = ".safetensors"
DESCRIPTION_KEY = "d2v2ds"
"""Metadata key of a single file for what config.json holds in a folder."""
CONFIG_NAME = "config.json"
PIECE_BYTES = 5_000_000_000
"""Weights of more bytes are divided into several files."""

Part = Literal["model", "objective", "teacher", "head"]
OBJECTIVE_PREFIX = "objective."
"""Prefix of the objective's tensors in a single file."""
Weights = Literal["student", "teacher"]

Preprocessing = dict[str, dict[str, Any]]
"""Modality -> what happens to its input before the network reads it; `Modality.describe_preprocessing` makes it."""

METADATA = {"format": "pt"}
"""Metadata that transformers expects in every file."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Contents of config.json."""

    model: TrunkConfig
    objective: dict[str, Any] | None = None
    """Settings of the objective that trained the weights, as plain values; None if they are not known."""
    preprocessing: Preprocessing
    origin: dict[str, Any]
    """Plain values: how these weights came about, such as `command`, `git_revision`, `step`, `official`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "model": write_trunk(self.model),
            "objective": self.objective,
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
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(tensor: Tensor) -> "Kind":
        """Kind of a tensor."""
        return Kind(tuple(tensor.shape), tensor.dtype)


Layout = Mapping[str, Kind]
"""Every tensor of a part, by name."""


def is_export(path: Path) -> bool:
    """Return True if d2v2ds wrote the folder; many other programs write a config.json too."""
    try:
        values = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def is_exported_file(path: Path) -> bool:
    """Return True if d2v2ds wrote the file."""
    try:
        metadata = _metadata(path)
    except CheckpointError:
        return False
    return DESCRIPTION_KEY in metadata


class ModelFolder:
    """An export that can be read: a folder or a single file."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: with what was found and what to do.
        """
        self.path = path
        self._places: dict[Part, dict[str, tuple[Path, str]]] = {}
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder; expected an exported model")
        values = self._read_single_file() if path.is_file() else self._read_config()
        try:
            model = read_trunk(values["model"], str(path))
            self.description = Description(
                model=model,
                objective=values.get("objective"),
                preprocessing=values["preprocessing"],
                origin=values.get("origin", {}),
            )
            lacking = set(model.modalities) - set(values["preprocessing"])
            if lacking:
                raise CheckpointError(f"{path}: config.json has no preprocessing of {', '.join(sorted(lacking))}")
            for name in model.modalities:
                for file in modality_of(name, str(path)).files_beside(values["preprocessing"][name]):
                    _inside(path / CONFIG_NAME, file)
        except (ConfigError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise CheckpointError(f"{path}: not the description of a model: {error}") from error

    def has(self, part: Part) -> bool:
        """Return True if the part is there."""
        return bool(self._files(part)) and bool(self.layout(part))

    def layout(self, part: Part) -> dict[str, Kind]:
        """Every tensor of a part; empty if it is not there."""
        found: dict[str, Kind] = {}
        for file in self._files(part):
            with _opened(file) as handle:
                for name, stored in self._names(part, handle):
                    piece = handle.get_slice(stored)
                    dtype = DTYPES.get(piece.get_dtype())
                    if dtype is None or not dtype.is_floating_point:
                        raise CheckpointError(f"{file}: {name} is {piece.get_dtype()}, expected a floating type")
                    found[name] = Kind(tuple(piece.get_shape()), dtype)
        return found

    def tensors(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a part one after another, as stored, on the CPU."""
        for file in self._files(part):
            with _opened(file) as handle:
                for name, stored in self._names(part, handle):
                    yield name, handle.get_tensor(stored)

    def tensor(self, part: Part, name: str) -> Tensor:
        """Read one tensor as stored; its bytes are read when they are used.

        Raises:
            KeyError: there is no such tensor.
        """
        if part not in self._places:
            self._places[part] = {}
            for file in self._files(part):
                with _opened(file) as handle:
                    self._places[part].update({own: (file, stored) for own, stored in self._names(part, handle)})
        file, stored = self._places[part][name]
        with _opened(file) as handle:
            tensor: Tensor = handle.get_tensor(stored)
        return tensor

    def _names(self, part: Part, handle: Any) -> Iterator[tuple[str, str]]:
        """Names of a part's tensors in a file: ours, and as they are stored."""
        is_shared = self.path.is_file()
        for stored in handle.keys():  # noqa: SIM118  (not a dictionary)
            is_of_objective = is_shared and stored.startswith(OBJECTIVE_PREFIX)
            if not is_shared:
                yield stored, stored
            elif is_of_objective == (part == "objective"):
                yield stored.removeprefix(OBJECTIVE_PREFIX), stored

    def _files(self, part: Part) -> list[Path]:
        if self.path.is_file():
            return [self.path] if part in ("model", "objective") else []
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
        raise CheckpointError(
            f"{self.path}: expected a file of d2v2ds.export, with {DESCRIPTION_KEY} in its metadata, found "
            f"{', '.join(sorted(metadata)) or 'none'}; export it again with python -m d2v2ds.export RUN --to FOLDER"
        )


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
            f"{where}: expected schema version {SCHEMA_VERSION}, found {version}; export the run again with this "
            "version of d2v2ds, or install the version that wrote it"
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


def load_trunk(folder: ModelFolder, weights: Weights = "student") -> Trunk:
    """Load the trunk, fp32, in eval mode, without gradient, on the CPU.

    Args:
        folder: the export.
        weights: the student's, or the teacher's with the student's local encoder where the teacher has none.

    Raises:
        CheckpointError: listing what is missing or has another shape.
    """
    if weights == "teacher" and not folder.has("teacher"):
        raise CheckpointError(f"{folder.path}: has no teacher; export with --teacher to have one")
    with torch.device("meta"):
        trunk = Trunk(folder.description.model)
    state = dict(folder.tensors("model"))
    if weights == "teacher":
        state |= folder.tensors("teacher")
    require_layout(folder.path, {name: Kind.of(tensor) for name, tensor in state.items()}, trunk.state_dict())
    trunk.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return trunk.requires_grad_(False).eval()


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
