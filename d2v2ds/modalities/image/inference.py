"""Pictures of any size -> squares of pixels that an image encoder reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.image.reader import resize, whole_view
from d2v2ds.modalities.inference import InputOptions, Piece


class ImageInference:
    """Raw pictures for one exported model; an `Inference`."""

    fill = 0.0

    def __init__(self, network: ImageNetwork, preprocessing: Mapping[str, Any]) -> None:
        """
        Args:
            network: settings of the encoder.
            preprocessing: `side` of the export.
        """
        self._network = network
        self._side: int = preprocessing["side"]

    def read(self, item: Any, options: InputOptions, place: str) -> Tensor:
        """Read a file or a PIL image: (3, Y, X) uint8, the middle of the picture."""
        return read_picture(item, self._side, place)

    def cut(self, index: int, source: Tensor, options: InputOptions) -> list[Piece]:
        """Return the whole picture as one piece."""
        return [Piece(index, source, 0, self._network.num_tokens(source.shape[-1]), 0)]


def read_picture(given: Any, side: int, place: str) -> Tensor:
    """The middle of a picture.

    Args:
        given: path of an image file, or a `PIL.Image.Image`; its EXIF orientation is applied.
        side: of the square that the model reads (pixels).
        place: how messages call the input.

    Returns:
        (3, side, side) uint8.

    Raises:
        ValueError: it is no picture, or a damaged one.
        MissingExtraError: Pillow is not installed.
    """
    from PIL import Image, ImageOps

    from d2v2ds.data.codecs.pixels import PILLOW_ERRORS, to_rgb  # here, so that other modalities need no Pillow

    if not isinstance(given, str | Path | Image.Image):
        raise ValueError(f"{place}: expected a path or a PIL image, found {type(given).__name__}")
    try:
        opened = given if isinstance(given, Image.Image) else Image.open(given)
        rgb = to_rgb(ImageOps.exif_transpose(opened))
    except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"{place}: cannot be decoded as a picture: {error}") from error
    if not rgb.width or not rgb.height:
        raise ValueError(f"{place}: expected a picture, found one of {rgb.width} x {rgb.height} pixels")
    view = whole_view(rgb.width, rgb.height, side)
    return view.middle(resize(np.array(rgb.crop(view.box)), *view.size), side)
