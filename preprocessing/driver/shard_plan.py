"""Plan of a packing: the units of each shard, decided before anything is packed.

A plan is a pure function of the inputs and the settings. Worker counts and restarts cannot change it, so they cannot
change the bytes: each shard is packed on its own, from its own part of the plan.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar


class Unit(Protocol):
    """Input that is packed together and in one shard: a file, clips that are joined, a part of an archive."""

    @property
    def files(self) -> int:
        """Input files in it."""
        ...

    @property
    def size(self) -> int:
        """Planned size, by which shards are cut and progress is counted: samples, or bytes of input."""
        ...


SomeUnit = TypeVar("SomeUnit", bound=Unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A file that is not in the shards."""

    order: int
    """Position of the file among all input files."""
    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """A file that is in the shards, but not as it was or not as its header says."""

    order: int
    """Position of the file among all input files."""
    source: str
    kind: str
    """Kind of loss, in the same words for all such files: ``clipped``."""
    detail: str
    """How much of this file."""
    lost: float = 1.0
    """Share of the file that is lost, 0 to 1; 0 if the note is only counted."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The units of every shard, and the files that the plan already rules out."""

    shards: tuple[tuple[Any, ...], ...]
    skipped: tuple[Skipped, ...]
    files: int
    """Input files, the skipped ones included."""
    sha256: str
    """`fingerprint` of everything that the bytes of the shards depend on, beside the settings."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Files of the input folders that are not read, by suffix."""
    noted: tuple[Noted, ...] = ()
    """Notes that need no decoding."""


def cut_shards(
    units: Sequence[SomeUnit], shard_bytes: int, bytes_per_size: float = 1.0
) -> tuple[tuple[SomeUnit, ...], ...]:
    """Divide the units evenly over the fewest shards of the wanted size, by planned bytes; order is kept.

    Args:
        units: what is packed, in order.
        shard_bytes: wanted size of a shard.
        bytes_per_size: planned bytes in a shard per `Unit.size`.
    """
    if not units:
        return ()
    total = max(1, sum(unit.size for unit in units))
    count = max(1, -(-round(total * bytes_per_size) // shard_bytes))
    shards: dict[int, list[SomeUnit]] = {}
    start = 0
    for unit in units:
        # the shard in which the middle of the unit falls; whole numbers, so every machine agrees
        number = min((2 * start + unit.size) * count // (2 * total), count - 1)
        shards.setdefault(number, []).append(unit)
        start += unit.size
    return tuple(tuple(shard) for shard in shards.values())


def fingerprint(values: Iterable[object]) -> str:
    """SHA-256 of the `repr` of values in order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()
