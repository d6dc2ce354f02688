"""Positions of tokens: convolutions for speech (arXiv 2006.11477), a fixed table for images (arXiv 2111.06377).

Decoders use the same convolutions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.bounds import MOST_LAYERS


class _StridedConv(torch.autograd.Function):
    """Strided convolution without padding whose backward on a CPU is a few large matrix products.

    With channels last, taps [i s, i s + s) of every window are s C consecutive numbers, and the next window's follow
    directly: a matrix without a copy. This is faster than oneDNN's own backward in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        """x (R, T, C) contiguous, weight (C', C, K) -> (R, T', C')."""
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return _token_conv(x, weight, None, stride, 0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            wanted = [one for one, is_wanted in zip((x, weight), ctx.needs_input_grad, strict=False) if is_wanted]
            out = _token_conv(x, weight, None, ctx.stride, 0, 1)
            found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=True))
            dx, dweight = (next(found) if is_wanted else None for is_wanted in ctx.needs_input_grad[:2])
            return dx, dweight, None
        stride, grad = ctx.stride, grads[0].contiguous()  # (R, T', C')
        taps = weight.permute(2, 1, 0).contiguous()  # (K, C, C')
        dtaps = torch.zeros_like(taps, dtype=torch.float32)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for first in range(0, len(taps), stride):
            some = slice(first, first + stride)
            factors, dfactors = taps[some].flatten(0, 1), dtaps[some].flatten(0, 1)  # (s C, C')
            for row, drow in enumerate(grad):
                windows = _windows(x[row], first, len(drow), len(factors), stride)  # (T', s C)
                if drow.dtype == dfactors.dtype:
                    dfactors.addmm_(windows.t(), drow)
                else:  # sum over rows in fp32
                    dfactors.add_(windows.t() @ drow)
                if dx is not None:
                    _windows(dx[row], first, len(drow), len(factors), stride).addmm_(drow, factors.t())
        return dx, dtaps.to(weight.dtype).permute(2, 1, 0), None


def _windows(x: Tensor, first: int, count: int, width: int, stride: int) -> Tensor:
    """View x (T, C) as (count, width): row t begins at token first + t stride, and rows do not overlap."""
    channels = x.shape[1]
    return x.as_strided((count, width), (stride * channels, 1), x.storage_offset() + first * channels)


def _token_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> Tensor:
    image = x.unsqueeze(1).permute(0, 3, 1, 2)  # (R, C, 1, T), channels last in memory
    image = F.conv2d(image, weight.unsqueeze(2), bias, stride=(1, stride), padding=(0, padding), groups=groups)
    return image.permute(0, 2, 3, 1).squeeze(1)


class TokenConv(nn.Conv1d):
    """`nn.Conv1d` over tokens with channels last, (R, T, C) -> (R, T', C'), without copies.

    It runs as a 2-D convolution of height 1 in the channels-last memory format, which tokens already have: the norms
    that follow work on channels, and with channels first each layer would be transposed twice.
    """

    def forward(self, x: Tensor) -> Tensor:
        stride, padding = self.stride[0], int(self.padding[0])
        trains = x.device.type == "cpu" and torch.is_grad_enabled() and x.is_contiguous()
        if trains and stride > 1 and self.in_channels > 1 and (padding, self.groups, self.bias) == (0, 1, None):
            weight = self.weight
            if torch.is_autocast_enabled("cpu"):  # here, for a backward of our own must see what the forward multiplied
                dtype = torch.get_autocast_dtype("cpu")
                x, weight = x.to(dtype), weight.to(dtype)
            return _StridedConv.apply(x, weight, stride)
        return _token_conv(x, self.weight, self.bias, stride, padding, self.groups)


class SameConv(nn.Module):
    """Length-preserving grouped convolution, LayerNorm over channels without gain and bias, GELU."""

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


class SameConv2d(nn.Module):
    """`SameConv` over a grid of tokens, row by row."""

    def __init__(self, in_width: int, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, kernel, padding=kernel // 2, groups=groups)
        self.trim = 1 - kernel % 2

    def forward(self, x: Tensor) -> Tensor:
        """(R, Gh, Gw, C_in) -> (R, Gh, Gw, C)."""
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels last in memory throughout
        if self.trim:
            x = x[:, : -self.trim, : -self.trim]
        return F.gelu(F.layer_norm(x, x.shape[-1:]))


class ConvPositions(nn.Module):
    """Stack of convolutions over neighbouring tokens, without residuals; encodes relative positions."""

    def __init__(self, width: int, *, depth: int, total_kernel: int, groups: int) -> None:
        """
        Args:
            width: D.
            depth: number of layers, at most `MOST_LAYERS`.
            total_kernel: each layer's kernel is max(3, total_kernel // depth).
            groups: of each convolution.
        """
        super().__init__()
        if depth > MOST_LAYERS:
            raise ValueError(f"expected at most {MOST_LAYERS} position convolutions, found {depth}")
        kernel = max(3, total_kernel // depth)
        self.layers = nn.ModuleList(SameConv(width, width, kernel, groups) for _ in range(depth))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (R, T, D) with masked tokens zeroed.
            padding: (R, T) bool, True = zero this token before every layer, so that padding does not change real
                tokens. None in training: the official code does not zero padding.

        Returns:
            (R, T, D).
        """
        for layer in self.layers:
            x = layer(x if padding is None else x.masked_fill(padding[..., None], 0))
        return x


