"""Find what is wrong with the raw values of a configuration, and put the file's own values in the place of faulty ones.

The rest of a configuration can then be checked too, so that one error reports everything.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def drop_unknown_keys(values: dict[str, Any], section: type, prefix: str) -> list[str]:
    """Remove keys that no field has, which pydantic would ignore; return one message for each."""
    known = {field.name for field in dataclasses.fields(section)}
    hints = {name: hint for name, hint in typing.get_type_hints(section).items() if name in known}
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
    """Yield the dataclass that an annotation may hold, alone or beside None; of several kinds, none: see `unions`."""
    if dataclasses.is_dataclass(annotation):
        yield typing.cast(type, annotation)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [member for member in typing.get_args(annotation) if dataclasses.is_dataclass(member)]
        if len(found) == 1:
            yield from _dataclasses_in(found[0])


def _mapped_dataclasses(annotation: Any) -> Iterator[type]:
    """Dataclasses that are the values of a mapping."""
    if typing.get_origin(annotation) is Mapping:
        yield from _dataclasses_in(typing.get_args(annotation)[1])


def validated(kind: type[T], values: dict[str, Any], shipped: Any, prefix: str = "") -> tuple[T | None, list[str]]:
    """Build settings; each faulty value gives way to the file's own, so that the rest can be checked too.

    Args:
        kind: dataclass of the settings.
        values: raw values, changed in place.
        shipped: raw values of the file alone.
        prefix: section of these settings, for messages: "data.audio.".

    Returns:
        The settings, None if they cannot be built at all, and one message for each faulty value.
    """
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    try:
        return adapter.validate_python(values), []
    except ValidationError as error:
        faults = error.errors()
    for fault in faults:
        _restore(values, shipped, fault["loc"])
    problems = list(dict.fromkeys(_message(fault, prefix) for fault in faults))
    try:
        return adapter.validate_python(values), problems
    except ValidationError:
        return None, problems


def _message(fault: Mapping[str, Any], prefix: str) -> str:
    # pydantic also names the member of a union, such as tuple[...], which is no key of the YAML
    where = prefix + ".".join(str(part) for part in fault["loc"] if "[" not in str(part))
    if fault["type"] == "missing":
        return f"{where}: required, not given"
    said = "expected a path" if fault["type"] == "path_type" else fault["msg"]
    found = repr(fault["input"])
    return f"{where}: {said}, found {found if len(found) < 200 else found[:200] + '...'}"


def _restore(values: dict[Any, Any], shipped: Any, place: Sequence[int | str]) -> None:
    """Put the file's own value, or nothing, in the place of a faulty one; an item of a list takes the list along."""
    key, *rest = place
    own = shipped if isinstance(shipped, dict) else {}
    if rest and isinstance(values.get(key), dict):
        _restore(values[key], own.get(key), rest)
        return
    values.pop(key, None)
    if key in own:
        values[key] = own[key]
