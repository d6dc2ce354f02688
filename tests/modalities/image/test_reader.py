"""Rows of an image folder become crops: random numbers, geometry, pixels, settings."""

import importlib
import io
import itertools
import math
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import d2v2ds.modalities.image
import d2v2ds.modalities.image.reader as image_module
from d2v2ds.config.load import load_config
from d2v2ds.data.codecs.imagefile import to_rgb, upright
from d2v2ds.data.codecs.pixels import SCALES, Box, ImageFacts, displayed, stored_box
from d2v2ds.data.collate import Collator
from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.order import BatchPlan, MicroBatch
from d2v2ds.errors import CheckpointError, ConfigError, MissingExtraError, ShardError
from d2v2ds.masking import MaskConfig, draw_masks, masked_count
from d2v2ds.modalities.image.inference import ImageInference, read_picture
from d2v2ds.modalities.image.reader import ImageDataConfig, ImageReader, augmentation_numbers, draw_crops, resize
from d2v2ds.modalities.image.shards import ImageShards
from preprocessing.pack_images import main as pack_images
from tests.data.fake_images import FakeImages, encode, photo

SIDE, PATCH = 32, 8
MASK = MaskConfig(masked_fraction=0.75, num_masks=3, kind="block_2d", block_length=2, inverse=True)
PUBLISHED = {"scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip_probability": 0.5}
BICUBIC = Image.Resampling.BICUBIC


