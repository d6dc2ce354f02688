"""Images and text: positions, initialisation, the CLS loss, and what the student may see."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.model.local import IMAGE_MEAN, IMAGE_STD, PatchEncoder, TokenEncoder, normalise_pixels
from d2v2ds.model.positions import sin_cos_grid
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec2 import Data2Vec2, Data2Vec2Config, Data2Vec2Network
from d2v2ds.objectives.teacher_network import TeacherNetwork
from d2v2ds.shapes import PAD_ID
from tests.model.tiny_joint import joint_batch, joint_trunk_config
from tests.objectives.tiny import joint_objective_config


def built(
    trunk: TrunkConfig | None = None, objective: Data2Vec2Config | None = None, seed: int = 1
) -> tuple[Data2Vec2Network, TeacherNetwork]:
    """Student in training mode and a teacher equal to it."""
    whole = Data2Vec2(objective or joint_objective_config(), trunk or joint_trunk_config(), seed)
    student, teacher = whole.build_network(activation_checkpointing=False), whole.build_teacher_network().eval()
    whole.initialise(student, seed)
    teacher.load_state_dict({name: student.state_dict()[name] for name in teacher.state_dict()})
    return student, teacher


def changed(config: Any, modality: str, **changes: object) -> Any:
    """Settings of a trunk or an objective with other settings for one modality."""
    own = replace(config.modalities[modality], **changes)
    return replace(config, modalities={**config.modalities, modality: own})


def test_grid_positions_are_those_of_the_formula() -> None:
    width, side = 16, 3
    table = sin_cos_grid(width, side)
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (column, row):  # the first half of the channels is the column's
                rates = [10000 ** (-j / (width / 4)) for j in range(width // 4)]
                expected += [math.sin(place * rate) for rate in rates] + [math.cos(place * rate) for rate in rates]
            torch.testing.assert_close(table[row * side + column], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_initialisation_of_images_and_text_follows_the_table() -> None:
    objective = Data2Vec2(joint_objective_config(), joint_trunk_config(width=256), seed=0)
    student = objective.build_network(activation_checkpointing=False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7.0)
    objective.initialise(student, seed=0)
    image, text = student.trunk.encoders["image"], student.trunk.encoders["text"]
    bound = math.sqrt(6 / (256 + 3 * 4 * 4))
    assert image.local.proj.weight.abs().max() <= bound
    assert image.local.proj.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert image.extra.tokens.std().item() == pytest.approx(1.0, rel=0.15)
    torch.testing.assert_close(image.fixed_positions.table[0], sin_cos_grid(256, 4))
    assert not image.fixed_positions.table.requires_grad
    assert text.local.tokens.weight[PAD_ID].abs().max() == text.local.places.weight[PAD_ID].abs().max() == 0
    assert text.local.tokens.weight[PAD_ID + 1 :].std().item() == pytest.approx(0.02, rel=0.05)
    assert student.decoders["text"].proj.weight.std().item() == pytest.approx(0.02, rel=0.1), "text keeps N(0, 0.02)"
    assert student.decoders["image"].proj.weight.std().item() > 0.1, "1 / sqrt(3 * 8) by the framework's uniform"
    scale = {name for name, p in student.named_parameters() if (p == 7.0).any()}
    assert scale == {"trunk.encoders.audio.alibi.scale"}, "whose start is its constructor's"


def test_how_pixels_lie_in_memory_changes_nothing() -> None:
    """The reader's lie channels last; a convolution would take another way for them, and round otherwise."""
    source = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    channels_last = source.contiguous(memory_format=torch.channels_last)
    assert channels_last.stride() != source.stride()
    pixels = normalise_pixels(channels_last, torch.float32)
    assert pixels.is_contiguous()
    assert torch.equal(pixels, normalise_pixels(source, torch.float32))
    torch.testing.assert_close(pixels[:, 1], (source[:, 1] / 255 - IMAGE_MEAN[1]) / IMAGE_STD[1])
    encoder = PatchEncoder(8, 16, 16)
    assert torch.equal(encoder(channels_last), encoder(source))


def test_a_modality_that_is_left_out_does_not_change_the_start_of_the_others() -> None:
    config = joint_trunk_config()
    fewer = replace(config, modalities={name: own for name, own in config.modalities.items() if name != "audio"})
    (whole, _), (less, _) = built(config), built(fewer)
    kept = less.state_dict()
    assert kept
    assert all(torch.equal(whole.state_dict()[name], kept[name]) for name in kept)
    other, _ = built(fewer, seed=2)
    assert not torch.equal(other.trunk.blocks[0].attn.qkv.weight, less.trunk.blocks[0].attn.qkv.weight)


