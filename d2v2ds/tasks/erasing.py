"""Random erasing of images (arXiv 1708.04896): a box of noise in some of them.

Draws come from torch's generator, which every micro-batch seeds: the same on any number of ranks.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from d2v2ds.bounds import Bounds, Share

_TRIES = 10
"""Areas and ratios drawn before an image is left whole."""
Box = tuple[int, int, int, int]
"""First row, one past the last, first column, one past the last."""


@dataclass(frozen=True, kw_only=True)
class ErasingConfig:
    """Settings of random erasing; each pixel and channel of a box becomes noise of mean 0 and variance 1, as normalised
    pixels have."""

    probability: Share = 0.25
    """Probability of erasing a box of an image (fraction)."""
    area: tuple[Share, Share] = (0.02, 1 / 3)
    """Smallest and largest share of the image's area (fractions)."""
    ratio: Annotated[float, Bounds(gt=0, le=1)] = 0.3
    """Smallest height of a box in units of its width, and the reverse; uniform in the logarithm."""

    def check(self) -> list[str]:
        """Return a message if the areas are in the wrong order."""
        least, most = self.area
        return [f"erasing.area is [{least}, {most}], expected the first to be at most the second"] * (least > most)


def draw_boxes(config: ErasingConfig, num_rows: int, height: int, width: int) -> list[Box | None]:
    """Draw a box for each of some images; None for those that stay whole."""
    erased = torch.rand(num_rows) < config.probability
    area, ratio, top, left = torch.rand(4, num_rows, _TRIES, dtype=torch.float64)
    least, most = config.area
    area = (least + area * (most - least)) * height * width  # (B, tries)
    ratio = ((2.0 * ratio - 1.0) * math.log(1.0 / config.ratio)).exp()
    rows, columns = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (rows >= 1) & (rows < height) & (columns >= 1) & (columns < width)
    first = fits.int().argmax(1, keepdim=True)  # (B, 1)
    tops, lefts = (top * (height - rows + 1)).long(), (left * (width - columns + 1)).long()
    edges = torch.stack([tops, tops + rows, lefts, lefts + columns], -1)  # (B, tries, 4)
    chosen = edges.gather(1, first[..., None].expand(-1, -1, 4))[:, 0].tolist()
    usable = (erased & fits.any(1)).tolist()
    return [(box[0], box[1], box[2], box[3]) if use else None for box, use in zip(chosen, usable, strict=True)]


def erase(images: Tensor, config: ErasingConfig) -> Tensor:
    """Erase boxes of normalised images, (B, C, Y, X) float -> the same; the images themselves stay as they are."""
    erased = images.clone()
    for image, box in zip(erased, draw_boxes(config, len(images), *images.shape[-2:]), strict=True):
        if box is not None:
            image[:, box[0] : box[1], box[2] : box[3]].normal_()
    return erased
