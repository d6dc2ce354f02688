"""The composed pictures: repeatable, apart from split to split, usable by the packer, and not to be told by pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2v2ds.modalities.image.shards import ImageShards
from preprocessing.pack_images import main as pack
from preprocessing.samples.images import SIDE, draw_shape, load_materials, main
from tests.preprocessing.helpers import run_module

pytest.importorskip("sklearn", reason="the extra eval is not installed")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    assert main(["--output", str(folder), "--train", "300", "--valid", "50"]) == 0
    return folder


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_both_splits_have_class_folders_of_rgb_pictures(corpus: Path) -> None:
    for split, number in (("train", 300), ("valid", 50)):
        files = sorted((corpus / split).rglob("*.png"))
        assert len(files) == number
        assert {file.parent.name for file in files} == {str(digit) for digit in range(10)}
        for file in files:
            with Image.open(file) as picture:
                assert picture.mode == "RGB" and picture.size == (SIDE, SIDE)


def test_same_options_give_the_same_bytes_in_another_process(corpus: Path, tmp_path: Path) -> None:
    result = run_module(
        "preprocessing.samples.images", "--output", tmp_path / "again", "--train", 300, "--valid", 50
    )  # fmt: skip
    assert result.returncode == 0 and "COMPOSED" in result.stdout
    assert files_in(tmp_path / "again") == files_in(corpus)
    assert main(["--output", str(tmp_path / "other"), "--train", "300", "--valid", "50", "--seed", "1"]) == 0
    assert files_in(tmp_path / "other") != files_in(corpus)


def test_no_digit_and_no_part_of_a_photograph_is_in_both_splits() -> None:
    materials = load_materials()
    train, valid = materials["train"], materials["valid"]
    assert len(train.digits) + len(valid.digits) == 1797 and len(train.digits) == len(train.labels)
    assert len(np.unique(valid.labels)) == 10
    for first, second in zip(train.photographs, valid.photographs, strict=True):
        assert first.width + second.width == 640 and first.height == second.height == 427


def test_digits_lie_inside_their_pictures() -> None:
    rng = np.random.default_rng(0)
    full = np.full((8, 8), 255, dtype=np.uint8)
    full[[0, -1]] = full[:, [0, -1]] = 0  # ink up to the margin that the digits have
    for _ in range(200):
        shape = draw_shape(full, rng)
        assert shape.shape == (SIDE, SIDE) and shape.min() >= 0.0 and shape.max() <= 1.0
        edge = np.concatenate([shape[0], shape[-1], shape[:, 0], shape[:, -1]])
        assert edge.max() < 0.9 and 0.08 * SIDE**2 < shape.sum() < 0.6 * SIDE**2


def test_digit_and_ground_differ_in_brightness_but_either_may_be_the_brighter_one(corpus: Path) -> None:
    middle = []
    for file in sorted((corpus / "train").rglob("*.png")):
        grey = np.asarray(Image.open(file).convert("L")).astype(float)
        middle.append(grey[10:22, 10:22].mean() - np.concatenate([grey[:4].ravel(), grey[-4:].ravel()]).mean())
    assert 0.3 < np.mean(np.array(middle) > 0) < 0.7 and np.abs(middle).mean() > 20


def test_pictures_pack_with_their_labels(corpus: Path, tmp_path: Path) -> None:
    assert pack(["--input", str(corpus / "valid"), "--output", str(tmp_path / "shards"), "--workers", "1"]) == 0
    shards = ImageShards(tmp_path / "shards")
    assert len(shards) == 50 and {shards.read_labels(row).label for row in range(50)} == set("0123456789")
