"""`D2V2DSImageProcessor`: pictures -> the normalised centre crop that published results are measured with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    ChannelDimension,
    infer_channel_dimension_format,
    make_flat_list_of_images,
    to_numpy_array,
)

from d2v2ds.data.codecs.imagefile import read_rgb


class D2V2DSImageProcessor(BaseImageProcessor):
    """Upright RGB; the shorter side resized; the middle cut out; normalised per channel.

    Own steps, because those of transformers cut a pixel beside where d2v2ds does (every fourth picture), and Pillow
    resizes to other grey levels than torch.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: dict[str, int] | None = None,
        crop_size: dict[str, int] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            size: `shortest_edge`, pixels of the shorter side after resizing.
            crop_size: `height` and `width` of the result.
            image_mean: of each channel on the scale 0 to 1.
            image_std: likewise.
            kwargs: of `BaseImageProcessor`.
        """
        super().__init__(**kwargs)
        self.size = size or {"shortest_edge": 256}
        self.crop_size = crop_size or {"height": 224, "width": 224}
        self.image_mean = image_mean or [0.485, 0.456, 0.406]
        self.image_std = image_std or [0.229, 0.224, 0.225]

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: one or several: paths of image files, or images of Pillow, NumPy or torch; arrays are uint8 with
                three channels, first or last.
            return_tensors: "pt" or "np".
            kwargs: nothing: the size of the result is the model's.

        Returns:
            `pixel_values` (B, 3, Y, X) float32.

        Raises:
            ValueError: an image cannot be read, an array is not of bytes, or a setting is given that is fixed.
        """
        if kwargs:
            raise ValueError(f"{type(self).__name__}: settings are those of the model, found {sorted(kwargs)}")
        mean, std = (
            np.array(values, dtype=np.float32)[:, None, None] * 255 for values in (self.image_mean, self.image_std)
        )
        flat = make_flat_list_of_images(_upright(images))
        crops = [(self._crop(_channels_last(image)) - mean) / std for image in flat]
        return BatchFeature({"pixel_values": crops}, tensor_type=return_tensors)

    def _crop(self, image: np.ndarray) -> np.ndarray:
        """(Y, X, 3) uint8 -> (3, height, width) uint8: bicubic with antialiasing, then the middle."""
        shorter, wanted = min(image.shape[:2]), self.size["shortest_edge"]
        above, before = (max(0, side - 8 * shorter) // 2 for side in image.shape[:2])  # of a panorama only the middle
        image = image[above : image.shape[0] - above, before : image.shape[1] - before]
        target = [side * wanted // shorter for side in image.shape[:2]]
        source = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)[None]  # (1, 3, Y, X), channels last
        resized = F.interpolate(source, target, mode="bicubic", antialias=True)[0].numpy()  # (3, Y, X)
        height, width = self.crop_size["height"], self.crop_size["width"]
        top, left = round((target[0] - height) / 2), round((target[1] - width) / 2)
        crop: np.ndarray = resized[:, top : top + height, left : left + width]
        return crop


def _upright(images: Any) -> Any:
    """Images with files and Pillow images as displayed, in mode RGB; lists of them likewise."""
    if isinstance(images, list | tuple):
        return [_upright(image) for image in images]
    return read_rgb(images) if isinstance(images, str | Path | Image.Image) else images


def _channels_last(image: Any) -> np.ndarray:
    """(Y, X, 3) uint8 of an RGB image, or of an array of either order."""
    array: np.ndarray = to_numpy_array(image)
    if array.dtype != np.uint8:
        raise ValueError(f"images: expected files, Pillow images or arrays of uint8 (0 to 255), found {array.dtype}")
    if isinstance(image, Image.Image) or infer_channel_dimension_format(array) == ChannelDimension.LAST:
        return array
    return array.transpose(1, 2, 0)
