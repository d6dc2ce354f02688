"""Settings of a trunk as plain values, as configurations, checkpoints and exports store them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter

from d2v2ds.errors import ConfigError
from d2v2ds.io.read import validate
from d2v2ds.modalities.known import modality_of
from d2v2ds.model.trunk import TrunkConfig

_MOST_CHARACTERS = 100_000
MOST_NUMBER = 10_000_000
"""Largest number in the settings of a modality: of token ids, samples or pixels."""


def read_trunk(values: Any, where: str) -> TrunkConfig:
    """Build the settings of a trunk from plain values.

    Args:
        values: as `write_trunk` makes them.
        where: file they come from, for messages.

    Raises:
        ConfigError: they are not the settings of a trunk, or beyond what any network has; or nobody provides one of
            its modalities.
    """
    sections = values.get("modalities") if isinstance(values, Mapping) else None
    if not isinstance(sections, Mapping):
        raise ConfigError(f"{where}: expected the settings of a trunk with `modalities`, found others")
    try:
        size = len(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: expected plain and finite settings: {error}") from error
    if size > _MOST_CHARACTERS:
        raise ConfigError(f"{where}: expected settings of at most {_MOST_CHARACTERS:,} characters, found {size:,}")
    modalities: dict[str, Any] = {}
    for name, settings in sections.items():
        if settings is None:
            continue
        place = f"{where}: modalities.{name}"
        if large := [f"{number:,}" for number in _numbers(settings) if abs(number) > MOST_NUMBER]:
            raise ConfigError(f"{place}: expected numbers up to {MOST_NUMBER:,}, found {', '.join(large[:3])}")
        modalities[name] = validate(modality_of(name, where).network, settings, place, ConfigError)
    found = replace(validate(TrunkConfig, {**values, "modalities": {}}, where, ConfigError), modalities=modalities)
    if unknown := sorted(_unknown_keys(values, write_trunk(found))):
        raise ConfigError(f"{where}: expected the settings of a trunk, found the unknown keys {', '.join(unknown[:8])}")
    return found


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield every number in plain values."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(inner)


def _unknown_keys(given: Any, known: Any, place: str = "") -> Iterator[str]:
    """Yield keys that no field has read."""
    if isinstance(given, Mapping) and isinstance(known, Mapping):
        yield from (f"{place}{key}" for key in given if key not in known and given[key] is not None)
        for key in given.keys() & known.keys():
            yield from _unknown_keys(given[key], known[key], f"{place}{key}.")


def write_trunk(config: TrunkConfig) -> dict[str, Any]:
    """Convert the settings of a trunk to plain values."""
    values: dict[str, Any] = TypeAdapter(TrunkConfig).dump_python(config, mode="json")
    return values
