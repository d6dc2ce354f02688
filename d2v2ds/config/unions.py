"""Settings of which there are several kinds, such as objectives and heads: a field with one possible value names it.

The chosen kind is validated by itself, so that messages are about its fields alone.
"""

import copy
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from d2v2ds.config.faults import drop_unknown_keys, validated


def members(annotation: Any) -> list[type]:
    """List the dataclasses of a union; empty if there are fewer than two."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return []
    found = [member for member in typing.get_args(annotation) if dataclasses.is_dataclass(member)]
    return [typing.cast(type, member) for member in found] if len(found) > 1 else []


def tag_of(kind: type) -> tuple[str, str]:
    """Return the field that names a kind, and its value."""
    for name, hint in _hints(kind).items():
        if typing.get_origin(hint) is typing.Literal and len(typing.get_args(hint)) == 1:
            return name, typing.get_args(hint)[0]
    raise TypeError(f"{kind.__name__}: expected a field with one possible value, found none")


def build_unions(values: dict[str, Any], shipped: Any, section: type, prefix: str = "") -> tuple[bool, list[str]]:
    """Replace raw values by the chosen kind of settings, in place, innermost first.

    Args:
        values: raw values of a section.
        shipped: those of the file alone, to go on with in place of faulty ones.
        section: dataclass of the section.
        prefix: its name for messages, with a dot behind.

    Returns:
        Whether all could be built, and one message for each problem.
    """
    whole, problems = True, list[str]()
    own = shipped if isinstance(shipped, dict) else {}
    for name, hint in _hints(section).items():
        raw, where, kinds = values.get(name), f"{prefix}{name}", members(hint)
        if kinds and name in values and not isinstance(raw, dict) and not _is_allowed(raw, hint):
            problems.append(f"{where}: Input should be a dictionary, found {raw!r}")
            raw = values[name] = copy.deepcopy(own.get(name))
        if not isinstance(raw, dict):
            continue
        if not kinds:
            for inner in _inner(hint):
                built, faults = build_unions(raw, own.get(name), inner, f"{where}.")
                whole, problems = whole and built, problems + faults
            for key, inner in _mapped(hint, raw):
                given = own.get(name)
                below = given.get(key) if isinstance(given, dict) else None
                built, faults = build_unions(raw[key], below, inner, f"{where}.{key}.")
                whole, problems = whole and built, problems + faults
            continue
        kind, fault = _chosen(kinds, raw, where)
        if kind is None:
            problems.append(fault)
            del values[name]
            whole = False
            continue
        problems += drop_unknown_keys(raw, kind, f"{where}.")
        built, faults = build_unions(raw, own.get(name), kind, f"{where}.")
        settings, more = validated(kind, raw, own.get(name), f"{where}.")
        problems += faults + more
        whole &= built and settings is not None
        if settings is None:
            del values[name]
        else:
            values[name] = settings
    return whole, problems


def _is_allowed(raw: Any, hint: Any) -> bool:
    """Return True for settings that are built already, and for None where the field may be empty."""
    return dataclasses.is_dataclass(raw) or (raw is None and types.NoneType in typing.get_args(hint))


def _chosen(kinds: list[type], raw: Mapping[str, Any], where: str) -> tuple[type | None, str]:
    """Find the kind that raw values name; the first if they name none."""
    tags = {tag_of(kind)[1]: kind for kind in kinds}
    field = tag_of(kinds[0])[0]
    found = raw.get(field, next(iter(tags)))
    if isinstance(found, str) and found in tags:
        return tags[found], ""
    return None, f"{where}.{field}: expected one of {', '.join(tags)}, found {found!r}"


def _inner(annotation: Any) -> Iterator[type]:
    """Yield the dataclass that an annotation holds, alone or beside None."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) is not None else (annotation,)
    for option in options:
        if dataclasses.is_dataclass(option) and typing.get_origin(annotation) is not Mapping:
            yield typing.cast(type, option)


def _mapped(annotation: Any, raw: Mapping[str, Any]) -> Iterator[tuple[str, type]]:
    """Yield the keys of a mapping whose values are raw settings, and the dataclass of those."""
    if typing.get_origin(annotation) is Mapping and dataclasses.is_dataclass(kind := typing.get_args(annotation)[1]):
        yield from ((key, typing.cast(type, kind)) for key, value in raw.items() if isinstance(value, dict))


def _hints(kind: type) -> dict[str, Any]:
    """Annotations of the fields of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def merged_hints(annotation: Any) -> dict[str, Any]:
    """Return the annotations of the fields of a dataclass, or of all kinds of a union."""
    if dataclasses.is_dataclass(annotation):
        return _hints(typing.cast(type, annotation))
    found: dict[str, Any] = {}
    for kind in members(annotation) or list(_inner(annotation)):
        for name, hint in _hints(kind).items():
            found[name] = hint if name not in found else found[name] | hint
    return found
