"""Mixing of images and recordings equals loops; boxes end at the border; shares of labels add up to 1."""

import numpy as np
import pytest
import torch

from d2v2ds.batch import Batch, Labels
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.heads import FrameHeadConfig
from d2v2ds.tasks.mixing import (
    ImageMix,
    ImageMixingConfig,
    WaveformMix,
    WaveformMixingConfig,
    draw_image_mix,
    draw_waveform_mix,
    mix_classes,
    mix_images,
    mix_labels,
    mix_waveforms,
)
from tests.tasks.tiny import trunk_of


def images(rows: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 3, 6, 8), generator=torch.Generator().manual_seed(rows)).float()


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize("box", [None, (0, 4, 5, 8), (2, 2, 3, 5), (0, 6, 0, 8)])
def test_images_and_classes_equal_loops(rows: int, box: tuple[int, int, int, int] | None) -> None:
    source, classes = images(rows), torch.arange(rows) % 4
    own = 0.3 if box is None else 1 - (box[1] - box[0]) * (box[3] - box[2]) / 48
    mix = ImageMix(own, box)
    found, shares = mix_images(source, mix), mix_classes(classes, 4, 0.2, mix)
    for row in range(rows):
        partner = rows - 1 - row
        for y, x in np.ndindex(6, 8):
            mine, other = source[row, :, y, x], source[partner, :, y, x]
            if box is None:
                expected = own * mine + (1 - own) * other
            else:
                expected = other if box[0] <= y < box[1] and box[2] <= x < box[3] else mine
            torch.testing.assert_close(found[row, :, y, x], expected)
        for c in range(4):
            smooth = [0.2 / 4 + 0.8 * (int(classes[one]) == c) for one in (row, partner)]
            assert float(shares[row, c]) == pytest.approx(own * smooth[0] + (1 - own) * smooth[1], abs=1e-6)
    torch.testing.assert_close(shares.sum(1), torch.ones(rows))
    assert torch.equal(source, images(rows)), "the batch itself is left as it was"


def test_bytes_stay_bytes_where_a_box_is_cut() -> None:
    source = images(2).to(torch.uint8)
    assert mix_images(source, ImageMix(0.5, (0, 3, 0, 8))).dtype == torch.uint8


def test_drawn_boxes_lie_in_the_image_and_the_share_is_that_of_their_area() -> None:
    torch.manual_seed(0)
    mixes = [draw_image_mix(ImageMixingConfig(mixup=0.0, cutmix=1.0), 6, 9) for _ in range(2000)]
    for mix in mixes:
        assert mix.box is not None
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 6 and 0 <= left <= right <= 9
        assert mix.own == pytest.approx(1 - (bottom - top) * (right - left) / 54)
        assert mix_classes(torch.tensor([0, 1]), 3, 0.1, mix).sum(1).tolist() == pytest.approx([1, 1])
    boxes = [mix.box for mix in mixes if mix.box]
    clipped = [box for box in boxes if box[0] == 0 or box[1] == 6]
    assert 0 < len(clipped) < len(boxes)
    assert min(mix.own for mix in mixes) < 0.5 and max(mix.own for mix in mixes) == 1.0


