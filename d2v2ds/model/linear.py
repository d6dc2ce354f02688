"""`nn.Linear` that uses oneDNN for fp32 on a CPU that is not Intel's.

torch hands fp32 products to MKL, which takes narrower vector instructions on processors of other makers: half the
speed of oneDNN there, measured on a Zen 5. On a Xeon MKL is as fast as oneDNN and needs no copies of transposed
factors: whole steps took 15 % less. bf16 goes to oneDNN anyway, and accelerators have their own libraries.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) times the transpose of weight (O, I), by oneDNN; both are made contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0]  # (..., O)
        rows = grad.reshape(-1, grad.shape[-1])  # (n, O)
        dx = _product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        dweight = _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)  # (O, I)
        return dx, dweight, rows.sum(0)


class Linear(nn.Linear):
    """Drop-in `nn.Linear` with bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        fits = x.device.type == "cpu" and x.dtype == torch.float32
        if fits and _USES_ONEDNN and not torch.compiler.is_exporting():  # a graph for elsewhere takes the plain product
            return _OneDnnLinear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


_CPU_FACTS = Path("/proc/cpuinfo")


def _is_intel(facts: Path = _CPU_FACTS) -> bool:
    """Whether Linux says so; False where it says nothing."""
    try:
        return "GenuineIntel" in facts.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


_USES_ONEDNN = (
    torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not _is_intel()
)
