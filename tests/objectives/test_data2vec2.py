"""The student as a whole: published sizes, initialisation, and the properties of one forward."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.config.load import load_config
from d2v2ds.model.flops import step_flops
from d2v2ds.model.init import initialise
from d2v2ds.model.trunk import Data2Vec2, ModelConfig, total_loss
from d2v2ds.objectives.teacher_network import TargetNet
from d2v2ds.shapes import AUDIO_CONV_LAYERS, PAD_ID, conv_output_length
from tests.model.tiny import CONV_LAYERS, tiny_batch, tiny_model_config
from tests.model.tiny_joint import joint_batch, joint_model_config


def _config(name: str) -> ModelConfig:
    return load_config(name).model


@pytest.mark.parametrize(
    "name, student, decoder, teacher",
    [
        ("audio_base", 93_783_308, 619_776, 88_561_932),
        ("audio_large", 315_184_144, 1_908_736, 308_542_480),
        ("image_base", 88_383_744, 2_585_856, 85_797_888),
        ("image_large", 309_268_480, 5_967_872, 303_300_608),
        ("image_huge14", 637_403_392, 6_639_872, 630_763_520),
        ("image_huge16", 637_556_992, 6_639_872, 630_917_120),
        ("text_base", 152_961_792, 28_907_520, 85_054_464),
        ("text_large", 385_379_584, 31_070_464, 302_309_376),
        ("text_large_1m", 385_379_584, 31_070_464, 302_309_376),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, student: int, decoder: int, teacher: int) -> None:
    with torch.device("meta"):
        model, target_net = Data2Vec2(_config(name)), TargetNet(_config(name))
    assert sum(p.numel() for p in model.parameters()) == student
    assert sum(p.numel() for p in model.decoders.parameters()) == decoder
    assert sum(p.numel() for p in target_net.parameters()) == teacher
    assert set(dict(target_net.named_parameters())) < set(dict(model.named_parameters()))


def test_flops_are_those_of_the_measured_cases() -> None:
    base = step_flops(_config("audio_base"), "audio", num_samples=1, size=160_000, num_masks=8, visible=250)
    large = step_flops(_config("audio_large"), "audio", num_samples=1, size=80_000, num_masks=12, visible=113)
    assert base.total == pytest.approx(1.42e12, rel=2e-3)
    assert large.total == pytest.approx(2.88e12, rel=2e-3)


@pytest.mark.parametrize("samples, frames", [(399, 0), (400, 1), (719, 1), (720, 2), (16000, 49), (320000, 999)])
def test_frame_counts_use_the_floor_of_every_layer(samples: int, frames: int) -> None:
    assert conv_output_length(samples, AUDIO_CONV_LAYERS) == frames


def test_initialisation_follows_the_table() -> None:
    torch.manual_seed(0)
    config = tiny_model_config(width=128)
    model = Data2Vec2(config)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    model.encoders["audio"].alibi.scale.data.fill_(1.0)
    initialise(model, seed=0)
    fan_in = 128
    qkv, project = model.blocks[0].attn.qkv, model.encoders["audio"].local.project
    assert qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert qkv.bias.abs().max() == 0
    assert project.weight.abs().max().item() <= 1 / project.in_features**0.5
    assert project.bias.abs().max() > 0
    conv = model.encoders["audio"].local.convs.layers[1].conv
    wanted = (2 / (conv.in_channels * conv.kernel_size[0])) ** 0.5
    assert conv.weight.std().item() == pytest.approx(wanted, rel=0.1)
    assert (model.blocks[0].norm1.weight == 1).all()
    assert model.decoders["audio"].proj.weight.abs().max().item() <= 1 / model.decoders["audio"].proj.in_features ** 0.5
    assert not any((p == 7.0).any() for p in model.parameters()), f"a parameter of fan-in {fan_in} was not drawn"


def _teacher(config: ModelConfig) -> TargetNet:
    return TargetNet(config).eval()


def _forward(config: ModelConfig, batch: Batch, seed: int = 0, **options: bool):
    torch.manual_seed(seed)
    student, teacher = Data2Vec2(config, **options), _teacher(config)
    torch.manual_seed(seed + 1)
    out = student(batch, torch.no_grad()(teacher.__call__))
    return student, out


def test_activation_checkpointing_changes_nothing() -> None:
    config = tiny_model_config()
    config = replace(config, block=replace(config.block, attention_dropout=0.2, mlp_dropout=0.2))
    grads = []
    for checkpointing in (False, True):
        student, out = _forward(config, tiny_batch(), activation_checkpointing=checkpointing)
        total_loss(out).backward()
        grads.append({name: p.grad for name, p in student.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_masked_audio_does_not_reach_the_student() -> None:
    """Changing the local features at places masked in every row changes no context feature."""
    config = tiny_model_config()
    batch = tiny_batch(num_masks=1)
    student, _ = _forward(config, batch)
    student.eval()
    keep, masked = batch.masks.rows()
    with torch.no_grad():
        local = student.encoders["audio"].embed(batch)
        changed = torch.where(masked[..., None], torch.full_like(local, 50.0), local)
        before, after = student.encode(local, batch), student.encode(changed, batch)
        torch.testing.assert_close(before, after)
        visible = torch.where(masked[..., None], local, local + 1.0)
        assert not torch.allclose(before, student.encode(visible, batch)), "the check itself must be able to fail"


def test_padded_tokens_are_not_attended_to() -> None:
    config = tiny_model_config()
    torch.manual_seed(0)
    teacher = _teacher(config)
    batch = tiny_batch(seconds_of_padding=True)
    encoder = teacher.encoders["audio"]
    length = batch.masks.num_tokens
    padding = encoder.token_padding(batch.padding, length)
    assert padding is not None
    assert padding.sum(1).tolist() == [length - conv_output_length(400, CONV_LAYERS)] * 2
    order = torch.arange(length)[None]
    x = torch.randn(2, length, config.block.width)
    noisy = torch.where(padding[..., None], x + 30.0, x)
    outputs = []
    for found in (padding, None):
        bias = encoder.biases(order, found, 1)[0]
        with torch.no_grad():
            outputs.append([teacher.blocks[0](tokens, bias)[0][~padding] for tokens in (x, noisy)])
    torch.testing.assert_close(*outputs[0])
    assert not torch.allclose(*outputs[1]), "without the padding mask the noise must show"


def test_layer_drop_skips_the_block() -> None:
    config = tiny_model_config()
    batch = tiny_batch()
    student, _ = _forward(config, batch)
    teacher = _teacher(config)
    out = student(batch, torch.no_grad()(teacher.__call__), [True, False])
    total_loss(out).backward()
    assert all(p.grad is None for p in student.blocks[1].parameters())
    assert all(p.grad is not None for p in student.blocks[0].parameters())


def test_rows_are_sample_major() -> None:
    config = tiny_model_config()
    batch = tiny_batch(samples=2, num_masks=3)
    student, out = _forward(config, batch)
    student.eval()
    one = replace(
        batch,
        source=batch.source[1:],
        ids=batch.ids[1:],
        masks=MaskSet(keep=batch.masks.keep[1:], masked=batch.masks.masked[1:]),
        num_masked=batch.num_masked // 2,
    )
    with torch.no_grad():
        both = student.encode(student.encoders["audio"].embed(batch), batch)
        alone = student.encode(student.encoders["audio"].embed(one), one)
    torch.testing.assert_close(both[3:], alone)


def test_wrong_mask_length_is_refused_by_name() -> None:
    config = tiny_model_config()
    batch = tiny_batch()
    longer = replace(batch, source=torch.cat((batch.source, batch.source), 1))
    with pytest.raises(ValueError, match="masks are drawn for"):
        _forward(config, longer)


def test_teacher_with_its_own_front_end_ignores_the_students_features() -> None:
    config = tiny_model_config(share_local_encoder=False)
    teacher = _teacher(config)
    batch = tiny_batch()
    shape = (batch.source.shape[0], batch.masks.num_tokens, config.block.width)
    with torch.no_grad():
        targets: list[Tensor] = [teacher(batch, torch.full(shape, value)) for value in (0.0, 9.0)]
    assert torch.equal(*targets)
    assert any("local" in name for name, _ in teacher.named_parameters())


@pytest.mark.parametrize("filled", [0.0, 7.0])
def test_features_of_a_padded_batch_are_those_of_each_recording_alone(filled: float) -> None:
    model = Data2Vec2(tiny_model_config())
    initialise(model, seed=3)
    model.eval()
    source, short = tiny_batch(length=800).source, 503
    padding = torch.zeros(2, 800, dtype=torch.bool)
    padding[1, short:] = True
    alone = model.layers("audio", source[1:, :short])
    with torch.no_grad():
        both = model.layers("audio", source.masked_fill(padding, filled), padding)
    tokens = alone[0].shape[1]
    assert tokens < both[0].shape[1]
    for padded, single in zip(both, alone, strict=True):
        torch.testing.assert_close(padded[1:, :tokens], single, rtol=0, atol=1e-5)


def test_features_of_a_padded_text_are_those_of_the_text_alone() -> None:
    model = Data2Vec2(joint_model_config())
    initialise(model, seed=3)
    model.eval()
    ids = joint_batch("text", seed=0).source
    ids[1, 12:] = PAD_ID
    with torch.no_grad():
        both, alone = model.layers("text", ids, ids == PAD_ID), model.layers("text", ids[1:, :12])
    for padded, single in zip(both, alone, strict=True):
        torch.testing.assert_close(padded[1:, :12], single, rtol=0, atol=1e-5)
