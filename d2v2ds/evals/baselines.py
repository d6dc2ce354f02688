"""What an input shows without any model: the yardstick beside a probe of features."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2v2ds.data.collate import Reader
from d2v2ds.errors import MissingExtraError

PIXEL_SIDE = 16
"""Images are averaged down to this many pixels a side."""


def tf_idf(reader: Reader, rows: Sequence[int]) -> Any:
    """TF-IDF of the token ids of every row, fitted on all of them: a sparse matrix (N, V)."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise MissingExtraError("probes need scikit-learn", "eval") from error
    texts = [" ".join(map(str, reader.read_whole(row).tolist())) for row in rows]
    return TfidfVectorizer(token_pattern=r"\d+").fit_transform(texts)


def pixels(reader: Reader, rows: Sequence[int]) -> NDArray[np.float32]:
    """The pixels themselves, (N, 3 * side * side)."""
    found = []
    for row in rows:
        image = reader.read_whole(row)[None].float()
        small = min(PIXEL_SIDE, image.shape[-1])
        found.append(torch.nn.functional.adaptive_avg_pool2d(image, small).flatten().numpy())
    return np.stack(found)


BASELINES: dict[str, tuple[str, Callable[[Reader, Sequence[int]], Any]]] = {
    "image": ("pixels", pixels),
    "text": ("TF-IDF of the tokens", tf_idf),
}
"""Modality -> name of its baseline, and the function that computes it."""
