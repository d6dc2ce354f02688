"""Heads equal loops over rows, frames and classes, with and without padding."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v2ds.tasks.heads import (
    FrameHeadConfig,
    FramePooling,
    HeadConfig,
    PatchHeadConfig,
    SentenceHeadConfig,
    TokenHead,
    _log_sigmoid,
)

LENGTHS = (5, 1, 3)
FEATURES = torch.randn(3, 2 + 5, 8, generator=torch.Generator().manual_seed(1))
"""(B, E + T, D), two extra tokens."""
PADDING = torch.arange(5) >= torch.tensor(LENGTHS)[:, None]


def pooled(pooling: str, frames: list[Tensor], weight: Tensor, bias: Tensor) -> list[float]:
    """One recording's logits, class by class and frame by frame in float64."""
    logits = []
    for own, shift in zip(weight.double(), bias.double(), strict=True):
        values = [float(frame.double() @ own + shift) for frame in frames]
        shares = [1 / (1 + math.exp(-value)) for value in values]
        if pooling == "linear_softmax":
            share = sum(one**2 for one in shares) / sum(shares)
        else:
            share = sum(shares) / len(shares)
        logit = math.log(share / (1 - share))
        mean = sum(values) / len(values)
        logits.append({"mean": mean, "max": max(values), "mean_features": mean}.get(pooling, logit))
    return logits


@pytest.mark.parametrize("pool_padding", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("pooling", get_args(FramePooling))
def test_every_pooling_of_frames_equals_loops(pooling: FramePooling, is_padded: bool, pool_padding: bool) -> None:
    torch.manual_seed(0)
    head = FrameHeadConfig(pooling=pooling, pool_padding=pool_padding).build(8, 4)
    found = head(FEATURES, 2, PADDING if is_padded else None)
    for row, length in enumerate(LENGTHS):
        frames = list(FEATURES[row, 2:])
        if is_padded:
            frames = frames[:length] + [torch.zeros(8)] * (5 - length if pool_padding else 0)
        expected = pooled(pooling, frames, head.proj.weight.detach(), head.proj.bias.detach())
        torch.testing.assert_close(found[row].double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", get_args(FramePooling))
def test_what_lies_in_padding_changes_nothing(pooling: FramePooling) -> None:
    head = FrameHeadConfig(pooling=pooling).build(8, 4)
    other = FEATURES.clone()
    other[:, 2:][PADDING] = 1e4
    assert torch.equal(head(FEATURES, 2, PADDING), head(other, 2, PADDING))


@pytest.mark.parametrize("pooling", get_args(FramePooling))
@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_logits_have_finite_values_and_gradients(pooling: FramePooling, size: float) -> None:
    head = FrameHeadConfig(pooling=pooling).build(8, 4)
    with torch.no_grad():
        head.proj.weight.mul_(0).add_(size / 8)
    features = torch.ones(3, 5, 8).mul(torch.tensor([1.0, -1.0, 0.0])[:, None, None]).requires_grad_()
    found = head(features, 0, PADDING)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert features.grad is not None and torch.isfinite(features.grad).all()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("has_norm", [False, True])
def test_patches_equal_loops(pooling: str, has_norm: bool) -> None:
    torch.manual_seed(0)
    head = PatchHeadConfig(pooling=pooling, norm=has_norm).build(8, 4)  # type: ignore[arg-type]
    if has_norm:
        torch.nn.init.normal_(head.norm.weight)  # type: ignore[arg-type]
        torch.nn.init.normal_(head.norm.bias)  # type: ignore[arg-type]
    found = head(FEATURES, 2, None)
    for row in FEATURES:
        vector = row[0] if pooling == "cls" else sum(row[2:], torch.zeros(8)) / 5
        if has_norm:
            mean, variance = vector.mean(), ((vector - vector.mean()) ** 2).mean()
            vector = (vector - mean) / (variance + 1e-6).sqrt() * head.norm.weight + head.norm.bias
        expected = head.proj.weight @ vector + head.proj.bias
        assert any(torch.allclose(expected, one, atol=1e-5) for one in found)
    assert found.shape == (3, 4)


def test_first_weights_of_a_head_have_the_spread_that_is_asked_for() -> None:
    head = PatchHeadConfig(init_std=2e-5).build(64, 100)
    head.draw()
    assert head.proj.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert head.proj.bias.abs().max() == 0


def test_a_sentence_is_its_first_token() -> None:
    head = SentenceHeadConfig().build(8, 3)
    found = head(FEATURES, 2, PADDING)
    for row in range(3):
        hidden = (head.dense.weight @ FEATURES[row, 2] + head.dense.bias).tanh()
        torch.testing.assert_close(found[row], head.proj.weight @ hidden + head.proj.bias)


def test_dropout_acts_in_training_alone() -> None:
    heads = [SentenceHeadConfig(dropout=0.5).build(8, 3), FrameHeadConfig(dropout=0.5).build(8, 3)]
    for head in heads:
        assert not torch.equal(head(FEATURES, 2, None), head(FEATURES, 2, None))
        head.eval()
        assert torch.equal(head(FEATURES, 2, None), head(FEATURES, 2, None))


@pytest.mark.parametrize(
    "config", [PatchHeadConfig(norm=False), SentenceHeadConfig(), FrameHeadConfig(pooling="mean"), None]
)
def test_outputs_of_a_head_in_bf16_are_not_rounded(config: HeadConfig | None) -> None:
    """Equal to the output layer in fp64 on what enters it; a number of 3.14159 in bf16 would be 3.140625."""
    torch.manual_seed(0)
    head = TokenHead(8, 4, 0.0) if config is None else config.build(8, 4)
    head = head.bfloat16()
    entered: list[Tensor] = []
    head.proj.register_forward_hook(lambda module, inputs, output: entered.append(inputs[0]))
    given = FEATURES.bfloat16()
    found = head(given) if config is None else head(given, 2, PADDING)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    exact = F.linear(entered[0].double(), head.proj.weight.double(), head.proj.bias.double())
    if isinstance(config, FrameHeadConfig):
        exact = exact.masked_fill(PADDING[..., None], 0).sum(1) / torch.tensor(LENGTHS)[:, None]
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert head.proj.weight.grad is not None and head.proj.weight.grad.dtype == torch.bfloat16


def law(weight: Tensor) -> tuple[float, float]:
    return float(weight.detach().std()), float(weight.detach().abs().max())


def test_weights_are_drawn_from_the_laws_of_the_official_heads() -> None:
    torch.manual_seed(0)
    width = 256
    patches = PatchHeadConfig().build(width, 100)
    patches.draw()
    assert law(patches.proj.weight)[0] == pytest.approx(0.02, rel=0.02) and not patches.proj.bias.any()
    sentence = SentenceHeadConfig().build(width, 100)
    sentence.draw()
    for weight in (sentence.dense.weight, sentence.proj.weight):  # uniform up to 1 / sqrt(D)
        assert law(weight) == pytest.approx((width**-0.5 / 3**0.5, width**-0.5), rel=0.02)
    tokens = TokenHead(width, 32, 0.0)
    tokens.draw()
    most = (6 / (width + 32)) ** 0.5
    assert law(tokens.proj.weight) == pytest.approx((most / 3**0.5, most), rel=0.02) and not tokens.proj.bias.any()


def test_log_sigmoid_is_that_of_torch_far_from_zero_too() -> None:
    values = torch.tensor([-120.0, -30.0, -18.5, -1.0, 0.0, 1.0, 18.5, 30.0, 120.0])
    torch.testing.assert_close(_log_sigmoid(values), F.logsigmoid(values), rtol=1e-6, atol=1e-8)
