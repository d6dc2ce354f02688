"""Convolutional positions of speech (spec section 3.1)."""

import torch.nn.functional as F
from torch import Tensor, nn


class SameConv1d(nn.Module):
    """Length-preserving grouped convolution, LayerNorm over channels without gain or bias, GELU."""

    def __init__(self, in_width: int, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_width, width, kernel, padding=kernel // 2, groups=groups)
        self.trim = 1 - kernel % 2

    def forward(self, x: Tensor) -> Tensor:
        """(R, C_in, T) -> (R, T, C), channels last because the norm is over channels."""
        x = self.conv(x)
        if self.trim:
            x = x[..., : -self.trim]  # an even kernel with padding k // 2 gives one token too many
        x = x.transpose(1, 2)  # (R, T, C)
        return F.gelu(F.layer_norm(x, x.shape[-1:]))


class ConvPositions(nn.Module):
    """A stack of wide convolutions that tells a token its surroundings, without residuals."""

    def __init__(self, width: int, *, depth: int, total_kernel: int, groups: int) -> None:
        """
        Args:
            width: D.
            depth: number of layers.
            total_kernel: the layers' kernel is max(3, total_kernel // depth).
            groups: of each convolution.
        """
        super().__init__()
        kernel = max(3, total_kernel // depth)
        self.layers = nn.ModuleList(SameConv1d(width, width, kernel, groups) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(R, T, D) with masked tokens zeroed -> (R, T, D)."""
        for layer in self.layers:
            x = layer(x.transpose(1, 2))  # (R, T, D)
        return x
