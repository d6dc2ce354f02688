"""Read files of `torch.save` that hold objects of other programs, without importing or running any of them.

`torch.load(weights_only=True)` rebuilds tensors and plain containers and refuses every other global. Official
checkpoints also carry omegaconf containers, an argparse namespace and enums; for those that a list here names, torch is
handed a class that remembers what it was given and does nothing. So no code from outside runs, whatever the file
says: a name is only the key of such a class and is never looked up. `plain` then reads what the classes remember.
"""

import _compat_pickle
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from d2v2ds.errors import CheckpointError

HARMLESS_PREFIXES = (
    "omegaconf.",
    "fairseq.",
    "fairseq_cli.",
    "fairseq_user_dir",
    "examples.data2vec.",
    "data2vec.",
    "numpy.",
    "typing.",
    "enum.",
    "pathlib.",
)
HARMLESS = {
    "argparse.Namespace", "collections.defaultdict", "copyreg._reconstructor", "operator.getitem", "_operator.getitem",
    "builtins.bool", "builtins.bytes", "builtins.dict", "builtins.float", "builtins.frozenset", "builtins.int",
    "builtins.list", "builtins.object", "builtins.str", "builtins.tuple", "builtins.type",
}  # fmt: skip
"""Globals that configurations and run states mention. They are not called either: this list only decides which files
are read at all."""

_KNOWN_TO_TORCH = {
    "collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.bytearray", "builtins.set",
    "builtins.complex",
}  # fmt: skip
"""Globals outside `torch` that its safe reader has itself; it decides which of its own it takes."""

_ZIP_START = b"PK\x03\x04"
_OLD_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)[2:-1]  # without protocol and end
_OLD_HEAD_BYTES = 32

_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    OSError,  # a damaged offset
    MemoryError,  # a damaged length
)
"""Errors of torch on a file that is cut off, damaged or made to harm."""


class Stub:
    """Stands for an object of a class that is not imported; one subclass for each global name."""

    full_name: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Any:
        """Remember what the object would have been made of."""
        stub = object.__new__(cls)
        stub.args, stub.state = args, None
        return stub

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _DefaultDict(Stub):
    """The unpickler only puts items into real dictionaries, so this one is a real one, without its factory."""

    def __new__(cls, *args: Any) -> Any:
        return {}


def _stub_class(full_name: str) -> type[Stub]:
    base = _DefaultDict if full_name == "collections.defaultdict" else Stub
    return type("Stub", (base,), {"full_name": full_name})


def _renamed(module: str, name: str) -> str:
    """The name of today for a global of Python 2, in which pickles of protocol 2 are written; torch does the same."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        module, name = _compat_pickle.NAME_MAPPING[module, name]
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def _globals_of(file: IO[bytes]) -> set[str]:
    """Names that one pickle asks for; it is taken apart, not run. Leaves the file behind its end."""
    names: set[str] = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(_renamed(*str(argument).split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":  # torch refuses it; the message shall name what was wanted
            names.add(_renamed(*strings[-2:]) if len(strings) > 1 else "a computed name")
        elif isinstance(argument, str):
            strings.append(argument)
    return names


def _is_zip(path: Path) -> bool:
    """True if torch would take the file for its format since 1.6."""
    with path.open("rb") as file:
        return file.read(len(_ZIP_START)) == _ZIP_START


def _globals_in(path: Path, is_zip: bool) -> set[str]:
    """Names that any pickle in a file of `torch.save` asks for, new format or old.

    Raises:
        CheckpointError: it is neither.
    """
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if Path(name).name == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(f"{path}: expected a file of torch.save, found a zip file of something else")
            with archive.open(pickles[0]) as entry:
                return _globals_of(entry)
    with path.open("rb") as file:
        if _OLD_MAGIC not in file.read(_OLD_HEAD_BYTES):
            raise CheckpointError(f"{path}: expected a file of torch.save, found something else")
        file.seek(0)
        # magic number, version, sizes of the machine, the object, keys of the storages
        return set().union(*(_globals_of(file) for _ in range(5)))


def read_pickled(path: Path) -> dict[str, Any]:
    """Read a file of `torch.save` whose content is a dictionary. Nothing in it is run.

    Tensors of the format in use since torch 1.6 stay in the file until they are looked at.

    Args:
        path: the file.

    Returns:
        Tensors, plain containers and `Stub` objects; see `plain`.

    Raises:
        CheckpointError: it is cut off, damaged, no file of `torch.save`, or asks for anything that is not known to be
            harmless.
        OSError: it cannot be opened.
    """
    is_zip = _is_zip(path)
    try:
        names = {name for name in _globals_in(path, is_zip) if not name.startswith("torch.")} - _KNOWN_TO_TORCH
    except _DAMAGED as error:
        raise CheckpointError(_damaged(path, error)) from error
    unknown = sorted(name for name in names if name not in HARMLESS and not name.startswith(HARMLESS_PREFIXES))
    if unknown:
        raise CheckpointError(_harmful(path, ", ".join(unknown)))
    try:
        with torch.serialization.safe_globals([(_stub_class(name), name) for name in names]):
            content = torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip)
    except _DAMAGED as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # of torch itself, such as a function that reads more pickles
        raise CheckpointError(_harmful(path, refused[1]) if refused else _damaged(path, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, found {type(content).__name__}")
    return content


def _harmful(path: Path, names: str) -> str:
    return (
        f"{path}: expected tensors and configurations, found a wish to use {names}; nothing was run. Official "
        "checkpoints need no such thing: do not open this file with anything that runs what it reads"
    )


def _damaged(path: Path, error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if line.startswith("Can only")), lines[0] if lines else type(error).__name__)
    return (
        f"{path}: expected a whole file of torch.save, found one that is cut off, damaged or built in a way that the "
        f"safe reader does not know ({detail}); nothing was run. Fetch it again and compare its size"
    )


def plain(value: Any) -> Any:
    """A value as dictionaries, lists, numbers and strings.

    omegaconf containers and nodes give their content, a namespace and other objects with named fields those fields, an
    enum its value, and whatever else is not plain its name in angle brackets. Tensors stay.
    """
    if isinstance(value, dict):
        return {_plain_key(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(one) for one in value]
    if isinstance(value, type) and issubclass(value, Stub):
        return f"<{value.full_name}>"
    if isinstance(value, Stub):
        return _plain_stub(value)
    return value if value is None or isinstance(value, bool | int | float | str | Tensor) else f"<{value!r}>"


def _plain_key(key: Any) -> Any:
    key = plain(key)
    return key if isinstance(key, str | int | float) else str(key)


def _plain_stub(stub: Stub) -> Any:
    state = stub.state
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        state = {**(state[0] or {}), **state[1]}  # of a class with slots
    if isinstance(state, dict):
        for content in ("_content", "_val"):
            if stub.full_name.startswith("omegaconf.") and content in state:
                return plain(state[content])
        return plain(state)
    if len(stub.args) == 1 and isinstance(stub.args[0], bool | int | float | str):
        return stub.args[0]
    return f"<{stub.full_name}>"
