"""The reader of each modality by its name."""

from collections.abc import Callable
from typing import Any

from d2v2ds.data.audio import AudioReader
from d2v2ds.data.collate import ModelInput, Reader
from d2v2ds.data.image import ImageReader
from d2v2ds.data.shards import AudioShards, ImageShards, TextShards, open_shards
from d2v2ds.data.text import TextReader
from d2v2ds.errors import ShardError

READERS: dict[str, Callable[..., Reader]] = {"audio": AudioReader, "image": ImageReader, "text": TextReader}


def open_reader(modality: str, config: Any, model: ModelInput) -> Reader:
    """Open the folder that a modality's settings name.

    Args:
        modality: its name.
        config: its settings of data.
        model: its settings of the model.

    Raises:
        ShardError: if the folder is unfinished, damaged or of another modality.
        MissingExtraError: if a package that decodes it is absent.
    """
    shards: AudioShards | ImageShards | TextShards = open_shards(config.shards)
    if shards.index.modality != modality:
        raise ShardError(f"{config.shards}: expected {modality}, found a folder of {shards.index.modality}")
    return READERS[modality](shards, config, model)
