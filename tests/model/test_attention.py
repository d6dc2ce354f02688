"""All attention paths compute the same function, with the same gradients, bias scale included."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from d2v2ds.model.alibi import Alibi, DistanceBias, alibi_slopes, dense_bias
from d2v2ds.model.attention import attend
from d2v2ds.model.cpu import attention as rowwise

ROWS, HEADS, TOKENS, WIDTH = 3, 4, 11, 8


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, penalty: Tensor, places: Tensor, padding: Tensor) -> Tensor:
    """Loops over rows, heads and queries."""
    out = torch.zeros_like(v)
    for r in range(ROWS):
        for h in range(HEADS):
            for i in range(TOKENS):
                logits = []
                for j in range(TOKENS):
                    distance = abs(int(places[r, i]) - int(places[r, j]))
                    logit = (q[r, h, i] @ k[r, h, j]) / WIDTH**0.5 - penalty[h] * distance
                    logits.append(logit if not padding[r, j] else logit * 0 - float("inf"))
                probs = torch.stack(logits).softmax(0)
                out[r, h, i] = sum(p * v[r, h, j] for j, p in enumerate(probs))
    return out


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    qkv = [torch.randn(ROWS, HEADS, TOKENS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)]
    scale = torch.tensor([0.5, 2.0, -1.0, 1.0], dtype=dtype, requires_grad=True)
    places = torch.stack([torch.randperm(40)[:TOKENS].sort().values for _ in range(ROWS)])
    padding = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    padding[1, -3:] = True
    return qkv, scale, places, padding


def _penalty(scale: Tensor) -> Tensor:
    return scale.clamp(min=0) * scale.new_tensor(alibi_slopes(HEADS))


def _bias(scale: Tensor, places: Tensor, padding: Tensor | None) -> DistanceBias:
    penalty = _penalty(scale)
    return DistanceBias(positions=places, penalty=penalty, padding=padding, dense=dense_bias(places, penalty, padding))


@torch.no_grad()
def test_flex_forward_equals_attention_by_hand() -> None:
    """As a user may call it on a CPU, where it has no backward."""
    qkv, scale, places, padding = _inputs(torch.float32)
    qkv = [x.detach() for x in qkv]
    found = attend(*qkv, _bias(scale.detach(), places, padding), path="flex")
    torch.testing.assert_close(found, attention_by_hand(*qkv, _penalty(scale), places, padding), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["explicit", "rowwise", "sdpa", "flex"])
def test_path_equals_attention_by_hand_with_gradients(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "flex":  # only a check of the device keeps the backward of its definition from a CPU; kernels: see below
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    qkv, scale, places, padding = _inputs(torch.float32)
    found = attend(*qkv, _bias(scale, places, padding), path=path)  # type: ignore[arg-type]
    weights = torch.randn_like(found)
    found_grads = torch.autograd.grad((found * weights).sum(), [*qkv, scale])
    expected = attention_by_hand(*qkv, _penalty(scale), places, padding)
    expected_grads = torch.autograd.grad((expected * weights).sum(), [*qkv, scale])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert found_grads[-1][2] == 0.0, "a negative scale must stay without gradient"
    assert (found_grads[-1][[0, 1, 3]] != 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["sdpa", "flex"])
def test_cuda_path_equals_explicit_with_gradients(path: str) -> None:
    qkv, scale, places, padding = _inputs(torch.float32)
    qkv = [torch.randn(ROWS, HEADS, TOKENS, 64, device="cuda", requires_grad=True) for _ in range(3)]
    scale, places, padding = scale.detach().float().cuda().requires_grad_(), places.cuda(), padding.cuda()
    results = []
    for used in (path, "explicit"):
        out = attend(*qkv, _bias(scale, places, padding), path=used)  # type: ignore[arg-type]
        results.append([out, *torch.autograd.grad(out.square().sum(), [*qkv, scale])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_flex_refuses_to_drop_probabilities() -> None:
    qkv, scale, places, _ = _inputs(torch.float32)
    with pytest.raises(ValueError, match="attention_dropout is 0.1"):
        attend(*qkv, _bias(scale, places, None), dropout_rate=0.1, path="flex")


def test_rowwise_and_explicit_drop_the_same_probabilities() -> None:
    qkv, scale, places, padding = _inputs(torch.float32)
    results = []
    for path in ("explicit", "rowwise"):
        torch.manual_seed(4)
        out = attend(*qkv, _bias(scale, places, padding), dropout_rate=0.4, path=path)  # type: ignore[arg-type]
        results.append([out, *torch.autograd.grad(out.square().sum(), [*qkv, scale])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_slopes_match_the_official_numbers() -> None:
    assert alibi_slopes(4) == [0.25, 0.0625, 0.015625, 0.00390625]
    assert alibi_slopes(6) == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    official_12 = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    official_12 += [0.7071067690849304, 0.3535533845424652, 0.1767766922712326, 0.0883883461356163]
    assert alibi_slopes(12) == pytest.approx(official_12, rel=1e-6)


def test_bias_is_fp32_and_built_from_visible_tokens_only() -> None:
    alibi = Alibi(HEADS, learned=True, per_head=True, num_layers=None).bfloat16()
    penalty = alibi()[0]
    assert penalty.dtype == torch.float32
    places = torch.tensor([[0, 500, 999]])
    bias = dense_bias(places, penalty, None)
    assert bias is not None
    assert bias.shape == (1, HEADS, 3, 3)
    assert bias[0, 0, 0, 2].item() == -0.25 * 999


def test_scale_of_each_block_gives_one_penalty_per_block() -> None:
    assert Alibi(HEADS, learned=True, per_head=True, num_layers=5)().shape == (5, HEADS)
    assert Alibi(HEADS, learned=True, per_head=False, num_layers=None)().shape == (1, HEADS)


@pytest.mark.parametrize("together", [1, 2, 3, 7])
@pytest.mark.parametrize("biased", [True, False])
def test_rows_taken_together_change_nothing(together: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows one by one, in pairs with one left over, and all at once; also with one row of places for all."""
    monkeypatch.setattr(rowwise, "_CACHED_LOGITS", together * HEADS * TOKENS**2)
    torch.manual_seed(0)
    qkv = [torch.randn(7, HEADS, TOKENS, WIDTH, requires_grad=True) for _ in range(3)]
    scale = torch.tensor([0.5, 2.0, -1.0, 1.0], requires_grad=True)
    places = torch.arange(TOKENS)[None]
    results = []
    for path in ("rowwise", "explicit"):
        out = attend(*qkv, _bias(scale, places, None) if biased else None, path=path)  # type: ignore[arg-type]
        leaves = [*qkv, scale] if biased else qkv
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
