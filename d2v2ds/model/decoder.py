"""Convolutional decoder that predicts masked tokens from visible ones (arXiv 2212.07525, section 3)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from d2v2ds.bounds import Depth, PositiveOrZero, Rate, Width, WidthRatio
from d2v2ds.model.cpu.dropout import dropout
from d2v2ds.model.positions import SameConv, SameConv2d


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings of one modality's decoder."""

    kind: Literal["conv"] = "conv"
    width: Width
    """Channels of its convolutions."""
    depth: Depth
    """Number of convolutions."""
    kernel: Width
    """Kernel size of each convolution (tokens)."""
    groups: Width
    """Groups of each convolution."""
    input_dropout: Rate = 0.1
    """Dropped fraction of the encoder output."""
    residual: bool = True
    """Add a layer's input to its output if their widths are equal."""
    mask_noise_std: PositiveOrZero = 0.01
    """Standard deviation of the noise that replaces a masked token."""
    projection_layers: Depth = 1
    """Linear layers from the convolutions back to the model's width, with GELU between them."""
    projection_ratio: WidthRatio = 2.0
    """Width of the hidden layers over that of the convolutions; unused by a single layer."""

    def check(self, model_width: int) -> list[str]:
        """Return one message for each width that the groups do not divide."""
        return [
            f"decoder: {name} {width} is not divisible by groups {self.groups}"
            for name, width in (("width", self.width), ("model width", model_width))
            if width % self.groups
        ]


class MaskTokens(nn.Module):
    """Puts visible tokens at their positions and new Gaussian noise, no learned embedding, at all others."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def noise(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Draw (R, T, D) noise; a separate method, so that tests can replace the draw."""
        return torch.randn(shape, dtype=like.dtype, device=like.device).mul_(self.std)

    def forward(self, visible: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
        """(R, K, D) and the positions (R, K) of its tokens -> (R, T, D)."""
        rows, _, width = visible.shape
        noise = self.noise(visible, (rows, num_tokens, width))
        return noise.scatter(1, keep[..., None].expand(-1, -1, width), visible)


def _projection(config: DecoderConfig, model_width: int) -> nn.Module:
    """Build one Linear, or several with GELU between, whose hidden layers have the wider width."""
    if config.projection_layers == 1:
        return nn.Linear(config.width, model_width)
    hidden = int(config.width * config.projection_ratio)
    widths = [config.width] + [hidden] * (config.projection_layers - 1) + [model_width]
    layers: list[nn.Module] = []
    for w_in, w_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(w_in, w_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class Decoder(nn.Module):
    """Convolutions over all T tokens, then a projection."""

    def __init__(self, config: DecoderConfig, model_width: int, *, columns: int | None = None) -> None:
        """
        Args:
            config: settings.
            model_width: D.
            columns: tokens in a row of a grid, whose rows follow from T; None for a sequence.
        """
        super().__init__()
        self.input_dropout = config.input_dropout
        self.columns = columns
        self.mask_tokens = MaskTokens(config.mask_noise_std)
        widths = [model_width] + [config.width] * config.depth
        conv = SameConv if columns is None else SameConv2d
        self.layers = nn.ModuleList(
            conv(w_in, w_out, config.kernel, config.groups) for w_in, w_out in zip(widths[:-1], widths[1:], strict=True)
        )
        self.has_residual = [config.residual and a == b for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.proj = _projection(config, model_width)

    def forward(self, visible: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
        """
        Args:
            visible: (R, K, D) encoder output.
            keep: (R, K) positions of the visible tokens.
            num_tokens: T.

        Returns:
            (R, T, D) predictions, also of visible tokens.
        """
        x = self.mask_tokens(dropout(visible, self.input_dropout, self.training), keep, num_tokens)
        if self.columns is not None:
            x = x.unflatten(1, (-1, self.columns))  # (R, Gh, Gw, D)
        for layer, residual in zip(self.layers, self.has_residual, strict=True):
            y = layer(x)  # (R, T, C) or (R, Gh, Gw, C)
            x = y + x if residual else y
        if self.columns is not None:
            x = x.flatten(1, 2)  # (R, T, C)
        return self.proj(x)
