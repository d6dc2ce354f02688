"""Read files of `torch.save` of either format, new (a zip archive) or old, without running anything in them.

`torch.load` with its safe reader does not know the opcodes of pickle protocols 4 and 5 and refuses objects that nobody
needs; without it, it runs what the file says. Here `pickles.Reader` reads, and the one thing that a file may ask for is
a tensor inside of one of its own storages.
"""

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.fairseq.pickles import Reader, Stub, stub_names
from d2v2ds.io.machine_faults import is_machine_fault, reading_error
from d2v2ds.io.read import open_regular

PICKLE_BYTES = 32 << 20
"""Largest pickle of a file in the new format; tensors are not in it."""
MODEL_KEYS = ("model", "cfg", "args")
"""Parts of an official file that are needed."""

_ZIP_START = b"PK\x03\x04"
_LOCAL_HEAD = struct.Struct("<4s22xHH")
_OLD_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)[2:-1]  # without protocol and end
_OLD_HEAD_BYTES = 32
_COUNT = struct.Struct("<q")

_DAMAGED = (
    pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, KeyError,
    IndexError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip
"""Errors on a file that is cut off, damaged or made to harm."""

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    """Numbers of one type."""

    dtype: torch.dtype
    bytes: torch.UntypedStorage

    def part(self, first: int, count: int) -> "_Storage":
        size = self.dtype.itemsize
        if min(first, count) < 0 or (first + count) * size > self.bytes.nbytes():
            raise pickle.UnpicklingError("a view of a storage that is shorter")
        return _Storage(self.dtype, self.bytes[first * size : (first + count) * size])


def _tensor(storage: object, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> object:
    """Make a tensor over a storage; of a storage of an unknown type nothing."""
    if not isinstance(storage, _Storage):
        return Stub()
    if min((offset, *shape, *strides), default=0) < 0 or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor of negative sizes")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    count = storage.bytes.nbytes() // storage.dtype.itemsize
    elements: int = math.prod([*shape])
    if elements > count or (elements and last >= count):
        raise pickle.UnpicklingError(f"a tensor of {tuple(shape)} in a storage of {count} elements")
    return torch.empty(0, dtype=storage.dtype).set_(storage.bytes, offset, tuple(shape), tuple(strides))


def _meta_tensor(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> Tensor:
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device="meta")


def _parameter(tensor: object, *_: object) -> object:
    return tensor


_KNOWN = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta_tensor,
    **{str(dtype): dtype for dtype in _STORAGES.values()},
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
}
"""Names of torch that mean something here: types of numbers, and tensors."""


def read_pickled(path: Path, only_model: bool = False) -> dict[str, Any]:
    """Read a file of `torch.save` whose content is a dictionary. Nothing in it is run.

    Tensors of the format in use since torch 1.6 stay in the file until they are looked at.

    Args:
        path: the file.
        only_model: leave out everything but `MODEL_KEYS`, whatever it is.

    Returns:
        Tensors, plain containers and `Stub` objects; see `pickles.plain`.

    Raises:
        CheckpointError: it is absent, cut off, damaged, no file of `torch.save`, or asks for functions to be called.
        MachineError: the machine is at fault.
    """
    refused: set[str] = set()
    with open_regular(path, CheckpointError) as file:
        try:
            content = _content(path, file, refused)
        except _DAMAGED as error:
            if refused and not only_model and not isinstance(error, EOFError):  # at a cut, the last name is half a name
                raise CheckpointError(_refusal(path, refused)) from error
            raise CheckpointError(_damaged(path, str(error) or type(error).__name__)) from error
        except OSError as error:
            if is_machine_fault(error):
                raise reading_error(path, error, CheckpointError) from error
            raise CheckpointError(_damaged(path, str(error))) from error  # a damaged offset
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, found {type(content).__name__}")
    if only_model:
        content = {key: content[key] for key in MODEL_KEYS if key in content}
        refused &= stub_names(content)
    if refused:
        raise CheckpointError(_refusal(path, refused))
    return {key: value for key, value in content.items() if isinstance(key, str)}


def _content(path: Path, file: BinaryIO, refused: set[str]) -> object:
    """Read the object that was saved; adds names that are not data to `refused`."""
    head = file.read(_OLD_HEAD_BYTES)
    if head.startswith(_ZIP_START):
        with zipfile.ZipFile(file) as archive:
            return _content_of_archive(path, archive, file, refused)
    if _OLD_MAGIC in head:
        file.seek(0)
        return _content_of_old_format(file, refused)
    raise CheckpointError(f"{path}: expected a file of torch.save, found something else")


def _content_of_archive(path: Path, archive: zipfile.ZipFile, file: BinaryIO, refused: set[str]) -> object:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if Path(name).name == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: expected a file of torch.save, found a zip file of something else")
    folder = pickles[0].removesuffix("data.pkl")
    if entries[pickles[0]].file_size > PICKLE_BYTES:
        raise ValueError(f"a pickle of {entries[pickles[0]].file_size:,} bytes, more than {PICKLE_BYTES:,}")
    if f"{folder}byteorder" in entries and archive.open(f"{folder}byteorder").read(9) != b"little":
        raise ValueError("numbers of another byte order than little-endian")
    size = os.fstat(file.fileno()).st_size
    mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)

    def storage(key: str, dtype: torch.dtype, count: int) -> _Storage:
        entry = entries[f"{folder}data/{key}"]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("compressed tensors, which torch.save does not write")
        file.seek(entry.header_offset)
        start, name_bytes, extra_bytes = _LOCAL_HEAD.unpack(file.read(_LOCAL_HEAD.size))
        first = entry.header_offset + _LOCAL_HEAD.size + name_bytes + extra_bytes
        if start != _ZIP_START or count * dtype.itemsize > entry.file_size or first + entry.file_size > size:
            raise ValueError(f"storage {key} is cut off")
        return _Storage(dtype, mapped[first : first + count * dtype.itemsize])

    data = archive.open(pickles[0]).read(PICKLE_BYTES)
    return Reader(io.BytesIO(data), _KNOWN, refused, _storages(storage)).load()