def test_kinds_of_mixing_come_as_often_as_the_settings_say() -> None:
    torch.manual_seed(0)
    config = ImageMixingConfig(mixup=0.8, cutmix=1.0, share=0.9, cutmix_share=0.25)
    mixes = [draw_image_mix(config, 16, 16) for _ in range(4000)]
    cut = np.mean([mix.box is not None for mix in mixes])
    kept = np.mean([mix == ImageMix(1.0, None) for mix in mixes])
    error = 4 / 4000**0.5
    assert abs(cut - 0.9 * 0.25) < error and abs(kept - 0.1) < error
    shares = np.array([mix.own for mix in mixes if mix.box is None and mix.own < 1.0])
    assert abs(shares.mean() - 0.5) < 0.03  # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert abs(shares.var() - 1 / (4 * 2.6)) < 0.01
    only = [draw_image_mix(ImageMixingConfig(mixup=0.8, cutmix=0.0), 16, 16) for _ in range(50)]
    assert all(mix.box is None for mix in only)
    off = draw_image_mix(ImageMixingConfig(mixup=0.0, cutmix=0.0), 16, 16)
    assert off == ImageMix(1.0, None)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_waveforms_and_labels_equal_loops(rows: int, is_padded: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.tensor([7, 4, 5, 2])[:rows]
    padding = torch.arange(7) >= lengths[:, None]
    waves = torch.randn(rows, 7, generator=generator).masked_fill(padding, 0)
    labels = torch.rand(rows, 5, generator=generator).round()
    mix = WaveformMix(0.7, torch.randperm(rows, generator=generator), torch.arange(rows) != 1)
    found, shares = mix_waveforms(waves, padding if is_padded else None, mix), mix_labels(labels, mix)
    for row in range(rows):
        partner, is_mixed = int(mix.partners[row]), row != 1
        for i in range(7):
            value = float(waves[row, i])
            if is_mixed:
                value = (0.7 * value + 0.3 * float(waves[partner, i])) / (0.7**2 + 0.3**2) ** 0.5
            if is_padded and i >= lengths[row]:
                value = 0.0
            assert float(found[row, i]) == pytest.approx(value, abs=1e-6)
        expected = 0.7 * labels[row] + 0.3 * labels[partner] if is_mixed else labels[row]
        torch.testing.assert_close(shares[row], expected)


def test_mixing_keeps_the_power_of_independent_recordings() -> None:
    waves = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    for own in (0.5, 0.8, 1.0):
        mixed = mix_waveforms(waves, None, WaveformMix(own, torch.tensor([1, 0]), torch.tensor([True, True])))
        assert float(mixed.std()) == pytest.approx(1.0, rel=0.01)


def test_drawn_shares_of_recordings_are_uniform_above_the_least() -> None:
    torch.manual_seed(0)
    config = WaveformMixingConfig(least=0.5, rows=0.25)
    mixes = [draw_waveform_mix(config, 8) for _ in range(1000)]
    own = np.array([mix.own for mix in mixes])
    assert own.min() >= 0.5 and own.max() <= 1.0 and abs(own.mean() - 0.75) < 4 * 0.5 / 12**0.5 / 1000**0.5
    assert abs(np.mean([mix.rows.float().mean() for mix in mixes]) - 0.25) < 4 * 0.433 / 8000**0.5
    assert all(sorted(mix.partners.tolist()) == list(range(8)) for mix in mixes)


def tagging(**changes: object) -> ClassifyConfig:
    mixing = WaveformMixingConfig(least=0.2)
    return ClassifyConfig(
        modality="audio", kind="several", num_outputs=3, head=FrameHeadConfig(), waveform_mixing=mixing, **changes
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("hide_padding", [True, False])
def test_a_longer_partner_is_cut_unless_padding_leaks_as_in_the_official_code(hide_padding: bool) -> None:
    torch.manual_seed(0)
    task = tagging(hide_padding=hide_padding).build(trunk_of("audio"), 0)
    padding = torch.arange(400) >= torch.tensor([400, 200])[:, None]
    source = torch.randn(2, 400).masked_fill(padding, 0)
    labels = Labels(values=torch.tensor([[1.0, 0, 0], [0, 1.0, 1.0]]))
    ends = []
    for _ in range(8):
        batch = Batch(modality="audio", source=source, padding=padding, ids=torch.arange(2), labels=labels)
        ends.append(bool(task.mixed(batch).source[1, 200:].any()))
    assert any(ends) is not hide_padding


def test_images_are_mixed_in_training_and_smoothed_there_alone() -> None:
    torch.manual_seed(0)
    config = ClassifyConfig(modality="image", num_outputs=4, label_smoothing=0.1, image_mixing=ImageMixingConfig())
    task = config.build(trunk_of("image"), 0)
    batch = Batch(
        modality="image",
        source=torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8),
        ids=torch.arange(3),
        labels=Labels(values=torch.tensor([0, 3, 1])),
    )
    seen: list[Batch] = []

    def network(batch: Batch, *_: object) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return {"logits": torch.zeros(3, 4)}

    task.losses(network, batch, 5)
    task.losses(network, batch, None)
    assert seen[0].required_labels().values.shape == (3, 4)
    torch.testing.assert_close(seen[0].required_labels().values.sum(1), torch.ones(3))
    assert seen[1] is batch
