"""The reader of each modality by its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2v2ds.data.collate import ModelInput, Reader
from d2v2ds.data.joined import JoinedShards, folders_of
from d2v2ds.data.shards import open_shards
from d2v2ds.errors import ShardError
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.audio.reader import AudioDataConfig, AudioReader
from d2v2ds.modalities.image.reader import ImageDataConfig, ImageReader
from d2v2ds.modalities.text.reader import TextDataConfig, TextReader

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


_NO_MASK = MaskConfig(kind="random", num_masks=1, masked_fraction=0.5)
"""Settings of data name one; nothing is drawn for whole inputs."""
WHOLE: dict[str, Callable[[Path, int], Any]] = {
    "audio": lambda folder, rate: AudioDataConfig(
        shards=folder, mask=_NO_MASK, sample_rate_hz=rate, global_batch_seconds=1, micro_batch_seconds=1
    ),
    "image": lambda folder, _: ImageDataConfig(
        shards=folder, mask=_NO_MASK, global_batch_images=1, micro_batch_images=1
    ),
    "text": lambda folder, _: TextDataConfig(shards=folder, mask=_NO_MASK, global_batch_tokens=1, micro_batch_tokens=1),
}


def open_whole(folder: Path, modality: str, model: ModelInput, sample_rate_hz: int) -> Reader:
    """A folder for evaluation: of its reader only `read_whole`, `sizes` and `units` mean anything.

    Args:
        folder: packed.
        modality: of the folder.
        model: its settings of the model.
        sample_rate_hz: of speech, what the model is made for.

    Raises:
        ShardError: if the folder cannot be read, or not by this model.
        MissingExtraError: if a package that decodes it is absent.
    """
    reader = open_reader(modality, WHOLE[modality](folder, sample_rate_hz), model)
    if faults := reader.misfits():
        raise ShardError(f"{folder}: " + "; ".join(faults))
    return reader
