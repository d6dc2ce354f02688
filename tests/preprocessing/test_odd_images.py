"""Packer, verify, reader, extractor and exported processor: for each odd file the same pixels, or all refuse it."""

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from d2v2ds.data.codecs.imagefile import PILLOW_ERRORS, to_rgb
from d2v2ds.data.codecs.pixels import ImageFacts
from d2v2ds.data.folders import JoinedShards
from d2v2ds.errors import ShardError
from d2v2ds.modalities.image.inference import read_picture
from d2v2ds.modalities.image.reader import ImageReader
from d2v2ds.modalities.image.shards import ImageShards
from preprocessing.image import rows
from preprocessing.pack_images import main as pack_images
from preprocessing.verify import verify
from tests.preprocessing.odd_images import BAD, METADATA, MODES, ORIENTATIONS, PIXELS

GOOD = METADATA | ORIENTATIONS | MODES
TOO_MUCH_FOR_PILLOW = {
    "broken raw profile.png", "itxt.png", "large xmp.png", "many texts.png", "no tiff.png", "no tiff.webp",
    "profile.png", "short gamma.png", "text after.png", "text before.png", "text called interlace.png",
    "unknown compression.png", "wrong frames.png",
}  # fmt: skip
"""Good files that Pillow refuses for their metadata; all are upright and lossless."""
SIDE = 64
"""The shorter side of all files, so that a view that does not resize is a crop."""


@pytest.fixture(autouse=True, scope="module")
def no_resizing() -> Iterator[None]:
    """Let the view of evaluation crop only: pixels are compared, not resampling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2v2ds.modalities.image.reader.resized_side", lambda side: side)
        yield


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "files"
    folder.mkdir()
    for name, data in (GOOD | BAD).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def shards(files: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is odd in one of a million files is for nobody to read
        return pack(files, files.parent / "shards")


@pytest.fixture(scope="module")
def trained(shards: Path) -> dict[str, Tensor]:
    """(3, SIDE, SIDE) uint8 by file."""
    reader = reader_of(shards)
    return {reader.shards.first.read_labels(row).id: reader.read_whole(row) for row in range(len(reader))}


@pytest.fixture(scope="module")
def processed() -> Callable[[Any], Tensor]:
    """(3, SIDE, SIDE) uint8 of one image, by the processor of an export folder."""
    pytest.importorskip("transformers", reason="needs the extra `hub`")
    from d2v2ds.interop.hub.files.image_processing_d2v2ds import D2V2DSImageProcessor

    processor = D2V2DSImageProcessor({"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}, MEAN, STD)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def process(image: Any) -> Tensor:
        normalised = processor(image, return_tensors="pt")["pixel_values"][0]
        return ((normalised * std + mean) * 255).round().to(torch.uint8)

    return process


def pack(source: Path, output: Path) -> Path:
    assert pack_images(["--input", str(source), "--output", str(output), "--workers", "1", "--max-skipped", "1"]) == 0
    return output


def reader_of(folder: Path) -> ImageReader:
    config: Any = SimpleNamespace()
    model: Any = SimpleNamespace(image_size=SIDE)
    return ImageReader(JoinedShards([ImageShards(folder)]), config, model, None)


def expected(name: str) -> Tensor:
    """(3, SIDE, SIDE) uint8: the middle of a good file by Pillow alone."""
    pixels = PIXELS
    if name not in TOO_MUCH_FOR_PILLOW:
        pixels = np.asarray(to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(GOOD[name])))))
    top, left = ((length - SIDE) // 2 for length in pixels.shape[:2])
    return torch.from_numpy(pixels[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1).copy())


def test_pillow_alone_refuses_some_good_files() -> None:
    def refused(data: bytes) -> bool:
        try:
            ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        except PILLOW_ERRORS:
            return True
        return False

    assert {name for name, data in GOOD.items() if refused(data)} == TOO_MUCH_FOR_PILLOW


def test_the_packer_takes_all_good_files_and_says_why_it_skips_the_others(
    shards: Path, trained: dict[str, Tensor]
) -> None:
    reasons = dict(line.split("\t") for line in (shards / "skipped.tsv").read_text().splitlines()[1:])
    assert set(trained) == set(GOOD) and set(reasons) == set(BAD)
    not_an_image = "not an image of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"
    for name, reason in {
        "bomb.png": "decompression bomb: 10000 x 9000 pixels exceed --max-pixels 89478485",
        "empty.png": "empty file (0 bytes)",
        "signature.png": "does not decode: cut off",
        "flipped bit.png": "does not decode: broken data stream when reading image file",
        **dict.fromkeys(("page.jpg", "document.jpg", "icon.png", "jpeg2000.jpg", "postscript.jpg"), not_an_image),
    }.items():
        assert reasons[name] == reason
    assert "floating point" in reasons["float.tif"]
    assert "truncated" in reasons["cut 0.7.bmp"]
    for name in ("cut 0.7.jpg", "no end.jpg", "zeros.jpg", "thumbnail has an end.jpg"):
        assert reasons[name] == "cut off: a JPEG without end marker"


@pytest.mark.parametrize("name", GOOD)
def test_reader_extractor_and_exported_processor_show_what_pillow_displays(
    name: str, files: Path, trained: dict[str, Tensor], processed: Callable[[Any], Tensor]
) -> None:
    assert torch.equal(trained[name], expected(name))
    assert torch.equal(read_picture(files / name, SIDE, name), expected(name))
    assert torch.equal(processed(str(files / name)), expected(name))


@pytest.mark.parametrize("name", sorted(set(GOOD) - TOO_MUCH_FOR_PILLOW | {"text after.png"}))
def test_images_that_pillow_has_opened_are_as_good_as_their_files(
    name: str, files: Path, trained: dict[str, Tensor], processed: Callable[[Any], Tensor]
) -> None:
    for read in (processed, lambda image: read_picture(image, SIDE, name)):
        with Image.open(files / name) as image:
            assert torch.equal(read(image), trained[name])
            if name != "text after.png":
                image.load()
                assert torch.equal(read(image), trained[name])


def test_verify_finds_no_fault_in_packed_files(shards: Path) -> None:
    assert verify(shards) == []


@pytest.mark.parametrize("name", BAD)
def test_extractor_and_exported_processor_refuse_what_the_packer_skips(
    name: str, files: Path, processed: Callable[[Any], Tensor]
) -> None:
    with pytest.raises(ValueError, match="cannot be decoded as a picture"):
        read_picture(files / name, SIDE, name)
    with pytest.raises(ValueError, match=r"does not decode|not an image|decompression bomb|cut off|empty file"):
        processed([str(files / name)])


def test_verify_and_reader_refuse_what_the_packer_skips(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "examine", lambda data, limit: ImageFacts("png", 96, 64, 1))
    reader = reader_of(pack(files, tmp_path / "shards"))
    faults = "\n".join(verify(tmp_path / "shards"))
    for row in range(len(reader)):
        if reader.shards.first.read_labels(row).id in BAD:
            assert f"row {row}: image: expected a whole png file, found" in faults
            with pytest.raises(ShardError, match="expected an image, found"):
                reader.read_whole(row)
