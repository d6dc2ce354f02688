"""Local encoders: raw input to one feature vector per token, computed from its neighbourhood only.

Speech: one vector every 20 ms (arXiv 2006.11477). Images, spectrograms: one per patch. Text: one per token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.model.cpu.dropout import dropout
from d2v2ds.model.positions import TokenConv
from d2v2ds.shapes import PAD_ID, ConvLayer

_NORM_EPS = 1e-5


def count_conv_tokens(layers: Sequence[ConvLayer], num_samples: Tensor) -> Tensor:
    """(B,) samples -> (B,) tokens of a stack of convolutions; `shapes.conv_output_length` of each."""
    for _, kernel, stride in layers:
        num_samples = (num_samples - kernel).div(stride, rounding_mode="floor") + 1
    return num_samples.clamp(min=0)


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
    """Strided convolutions of the speech front end."""

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

    def __init__(self, layers: Sequence[ConvLayer], width: int, conv_gradient: float = 1.0) -> None:
        """
        Args:
            layers: (channels, kernel, stride) of each convolution.
            width: D.
            conv_gradient: factor of the gradient of the convolutions and their norms; 0 does not train them.
        """
        super().__init__()
        channels = layers[-1][0]
        self.conv_gradient = conv_gradient
        self.convs = ConvStack(layers)
        self.norm = nn.LayerNorm(channels, eps=_NORM_EPS)
        self.project = nn.Linear(channels, width)
        self.convs.requires_grad_(conv_gradient > 0)

    def forward(self, source: Tensor) -> Tensor:
        """(B, S) waveform -> (B, T, D)."""
        x = self.convs(source.to(self.project.weight.dtype))  # (B, T, C)
        if self.conv_gradient != 1.0 and x.requires_grad:
            x.register_hook(lambda grad: grad * self.conv_gradient)
        return self.project(self.norm(x))


IMAGE_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's channels on the scale 0 to 1."""
IMAGE_STD = (0.229, 0.224, 0.225)


def normalise_pixels(source: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, Y, X) uint8 pixels -> `dtype`, zero mean and unit variance by ImageNet's statistics.

    The device does this, not a data worker, because bytes are smaller to copy than floats.
    """
    mean = torch.tensor(IMAGE_MEAN, device=source.device)[:, None, None] * 255
    std = torch.tensor(IMAGE_STD, device=source.device)[:, None, None] * 255
    pixels = source.to(torch.float32, memory_format=torch.contiguous_format)  # from channels last
    return ((pixels - mean) / std).to(dtype)


class PatchEncoder(nn.Module):
    """One convolution whose kernel equals its stride: a vector for every patch."""

    def __init__(self, patch_size: int, patch_width: int, width: int, channels: int = 3) -> None:
        """
        Args:
            patch_size: side of a patch in pixels.
            patch_width: channels of the convolution; if it differs from `width`, a Linear follows.
            width: D.
            channels: C of the image.
        """
        super().__init__()
        self.proj = nn.Conv2d(channels, patch_width, patch_size, stride=patch_size)
        if patch_width != width:
            self.widen = nn.Linear(patch_width, width)

    def forward(self, source: Tensor) -> Tensor:
        """(B, C, Y, X), uint8 or normalised float -> (B, T, D), row by row."""
        dtype = self.proj.weight.dtype
        pixels = normalise_pixels(source, dtype) if source.dtype == torch.uint8 else source.to(dtype)
        x = self.proj(pixels).flatten(2).transpose(1, 2)  # (B, T, C)
        return self.widen(x) if hasattr(self, "widen") else x


class TokenEncoder(nn.Module):
    """Token embedding plus learned positions, norm, dropout."""

    def __init__(self, vocab_size: int, max_tokens: int | None, width: int, rate: float) -> None:
        """
        Args:
            vocab_size: V.
            max_tokens: longest input; None for no learned positions.
            width: D.
            rate: dropped fraction of the result.
        """
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=PAD_ID)
        if max_tokens is not None:
            self.places = nn.Embedding(max_tokens + PAD_ID + 1, width, padding_idx=PAD_ID)
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.rate = rate

    def forward(self, source: Tensor) -> Tensor:
        """(B, S) int64 -> (B, T, D). The i-th token that is not padding has position 1 + i; padding has row 1."""
        x = self.tokens(source)  # (B, T, D)
        if hasattr(self, "places"):
            real = source != PAD_ID
            x = x + self.places(real.cumsum(1) * real + PAD_ID)
        return dropout(self.norm(x), self.rate, self.training)
