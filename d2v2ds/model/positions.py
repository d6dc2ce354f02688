"""Convolutions over token sequences, and the positions of speech that are made of them (spec section 3.1)."""

import torch.nn.functional as F
from torch import Tensor, nn


class TokenConv(nn.Conv1d):
    """`nn.Conv1d` over tokens with channels last, (R, T, C) -> (R, T', C'), without copying either side.

    It runs as a 2-D convolution of height 1 in the channels-last memory format, which is how tokens already lie.
    The norms that follow work on channels; with channels first, each layer would be transposed twice.
    """

    def forward(self, x: Tensor) -> Tensor:
        image = x.unsqueeze(1).permute(0, 3, 1, 2)  # (R, C, 1, T), channels last in memory
        image = F.conv2d(
            image,
            self.weight.unsqueeze(2),
            self.bias,
            stride=(1, self.stride[0]),
            padding=(0, int(self.padding[0])),
            groups=self.groups,
        )
        return image.permute(0, 2, 3, 1).squeeze(1)


class SameConv(nn.Module):
    """Length-preserving grouped convolution, LayerNorm over channels without gain or bias, GELU."""

    def __init__(self, in_width: int, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = TokenConv(in_width, width, kernel, padding=kernel // 2, groups=groups)
        self.trim = 1 - kernel % 2

    def forward(self, x: Tensor) -> Tensor:
        """(R, T, C_in) -> (R, T, C)."""
        x = self.conv(x)
        if self.trim:
            x = x[:, : -self.trim]  # an even kernel with padding k // 2 gives one token too many
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
        self.layers = nn.ModuleList(SameConv(width, width, kernel, groups) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(R, T, D) with masked tokens zeroed -> (R, T, D)."""
        for layer in self.layers:
            x = layer(x)
        return x
