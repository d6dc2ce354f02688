"""How fast one worker reads images: shard -> random resized crops of 224 x 224 -> batch.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.reading_images [--shards DIR] [--images 64] [--repeats 9]

Without --shards, JPEGs with the spectrum of photographs are generated (4 bits per pixel, as in ImageNet) and read from
memory. One process, one thread, processor time. Micro-batches of 16 images are read in all the ways of the table in
turn, so that they share the machine's moods; of each the fastest of the repeats counts. All ways cut the same crops,
which only ours have to draw:

shard to batch, RandAugment   Ours with the published RandAugment of fine-tuning: the difference is its price.
bare decode + crop            Pillow decodes, at the reduced scale that the crop allows, and crops. Nothing is resized.
bare decode + crop + resize   The same, and Pillow resizes the crop (bicubic). No flip, no tensor.
without draft                 Pillow decodes at full scale, crops, resizes, flips; NumPy and torch make the batch.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from d2v2ds.data.codecs.pixels import SCALES
from d2v2ds.data.collate import Collator
from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.order import MicroBatch
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.image.rand_augment import RandAugmentConfig
from d2v2ds.modalities.image.reader import ImageDataConfig, ImageReader, augmentation_numbers, draw_crops
from d2v2ds.modalities.image.shards import ImageShards
from tests.data.fake_images import FakeImages, encode, photo

SIDE, PATCH, MICRO_BATCH = 224, 16, 16
MASK = MaskConfig(masked_fraction=0.8, adjust=0.07, block_length=3, num_masks=16, kind="block_2d", inverse=True)
PHOTOS = ((500, 375), (800, 600), (1600, 1200))
BICUBIC = Image.Resampling.BICUBIC
OURS, BARE, FULL = "shard to batch", "bare decode + crop", "without draft"
AUGMENTED = "shard to batch, RandAugment"

Corners = tuple[int, int, int, int]


class Network:
    """Settings of a network of 16 x 16 patches that a reader asks for."""

    image_size = SIDE

    def num_tokens(self, size: int) -> int:
        return (size // PATCH) ** 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="a packed folder of upright images instead of generated ones")
    parser.add_argument("--images", type=int, default=64, help="different images of each size (count)")
    parser.add_argument("--repeats", type=int, default=9, help="readings of each batch; the fastest counts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.shards is not None:
        measure(str(options.shards), ImageShards(options.shards), options.images, options.repeats)
        return 0
    for width, height in PHOTOS:
        source = FakeImages([encode(photo(width, height, seed)) for seed in range(options.images)])
        measure(f"{width} x {height}", source, options.images, options.repeats)
    return 0


def measure(name: str, source: ImageShards, num_images: int, repeats: int) -> None:
    """Print the table of one set of images."""
    config = ImageDataConfig(shards=Path(), global_batch_images=1, micro_batch_images=1)
    reader = ImageReader(JoinedShards([source]), config, Network(), MASK)
    augmented = replace(config, rand_augment=RandAugmentConfig())
    augmenting = ImageReader(JoinedShards([source]), augmented, Network(), MASK)
    collator = Collator(reader=reader, seed=0)
    ways: dict[str, Callable[[MicroBatch, list[Corners], list[bool]], object]] = {
        OURS: lambda micro, boxes, flips: reader.read(micro, 0),
        AUGMENTED: lambda micro, boxes, flips: augmenting.read(micro, 0),
        "shard to batch with masks": lambda micro, boxes, flips: collator(micro),
        BARE: lambda micro, boxes, flips: [bare(source, *one) for one in zip(micro.rows, boxes, strict=True)],
        "bare decode + crop + resize": lambda micro, boxes, flips: [
            bare(source, *one).resize((SIDE, SIDE), BICUBIC) for one in zip(micro.rows, boxes, strict=True)
        ],
        FULL: lambda micro, boxes, flips: torch.stack(
            [at_full_scale(source, *one) for one in zip(micro.rows, boxes, flips, strict=True)]
        ),
    }
    rows = np.unique(np.linspace(0, len(source) - 1, num_images).astype(np.int64))
    seconds = dict.fromkeys(ways, 0.0)
    for start in range(0, len(rows), MICRO_BATCH):
        micro = MicroBatch(0, rows[start : start + MICRO_BATCH], SIDE)
        for way, taken in fastest(ways, micro, *crops_of(source, micro, config), repeats).items():
            seconds[way] += taken
    kilobytes = np.mean([len(source.read_image(row).data) for row in rows.tolist()]) / 1000
    reduced = np.mean([scale_of(box) > 1 for box in crops_of(source, MicroBatch(0, rows, SIDE), config)[0]])
    sys.stdout.write(f"{name}: {len(rows)} files of {kilobytes:.0f} kB, {reduced:.0%} of the crops decode reduced\n")
    goals = {BARE: 0.9, FULL: 1.5}
    for way, taken in seconds.items():
        ratio = taken / seconds[OURS]
        goal = f", goal {goals[way]}: {'reached' if ratio >= goals[way] else 'MISSED'}" if way in goals else ""
        sys.stdout.write(f"  {way:<28} {len(rows) / taken:>7,.0f} images/s   ours is {ratio:.2f} x as fast{goal}\n")
    price = 1000 * (seconds[AUGMENTED] - seconds[OURS]) / len(rows)
    sys.stdout.write(
        f"  RandAugment takes {price:.2f} ms an image, {price * len(rows) / 1000 / seconds[OURS]:.0%} of reading it\n"
    )


def fastest(
    ways: dict[str, Callable[[MicroBatch, list[Corners], list[bool]], object]],
    micro: MicroBatch,
    boxes: list[Corners],
    flips: list[bool],
    repeats: int,
) -> dict[str, float]:
    """Seconds of processor time that each way needs for one micro-batch."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for way, read in ways.items():
            start = time.process_time()
            read(micro, boxes, flips)
            best[way] = min(best[way], time.process_time() - start)
    return best


def crops_of(source: ImageShards, micro: MicroBatch, config: ImageDataConfig) -> tuple[list[Corners], list[bool]]:
    """The crops that the reader will draw."""
    images = [source.read_image(row) for row in micro.rows.tolist()]
    boxes, flips = draw_crops(
        np.array([(image.width, image.height) for image in images]),
        augmentation_numbers(seed=0, epoch=micro.epoch, rows=micro.rows),
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        flip_probability=config.flip_probability,
    )
    return [tuple(box) for box in boxes.tolist()], flips.tolist()


def scale_of(box: Corners) -> int:
    left, top, right, bottom = box
    return next((scale for scale in SCALES if min(right - left, bottom - top) // scale >= SIDE), 1)


def bare(source: ImageShards, row: int, box: Corners) -> Image.Image:
    image = Image.open(io.BytesIO(source.read_image(row).data))
    scale = scale_of(box)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    return image.crop(tuple(edge // scale for edge in box))


def at_full_scale(source: ImageShards, row: int, box: Corners, flip: bool) -> torch.Tensor:
    image = Image.open(io.BytesIO(source.read_image(row).data)).convert("RGB")
    small = image.crop(box).resize((SIDE, SIDE), BICUBIC)
    if flip:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


if __name__ == "__main__":
    sys.exit(main())
