"""Modules of data2vec 1.0 beside the trunk: mask vector and head."""

import torch
from torch import Tensor, nn


class MaskVector(nn.Module):
    """Learned vector in place of the local features of masked tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw from U(0, 1), as the official code for speech does."""
        nn.init.uniform_(self.vector)

    def forward(self, local: Tensor, masked: Tensor) -> Tensor:
        """(B, T, D) and (B, T) bool -> (B, T, D)."""
        return torch.where(masked[..., None], self.vector.to(local.dtype), local)


def head(width: int, layers: int) -> nn.Module:
    """Build linear layers with GELU between them; hidden layers have twice the width."""
    widths = [width] + [2 * width] * (layers - 1) + [width]
    parts: list[nn.Module] = []
    for w_in, w_out in zip(widths[:-1], widths[1:], strict=True):
        parts += [nn.Linear(w_in, w_out), nn.GELU()]
    return nn.Sequential(*parts[:-1]) if layers else nn.Identity()
