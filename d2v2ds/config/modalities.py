"""The parts of a configuration that belong to modalities: between YAML, where a modality's settings stand beside other
keys of `data` and `valid`, and the sections, where they are mappings by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from d2v2ds.modalities.known import known_modalities

_FOLDED = ("data", "valid")
"""Sections in which modalities stand beside other keys."""


def fold(values: dict[str, Any]) -> None:
    """Move the modalities of `data` and `valid` into mappings, in the order of `known_modalities`, without nulls."""
    known = known_modalities()
    for name in _FOLDED:
        section = values.get(name)
        if isinstance(section, dict):
            section["modalities"] = {one: section.pop(one) for one in known if one in section}
    for name in ("data", "valid", "model", "objective"):
        section = values.get(name)
        if isinstance(section, dict) and isinstance(section.get("modalities"), dict):
            found = section["modalities"]
            order = [*(one for one in known if one in found), *(one for one in found if one not in known)]
            section["modalities"] = {one: found[one] for one in order if found[one] is not None}
    _drop_unused(values)


def _drop_unused(values: dict[str, Any]) -> None:
    """Drop the objective's settings of modalities that neither data nor network have: they were switched off there."""
    used = _mapping(values, "data").keys() | _mapping(values, "model").keys()
    own = _mapping(values, "objective")
    for name in [name for name in own if name not in used]:
        del own[name]


def unfold(values: dict[str, Any]) -> None:
    """Undo `fold`."""
    for name in _FOLDED:
        values[name] |= values[name].pop("modalities")


def settings_by_modality(
    values: dict[str, Any],
    shipped: dict[str, Any],
    drop_unknown: Callable[[dict[str, Any], type, str], list[str]],
    message: Callable[[Mapping[str, Any], str], str],
) -> list[str]:
    """Replace raw settings of modalities in `data` and `model` by their dataclasses, in place.

    Args:
        values: folded values of a whole configuration.
        shipped: those of the file alone, to go on with in place of faulty ones.
        drop_unknown: (values, dataclass, prefix) removes unknown keys and returns one message for each.
        message: (fault of pydantic, prefix) -> message.

    Returns:
        One message for each problem.
    """
    problems = []
    for section, prefix, kind in (
        ("data", "data.", lambda modality: modality.data),
        ("model", "model.modalities.", lambda modality: modality.network),
    ):
        own = _mapping(values, section)
        for name in list(own):
            modality = known_modalities().get(name)
            where = f"{prefix}{name}."
            if modality is None:
                problems.append(f"{where[:-1]}: unknown modality, expected one of {', '.join(known_modalities())}")
                del own[name]
                continue
            problems += _settings(own, name, kind(modality), where, _mapping(shipped, section), drop_unknown, message)
    return problems


def _mapping(values: dict[str, Any], section: str) -> dict[str, Any]:
    found = values.get(section)
    inner = found.get("modalities") if isinstance(found, dict) else None
    return inner if isinstance(inner, dict) else {}


def _settings(
    own: dict[str, Any],
    name: str,
    kind: type,
    where: str,
    shipped: dict[str, Any],
    drop_unknown: Callable[[dict[str, Any], type, str], list[str]],
    message: Callable[[Mapping[str, Any], str], str],
) -> list[str]:
    """Validate the settings of one modality in one section; faulty ones give way to the file's own."""
    if not isinstance(own[name], dict):
        fault = f"{where[:-1]}: expected settings of {name}, found {own[name]!r}"
        del own[name]
        return [fault]
    problems = drop_unknown(own[name], kind, where)
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        own[name] = adapter.validate_python(own[name])
        return problems
    except ValidationError as error:
        problems += [message(fault, where) for fault in error.errors()]
    try:
        own[name] = adapter.validate_python(shipped.get(name))
    except ValidationError:
        del own[name]
    return problems
