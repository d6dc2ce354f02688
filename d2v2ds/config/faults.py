"""Find what is wrong with the raw values of a configuration, and put the file's own values in the place of faulty ones.

The rest of a configuration can then be checked too, so that one error reports everything.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError


def drop_unknown_keys(values: dict[str, Any], section: type, prefix: str) -> list[str]:
    """Remove keys that no field has, which pydantic would ignore; return one message for each."""
    hints = typing.get_type_hints(section)
    problems = []
    for key in list(values):
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            meant = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            problems.append(f"{prefix}{key}: unknown key; {meant}")
            del values[key]
        elif isinstance(values[key], dict):
            for inner in _dataclasses_in(hints[key]):
                problems += drop_unknown_keys(values[key], inner, f"{prefix}{key}.")
            for inner in _mapped_dataclasses(hints[key]):
                for name, value in values[key].items():
                    if isinstance(value, dict):
                        problems += drop_unknown_keys(value, inner, f"{prefix}{key}.{name}.")
    return problems


def _dataclasses_in(annotation: Any) -> Iterator[type]:
    """Dataclasses that an annotation may hold: itself, or members of a union."""
    if dataclasses.is_dataclass(annotation):
        yield typing.cast(type, annotation)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _dataclasses_in(member)


def _mapped_dataclasses(annotation: Any) -> Iterator[type]:
    """Dataclasses that are the values of a mapping."""
    if typing.get_origin(annotation) is Mapping:
        yield from _dataclasses_in(typing.get_args(annotation)[1])


def message(fault: Mapping[str, Any], prefix: str = "") -> str:
    where = prefix + ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{where}: required, not given"
    return f"{where}: {fault['msg']}, found {fault['input']!r}"


def restore_faulty_values(values: dict[str, Any], shipped: dict[str, Any], error: ValidationError) -> bool:
    """Replace each faulty value by the file's own, or remove it; returns whether all could be found."""
    for fault in error.errors():
        inner: Any = values
        own: Any = shipped
        *path, leaf = fault["loc"]
        for part in path:
            inner = inner.get(part) if isinstance(inner, dict) else None
            own = own.get(part) if isinstance(own, dict) else None
        if not isinstance(inner, dict):
            return False
        inner.pop(leaf, None)
        if isinstance(own, dict) and leaf in own:
            inner[leaf] = own[leaf]
    return True
