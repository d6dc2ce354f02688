"""Images: their settings of data, and rows of an image shard -> crops of one size.

In: encoded image files in the shard. Out: uint8 (B, 3, Y, X), random resized crops, flipped by chance; the model
normalises them on its device. The augmentation is that of the official recipe: a crop of 0.2 to 1 of the
area, its sides in a ratio of 3/4 to 4/3, resized with bicubic interpolation, and mirrored half of the time. In
fine-tuning RandAugment follows, on the crop.

A crop is chosen in the image as it is displayed and cut from the image as it is stored; only the small result is
turned upright. Where a JPEG is decoded at a reduced scale, the edges of the crop move to the nearest whole pixel of
the reduced image: by less than one pixel of the result.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.bounds import Bounds, Count, Positive, Share
from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.mixture import Dataset
from d2v2ds.data.order import MicroBatch, PlanConfig
from d2v2ds.data.reader import AnyMask, DataSettings, Examples, Reader, Unit, mask_faults
from d2v2ds.errors import ShardError
from d2v2ds.modalities.image.colour_jitter import ColourJitterConfig, draw_changes
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.image.rand_augment import RandAugmentConfig, draw_operations
from d2v2ds.modalities.image.shards import EncodedImage, ImageShards
from d2v2ds.rng import Stream, hash64, to_unit_interval
from d2v2ds.shapes import resized_side

PositiveShare = Annotated[float, Bounds(gt=0, le=1)]

_WIDEST = 8
"""Longer over shorter side of an image beyond which its ends are not resized in evaluation; the middle square then
moves by up to half a pixel."""
CROP_TRIES = 10
"""Areas and ratios drawn before the largest centred crop is taken instead."""
_NUM_DRAWS = 2 * CROP_TRIES + 3


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig(DataSettings):
    """Settings for reading images: folders, batch sizes, crops and masks."""

    modality = "image"
    unit = "images"

    global_batch_images: Count
    """Images per optimizer step over all ranks (count; before the M masks multiply it)."""
    micro_batch_images: Count
    """Images per forward pass on one rank (count); decides the memory needed."""
    crop_scale: tuple[PositiveShare, PositiveShare] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a crop has (fractions)."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest width of a crop in units of its height; uniform in the logarithm."""
    flip_probability: Share = 0.5
    """Probability of mirroring left and right (fraction)."""
    rand_augment: RandAugmentConfig | None = None
    """RandAugment of the crops; None for none, as in pretraining."""
    colour_jitter: ColourJitterConfig | None = None
    """Random changes of the crops' colours; None for none. Published image models of data2vec 1.0 have them."""

    def largest_samples(self, network: Any) -> tuple[float, int]:
        """Images of one optimizer step, and their side in pixels."""
        return self.global_batch, network.image_size

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        faults = super().check()
        for name in ("crop_scale", "crop_ratio"):
            least, most = getattr(self, name)
            if least > most:
                faults.append(f"data.image.{name} is [{least}, {most}], expected the first to be at most the second")
        return faults


IMAGES = Unit(
    name="images",
    label="images",
    total_metric="data/images",
    total_help="images seen since the run began; sum over ranks, not multiplied by masks",
    speed_metric="perf/images_per_s",
    speed_help="images per second of wall time; sum over ranks",
)


