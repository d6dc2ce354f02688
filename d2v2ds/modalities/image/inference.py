"""Pictures of any size -> squares of pixels that an image encoder reads."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.image.reader import resize, whole_view
from d2v2ds.modalities.image.shards import IMAGE_SUFFIXES
from d2v2ds.modalities.inference import InputOptions, Piece


class ImageInference:
    """Raw pictures for one exported model; an `Inference`."""

    fill = 0.0
    suffixes = IMAGE_SUFFIXES
    token_seconds = None

    def __init__(self, network: ImageNetwork, preprocessing: Mapping[str, Any]) -> None:
        """
        Args:
            network: settings of the encoder.
            preprocessing: `side` of the export.

        Raises:
            CheckpointError: they contradict each other.
        """
        self._network = network
        self._side: int = preprocessing["side"]
        if self._side != network.image_size:
            raise CheckpointError(
                f"expected pictures of the network's {network.image_size} pixels a side, found preprocessing to "
                f"{self._side!r:.40}; export the model again"
            )

    def read(self, item: Any, options: InputOptions, place: str) -> Tensor:
        """Read a file or a PIL image: (3, Y, X) uint8, the middle of the picture."""
        return read_picture(item, self._side, place)

    def cut(self, index: int, source: Tensor, options: InputOptions) -> list[Piece]:
        """Return the whole picture as one piece."""
        return [Piece(index, source, 0, self._network.num_tokens(source.shape[-1]), 0)]

    def inputs(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield the file itself."""
        yield str(path), path

    def pieces(self, index: int, item: Any, options: InputOptions, place: str) -> Iterator[Piece]:
        """Yield the whole picture."""
        yield from self.cut(index, self.read(item, options, place), options)


def read_picture(given: Any, side: int, place: str) -> Tensor:
    """The middle of a picture.

    Args:
        given: path of an image file, or a `PIL.Image.Image`; its EXIF orientation is applied.
        side: of the square that the model reads (pixels).
        place: how messages call the input.

    Returns:
        (3, side, side) uint8.

    Raises:
        ValueError: it is no picture, a damaged one, or one that packing would skip.
        MissingExtraError: Pillow is not installed.
    """
    from d2v2ds.data.codecs.imagefile import DecodeError, read_rgb  # here, so that other modalities need no Pillow

    try:
        rgb = read_rgb(given)
    except DecodeError as error:
        raise ValueError(f"{place}: cannot be decoded as a picture: {error}") from error
    view = whole_view(rgb.width, rgb.height, side)
    return view.middle(resize(np.array(rgb.crop(view.box)), *view.size), side)
