"""Random erasing: boxes, noise, and where in a training step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from d2v2ds.batch import Batch, Labels
from d2v2ds.model.local import normalise_pixels
from d2v2ds.tasks.classify import Classify, ClassifyConfig
from d2v2ds.tasks.erasing import ErasingConfig, draw_boxes, erase
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig
from d2v2ds.tasks.mixing import ImageMixingConfig
from tests.interop.folders import tiny_config

PUBLISHED = ErasingConfig()
ALWAYS = replace(PUBLISHED, probability=1.0)


def test_a_quarter_of_the_images_loses_one_box_of_the_published_sizes() -> None:
    torch.manual_seed(0)
    boxes = draw_boxes(PUBLISHED, 40_000, 224, 224)
    found = np.array([box for box in boxes if box is not None])
    assert len(found) / 40_000 == pytest.approx(0.25, abs=0.01)
    height, width = found[:, 1] - found[:, 0], found[:, 3] - found[:, 2]
    assert (found[:, ::2] >= 0).all() and (found[:, 1::2] <= 224).all() and min(height.min(), width.min()) > 0
    area, ratio = height * width / 224**2, np.log(height / width)
    assert 0.019 < area.min() < area.max() < 0.34
    assert abs(ratio).max() < np.log(1 / 0.29)
    wide = np.quantile(area, [0.25, 0.5, 0.75])
    assert wide == pytest.approx(0.02 + (1 / 3 - 0.02) * np.array([0.25, 0.5, 0.75]), abs=0.01)
    small = ratio[area < 0.1]  # larger ones do not fit at every ratio
    assert np.quantile(small, [0.25, 0.5, 0.75]) == pytest.approx(np.log(0.3) * np.array([0.5, 0, -0.5]), abs=0.06)
    assert np.mean(found[:, 0] / (224 - height)) == pytest.approx(0.5, abs=0.01)
    assert np.mean(found[:, 2] / (224 - width)) == pytest.approx(0.5, abs=0.01)


def test_a_box_that_never_fits_leaves_the_image_whole() -> None:
    torch.manual_seed(0)
    assert draw_boxes(replace(ALWAYS, area=(1.0, 1.0)), 8, 16, 16) == [None] * 8
    assert draw_boxes(ALWAYS, 8, 1, 1) == [None] * 8
    assert None not in draw_boxes(ALWAYS, 64, 16, 16)


def test_erased_pixels_are_unit_noise_in_every_channel_and_others_stay() -> None:
    images = torch.full((64, 3, 32, 32), 9.0)
    torch.manual_seed(1)
    boxes = draw_boxes(ALWAYS, 64, 32, 32)
    torch.manual_seed(1)
    found = erase(images, ALWAYS)
    assert (images == 9.0).all(), "the batch itself is left as it was"
    inside = torch.zeros(64, 1, 32, 32, dtype=torch.bool)
    for row, box in zip(inside, boxes, strict=True):
        assert box is not None
        row[:, box[0] : box[1], box[2] : box[3]] = True
    noise = found[inside.expand_as(found)]
    assert (found[~inside.expand_as(found)] == 9.0).all()
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    channels = found.permute(1, 0, 2, 3)[:, inside[:, 0]]
    assert abs(np.corrcoef(channels)[0, 1]) < 0.03, "each channel has its own noise"


def task(**settings: object) -> Classify:
    config = ClassifyConfig(modality="image", num_outputs=3, head=PatchHeadConfig(), **settings)  # type: ignore[arg-type]
    return Classify(config, tiny_config("image"), seed=0)


def batch_of(rows: int = 8) -> Batch:
    source = torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(modality="image", source=source, ids=torch.arange(rows), labels=Labels(values=torch.arange(rows) % 3))


def test_a_training_step_erases_normalised_pixels_before_it_mixes_and_validation_does_neither() -> None:
    seen: list[torch.Tensor] = []

    def network(batch: Batch, *_: object) -> dict[str, torch.Tensor]:
        seen.append(batch.source)
        return {"logits": torch.zeros(len(batch.source), 3)}

    mixing = ImageMixingConfig(mixup=0.0, cutmix=1.0)
    batch, built = batch_of(), task(erasing=ALWAYS, image_mixing=mixing)
    torch.manual_seed(7)
    built.losses(network, batch, step=0)
    torch.manual_seed(7)
    erased = erase(normalise_pixels(batch.source, torch.float32), ALWAYS)
    assert torch.equal(seen[0], built.mixed(replace(batch, source=erased)).source)
    assert not torch.equal(seen[0], erased)
    built.losses(network, batch, step=None)
    assert torch.equal(seen[1], batch.source)
    torch.manual_seed(7)
    task(erasing=ALWAYS).losses(network, batch, step=0)
    assert torch.equal(seen[2], erased), "also without mixing"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ClassifyConfig(modality="image", erasing=ErasingConfig(area=(0.5, 0.1))), "erasing.area is [0.5, 0.1]"),
        (ClassifyConfig(modality="audio", head=FrameHeadConfig(), erasing=PUBLISHED), "erasing is for images"),
    ],
)
def test_settings_that_cannot_work_are_sentences(config: ClassifyConfig, said: str) -> None:
    assert any(said in problem for problem in config.check(tiny_config(config.modality)))
    assert task(erasing=PUBLISHED).config.check(tiny_config("image")) == []
