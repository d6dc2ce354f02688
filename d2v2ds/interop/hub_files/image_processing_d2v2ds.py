"""`D2V2DSImageProcessor`: pictures -> the normalised centre crop that published results are measured with."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict


class D2V2DSImageProcessor(PilBackend):
    """Upright RGB; the shorter side resized; the middle cut out; normalised per channel.

    Own steps where those of transformers round otherwise, by up to one pixel of the crop: d2v2ds resizes with torch
    and rounds the crop's corner to even numbers.
    """

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 256}
    crop_size = {"height": 224, "width": 224}
    default_to_square = False
    do_convert_rgb = do_resize = do_center_crop = do_rescale = do_normalize = True

    def convert_to_rgb(self, image: Any, **kwargs: Any) -> Any:
        """As displayed, without transparency: white lies below."""
        if not isinstance(image, Image.Image):
            return super().convert_to_rgb(image, **kwargs)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            above = image.convert("RGBA")
            image = Image.new("RGB", image.size, (255, 255, 255))
            image.paste(above, mask=above.getchannel("A"))
        return np.asarray(image.convert("RGB"))

    def resize(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        """(3, Y, X) uint8, the shorter side `size.shortest_edge` after; bicubic with antialiasing."""
        sides, wanted = image.shape[1:], size.shortest_edge
        shorter = min(sides)
        top, left = (max(0, side - 2 * shorter) // 2 for side in sides)  # of a panorama only the middle
        image = image[:, top : sides[0] - top, left : sides[1] - left].transpose(1, 2, 0)  # (Y, X, 3)
        target = [side * wanted // shorter for side in image.shape[:2]]
        source = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)[None]  # (1, 3, Y, X), channels last
        resized: np.ndarray = F.interpolate(source, target, mode="bicubic", antialias=True)[0].numpy()
        return resized

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        """(3, Y, X) -> (3, size.height, size.width)."""
        top, left = round((image.shape[1] - size.height) / 2), round((image.shape[2] - size.width) / 2)
        return image[:, top : top + size.height, left : left + size.width]
