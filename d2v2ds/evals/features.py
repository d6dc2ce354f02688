"""Mean-pooled features of whole, unmasked inputs."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from d2v2ds.data.reader import Reader
from d2v2ds.data.shards import Shards
from d2v2ds.errors import ShardError
from d2v2ds.model.trunk import Trunk

BATCH_ROWS = 32
"""Most inputs of one size in a batch."""


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


@torch.inference_mode()
def pooled_features(model: Trunk, reader: Reader, rows: Sequence[int], *, progress: str) -> list[NDArray[np.float32]]:
    """Average every layer over tokens. Inputs of equal size share a batch, so none is padded or cropped.

    Args:
        model: in eval mode, on any device.
        reader: of the inputs.
        rows: numbers of the inputs.
        progress: label of the progress bar.

    Returns:
        (N, D) for the input of the first block and for each block, in the order of `rows`.
    """
    device = next(model.parameters()).device
    by_size = sorted(range(len(rows)), key=lambda i: int(reader.sizes[rows[i]]))
    pooled: list[NDArray[np.float32]] = []
    with tqdm(total=len(rows), desc=progress, unit="row", leave=False, disable=None) as bar:
        for _, group in itertools.groupby(by_size, key=lambda i: int(reader.sizes[rows[i]])):
            members = list(group)
            for start in range(0, len(members), BATCH_ROWS):
                chosen = members[start : start + BATCH_ROWS]
                source = torch.stack([reader.read_whole(rows[i]) for i in chosen]).to(device)
                layers = [layer.mean(1).float().cpu().numpy() for layer in model.layers(reader.modality, source)]
                if not pooled:
                    pooled = [np.empty((len(rows), layer.shape[1]), dtype=np.float32) for layer in layers]
                for whole, part in zip(pooled, layers, strict=True):
                    whole[chosen] = part
                bar.update(len(chosen))
    return pooled
