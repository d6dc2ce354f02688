"""Our own export folder: weights that load anywhere, and everything that must be known of them.

    config.json             `Description`: network, preprocessing, where the weights come from; keys of the hub besides
    model.safetensors       the student's trunk; above 5 GB in pieces, with model.safetensors.index.json
    objective.safetensors   what the objective trains beside the trunk: decoders, or the head of a fine-tuned model
    teacher.safetensors     the averaged trunk, where it was asked for
    tokenizer.*             of text
    units.model             of a recogniser of sentencepiece units
    README.md               the model card

A single file instead, NAME.safetensors, has the `Description` in its metadata, the objective's tensors under
`objective.` and no tokenizer.

In: tensors one at a time, in any order and of any floating type. Out: a folder or file that is whole or not there.
Writing holds one tensor in memory, reading maps the files.
"""

import contextlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2v2ds.errors import CheckpointError, ConfigError
from d2v2ds.io.crc import crc32
from d2v2ds.io.machine_faults import is_machine_fault, reading_error
from d2v2ds.io.read import check_name, open_regular, parse_json, read_json, validate
from d2v2ds.io.safetensors_header import DTYPES
from d2v2ds.modalities.known import modality_of
from d2v2ds.modalities.settings import MOST_NUMBER, read_trunk, write_trunk
from d2v2ds.model.trunk import Trunk, TrunkConfig

FORMAT = "d2v2ds-model"
SCHEMA_VERSION = 1
FILE_SUFFIX = ".safetensors"
DESCRIPTION_KEY = "d2v2ds"
"""Metadata key of a single file for what config.json holds in a folder."""
CONFIG_NAME = "config.json"
FILES_KEY = "files"
"""Key of config.json with the names of all files of the export: a later export replaces these and no others."""
PIECE_BYTES = 5_000_000_000
"""Weights of more bytes are divided into several files."""

Part = Literal["model", "objective", "teacher"]
OBJECTIVE_PREFIX = "objective."
"""Prefix of the objective's tensors in a single file."""
Weights = Literal["student", "teacher"]

Preprocessing = dict[str, dict[str, Any]]
"""Modality -> what happens to its input before the network reads it; `Modality.describe_preprocessing` makes it."""

CHECKSUMS_KEY = "d2v2ds.crc32"
"""Metadata key of a file for the CRC-32 of each tensor's bytes; a file that another program wrote has none."""
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
        values = read_json(path / CONFIG_NAME, CheckpointError)
    except CheckpointError:
        return False
    return values.get("format") == FORMAT


def is_exported_file(path: Path) -> bool:
    """Return True if d2v2ds wrote the file."""
    try:
        metadata = _metadata(path)
    except CheckpointError:
        return False
    return DESCRIPTION_KEY in metadata


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Keys of config.json that are ours, before their content is checked."""

    model: dict[str, Any]
    objective: dict[str, Any] | None = None
    preprocessing: dict[str, dict[str, Any]]
    origin: dict[str, Any] = field(default_factory=dict)


def _description(values: dict[str, Any], path: Path) -> Description:
    """Check every value of a description that decides what is built or read.

    Raises:
        CheckpointError: with what does not fit.
    """
    where = path / CONFIG_NAME if path.is_dir() else path
    stored = validate(_Stored, values, where, CheckpointError)
    try:
        model = read_trunk(stored.model, f"{where}: model")
        if problems := model.check():
            raise ConfigError(f"{where}: model: {'; '.join(problems)}")
        if lacking := model.modalities.keys() - stored.preprocessing.keys():
            raise ConfigError(f"{where}: expected the preprocessing of {', '.join(sorted(lacking))}, found none")
        for name, network in model.modalities.items():
            modality, found = modality_of(name, str(where)), stored.preprocessing[name]
            _require_like(modality.describe_preprocessing(network, None, None), found, f"{where}: preprocessing.{name}")
            for file in modality.files_beside(found):
                if (place := path / plain_name(where, file)).exists():
                    open_regular(place, CheckpointError).close()
    except (ConfigError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    return Description(
        model=model, objective=stored.objective, preprocessing=stored.preprocessing, origin=stored.origin
    )


_MOST_TIMES = 16
"""Rates and sizes of an input are at most so many times those of published weights: they decide the work."""


def _require_like(expected: Any, found: Any, where: str) -> None:
    """Compare plain values with those of published weights: keys and types, and numbers above 0 where those are.

    Raises:
        ConfigError: naming the key.
    """
    if isinstance(expected, dict):
        if lacking := sorted(expected.keys() - found.keys() if isinstance(found, dict) else expected.keys()):
            raise ConfigError(f"{where}: expected {', '.join(lacking)}, found none")
        for key, value in expected.items():
            _require_like(value, found[key], f"{where}.{key}")
    elif isinstance(expected, list):
        if not isinstance(found, list):
            raise ConfigError(f"{where}: expected a list, found {found!r:.80}")
        for value in found:
            _require_like(expected[0] if expected else None, value, where)
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        kinds = int if isinstance(expected, int) else int | float
        fits = isinstance(found, kinds) and not isinstance(found, bool)
        most = _MOST_TIMES * abs(expected) if isinstance(expected, int) else MOST_NUMBER
        if not fits or not -most <= found <= most or (expected > 0 and found <= 0):
            raise ConfigError(f"{where}: expected a number such as {expected}, found {found!r:.80}")
    elif not isinstance(found, str | type(None) if expected is None else type(expected)):
        raise ConfigError(f"{where}: expected text, found {found!r:.80}")


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
        values = self._read_config() if path.is_dir() else self._read_single_file()
        self.description = _description(values, path)

    def has(self, part: Part) -> bool:
        """Return True if the part is there."""
        return bool(self._files(part)) and bool(self.layout(part))

    def layout(self, part: Part) -> dict[str, Kind]:
        """Every tensor of a part; empty if it is not there."""
        found: dict[str, Kind] = {}
        for file in self._files(part):
            with opened_tensors(file) as handle:
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
            with opened_tensors(file) as handle:
                checksums = _checksums(file, handle)
                for name, stored in self._names(part, handle):
                    yield name, _checked(file, stored, handle.get_tensor(stored), checksums)

    def tensor(self, part: Part, name: str) -> Tensor:
        """Read one tensor as stored, and check it.

        Raises:
            KeyError: there is no such tensor.
        """
        if part not in self._places:
            self._places[part] = {}
            for file in self._files(part):
                with opened_tensors(file) as handle:
                    self._places[part].update({own: (file, stored) for own, stored in self._names(part, handle)})
        file, stored = self._places[part][name]
        with opened_tensors(file) as handle:
            return _checked(file, stored, handle.get_tensor(stored), _checksums(file, handle))

    def _names(self, part: Part, handle: Any) -> Iterator[tuple[str, str]]:
        """Names of a part's tensors in a file: ours, and as they are stored."""
        is_shared = not self.path.is_dir()
        for stored in handle.keys():  # noqa: SIM118  (not a dictionary)
            is_of_objective = is_shared and stored.startswith(OBJECTIVE_PREFIX)
            if not is_shared:
                yield stored, stored
            elif is_of_objective == (part == "objective"):
                yield stored.removeprefix(OBJECTIVE_PREFIX), stored

    def _files(self, part: Part) -> list[Path]:
        if not self.path.is_dir():
            return [self.path] if part in ("model", "objective") else []
        index = self.path / f"{part}.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index, CheckpointError).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: expected a weight_map, found {type(weight_map).__name__}")
            names = dict.fromkeys(plain_name(index, name) for name in weight_map.values())
            return [self.path / name for name in names]
        single = self.path / f"{part}.safetensors"
        return [single] if single.exists() else []

    def _read_config(self) -> dict[str, Any]:
        file = self.path / CONFIG_NAME
        if (self.path / "checkpoints").is_dir():
            raise CheckpointError(
                f"{self.path}: the folder of a run; python -m d2v2ds.export {self.path} --to FOLDER makes a model of it"
            )
        if not file.exists():
            raise CheckpointError(f"{file}: expected the description of an exported model, found no such file")
        return _of_this_version(file, read_json(file, CheckpointError))

    def _read_single_file(self) -> dict[str, Any]:
        if self.path.suffix in (".pt", ".pth"):
            raise CheckpointError(
                f"{self.path}: a file of torch.save; of an official checkpoint python -m d2v2ds.interop.fairseq import "
                f"{self.path} --out FOLDER makes a model"
            )
        metadata = _metadata(self.path)
        if DESCRIPTION_KEY in metadata:
            where = f"{self.path}: metadata {DESCRIPTION_KEY}"
            return _of_this_version(self.path, parse_json(metadata[DESCRIPTION_KEY].encode(), where, CheckpointError))
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
    with opened_tensors(file) as handle:
        return dict(handle.metadata() or {})


