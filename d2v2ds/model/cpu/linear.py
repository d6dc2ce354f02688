"""`nn.Linear` that uses oneDNN for fp32 on a CPU that is not Intel's.

torch computes fp32 products with MKL, which uses narrower vector instructions on other makers' processors and is slower
than oneDNN there. On Intel's, MKL is as fast and needs no transposed copies. torch uses oneDNN for bf16 anyway.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (..., I) by the transpose of weight (O, I) with oneDNN; makes both contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, needs_dx: bool) -> tuple[Tensor | None, Tensor]:
    """Compute gradients (n, I) of x and (O, I) of weight as those of a convolution with kernel 1.

    oneDNN's convolutions need no transposed copies of the factors; its products do.

    Args:
        grad: (n, O) contiguous.
        x: (n, I) contiguous.
        weight: (O, I).
        needs_dx: False returns None for x.
    """
    # (1, I, 1, n) and (1, O, 1, n), with the strides of the channels-last format
    image, dimage = (rows[None, None].permute(0, 3, 1, 2) for rows in (x, grad))
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dimage, image, weight[..., None, None], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [needs_dx, True, False]
    )
    return dx[0, :, 0].t() if needs_dx else None, dweight.flatten(1)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad, rows = (t.reshape(-1, t.shape[-1]).contiguous() for t in (grads[0], x))  # (n, O), (n, I)
        needs_dx = ctx.needs_input_grad[0]
        if torch.get_num_threads() > 1:
            dx, dweight = _gradients(grad, rows, weight, needs_dx)
        else:  # torch computes such a convolution with MKL
            dx = _product(grad, weight.t(), None) if needs_dx else None
            dweight = _product(grad.t(), rows.t(), None)
        return None if dx is None else dx.view(x.shape), dweight, grad.sum(0)


class Linear(nn.Linear):
    """Drop-in `nn.Linear` with bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        fits = x.device.type == "cpu" and x.dtype == torch.float32
        if fits and _USES_ONEDNN and not torch.compiler.is_compiling():  # torch.compile needs the plain operator
            return _OneDnnLinear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


_CPUINFO = Path("/proc/cpuinfo")


def _is_intel(cpuinfo: Path = _CPUINFO) -> bool:
    """Return True if Linux reports an Intel processor."""
    try:
        return "GenuineIntel" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


_USES_ONEDNN = (
    torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not _is_intel()
)
