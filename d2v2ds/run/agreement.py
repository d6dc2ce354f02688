"""Compare what the ranks assume before the first step: configuration, data, DeepSpeed settings, code.

Ranks that differ train to the end without an error, or hang in a collective call: a job script edited while it waited,
a folder that one node holds an older copy of, another installed version. Everything that decides a number is compared.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from d2v2ds.config.load import to_dict
from d2v2ds.distributed import comm
from d2v2ds.errors import ConfigError
from d2v2ds.io.crc import crc32
from d2v2ds.run.prepare import Prepared
from d2v2ds.run.provenance import versions
from d2v2ds.run.watchdog import ranges

MOST_SAID = 20
"""Differing fields in one message."""


def assumptions(prepared: Prepared) -> dict[str, Any]:
    """Return everything that must be the same on all ranks, by field."""
    readers = {f"data.{name}": stream.reader for name, stream in prepared.streams.items()}
    readers |= prepared.held_out_readers
    sections = {
        "": to_dict(prepared.config),
        "DeepSpeed settings": prepared.ds_config,
        "objective: units": {"crc32": crc32(prepared.units)},
        "versions": versions() | {"code": _code()},
        **{
            f"{name}: folder": [part.index.checksums() for part in reader.shards.parts]
            for name, reader in readers.items()
        },
    }
    return {field: value for prefix, section in sections.items() for field, value in _flat(section, prefix)}


def compare(values: Mapping[str, Any]) -> None:
    """Check that all ranks have the same values. Collective.

    Raises:
        ConfigError: on all ranks, naming the fields and the ranks.
    """
    text = json.dumps(values, sort_keys=True, default=str)
    if len(set(comm.gather_objects(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    by_rank = comm.gather_objects(dict(json.loads(text)))
    lines = []
    for field in sorted({name for one in by_rank for name in one}):
        holders: dict[str, list[int]] = {}
        for rank, one in enumerate(by_rank):
            holders.setdefault(json.dumps(one.get(field)), []).append(rank)
        if len(holders) > 1:
            said = sorted(holders.items(), key=lambda item: -len(item[1]))
            lines.append(f"  - {field}: " + ", ".join(f"{value} on rank {ranges(ranks)}" for value, ranks in said))
    more = f"\n  and {len(lines) - MOST_SAID} more" if len(lines) > MOST_SAID else ""
    raise ConfigError(
        "the ranks assume different things; start all of them with one command, code and data\n"
        + "\n".join(lines[:MOST_SAID])
        + more
    )


@cache
def _code() -> str:
    """Hash of the package's source files."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _flat(value: Any, prefix: str) -> list[tuple[str, Any]]:
    """List the leaves of nested mappings and lists with their paths."""
    if isinstance(value, Mapping) and value:
        items = [(str(name), inner) for name, inner in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        return [(prefix, value)]
    return [leaf for name, inner in items for leaf in _flat(inner, f"{prefix}.{name}".lstrip("."))]
