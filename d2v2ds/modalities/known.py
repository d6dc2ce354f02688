"""Modalities by name: those shipped with d2v2ds, and those of installed packages.

A package of another project adds one by an entry point, in its own pyproject.toml:

    [project.entry-points."d2v2ds.modalities"]
    sensors = "sensors.modality:SENSORS"
"""

from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from d2v2ds.data.folders import JoinedShards, folders_of
from d2v2ds.data.reader import AnyMask, Reader
from d2v2ds.data.schema import read_index
from d2v2ds.data.shards import Shards
from d2v2ds.errors import ConfigError, ShardError
from d2v2ds.labels import Labelled
from d2v2ds.modalities.audio.modality import AUDIO
from d2v2ds.modalities.image.modality import IMAGE
from d2v2ds.modalities.modality import Modality
from d2v2ds.modalities.spectrogram.modality import SPECTROGRAM
from d2v2ds.modalities.text.modality import TEXT

SHIPPED: tuple[Modality, ...] = (AUDIO, IMAGE, TEXT, SPECTROGRAM)
ENTRY_POINTS = "d2v2ds.modalities"


@cache
def known_modalities() -> dict[str, Modality]:
    """Modalities by name: the shipped ones in their order, then those of installed packages by name.

    Raises:
        ConfigError: two of them have one name.
    """
    found = {modality.name: modality for modality in SHIPPED}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        modality: Modality = entry.load()
        if modality.name in found:
            raise ConfigError(
                f"entry point {entry.value} of {ENTRY_POINTS}: modality {modality.name!r} exists already; rename it"
            )
        found[modality.name] = modality
    return found


def modality_of(name: str, where: str) -> Modality:
    """Find a modality.

    Args:
        name: its name.
        where: who names it, for the message.

    Raises:
        ConfigError: nobody provides it.
    """
    modalities = known_modalities()
    if name not in modalities:
        raise ConfigError(
            f"{where}: modality {name!r} is not known here, expected one of {', '.join(modalities)}; install the "
            "package that provides it"
        )
    return modalities[name]


def open_shards(folder: Path | str) -> Shards:
    """Open a packed folder of any modality.

    Raises:
        ShardError: if the folder is unfinished, of another version, or its files do not fit its index.
        ConfigError: if nobody provides its modality.
    """
    return modality_of(read_index(Path(folder)).modality, str(folder)).shards(folder)


def modality_reading(folder: Path | str, names: Iterable[str]) -> str | None:
    """Find the modality that reads a packed folder; the first if several do, None if none does.

    Args:
        folder: packed.
        names: of modalities.

    Raises:
        ShardError: the folder is unfinished or of another version.
        ConfigError: nobody provides one of the modalities.
    """
    packed = read_index(Path(folder)).modality
    return next((name for name in names if modality_of(name, str(folder)).shards.layout.name == packed), None)


def open_reader(
    name: str, data: Any, network: Any, mask: AnyMask | None, labelled: Labelled | None = None, augments: bool = True
) -> Reader:
    """Open the folder or folders that a modality's data settings name.

    Args:
        name: of the modality.
        data: its data settings.
        network: its network settings.
        mask: masks that the objective asks for; None for none.
        labelled: demands of a fine-tuning task; None for none.
        augments: False reads a task's inputs as in evaluation.

    Raises:
        ConfigError: if a task asks for whole inputs and the modality has none.
        ShardError: if a folder is unfinished, damaged or of another modality, or folders do not fit each other.
        MissingExtraError: if a package that decodes it is absent.
    """
    modality = modality_of(name, f"data.{name}")
    for folder in folders_of(data.shards):
        if (found := read_index(folder).modality) != (wanted := modality.shards.layout.name):
            raise ShardError(f"{folder}: expected {wanted}, found a folder of {found}")
    parts = [modality.shards(folder) for folder in folders_of(data.shards)]
    reader = modality.reader(JoinedShards(parts, modality.must_be_equal), data, network, mask)
    if labelled is not None and not reader.can_be_whole:
        raise ConfigError(f"data.{name}: its reader cannot read whole inputs, which fine-tuning needs")
    reader.labelled, reader.augments = labelled, augments
    return reader
