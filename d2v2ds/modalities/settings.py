"""Settings of a trunk as plain values, as configurations, checkpoints and exports store them."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from d2v2ds.modalities.known import modality_of
from d2v2ds.model.trunk import TrunkConfig


def read_trunk(values: Mapping[str, Any], where: str) -> TrunkConfig:
    """Build the settings of a trunk from plain values.

    Args:
        values: as `write_trunk` makes them.
        where: file they come from, for messages.

    Raises:
        ConfigError: nobody provides one of its modalities.
        ValidationError, KeyError, TypeError, AttributeError: not the settings of a trunk.
    """
    modalities: dict[str, Any] = {
        name: TypeAdapter(modality_of(name, where).network).validate_python(settings)
        for name, settings in values["modalities"].items()
        if settings is not None
    }
    found: TrunkConfig = TypeAdapter(TrunkConfig).validate_python(dict(values) | {"modalities": modalities})
    return found


def write_trunk(config: TrunkConfig) -> dict[str, Any]:
    """Convert the settings of a trunk to plain values."""
    values: dict[str, Any] = TypeAdapter(TrunkConfig).dump_python(config, mode="json")
    return values