class FakeNetwork:
    def __init__(self, image_size: int = SIDE) -> None:
        self.image_size = image_size

    def num_tokens(self, size: int) -> int:
        return (size // PATCH) ** 2


def config_of(**changes) -> ImageDataConfig:
    return ImageDataConfig(**({"shards": Path("x"), "global_batch_images": 8, "micro_batch_images": 4} | changes))


def reader_of(source, side: int = SIDE, mask: MaskConfig | None = MASK, **changes) -> ImageReader:
    return ImageReader(JoinedShards([source]), config_of(**changes), FakeNetwork(side), mask)


@pytest.fixture(scope="module")
def source() -> FakeImages:
    sizes = [(60, 45), (45, 60), (300, 40), (400, 300), (33, 200)]
    return FakeImages([encode(photo(*size, seed)) for seed, size in enumerate(sizes)], [1, 6, 3, 8, 5])


def read(reader: ImageReader, rows: list[int], epoch: int = 0, seed: int = 0) -> torch.Tensor:
    return reader.read(MicroBatch(epoch, np.array(rows), reader.side), seed).source


def numbers_of(rows: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return augmentation_numbers(seed=seed, epoch=epoch, rows=np.arange(rows))


# --- which crop ------------------------------------------------------------------------------------------------------


def crop_by_torchvision(width: int, height: int, numbers: np.ndarray, scale, ratio) -> tuple[int, int, int, int]:
    """`torchvision.transforms.RandomResizedCrop.get_params`, its random numbers given."""
    for try_ in range(10):
        area = width * height * (scale[0] + numbers[try_] * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + numbers[10 + try_] * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(numbers[20] * (width - w + 1)), int(numbers[21] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def test_crops_equal_torchvisions_for_the_same_random_numbers():
    sizes = np.random.default_rng(0).integers(3, 600, (1000, 2))
    numbers = numbers_of(1000)
    boxes, _ = draw_crops(sizes, numbers, **PUBLISHED)
    expected = [
        crop_by_torchvision(*size, drawn, PUBLISHED["scale"], PUBLISHED["ratio"])
        for size, drawn in zip(sizes.tolist(), numbers, strict=True)
    ]
    assert boxes.tolist() == [list(box) for box in expected]


def test_images_of_a_few_pixels_have_crops_inside():
    sizes = np.array([(w, h) for w in (1, 2, 3, 1000) for h in (1, 2, 3, 1000)])
    for epoch, ratio in itertools.product(range(20), [(3 / 4, 4 / 3), (0.1, 0.2), (5.0, 6.0)]):
        boxes, _ = draw_crops(sizes, numbers_of(len(sizes), epoch=epoch), **(PUBLISHED | {"ratio": ratio}))
        assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] < boxes[:, 2:]).all() and (boxes[:, 2:] <= sizes).all()


def test_areas_ratios_places_and_flips_are_spread_as_stated():
    rows = 20_000
    boxes, flips = draw_crops(
        np.full((rows, 2), 1000), numbers_of(rows), scale=(0.1, 0.5), ratio=(0.5, 2.0), flip_probability=0.3
    )
    width, height = (boxes[:, 2] - boxes[:, 0]).astype(float), (boxes[:, 3] - boxes[:, 1]).astype(float)
    quarters = [0.25, 0.5, 0.75]
    np.testing.assert_allclose(np.quantile(width * height / 1e6, quarters), [0.2, 0.3, 0.4], atol=0.005)
    np.testing.assert_allclose(np.quantile(np.log2(width / height), quarters), [-0.5, 0, 0.5], atol=0.03)
    for corner, room in ((boxes[:, 0], 1000 - width), (boxes[:, 1], 1000 - height)):
        np.testing.assert_allclose(np.quantile(corner / np.maximum(room, 1), quarters), quarters, atol=0.015)
    assert abs(flips.mean() - 0.3) < 0.012
    whole, never = draw_crops(
        np.full((9, 2), 50), numbers_of(9), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip_probability=0.0
    )
    assert (whole == [0, 0, 50, 50]).all() and not never.any()


def test_an_augmentation_depends_on_seed_epoch_and_row_only(source):
    reader = reader_of(source)
    first = read(reader, [0, 1, 2, 3, 4], epoch=3, seed=5)
    again = read(pickle.loads(pickle.dumps(reader)), [3, 0], epoch=3, seed=5)  # noqa: S301  (our own)
    assert torch.equal(again, first[[3, 0]])
    for change in ({"epoch": 4, "seed": 5}, {"epoch": 3, "seed": 6}):
        other = read(reader, [0, 1, 3], **change)  # into the others, which are strips, few crops fit
        assert not any(torch.equal(one, two) for one, two in zip(first[[0, 1, 3]], other, strict=True))
    assert len({tuple(row) for row in numbers_of(100)[:, :2]}) == 100


# --- which pixels ----------------------------------------------------------------------------------------------------


def slow_crop(data: bytes, turn: int, box: tuple[int, int, int, int], flip: bool, side: int) -> np.ndarray:
    """(3, Y, X) the obvious way: decode all, turn, crop, resize, mirror."""
    image = upright(to_rgb(Image.open(io.BytesIO(data))), turn).crop(box).resize((side, side), BICUBIC)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_crops_at_full_scale_equal_the_slow_way(turn, format):
    images = FakeImages([encode(photo(61, 47, seed), format) for seed in range(12)], [turn] * 12)
    found = read(reader_of(images), list(range(12)))
    assert found.shape == (12, 3, SIDE, SIDE) and found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last), "as they are resized, without a copy"
    boxes, flips = draw_crops(np.array(images.displayed), numbers_of(12), **PUBLISHED)
    assert 0 < flips.sum() < 12
    for data, pixels, box, flip in zip(images.files, found.numpy(), boxes.tolist(), flips, strict=True):
        difference = abs(pixels.astype(int) - slow_crop(data, turn, tuple(box), bool(flip), SIDE))
        # both round between the two directions, not always in the same order
        assert difference.mean() < 0.5 and difference.max() < 10


@pytest.mark.parametrize("turn", [1, 3, 6])
def test_crops_at_reduced_scale_equal_the_slow_way_on_a_box_moved_to_whole_pixels(turn):
    images = FakeImages([encode(photo(505, 403, seed)) for seed in range(8)], [turn] * 8)
    found = read(reader_of(images), list(range(8)))
    width, height = images.displayed[0]
    boxes, flips = draw_crops(np.array(images.displayed), numbers_of(8), **PUBLISHED)
    used = set()
    for data, pixels, corners, flip in zip(images.files, found.numpy(), boxes.tolist(), flips, strict=True):
        box = stored_box(Box(*corners), width, height, turn)
        scale = next(scale for scale in SCALES if min(box.width, box.height) // scale >= SIDE)
        used.add(scale)
        small = box.reduced(scale)
        moved = [scale * edge for edge in (small.left, small.top, small.right, small.bottom)]
        assert np.abs(np.subtract(moved, (box.left, box.top, box.right, box.bottom))).max() <= scale / 2
        image = Image.open(io.BytesIO(data)).crop(tuple(moved)).resize((SIDE, SIDE), BICUBIC)
        expected = displayed(np.asarray(image), turn)
        expected = expected[:, ::-1] if flip else expected
        # of 255; the decoder's filter and the bicubic one differ: 0.7 to 3 grey levels on these noisy photographs
        assert abs(pixels.astype(int) - expected.transpose(2, 0, 1)).mean() < 4.0
    assert len(used) > 1


def test_grey_images_fill_three_channels():
    images = FakeImages([encode(photo(50, 50)[..., 0]), encode(photo(50, 50)[..., 0], "PNG")])
    jpeg, png = read(reader_of(images), [0, 1]).numpy()
    for pixels in (jpeg, png):
        assert (pixels == pixels[:1]).all() and pixels.std() > 10


def test_the_whole_view_is_the_published_resize_and_centre_crop():
    for width, height, turn, side, resized in ((500, 375, 1, 224, 256), (375, 500, 6, 224, 256), (70, 50, 3, 32, 36)):
        images = FakeImages([encode(photo(width, height), "PNG")], [turn])
        image = upright(Image.open(io.BytesIO(images.files[0])), turn)
        of_extractor = read_picture(image, side, "upright")
        short = min(image.size)
        image = image.resize(tuple(length * resized // short for length in image.size), BICUBIC)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        expected = np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
        found = reader_of(images, side).read_whole(0)
        assert found.shape == (3, side, side) and found.dtype == torch.uint8 and found.is_contiguous()
        assert abs(found.numpy().astype(int) - expected).mean() < 0.5
        assert torch.equal(found, of_extractor)


def test_the_whole_view_of_a_strip_is_its_middle_and_never_resized_as_a_whole(monkeypatch):
    made = []
    monkeypatch.setattr(image_module, "resize", lambda *given: made.append(given[1:]) or resize(*given))
    strip = np.zeros((3, 9000, 3), dtype=np.uint8)
    strip[:, 4496:4504] = 255
    for pixels in (strip, strip.transpose(1, 0, 2)):
        found = reader_of(FakeImages([encode(pixels, "PNG")]), 224).read_whole(0)
        assert found.shape == (3, 224, 224) and found.min() > 200
    assert made == [(2048, 256), (256, 2048)]


def test_resizing_is_as_exact_as_pillows():
    for width, height in ((300, 200), (200, 300), (90, 400), (1, 1), (224, 224)):
        pixels = photo(width, height)
        exact = torch.nn.functional.interpolate(
            torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), (224, 224), mode="bicubic", antialias=True
        )[0].permute(1, 2, 0).clamp(0, 255).numpy()  # fmt: skip
        ours = abs(resize(pixels, 224, 224) - exact).mean()
        pillows = abs(np.asarray(Image.fromarray(pixels).resize((224, 224), BICUBIC)) - exact).mean()
        assert ours <= pillows + 0.01 < 0.4


def test_resizing_is_torchs_interpolation():
    for pixels in (photo(300, 200), photo(90, 400), photo(50, 50)[..., :1]):
        source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(source, (150, 224), mode="bicubic", antialias=True)
        np.testing.assert_array_equal(resize(pixels, 224, 150), expected[0].permute(1, 2, 0).numpy())


def test_a_fourth_channel_changes_nothing():
    pixels = photo(90, 40)
    rest = np.random.default_rng(0).integers(0, 256, (40, 90, 1), dtype=np.uint8)
    four = np.concatenate([pixels, rest], axis=-1)
    for side in (20, 64, 224):
        np.testing.assert_array_equal(resize(four, side, side), resize(pixels, side, side))


def test_damaged_rows_name_folder_and_row(source):
    broken = FakeImages([source.files[0]] * 3)
    broken.files[2] = broken.files[2][:400]
    reader = reader_of(broken)
    for call in (lambda: read(reader, [0, 2]), lambda: reader.read_whole(2)):
        with pytest.raises(ShardError, match="fake-images row 2: expected an image, found: .*preprocessing.verify"):
            call()
    broken.displayed[1] = (45, 60)
    with pytest.raises(ShardError, match="row 1: .*expected 45 x 60 pixels as stored, found 60 x 45"):
        read(reader, [1])


# --- settings and batches --------------------------------------------------------------------------------------------


def test_a_plan_over_images_deals_equal_micro_batches(source):
    reader = reader_of(source)
    config = reader.plan_config()
    assert (config.micro_size, config.num_micro, config.min_size, config.max_size) == (4 * SIDE, 2, SIDE, SIDE)
    assert reader.sizes.tolist() == [SIDE] * 5 and reader.sizes.strides == (0,)
    micro = BatchPlan(reader.sizes, config=config, seed=0).window(0, 0)
    assert sorted(len(one.rows) for one in micro) == [1, 4] and {one.size for one in micro} == {SIDE}
    assert reader.units(4, SIDE) == 4.0


def test_a_batch_has_images_and_their_masks(source):
    batch = Collator(reader=reader_of(source), seed=3)(MicroBatch(1, np.array([4, 0]), SIDE))
    assert batch.modality == "image" and batch.padding is None and batch.source.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(batch.source, read(reader_of(source), [4, 0], epoch=1, seed=3))
    masks = draw_masks(MASK, 16, seed=3, epoch=1, sample_ids=[4, 0])
    np.testing.assert_array_equal(batch.masks.masked.numpy(), masks)
    assert batch.num_masked == 2 * 3 * masked_count(MASK, 16)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"global_batch_images": 3}, "data.image.global_batch_images 3 is less than micro_batch_images 4"),
        (
            {"global_batch_images": 9},
            "is no whole number of .* of 4; expected .*=8 or global_batch_images=12 or micro.*=3$",
        ),
        ({"global_batch_images": 7}, "is no whole number of .* of 4; expected .*=4 or global_batch_images=8$"),
        ({"crop_scale": (0.6, 0.5)}, r"data.image.crop_scale is \[0.6, 0.5\]"),
        ({"crop_ratio": (2.0, 1.0)}, r"data.image.crop_ratio is \[2.0, 1.0\]"),
    ],
)
def test_settings_that_cannot_work_are_sentences(changes, sentence):
    assert config_of().check() == []
    faults = "\n".join(config_of(**changes).check())
    assert re.search(sentence, faults), faults