def plain_name(where: Path, name: Any) -> str:
    """Return a file name that a folder from elsewhere gives.

    Raises:
        CheckpointError: it leads out of the folder.
    """
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: expected the name of a file beside it, found {name!r:.80}")
    check_name(name, where, CheckpointError)
    return name


_MOST_HEADER_BYTES = 100_000_000
"""Longest header of a safetensors file that the library reads."""


@contextlib.contextmanager
def opened_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file from anywhere with the library.

    Raises:
        CheckpointError: it is no such file, or cannot be read.
    """
    with open_regular(file, CheckpointError) as opened:  # a FIFO would block for ever
        prefix, size = opened.read(8), os.fstat(opened.fileno()).st_size
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, _MOST_HEADER_BYTES):
        raise CheckpointError(
            f"{file}: expected a whole safetensors file, found a header of {length:,} bytes in {size:,}"
        )
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and is_machine_fault(error):
            raise reading_error(file, error, CheckpointError) from error
        raise CheckpointError(f"{file}: expected a whole safetensors file, found: {error}") from error


def _checksums(file: Path, handle: Any) -> dict[str, Any]:
    """CRC-32 of each tensor, by its name in the file; empty if nobody stored them."""
    text = (handle.metadata() or {}).get(CHECKSUMS_KEY)
    found = {} if text is None else parse_json(text.encode(), f"{file}: metadata {CHECKSUMS_KEY}", CheckpointError)
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: metadata {CHECKSUMS_KEY}: expected checksums by name, found others")
    return found


def _checked(file: Path, name: str, tensor: Tensor, checksums: Mapping[str, Any]) -> Tensor:
    """Return a tensor that was read, if its checksum is the one stored."""
    if checksums and f"{crc32(bytes_of(tensor)):08x}" != checksums.get(name):
        raise CheckpointError(f"{file}: {name} is damaged, its checksum differs; export or fetch the model again")
    return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in row-major order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


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
    layout = folder.layout("model") | (folder.layout("teacher") if weights == "teacher" else {})
    trunk = _empty_trunk(folder)
    require_layout(folder.path, layout, trunk.state_dict())
    state = dict(folder.tensors("model"))
    if weights == "teacher":
        state |= folder.tensors("teacher")
    trunk.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return trunk.requires_grad_(False).eval()


def _empty_trunk(folder: ModelFolder) -> Trunk:
    """Build the trunk without memory for its weights."""
    try:
        with torch.device("meta"):
            return Trunk(folder.description.model)
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:  # sizes beyond those of any tensor
        raise CheckpointError(f"{folder.path}: its settings describe no network: {error}") from error


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
