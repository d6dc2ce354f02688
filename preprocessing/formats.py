"""Kinds of packed folders that `verify` and `inspect` know: the shipped ones and those of installed packages.

A package of another project adds one by an entry point, in its own pyproject.toml:

    [project.entry-points."d2v2ds.packed_formats"]
    sensors = "sensors.packing:FORMAT"

The report of a format is imported when a folder of it is looked at, so that text needs no audio library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from d2v2ds.data.schema import read_index
from d2v2ds.data.shards import Shards
from d2v2ds.errors import ConfigError
from d2v2ds.modalities.audio.shards import AudioShards
from d2v2ds.modalities.image.shards import ImageShards
from d2v2ds.modalities.text.shards import TextShards
from preprocessing.driver.protocol import FolderReport

ENTRY_POINTS = "d2v2ds.packed_formats"


@dataclass(frozen=True)
class PackedFormat:
    """A kind of packed folder."""

    shards: type[Shards]
    """Access to its rows; has the layout and with it the name."""
    report: Callable[[], FolderReport]
    """Imports what `verify` and `inspect` do with it."""


def _audio() -> FolderReport:
    from preprocessing.audio import report

    return report


def _image() -> FolderReport:
    from preprocessing.image import report

    return report


def _text() -> FolderReport:
    from preprocessing.text import report

    return report


SHIPPED = (PackedFormat(AudioShards, _audio), PackedFormat(ImageShards, _image), PackedFormat(TextShards, _text))


@cache
def known_formats() -> dict[str, PackedFormat]:
    """Formats by the name of their modality: the shipped ones in their order, then those of installed packages by name.

    Raises:
        ConfigError: two of them have one name.
    """
    found = {one.shards.layout.name: one for one in SHIPPED}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        packed: PackedFormat = entry.load()
        name = packed.shards.layout.name
        if name in found:
            raise ConfigError(
                f"entry point {entry.value} of {ENTRY_POINTS}: format {name!r} exists already; rename its layout"
            )
        found[name] = packed
    return found


def format_of(modality: str, where: Path) -> PackedFormat:
    """Find the format of a folder.

    Raises:
        ConfigError: nobody provides it.
    """
    if modality not in known_formats():
        raise ConfigError(
            f"{where}: modality {modality!r} is not known here, expected one of {', '.join(known_formats())}; install "
            "the package that packed the folder"
        )
    return known_formats()[modality]


def open_shards(folder: Path) -> Any:
    """Open a packed folder of any known format.

    Raises:
        ShardError: if the folder is unfinished, of another version, or its files do not fit its index.
        ConfigError: if nobody provides its format.
    """
    return format_of(read_index(folder).modality, folder).shards(folder)