@pytest.mark.parametrize(
    ("override", "place", "bound"),
    [
        ("data.image.micro_batch_images=0", "", "greater than or equal to 1, found 0"),
        ("data.image.global_batch_images=0", "", "greater than or equal to 1, found 0"),
        ("data.image.crop_scale=[0.0, 1.0]", ".0", "greater than 0, found 0.0"),
        ("data.image.crop_scale=[0.5, 1.5]", ".1", "less than or equal to 1, found 1.5"),
        ("data.image.crop_ratio=[-1.0, 1.0]", ".0", "greater than 0, found -1.0"),
        ("data.image.flip_probability=1.5", "", "less than or equal to 1, found 1.5"),
        ("data.image.flip_probability=-0.5", "", "greater than or equal to 0, found -0.5"),
        ("data.image.loss_weight=-1.0", "", "greater than or equal to 0, found -1.0"),
        ("model.modalities.image.image_size=0", "", "greater than or equal to 1, found 0"),
    ],
)
def test_settings_out_of_bounds_are_named_with_what_was_found(override, place, bound):
    name = override.split("=")[0]
    with pytest.raises(ConfigError, match=f"{name}{place}: Input should be {bound}"):
        load_config("image_tiny", ["data.image.shards=x", override])


def test_what_does_not_fit_the_model_is_a_sentence(source):
    assert reader_of(source).faults() == []
    random = MaskConfig(masked_fraction=0.5, num_masks=1, kind="random")
    assert reader_of(source, mask=random).faults() == []
    [fault] = reader_of(source, mask=MaskConfig(masked_fraction=0.5, num_masks=1)).faults()
    assert (
        fault == "objective.modalities.image.mask.kind is 'block_1d', images need 'block_2d', 'random' or 'grid_blocks'"
    )
    [fault] = reader_of(source, PATCH).faults()
    assert "images of 8 x 8 pixels make 1 tokens, expected 2 or more" in fault
    [fault] = reader_of(
        source, mask=MaskConfig(masked_fraction=0.5, num_masks=1, kind="block_2d", block_length=5)
    ).faults()
    expected = "image.mask, for images of 32 x 32 pixels: 16 tokens (4 x 4) cannot hold a block of length 5"
    assert expected in fault
    [fault] = reader_of(source, mask=MaskConfig(masked_fraction=0.99, num_masks=1, kind="random")).faults()
    assert "masked_fraction 0.99 of 16 tokens leaves nothing visible" in fault


