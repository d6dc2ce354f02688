"""Mean-pooled features of whole clips, nothing masked."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from d2v2ds.data.audio import decode
from d2v2ds.data.shards import ArrowShards
from d2v2ds.errors import ShardError
from d2v2ds.model.data2vec2 import Data2Vec2

COLUMNS = ("label", "speaker", "text")
"""Annotations that a shard row can have."""


def annotation(shards: ArrowShards, name: str) -> list[str | None]:
    """One annotation of every row, None where a row has none.

    Args:
        shards: the dataset.
        name: `label`, `speaker` or `text`, or the manifest column that was packed as the label.

    Raises:
        ShardError: if there is no such annotation, or no row has it.
    """
    packed_as = shards.index.settings.get("label_column")
    column = "label" if name == packed_as else name
    if column not in COLUMNS:
        raise ShardError(
            f"{shards.folder}: no annotation {name!r}; there are {', '.join(COLUMNS)}, label = {packed_as}"
        )
    values = [getattr(shards.read_labels(i), column) for i in range(len(shards))]
    if not any(values):
        raise ShardError(f"{shards.folder}: no row has a {name}; pack a manifest with that column")
    return values


@torch.inference_mode()
def pooled_features(
    model: Data2Vec2, shards: ArrowShards, rows: Sequence[int], *, progress: str
) -> list[NDArray[np.float32]]:
    """Mean over time of every layer, clip by clip, so that no clip is padded or cropped.

    Args:
        model: in eval mode, on any device.
        shards: the clips.
        rows: which clips.
        progress: label of the progress bar.

    Returns:
        For the input of the first block and for each block: (N, D).
    """
    device = next(model.parameters()).device
    pooled: list[list[NDArray[np.float32]]] = []
    for row in tqdm(rows, desc=progress, unit="clip", leave=False, disable=None):
        waveform = torch.empty(1, int(shards.num_samples[row]))
        decode(shards, row, 0, waveform.numpy()[0])
        pooled.append([layer.mean(1)[0].float().cpu().numpy() for layer in model.layers("audio", waveform.to(device))])
    return [np.stack(layer) for layer in zip(*pooled, strict=True)]