def _content_of_old_format(file: BinaryIO, refused: set[str]) -> object:
    """Read magic number, version, sizes of the machine, the object, keys of its storages, and these one by one."""
    room = os.fstat(file.fileno()).st_size
    found: dict[str, _Storage] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> _Storage:
        nonlocal room
        room -= count * dtype.itemsize
        if room < 0:
            raise ValueError("storages of more bytes than the file has")
        found[key] = _Storage(dtype, torch.UntypedStorage(count * dtype.itemsize))
        return found[key]

    for _ in range(3):
        Reader(file, {}, refused).load()
    content = Reader(file, _KNOWN, refused, _storages(storage)).load()
    for key in Reader(file, {}, refused).load():
        own = found[key]
        (count,) = _COUNT.unpack(file.read(_COUNT.size))
        target = torch.empty(0, dtype=torch.uint8).set_(own.bytes).numpy()
        if count * own.dtype.itemsize != len(target) or file.readinto(target) != len(target):  # type: ignore[attr-defined]
            raise ValueError(f"storage {key} is cut off")
        del found[key]
    if found:
        raise ValueError(f"storages are missing: {', '.join(sorted(found)[:8])}")
    return content


def _storages(make: Callable[[str, torch.dtype, int], _Storage]) -> Callable[[tuple[Any, ...]], object]:
    """Return a function that makes the storage of an id, each once."""
    made: dict[str, _Storage] = {}

    def storage(pid: tuple[Any, ...]) -> object:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError("an id of something that is no storage")
        if not isinstance(dtype, torch.dtype):
            return Stub()
        if key not in made:
            made[key] = make(key, dtype, count)
        if made[key].dtype != dtype:
            raise pickle.UnpicklingError(f"storage {key} of two types")
        return made[key].part(view[0][1], view[0][2]) if view and view[0] else made[key]

    return storage


def _refusal(path: Path, names: set[str]) -> str:
    listed = ", ".join(sorted(names))
    return (
        f"{path}: expected tensors and configurations, found a wish to use {listed}; nothing was run. "
        "Official checkpoints need no such thing: do not open this file with anything that runs what it reads. If "
        "you know why it is there, --only-model reads the weights and their configuration alone"
    )


def _damaged(path: Path, detail: str) -> str:
    return (
        f"{path}: expected a whole file of torch.save, found one that is cut off, damaged or built in a way that is "
        f"not known ({detail[:200]}); nothing was run. Fetch it again and compare its size"
    )