def test_settings_need_no_pillow_but_readers_do(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "d2v2ds.data.codecs.imagefile")
    monkeypatch.delitem(sys.modules, "d2v2ds.modalities.image.reader")
    monkeypatch.setattr(d2v2ds.modalities.image, "reader", image_module)  # so that it is restored
    image = importlib.import_module("d2v2ds.modalities.image.reader")
    assert image is not image_module
    assert image.ImageDataConfig(**vars(config_of())).check() == []
    with pytest.raises(MissingExtraError, match=r"\.\[image\]"):
        image.ImageReader(JoinedShards([source]), config_of(), FakeNetwork(), MASK)


# --- packed folders --------------------------------------------------------------------------------------------------


def test_packed_files_of_every_kind_read_as_they_are_displayed(tmp_path):
    """Four fields of different colours tell the corners apart."""
    colours = np.array([[(250, 10, 10), (10, 250, 10)], [(10, 10, 250), (250, 250, 10)]], dtype=np.uint8)
    shown = Image.fromarray(np.kron(colours, np.ones((24, 32, 1), dtype=np.uint8)))
    photos = tmp_path / "photos"
    photos.mkdir()
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        stored = shown.transpose(INVERSES[turn]) if turn > 1 else shown
        for suffix in ("jpg", "png", "webp", "tif"):
            stored.save(photos / f"{turn}.{suffix}", exif=exif)
    for suffix, mode in (("gif", "P"), ("bmp", "RGB"), ("ppm", "RGB")):
        shown.convert(mode).save(photos / f"plain.{suffix}")
    arguments = ["--input", str(photos), "--output", str(tmp_path / "shards"), "--workers", "1"]
    assert pack_images(arguments) == 0
    shards = ImageShards(tmp_path / "shards")
    assert len(shards) == 35
    reader = reader_of(shards, flip_probability=0.0, crop_scale=(0.99, 1.0))
    for row in range(len(shards)):
        for view in (reader.read_whole(row), read(reader, [row])[0]):
            corners = view[:, 6::20, 6::20].permute(1, 2, 0).numpy().astype(int)  # (2, 2, 3)
            assert abs(corners - colours).max() < 40, shards.read_labels(row).id


INVERSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores an image that this EXIF orientation makes upright."""


@pytest.mark.parametrize("facts", [(40, 30, 0), (40, 30, 9), (0, 30, 1), (-40, -30, 1), (40_000, 30_000, 1)])
def test_rows_that_state_what_no_packer_writes_are_damaged(
    facts: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(encode(photo(40, 30), "JPEG"))
    monkeypatch.setattr("preprocessing.image.rows.examine", lambda data, most: ImageFacts("jpeg", *facts))
    assert pack_images(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    with pytest.raises(
        ShardError, match="row 0: expected an orientation of 1 to 8 and at most 89,478,485 pixels, found"
    ):
        ImageShards(tmp_path / "out").read_image(0)


@pytest.mark.parametrize("side", [0, -1, 10**9, "224", None])
def test_an_export_whose_pictures_do_not_fit_its_network_is_refused(side: object) -> None:
    with pytest.raises(CheckpointError, match="expected pictures of the network's 32 pixels"):
        ImageInference(FakeNetwork(), {"side": side})