class ImageReader(Reader[ImageShards]):
    """Packed folders of images as square crops of one size."""

    modality = "image"
    unit = IMAGES
    can_be_whole = True
    config: ImageDataConfig
    network: ImageNetwork

    def __init__(
        self,
        shards: JoinedShards[ImageShards],
        config: ImageDataConfig,
        network: ImageNetwork,
        mask: AnyMask | None,
    ) -> None:
        """
        Raises:
            MissingExtraError: Pillow is not installed.
        """
        import d2v2ds.data.codecs.imagefile  # noqa: F401  (here, so that runs without images need no Pillow)

        super().__init__(shards, config, network, mask)

    @property
    def side(self) -> int:
        """Pixels along each side of what the network sees."""
        return self.network.image_size

    @property
    def datasets(self) -> list[Dataset]:
        """The folders; all sizes are equal to the side of a crop, and take no memory."""
        return self.shards.datasets(
            self.config.weights, lambda part: np.broadcast_to(np.int64(self.side), (len(part),))
        )

    def plan_config(self) -> PlanConfig:
        """Limits in pixels along the side."""
        config = self.config
        return PlanConfig(
            micro_size=config.micro_batch_images * self.side,
            num_micro=config.num_micro,
            min_size=self.side,
            max_size=self.side,
            crops=False,
        )

    def units(self, num_rows: int, size: int) -> float:
        """Images."""
        return float(num_rows)

    def read(self, micro: MicroBatch, seed: int) -> Examples:
        """Images (B, 3, Y, X) uint8, Y = X = `micro.size`, in memory channels last, as they are decoded and resized."""
        from d2v2ds.data.codecs.pixels import displayed

        rows, config, side = micro.rows.tolist(), self.config, micro.size
        if not self.augments:
            return Examples(torch.stack([self.read_whole(row) for row in rows]))
        images = [self._encoded(row) for row in rows]
        boxes, flips = draw_crops(
            np.array([(image.width, image.height) for image in images]),
            augmentation_numbers(seed=seed, epoch=micro.epoch, rows=micro.rows),
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            flip_probability=config.flip_probability,
        )
        source = torch.empty(len(rows), 3, side, side, dtype=torch.uint8, memory_format=torch.channels_last)
        outputs = source.split(1)
        for row, image, box, flip, out in zip(rows, images, boxes.tolist(), flips.tolist(), outputs, strict=True):
            part = self._part(row, image, box, side)  # (Y, X, C)
            if image.orientation == 1:
                resize_into(out, part)
            else:
                out[0].permute(1, 2, 0).numpy()[:] = displayed(resize(part, side, side), image.orientation)
            if flip:
                out.copy_(out.flip(3))  # twice as fast as NumPy's copy of a reversed view
        self._change_colours([out[0].permute(1, 2, 0).numpy() for out in outputs], micro, seed)
        return Examples(source)

    def _change_colours(self, crops: list[NDArray[np.uint8]], micro: MicroBatch, seed: int) -> None:
        """Apply colour jitter, then RandAugment, to crops (Y, X, 3) in place."""
        from d2v2ds.modalities.image.operations import change, operate

        config = self.config
        if config.colour_jitter is not None:
            changes = draw_changes(config.colour_jitter, seed=seed, epoch=micro.epoch, rows=micro.rows)
            for crop, own in zip(crops, changes, strict=True):
                change(crop, own)
        if config.rand_augment is not None:
            drawn = draw_operations(config.rand_augment, seed=seed, epoch=micro.epoch, rows=micro.rows)
            for crop, operations in zip(crops, drawn, strict=True):
                operate(crop, operations)

    def read_whole(self, row: int) -> Tensor:
        """(3, Y, X) uint8: the middle of the image, resized so that it just holds the model's side.

        Its shorter side is then that of `d2v2ds.shapes.resized_side`, as published results are measured.
        """
        from d2v2ds.data.codecs.pixels import displayed

        image, side = self._encoded(row), self.side
        view = whole_view(image.width, image.height, side)
        part = displayed(self._part(row, image, view.box, None), image.orientation)  # (Y, X, C)
        return view.middle(resize(np.ascontiguousarray(part), *view.size), side)

    def faults(self) -> list[str]:
        """Reasons why settings and model do not fit, as sentences."""
        side, faults = self.side, []
        if self.mask is not None and not self.mask.is_for_grids:
            faults.append(
                f"objective.modalities.image.mask.kind is {self.mask.kind!r}, images need 'block_2d', 'random' or "
                "'grid_blocks'"
            )
        tokens = self.network.num_tokens(side)
        if tokens < 2:
            faults.append(f"images of {side} x {side} pixels make {tokens} tokens, expected 2 or more")
        elif not faults:
            faults += mask_faults(
                self.mask, tokens, f"objective.modalities.image.mask, for images of {side} x {side} pixels"
            )
        return faults

    def _encoded(self, row: int) -> EncodedImage:
        part, local = self.shards.locate(row)
        return part.read_image(local)

    def _part(
        self, row: int, image: EncodedImage, corners: tuple[int, int, int, int], least: int | None
    ) -> NDArray[np.uint8]:
        """A part of an image, decoded.

        Args:
            row: names the image in messages.
            image: encoded.
            corners: left, top, right, bottom of the part, in the image as displayed.
            least: pixels of each side that decoding must leave; None: all.

        Returns:
            (Y, X, C) uint8 as stored, of `decode_box`.
        """
        from d2v2ds.data.codecs.imagefile import DecodeError
        from d2v2ds.data.codecs.pixels import SWAPS_SIDES, Box, decode_box, stored_box

        turn = image.orientation
        box = stored_box(Box(*corners), image.width, image.height, turn)
        size = (image.height, image.width) if turn in SWAPS_SIDES else (image.width, image.height)
        try:
            return decode_box(image.data, size, box, least)
        except DecodeError as error:
            raise ShardError(
                f"{self.shards.name(row)}: expected an image, found: {error}; run python -m "
                "preprocessing.verify on the folder"
            ) from error


@dataclass(frozen=True)
class WholeView:
    """View of a whole image: `box` is resized to `size`, then its centre is cropped."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom, as displayed (pixels)."""
    size: tuple[int, int]
    """Width and height after resizing."""

    def middle(self, pixels: NDArray[np.uint8], side: int) -> Tensor:
        """(Y, X, C) resized pixels, C = 1 or 3 -> (3, side, side) uint8."""
        width, height = self.size
        top, left = round((height - side) / 2), round((width - side) / 2)
        source = torch.empty(3, side, side, dtype=torch.uint8)  # (3, Y, X)
        source.numpy()[:] = pixels[top : top + side, left : left + side].transpose(2, 0, 1)
        return source


