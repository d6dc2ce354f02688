"""Bounds of single configuration fields: `Annotated[int, Bounds(ge=1)]`.

pydantic checks them when it loads a YAML file. This module does not import pydantic, so that the model room needs only
torch.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a number."""

    ge: float | None = None
    """Least value."""
    gt: float | None = None
    """Value that the number must exceed."""
    le: float | None = None
    """Largest value."""
    lt: float | None = None
    """Value that the number must stay below."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Add the limits to the schema of an int or a float; integers stay below 2^53, which a float can hold."""
        schema = handler(source)
        limits = {name: limit for name, limit in asdict(self).items() if limit is not None}
        if schema["type"] == "int" and not {"le", "lt"} & limits.keys():
            limits["lt"] = 1 << 53
        return schema | limits


@dataclass(frozen=True)
class _Expanded:
    """Expands a leading `~` of a path."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Add the expansion to the schema of a path."""
        expand = {"type": "no-info", "function": Path.expanduser}
        return {"type": "function-after", "function": expand, "schema": handler(source)}


MOST_LAYERS = 1000
"""Most layers of any stack: a number from a file that decides how much is built."""
_MOST_WIDTH = 65_536
_MOST_COUNT = 2**31 - 1

UserPath = Annotated[Path, _Expanded()]
"""Path that a user gives; `~` is the home folder."""
Amount = Annotated[int, Bounds(ge=0)]
"""0 or more, without the limit of a count: bytes, samples, rows of a corpus."""
Count = Annotated[int, Bounds(ge=1, le=_MOST_COUNT)]
"""1 or more."""
CountOrZero = Annotated[int, Bounds(ge=0, le=_MOST_COUNT)]
"""0 or more."""
Depth = Annotated[int, Bounds(ge=1, le=MOST_LAYERS)]
"""Number of layers."""
DepthOrZero = Annotated[int, Bounds(ge=0, le=MOST_LAYERS)]
"""Number of layers, or none."""
Width = Annotated[int, Bounds(ge=1, le=_MOST_WIDTH)]
"""Channels, heads, groups or taps of a layer."""
WidthRatio = Annotated[float, Bounds(gt=0, le=1000)]
"""Width of a layer over that of another."""
Positive = Annotated[float, Bounds(gt=0)]
"""Above 0."""
PositiveOrZero = Annotated[float, Bounds(ge=0)]
"""0 or more."""
Rate = Annotated[float, Bounds(ge=0, lt=1)]
"""Dropped fraction: 0 or more, below 1."""
Share = Annotated[float, Bounds(ge=0, le=1)]
"""Fraction from 0 to 1."""
