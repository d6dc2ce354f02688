"""Our CPU dropout has the right rate, mean, gradient and independence."""

import pytest
import torch

from d2v2ds.model.cpu.dropout import add_dropped, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_scale_and_gradient(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 997, dtype=dtype, requires_grad=True)
    y = dropout(x, rate, training=True)
    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(rate, abs=5 * (rate * (1 - rate) / x.numel()) ** 0.5)
    assert y.max().item() == pytest.approx(1 / (1 - rate), rel=1e-2)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach()), "the gradient passes where the value passed, with the same scale"


def test_neighbours_within_a_random_word_are_independent() -> None:
    torch.manual_seed(1)
    kept = (dropout(torch.ones(400_000), 0.5, training=True) != 0).view(-1, 4).double()
    correlations = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlations.abs().max() < 5 / 100_000**0.5


def test_same_seed_same_mask_and_eval_is_identity() -> None:
    x = torch.randn(7, 5)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(dropout(x, 0.3, training=True))
    assert torch.equal(*draws)
    assert dropout(x, 0.3, training=False) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dropped_branch_is_added_with_both_gradients(dtype: torch.dtype) -> None:
    base, x = (torch.randn(31, 17, dtype=dtype, requires_grad=True) for _ in range(2))
    results = []
    for add in (add_dropped, lambda a, b, *how: a + dropout(b, *how)):
        torch.manual_seed(5)
        y = add(base, x, 0.3, True)
        results.append([y, *torch.autograd.grad((y * y.detach()).sum(), (base, x))])
    near = 1e-5 if dtype == torch.float32 else 0.02  # in bf16 the sum alone is rounded, not its second term before
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)
    assert torch.equal(add_dropped(base, x, 0.3, training=False), base + x)
    frozen = base.detach()
    torch.manual_seed(5)
    assert torch.equal(add_dropped(frozen, x, 0.3, training=True), results[0][0])
