"""The reader of each modality by its name."""

from collections.abc import Callable
from typing import Any

from d2v2ds.data.audio import AudioReader
from d2v2ds.data.collate import ModelInput, Reader
from d2v2ds.data.image import ImageReader
from d2v2ds.data.joined import JoinedShards, folders_of
from d2v2ds.data.shards import open_shards
from d2v2ds.data.text import TextReader
from d2v2ds.errors import ShardError

READERS: dict[str, Callable[..., Reader]] = {"audio": AudioReader, "image": ImageReader, "text": TextReader}


def open_reader(modality: str, config: Any, model: ModelInput) -> Reader:
    """Open the folder or folders that a modality's settings name.

    Args:
        modality: its name.
        config: its settings of data.
        model: its settings of the model.

    Raises:
        ShardError: if a folder is unfinished, damaged or of another modality, or folders do not fit each other.
        MissingExtraError: if a package that decodes it is absent.
    """
    parts: list[Any] = [open_shards(folder) for folder in folders_of(config.shards)]
    for part in parts:
        if part.index.modality != modality:
            raise ShardError(f"{part.folder}: expected {modality}, found a folder of {part.index.modality}")
    return READERS[modality](parts[0] if len(parts) == 1 else JoinedShards(parts), config, model)
