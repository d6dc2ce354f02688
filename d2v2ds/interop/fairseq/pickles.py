"""Read pickles of other programs without importing or running anything that they name.

`Reader` makes plain values and tensors, and for every other name an object that remembers what it was given and does
nothing: a name is never looked up. So no code from outside runs, whatever a pickle says, and programs that are not
installed may have written it. `plain` then reads what the objects remember.

Work and memory are bounded: by the number of opcodes, and because nothing from the file is hashed or compared but short
keys (nested tuples and chosen integers can make either take for ever).
"""

import _compat_pickle
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

from torch import Tensor, dtype

MOST_OPCODES = 1_000_000
"""Opcodes of one pickle; that of an official checkpoint with its optimizer has some 50,000."""
MOST_VALUES = 200_000
"""Values of a configuration, each counted as often as it is referred to."""
_MOST_NESTED = 100
_INTEGER_KEY_BITS = 60
"""Longer integers may be chosen to have one hash."""
_INTEGER_BITS = 128

_DATA = {
    "argparse.Namespace", "copyreg._reconstructor", "copyreg.__newobj__", "_codecs.encode", "functools.partial",
    "builtins.bool", "builtins.bytearray", "builtins.bytes", "builtins.complex", "builtins.float", "builtins.int",
    "builtins.object", "builtins.range", "builtins.slice", "builtins.str", "builtins.tuple", "builtins.type",
    "types.SimpleNamespace", "operator.getitem", "_operator.getitem",
}  # fmt: skip
_DATA_PREFIXES = (
    "array.", "collections.", "datetime.", "decimal.", "_decimal.", "enum.", "fractions.", "ipaddress.", "pathlib.",
    "typing.", "uuid.", "zoneinfo.",
    "torch._tensor.", "torch._utils.", "torch.nn.", "torch.optim.", "torch.serialization._get_layout",
)  # fmt: skip
"""Names of the standard library and of torch that describe data. A pickle that mentions another one of theirs asks for
functions to be called, and is refused with that name; here it would have done nothing."""
_TORCH_VALUES = ("Size", "device", "dtype", "layout", "memory_format", "strided", "Tensor")


def is_data(full_name: str) -> bool:
    """Return True for a name that checkpoints mention: a type of data, or anything of a program that is not ours."""
    root, _, rest = full_name.partition(".")
    if root == "torch" and (rest in _TORCH_VALUES or "." not in rest and rest.endswith("Storage")):
        return True
    is_known = root in sys.stdlib_module_names or root == "torch"
    return not is_known or full_name in _DATA or full_name.startswith(_DATA_PREFIXES)


class Stub:
    """Stands for an object of a class that is not imported; one subclass for each global name."""

    full_name: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]
    """Content: items, or pairs of key and value."""

    def __new__(cls, *args: Any, **named: Any) -> Any:
        """Remember what the object would have been made of."""
        stub = object.__new__(cls)
        stub.args, stub.state, stub.items = args, None, []
        return stub

    def __init__(self, *args: Any, **named: Any) -> None: ...