def whole_view(width: int, height: int, side: int) -> WholeView:
    """The official view for evaluation (`d2v2ds.shapes.resized_side`).

    Args:
        width, height: of the image as displayed (pixels).
        side: of the square that the model reads (pixels).
    """
    resized, shorter = resized_side(side), min(width, height)
    # of a panorama only the middle: more is not seen, and resized it could fill the memory
    left, top = (max(0, length - _WIDEST * shorter) // 2 for length in (width, height))
    size = (width - 2 * left) * resized // shorter, (height - 2 * top) * resized // shorter
    return WholeView((left, top, width - left, height - top), size)


def augmentation_numbers(*, seed: int, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Random numbers for the crops of some rows, a pure function of (seed, epoch, row).

    Args:
        seed: of the run.
        epoch: in which the rows are seen.
        rows: (B,) row numbers.

    Returns:
        (B, 23) float64 in [0, 1): ten areas, ten ratios, place from the left, place from the top, flip.
    """
    return to_unit_interval(hash64(seed, epoch, Stream.AUGMENT, rows[:, None], np.arange(_NUM_DRAWS)))


def draw_crops(
    sizes: NDArray[np.int64],
    numbers: NDArray[np.float64],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip_probability: float,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Random resized crops, as `torchvision.transforms.RandomResizedCrop` chooses them, from given random numbers.

    The first of ten areas and ratios that fits into the image is taken, at a uniform place. If none fits: the largest
    crop in the middle whose ratio is allowed.

    Args:
        sizes: (B, 2) width and height of the images.
        numbers: (B, 23), of `augmentation_numbers`.
        scale: least and largest share of the image's area.
        ratio: least and largest width / height.
        flip_probability: of mirroring.

    Returns:
        (B, 4) int64 left, top, right, bottom; (B,) bool, True = mirrored.
    """
    width, height = sizes[:, :1], sizes[:, 1:]  # (B, 1)
    areas = width * height * (scale[0] + numbers[:, :CROP_TRIES] * (scale[1] - scale[0]))  # (B, tries)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + numbers[:, CROP_TRIES : 2 * CROP_TRIES] * (high - low))  # (B, tries)
    tried = np.stack([np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))], axis=-1)  # (B, tries, 2)
    fits = ((tried > 0) & (tried <= sizes[:, None])).all(axis=-1)  # (B, tries)
    chosen = tried[np.arange(len(sizes)), fits.argmax(axis=1)]  # (B, 2)

    largest = np.minimum(sizes, np.rint(np.concatenate([height * ratio[1], width / ratio[0]], axis=1)))  # (B, 2)
    largest = np.maximum(largest, 1)
    found = np.any(fits, axis=1)[:, None]  # (B, 1)
    crop = np.where(found, chosen, largest).astype(np.int64)  # (B, 2)
    room = sizes - crop
    places = (numbers[:, 2 * CROP_TRIES : 2 * CROP_TRIES + 2] * (room + 1)).astype(np.int64)
    corner = np.where(found, places, room // 2)  # (B, 2)
    return np.concatenate([corner, corner + crop], axis=1), numbers[:, -1] < flip_probability


def resize(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Bicubic interpolation with antialiasing.

    As near to exact arithmetic as Pillow's (0.3 grey levels on average, after rounding between the two directions), and
    on the same pixels within 0.3 of it, in a quarter of its time: torch has vector instructions for RGB.

    Args:
        pixels: (Y, X, C) uint8; C = 1, 3, or 4, of which the last is left out of the result.
        width: of the result.
        height: of the result.

    Returns:
        (height, width, C) uint8, C = 1 or 3.
    """
    resized: Tensor = _BICUBIC(_channels_first(pixels), (height, width), False)  # (1, C, height, width)
    return resized[0, :3].permute(1, 2, 0).numpy()


def resize_into(out: Tensor, pixels: NDArray[np.uint8]) -> None:
    """`resize` to where the result is wanted.

    Args:
        out: (1, 3, Y, X) uint8, in memory channels last; grey fills all channels.
        pixels: as for `resize`.
    """
    source, size = _channels_first(pixels), out.shape[2:]
    if pixels.shape[2] == 3:
        _BICUBIC.out(source, size, False, out=out)
    else:
        out.copy_(_BICUBIC(source, size, False)[:, :3])


_BICUBIC = torch.ops.aten._upsample_bicubic2d_aa
"""Operator behind F.interpolate(mode="bicubic", antialias=True), without its checks, which take a sixth of the time."""


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """(Y, X, C) -> (1, C, Y, X), a view; of colours its strides say that channels come last, so that they stay last."""
    height, width, channels = pixels.shape
    source = torch.from_numpy(pixels)
    if channels == 1:  # torch resizes grey in planes, whatever the strides say, and rounds otherwise if they say this
        return source.permute(2, 0, 1)[None]
    return source.as_strided((1, channels, height, width), (pixels.size, 1, width * channels, channels))