def test_bytes_and_normalised_pixels_are_the_same_image() -> None:
    student, _ = built()
    pixels = joint_batch("image", seed=0).source
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    local = student.trunk.encoders["image"].local
    torch.testing.assert_close(local(pixels), local((pixels.float() / 255 - mean) / std), rtol=1e-5, atol=1e-6)


def _halves(batch: Batch) -> list[Batch]:
    return [
        replace(
            batch,
            source=batch.source[half],
            ids=batch.ids[half],
            masks=MaskSet(keep=batch.masks.keep[half], masked=batch.masks.masked[half]),
            num_masked=int(batch.masks.masked[half].sum()),
        )
        for half in (slice(0, 2), slice(2, 4))
    ]


@pytest.mark.parametrize(("cls_rows", "same"), [(8, True), (None, False)])
def test_stated_rows_make_the_cls_loss_independent_of_the_micro_batch(cls_rows: int | None, same: bool) -> None:
    """Of four images in one micro-batch or in two; the reference's own sum is not."""
    objective = joint_objective_config()
    loss = replace(objective.modalities["image"].loss, cls_rows=cls_rows)
    student, teacher = built(objective=changed(objective, "image", loss=loss))
    batch = joint_batch("image", seed=0, samples=4)

    def per_token(batches: list[Batch]) -> float:
        losses = [student(b, torch.no_grad()(teacher.__call__))["losses"]["cls"].detach() for b in batches]
        return float(sum(losses)) / sum(b.num_masked for b in batches)

    whole, split = per_token([batch]), per_token(_halves(batch))
    assert (split == pytest.approx(whole, rel=1e-4)) == same
    if cls_rows is None:
        assert split == pytest.approx(whole / 2, rel=1e-4)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_masked_input_does_not_reach_the_student(modality: str) -> None:
    student, _ = built()
    batch = joint_batch(modality, seed=0, num_masks=1)
    keep, masked = batch.masks.rows()

    def seen(source: Tensor) -> Tensor:
        with torch.no_grad():
            other = replace(batch, source=source)
            return student.trunk.encode_visible(student.trunk.embed(other), other)

    def repaint(where: Tensor) -> Tensor:
        """The input with every token of `where` (B, T) replaced."""
        if modality == "text":
            return torch.where(where, (batch.source + 1 - 4) % 30 + 4, batch.source)
        pixels = where.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return torch.where(pixels, 255 - batch.source, batch.source)

    assert torch.equal(seen(repaint(masked)), seen(batch.source))
    assert not torch.allclose(seen(repaint(~masked)), seen(batch.source)), "the check itself must be able to fail"


def test_positions_count_tokens_that_are_no_padding() -> None:
    encoder = TokenEncoder(vocab_size=20, max_tokens=8, width=4, rate=0.0)
    with torch.no_grad():
        encoder.tokens.weight.zero_()
        encoder.places.weight.copy_(torch.arange(10.0)[:, None] * torch.tensor([1.0, -1.0, 2.0, 0.5]))
    encoder.norm = torch.nn.Identity()
    found = encoder(torch.tensor([[0, 7, 9, 2, PAD_ID, PAD_ID], [0, 5, 2, PAD_ID, PAD_ID, PAD_ID]]))[..., 0]
    assert found.tolist() == [[2, 3, 4, 5, 1, 1], [2, 3, 4, 1, 1, 1]]


def test_extra_tokens_are_no_targets_and_no_features() -> None:
    student, teacher = built(changed(joint_trunk_config(), "image", num_extra_tokens=2))
    batch = joint_batch("image", seed=0)
    out = student(batch, torch.no_grad()(teacher.__call__))
    assert out["target"].shape == (2, 16, 16)
    assert out["context"].shape[1] == batch.masks.num_visible
    assert {layer.shape for layer in student.trunk.layers("image", batch.source)} == {(2, 16, 16)}


def test_row_that_sees_nothing_but_padding_stays_finite() -> None:
    """Text masks may hit every real token of a short row; one such row must not spoil the step of all ranks."""
    student, teacher = built()
    batch = joint_batch("text", seed=0, samples=2, num_masks=1)
    padding = torch.zeros_like(batch.source, dtype=torch.bool)
    padding[1, 3:] = True  # three real tokens
    keep = batch.masks.keep.clone()
    keep[1, 0] = torch.arange(20 - keep.shape[2], 20)  # only padding is visible
    masked = torch.ones_like(batch.masks.masked).scatter(2, keep, False)
    batch = replace(
        batch,
        source=batch.source.masked_fill(padding, PAD_ID),
        padding=padding,
        masks=MaskSet(keep=keep, masked=masked),
    )
    out = student(batch, torch.no_grad()(teacher.__call__))
    out["losses"]["regression"].backward()
    assert torch.isfinite(out["losses"]["regression"])
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