class _Tuple(tuple[Any, ...]):
    """A tuple that is hashed and compared as an object: by content, nested ones would take for ever."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def _as_list(items: Any = (), *_: Any) -> list[Any]:
    return list(items) if isinstance(items, list | tuple) else []


def _as_dict(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        _put(found, key, value)
    return found


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


_CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _as_dict,
    "collections.Counter": _as_dict,
    "collections.defaultdict": _empty_dict,  # its argument is the factory
    "builtins.dict": _as_dict,
    "builtins.list": _as_list,
    "builtins.set": _as_list,
    "builtins.frozenset": _as_list,
}
"""Containers by their names; sets become lists, which need no hashes."""


def _put(target: Any, key: Any, value: Any) -> None:
    """Put an item into a dictionary; a stub remembers it."""
    if isinstance(target, Stub):
        target.items.append((key, value))
        return
    if type(target) is not dict:
        raise pickle.UnpicklingError(f"items for {type(target).__name__}, which is no dictionary")
    if isinstance(key, int) and key.bit_length() > _INTEGER_KEY_BITS:
        raise pickle.UnpicklingError("a key that is an integer of more than 60 bits")
    target[key] = value


class Reader(pickle._Unpickler):  # the one in C cannot be told what to do with opcodes, nor when to stop
    """Reads one pickle."""

    def __init__(
        self,
        file: IO[bytes],
        known: Mapping[str, Any],
        refused: set[str],
        storage: Callable[[tuple[Any, ...]], Any] | None = None,
    ) -> None:
        """
        Args:
            file: at the pickle's beginning; it is left behind its end.
            known: values and functions that names stand for, besides containers.
            refused: names that are not data are added to it.
            storage: makes what an id outside of the pickle stands for.
        """
        super().__init__(file, encoding="utf-8", errors="replace")
        self.dispatch = _Counted(self.dispatch)  # type: ignore[misc]
        self._known, self._refused, self._storage = known, refused, storage
        self._stubs: dict[str, type[Stub]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for; it is not looked up anywhere."""
        full_name = _renamed(module, name)
        if full_name in self._known:
            return self._known[full_name]
        if full_name in _CONTAINERS:
            return _CONTAINERS[full_name]
        if full_name not in self._stubs:
            self._stubs[full_name] = type("Stub", (Stub,), {"full_name": full_name})
        if not is_data(full_name):
            self._refused.add(full_name)
        return self._stubs[full_name]

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage of an id."""
        if self._storage is None or not isinstance(pid, tuple):
            raise pickle.UnpicklingError("an id of something outside of the pickle")
        return self._storage(pid)


class _Counted(dict[int, Any]):
    """Methods by opcode; counts how often one is asked for."""

    left = MOST_OPCODES

    def __getitem__(self, opcode: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"more than {MOST_OPCODES:,} opcodes")
        return _OWN[opcode] if opcode in _OWN else super().__getitem__(opcode)


def _build(reader: Any) -> None:
    state = reader.stack.pop()
    if isinstance(reader.stack[-1], Stub):
        reader.stack[-1].state = state  # of others, such as the metadata of a dictionary of weights, nothing is needed


def _append(reader: Any) -> None:
    _extend(reader, [reader.stack.pop()])


def _appends(reader: Any) -> None:
    _extend(reader, reader.pop_mark())


def _extend(reader: Any, items: list[Any]) -> None:
    target = reader.stack[-1]
    if isinstance(target, Stub):
        target = target.items
    if type(target) is not list:
        raise pickle.UnpicklingError(f"items for {type(target).__name__}, which is no list")
    target += items


def _set_item(reader: Any) -> None:
    value, key = reader.stack.pop(), reader.stack.pop()
    _put(reader.stack[-1], key, value)


def _set_items(reader: Any) -> None:
    items = reader.pop_mark()
    for key, value in zip(items[::2], items[1::2], strict=True):
        _put(reader.stack[-1], key, value)


def _dict(reader: Any) -> None:
    items = reader.pop_mark()
    reader.append(_as_dict(list(zip(items[::2], items[1::2], strict=True))))


def _tuple(reader: Any) -> None:
    items = reader.pop_mark()  # first: it changes what `append` is
    reader.append(_Tuple(items))


def _tuple_of(count: int) -> Callable[[Any], None]:
    def make(reader: Any) -> None:
        reader.stack[-count:] = [_Tuple(reader.stack[-count:])]

    return make


def _frozen_set(reader: Any) -> None:
    items = reader.pop_mark()
    reader.append(items)


def _refuse(reader: Any) -> None:
    raise pickle.UnpicklingError("an opcode that torch.save does not write")


_OWN: dict[int, Callable[[Any], None]] = {
    pickle.BUILD[0]: _build,
    pickle.APPEND[0]: _append,
    pickle.APPENDS[0]: _appends,
    pickle.ADDITEMS[0]: _appends,
    pickle.SETITEM[0]: _set_item,
    pickle.SETITEMS[0]: _set_items,
    pickle.DICT[0]: _dict,
    pickle.TUPLE[0]: _tuple,
    pickle.TUPLE1[0]: _tuple_of(1),
    pickle.TUPLE2[0]: _tuple_of(2),
    pickle.TUPLE3[0]: _tuple_of(3),
    pickle.EMPTY_SET[0]: pickle._Unpickler.dispatch[pickle.EMPTY_LIST[0]],
    pickle.FROZENSET[0]: _frozen_set,
    # makes room for a length before it knows that so much follows
    pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],
    # names by number, from a table of this process
    pickle.EXT1[0]: _refuse,
    pickle.EXT2[0]: _refuse,
    pickle.EXT4[0]: _refuse,
}
"""Opcodes that put something into an object, or hash it: only into plain containers and stubs."""


def _renamed(module: str, name: str) -> str:
    """Return today's full name of a global of Python 2, in which pickles of protocol 2 are written."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        module, name = _compat_pickle.NAME_MAPPING[module, name]
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def stub_names(value: Any) -> set[str]:
    """Return the names of all stubs in a value, those of classes included."""
    names, waiting, seen = set(), [value], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, Tensor):
            continue
        seen.add(id(one))
        if isinstance(one, Stub):
            names.add(one.full_name)
            waiting += [one.args, one.state, one.items]
        elif isinstance(one, type) and issubclass(one, Stub):
            names.add(one.full_name)
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
    return names


def plain(value: Any) -> Any:
    """Convert a value to dictionaries, lists, numbers and strings.

    omegaconf containers and nodes give their content, a namespace and other objects with named fields those fields, an
    enum its value, and whatever else is not plain its name in angle brackets. Tensors stay.

    Raises:
        ValueError: it contains itself, or is nested too deeply, or refers to its parts too often.
    """
    return _Plain().of(value, 0)


class _Plain:
    def __init__(self) -> None:
        self.left = MOST_VALUES

    def of(self, value: Any, depth: int) -> Any:
        self.left -= 1
        if depth > _MOST_NESTED or self.left < 0:
            raise ValueError(
                f"more than {MOST_VALUES:,} values, more than {_MOST_NESTED} levels, or it contains itself"
            )
        if isinstance(value, dict):
            return {self._key(key, depth + 1): self.of(one, depth + 1) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(one, depth + 1) for one in value]
        if isinstance(value, type) and issubclass(value, Stub):
            return f"<{value.full_name}>"
        if isinstance(value, Stub):
            return self._stub(value, depth + 1)
        if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
            return "<a number of many digits>"
        if value is None or isinstance(value, bool | int | float | str | Tensor):
            return value
        return f"<{value}>" if isinstance(value, dtype) else f"<{type(value).__name__}>"

    def _key(self, key: Any, depth: int) -> Any:
        key = self.of(key, depth)
        return key if isinstance(key, str | int | float) else str(key)

    def _stub(self, stub: Stub, depth: int) -> Any:
        state = stub.state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = (state[0] if isinstance(state[0], dict) else {}) | state[1]  # of a class with slots
        if isinstance(state, dict):
            for content in ("_content", "_val"):
                if stub.full_name.startswith("omegaconf.") and content in state:
                    return self.of(state[content], depth)
            return self.of(state, depth)
        if len(stub.args) == 1 and isinstance(stub.args[0], bool | int | float | str):
            return self.of(stub.args[0], depth)
        return f"<{stub.full_name}>"
