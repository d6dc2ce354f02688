"""Token convolutions: the products that replace a strided convolution's backward give its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v2ds.model import positions
from d2v2ds.model.positions import ConvPositions, GridPositions, TokenConv, sin_cos_grid


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [16, 17, 18])  # the last window may leave tokens over
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (5, 3), (4, 3), (2, 3), (7, 2)])
def test_strided_convolution_has_the_gradients_of_conv1d(kernel: int, stride: int, length: int, rows: int) -> None:
    torch.manual_seed(0)
    conv = TokenConv(6, 4, kernel, stride, bias=False)
    x = torch.randn(rows, length, 6, requires_grad=True)
    found = conv(x)
    expected = F.conv1d(x.transpose(1, 2), conv.weight, stride=stride).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    pairs = [torch.autograd.grad((y * weights).sum(), (x, conv.weight)) for y in (found, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rows_are_added_up_in_fp32() -> None:
    """In bf16, 256 + 1 is 256, and stays 256 however often 1 is added."""
    conv = TokenConv(2, 2, 2, 2, bias=False).bfloat16()
    x = torch.ones(65, 2, 2, dtype=torch.bfloat16)
    x[0] = 256
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    assert (conv.weight.grad == 320).all()


def test_only_a_strided_training_convolution_on_a_cpu_takes_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    apply = positions._StridedConv.apply
    monkeypatch.setattr(positions._StridedConv, "apply", lambda *args: (calls.append("products"), apply(*args))[1])
    x = torch.randn(1, 16, 6)
    TokenConv(6, 4, 3, 2, bias=False)(x)
    assert calls == ["products"]
    with torch.no_grad():
        TokenConv(6, 4, 3, 2, bias=False)(x)
    TokenConv(6, 4, 3, padding=1)(x)
    TokenConv(6, 6, 3, 2, groups=2, bias=False)(x)
    TokenConv(1, 6, 3, 2, bias=False)(x[..., :1])
    assert calls == ["products"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_multiplies_in_the_type_of_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = TokenConv(6, 4, 3, 2, bias=False)
    x = torch.randn(3, 17, 6, requires_grad=True)
    expected = torch.autograd.grad(conv(x).square().sum(), (x, conv.weight))
    with torch.autocast("cpu", dtype=dtype):
        out = conv(x)
    assert out.dtype == dtype
    found = torch.autograd.grad(out.float().square().sum(), (x, conv.weight))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("trains_input", [True, False])
def test_its_gradient_can_be_differentiated(trains_input: bool) -> None:
    torch.manual_seed(0)
    conv = TokenConv(3, 2, 3, 2, bias=False).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=trains_input)

    def out(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(conv, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(out, (x, conv.weight))
    assert torch.autograd.gradgradcheck(out, (x, conv.weight))


def test_stacks_of_a_million_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 1000 position convolutions, found 1000000"):
        ConvPositions(4, depth=1_000_000, total_kernel=3, groups=1)


def test_a_table_of_a_rectangle_has_columns_in_its_first_half_and_rows_in_its_second() -> None:
    table = sin_cos_grid(8, 3, 2)
    for token in range(6):
        row, column = token // 2, token % 2
        expected = [f(p * 10000 ** (-j / 2)) for p in (column, row) for f in (math.sin, math.cos) for j in range(2)]
        torch.testing.assert_close(table[token], torch.tensor(expected))


def test_the_table_of_a_longer_grid_begins_with_that_of_a_shorter_one() -> None:
    x, positions = torch.randn(2, 4, 8), GridPositions(8, 3, 2, extends=True)
    torch.testing.assert_close(positions(x), x + sin_cos_grid(8, 2, 2))
    assert not positions.table.requires_grad and GridPositions(8, 3, 2, trains=True).table.requires_grad


@pytest.mark.parametrize(("extends", "message"), [(False, "expected 6 tokens"), (True, "expected up to 6 tokens")])
def test_inputs_of_another_grid_are_refused(extends: bool, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}, a grid of 3 x 2 patches, found 8"):
        GridPositions(8, 3, 2, extends=extends)(torch.zeros(1, 8, 8))
    if not extends:
        with pytest.raises(ValueError, match=message):
            GridPositions(8, 3, 2)(torch.zeros(1, 4, 8))
