"""The parts of a configuration that belong to modalities: between YAML, where a modality's settings stand beside other
keys of `data`, `valid` and `probe`, and the sections, where they are mappings by name.
"""

from typing import Any

from d2v2ds.config.faults import drop_unknown_keys, validated
from d2v2ds.config.unions import build_unions
from d2v2ds.modalities.known import known_modalities

_FOLDED = ("data", "valid", "probe")
"""Sections in which modalities stand beside other keys."""


def fold(values: dict[str, Any]) -> None:
    """Move the modalities of these sections into mappings, in the order of `known_modalities`, without nulls."""
    known = known_modalities()
    for name in _FOLDED:
        section = values.get(name)
        if isinstance(section, dict):
            section["modalities"] = {one: section.pop(one) for one in known if one in section}
    for name in (*_FOLDED, "model", "objective"):
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


def build_modalities(values: dict[str, Any], shipped: dict[str, Any]) -> tuple[bool, list[str]]:
    """Replace raw settings of modalities in `data` and `model` by their dataclasses, in place.

    Args:
        values: folded values of a whole configuration.
        shipped: those of the file alone, to go on with in place of faulty ones.

    Returns:
        Whether all could be built, and one message for each problem.
    """
    whole, problems, known = True, [], known_modalities()
    for section, prefix, kind in (
        ("data", "data.", lambda modality: modality.data),
        ("model", "model.modalities.", lambda modality: modality.network),
    ):
        raw, own = _mapping(values, section), _mapping(shipped, section)
        for name in list(raw):
            where, built = f"{prefix}{name}", None
            if name not in known:
                problems.append(f"{where}: unknown modality, expected one of {', '.join(known)}")
            elif not isinstance(raw[name], dict):
                problems.append(f"{where}: expected settings of {name}, found {raw[name]!r}")
            else:
                problems += drop_unknown_keys(raw[name], kind(known[name]), f"{where}.")
                chosen, faults = build_unions(raw[name], own.get(name), kind(known[name]), f"{where}.")
                whole, problems = whole and chosen, problems + faults
                built, faults = validated(kind(known[name]), raw[name], own.get(name), f"{where}.")
                problems += faults
            whole &= built is not None
            if built is None:
                del raw[name]
            else:
                raw[name] = built
    return whole, problems


def _mapping(values: dict[str, Any], section: str) -> dict[str, Any]:
    found = values.get(section)
    inner = found.get("modalities") if isinstance(found, dict) else None
    return inner if isinstance(inner, dict) else {}
