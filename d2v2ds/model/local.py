"""The local encoder of speech: a waveform to one feature vector every 20 ms (spec section 3.1)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.model.linear import Linear
from d2v2ds.model.positions import TokenConv
from d2v2ds.shapes import ConvLayer

_NORM_EPS = 1e-5


class ConvLayerNorm(nn.Module):
    """Strided convolution without bias or padding, LayerNorm over channels, GELU."""

    def __init__(self, in_channels: int, layer: ConvLayer) -> None:
        super().__init__()
        channels, kernel, stride = layer
        self.conv = TokenConv(in_channels, channels, kernel, stride, bias=False)
        self.norm = nn.LayerNorm(channels, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S_in, C_in) -> (B, S_out, C)."""
        return F.gelu(self.norm(self.conv(x)))


class ConvStack(nn.Module):
    """The strided convolutions of the front end."""

    def __init__(self, layers: Sequence[ConvLayer]) -> None:
        super().__init__()
        widths = [1, *(channels for channels, _, _ in layers)]
        self.layers = nn.ModuleList(
            ConvLayerNorm(width, layer) for width, layer in zip(widths[:-1], layers, strict=True)
        )

    def forward(self, source: Tensor) -> Tensor:
        """(B, S) -> (B, T, C)."""
        x = source[..., None]
        for layer in self.layers:
            x = layer(x)
        return x


class WaveformEncoder(nn.Module):
    """Conv stack, norm and projection to the model's width."""

    def __init__(self, layers: Sequence[ConvLayer], width: int) -> None:
        super().__init__()
        channels = layers[-1][0]
        self.convs = ConvStack(layers)
        self.norm = nn.LayerNorm(channels, eps=_NORM_EPS)
        self.project = Linear(channels, width)

    def forward(self, source: Tensor) -> Tensor:
        """(B, S) waveform -> (B, T, D)."""
        x = self.convs(source.to(self.project.weight.dtype))  # (B, T, C)
        return self.project(self.norm(x))