class GridPositions(nn.Module):
    """Table of 2-D sines and cosines, added to the patches of an image or a spectrogram.

    It is a parameter, as in official checkpoints and parameter counts; as a rule one without gradient.
    """

    def __init__(
        self,
        width: int,
        rows: int,
        columns: int | None = None,
        *,
        num_extra: int = 0,
        extends: bool = False,
        trains: bool = False,
    ) -> None:
        """
        Args:
            width: D, divisible by 4.
            rows: of the grid of patches.
            columns: of the grid; None: as many as rows.
            num_extra: E, rows of zeros in front of the table, for tokens that have no position.
            extends: inputs may have fewer rows than the table, of which they take the first.
            trains: train the table, which then only begins with sines and cosines.
        """
        super().__init__()
        self.rows, self.columns, self.num_extra, self.extends = rows, columns or rows, num_extra, extends
        self.table = nn.Parameter(torch.empty(1, num_extra + self.rows * self.columns, width), requires_grad=trains)
        self.reset_parameters()

    def first_table(self) -> Tensor:
        """Compute the table (1, E + T, D) fp32 on the CPU."""
        grid = sin_cos_grid(self.table.shape[-1], self.rows, self.columns)
        return F.pad(grid, (0, 0, self.num_extra, 0))[None]

    def reset_parameters(self) -> None:
        """Fill the table."""
        self.table.data.copy_(self.first_table())

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) or (B, E + T, D) -> the same shape.

        Raises:
            ValueError: T is not the length of the table, or above it if inputs may be shorter.
        """
        length, most = x.shape[1], self.rows * self.columns
        if self.num_extra and length == self.num_extra + most:
            return x + self.table
        if length != most and not (self.extends and length < most):
            raise ValueError(
                f"expected {'up to ' if self.extends else ''}{most} tokens, a grid of {self.rows} x {self.columns} "
                f"patches, found {length}"
            )
        whole = self.num_extra == 0 and length == most
        return x + (self.table if whole else self.table[:, self.num_extra : self.num_extra + length])


def sin_cos_grid(width: int, rows: int, columns: int | None = None) -> Tensor:
    """Compute (rows * columns, width) fp32: the first half of the channels encodes the column, the second the row.

    Each half is [sin(p w_j), cos(p w_j)] with w_j = 10000^(-j / (width / 4)). Without `columns` the grid is square.
    """
    quarter, columns = width // 4, columns or rows
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * rates  # (longer side, width / 4)
    line = torch.cat((angles.sin(), angles.cos()), dim=1)  # (longer side, width / 2)
    of_columns = line[None, :columns, :].expand(rows, -1, -1)
    of_rows = line[:rows, None, :].expand(-1, columns, -1)
    return torch.cat((of_columns, of_rows), dim=2).reshape(rows * columns, width).float()


class RelativePositions(nn.Module):
    """Learned attention bias for each offset of two patches and each head (BEiT, arXiv 2106.08254).

    Source: the relative position bias of the official data2vec 1.0 for images. One CLS token stands in front.
    """

    def __init__(self, rows: int, columns: int, num_heads: int, num_layers: int | None = None) -> None:
        """
        Args:
            rows, columns: of the grid of patches.
            num_heads: H.
            num_layers: number of blocks if each has its own table, else None.
        """
        super().__init__()
        offsets = (2 * rows - 1) * (2 * columns - 1)
        self.table = nn.Parameter(torch.empty(num_layers or 1, offsets + 3, num_heads))
        """(L or 1, offsets + 3, H); the last three rows: CLS as query, CLS as key, CLS with itself."""
        self.rows, self.columns = rows, columns
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every bias to zero."""
        nn.init.zeros_(self.table)

    def check(self, num_tokens: int) -> None:
        """Raise ValueError if inputs of T tokens, CLS left aside, have another grid."""
        if num_tokens != self.rows * self.columns:
            raise ValueError(
                f"expected {self.rows * self.columns} tokens, a grid of {self.rows} x {self.columns} patches, found "
                f"{num_tokens}"
            )

    def forward(self) -> Tensor:
        """Return (L or 1, H, 1 + T, 1 + T)."""
        index = relative_index(self.rows, self.columns).to(self.table.device)
        return self.table[:, index].permute(0, 3, 1, 2)


def relative_index(rows: int, columns: int) -> Tensor:
    """Return (1 + T, 1 + T) int64: the row of the table for each query and key, CLS first.

    A query at (r, c) and a key at (r', c') have row (r - r' + rows - 1) (2 columns - 1) + (c - c' + columns - 1).
    """
    r = torch.arange(rows).repeat_interleave(columns)  # (T,)
    c = torch.arange(columns).repeat(rows)
    patches = (r[:, None] - r + rows - 1) * (2 * columns - 1) + (c[:, None] - c + columns - 1)  # (T, T)
    offsets = (2 * rows - 1) * (2 * columns - 1)
    index = torch.full((len(r) + 1, len(r) + 1), offsets + 1)  # CLS as key
    index[0] = offsets  # CLS as query
    index[0, 0] = offsets + 2
    index[1:, 1:] = patches
    return index
