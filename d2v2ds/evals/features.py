"""Features of whole, unmasked inputs: mean-pooled for every layer, and the frames of one layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from d2v2ds.data.reader import Reader
from d2v2ds.data.shards import Shards
from d2v2ds.errors import ConfigError, ShardError
from d2v2ds.model.trunk import Trunk

BATCH_ROWS = 32
"""Most inputs in a batch."""
BATCH_TOKENS = 8192
"""Most tokens in a batch, padding included; an input of more has one to itself."""


def annotation(shards: Shards, name: str) -> list[str | None]:
    """Return one annotation of every row, None for rows without it.

    Args:
        shards: the dataset.
        name: of `Shards.annotations`, or the manifest column that was packed as the label.

    Raises:
        ShardError: there is no such annotation, or no row has it.
    """
    packed_as = shards.index.settings.get("label_column")
    column = "label" if name == packed_as else name
    known = shards.annotations
    if column not in known:
        raise ShardError(
            f"{shards.folder}: no annotation {name!r} to predict or leave out; there are {', '.join(known) or 'none'} "
            f"(label = {packed_as}); or test on another folder with --test-shards"
        )
    values = [getattr(shards.read_labels(i), column) for i in range(len(shards))]
    if not any(values):
        raise ShardError(f"{shards.folder}: no row has a {name}; pack a manifest with that column")
    return values


@dataclass(frozen=True)
class Features:
    """Features of N inputs."""

    layers: list[NDArray[np.float32]]
    """(N, D) for the input of the first block and for each block: means over tokens."""
    frames: list[Tensor]
    """(T, D) for each input: tokens of one layer; empty if none was asked for."""

    @staticmethod
    def join(parts: Sequence["Features"]) -> "Features":
        """Join the features of several folders."""
        layers = [np.concatenate(layer) for layer in zip(*(part.layers for part in parts), strict=True)]
        return Features(layers, [frames for part in parts for frames in part.frames])


def frame_bytes(reader: Reader, rows: Sequence[int], width: int) -> int:
    """Return the memory that the frames of one layer take: 4 bytes for each of D = `width` numbers of a token."""
    return 4 * width * sum(reader.network.num_tokens(int(reader.sizes[row])) for row in rows)


def check_memory(needed: float, limit_gib: float) -> None:
    """Check that frames fit into memory before any is computed.

    Raises:
        ConfigError: they take more than `limit_gib`.
    """
    if needed > limit_gib * 2**30:
        raise ConfigError(
            f"the frames of all rows take {needed / 2**30:.2f} GiB, expected at most {limit_gib:g}; raise --memory-gib "
            "(probe.memory_gib of a run), or give a folder of fewer or shorter rows"
        )


@torch.inference_mode()
def compute_features(
    model: Trunk, reader: Reader, rows: Sequence[int], *, progress: str, frames_of: int | None = None
) -> Features:
    """Run inputs through a model, in batches of similar size.

    Args:
        model: in eval mode, on any device.
        reader: of the inputs.
        rows: numbers of the inputs; the results have their order.
        progress: label of the progress bar.
        frames_of: layer whose frames are kept, 0 for the input of the first block; None keeps none.
    """
    device = next(model.parameters()).device
    layers: list[NDArray[np.float32]] = []
    frames = [torch.empty(0)] * (0 if frames_of is None else len(rows))
    with tqdm(total=len(rows), desc=progress, unit="row", leave=False, disable=None) as bar:
        for chosen in _batches(reader, rows):
            source, padding = _collate([reader.read_whole(rows[i]) for i in chosen])
            padding = None if padding is None else padding.to(device)
            found = model.layers(reader.modality, source.to(device), padding)  # L x (B, T, D)
            hidden = model.encoder(reader.modality).token_padding(padding, found[0].shape[1])  # (B, T)
            pooled = [_mean(layer, hidden) for layer in found]
            if not layers:
                layers = [np.empty((len(rows), layer.shape[1]), dtype=np.float32) for layer in pooled]
            for whole, part in zip(layers, pooled, strict=True):
                whole[chosen] = part.float().cpu().numpy()
            if frames_of is not None:
                for row, i in enumerate(chosen):
                    real = slice(None) if hidden is None else ~hidden[row]
                    frames[i] = found[frames_of][row][real].float().cpu().clone()
            bar.update(len(chosen))
    return Features(layers, frames)


def _batches(reader: Reader, rows: Sequence[int]) -> Iterator[list[int]]:
    """Yield positions in `rows`, inputs of similar size together; of equal size if the modality knows no padding."""
    sizes = [int(reader.sizes[row]) for row in rows]
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=sizes.__getitem__):
        tokens = (len(batch) + 1) * reader.network.num_tokens(sizes[i])
        differs = bool(batch) and sizes[batch[0]] != sizes[i] and not reader.can_be_whole
        if batch and (differs or len(batch) == BATCH_ROWS or tokens > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _collate(sources: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack inputs, padded with 0 at the end of the last axis: (B, ..., S) and padding (B, S), None without any."""
    lengths = torch.tensor([source.shape[-1] for source in sources])
    longest = int(lengths.max())
    if int(lengths.min()) == longest:
        return torch.stack(list(sources)), None
    padded = [torch.nn.functional.pad(source, (0, longest - source.shape[-1])) for source in sources]
    return torch.stack(padded), torch.arange(longest) >= lengths[:, None]


def _mean(values: Tensor, hidden: Tensor | None) -> Tensor:
    """(B, T, D), hidden (B, T) -> (B, D)."""
    if hidden is None:
        return values.mean(1)
    return values.masked_fill(hidden[..., None], 0).sum(1) / (~hidden).sum(1, keepdim=True)
