"""Transformer decoder over all tokens, with a learned mask token (arXiv 2602.16305, as in arXiv 2111.06377)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from d2v2ds.bounds import Depth, Rate, Share, Width, WidthRatio
from d2v2ds.model.block import Block, BlockConfig
from d2v2ds.model.cpu.dropout import dropout
from d2v2ds.model.positions import GridPositions


@dataclass(frozen=True, kw_only=True)
class TransformerDecoderConfig:
    """Settings of a decoder of post-norm blocks."""

    kind: Literal["transformer"] = "transformer"
    width: Width
    """Channels of its tokens; a Linear without bias leads to them if they differ from the model's."""
    depth: Depth
    """Number of blocks."""
    num_heads: Width
    """Attention heads of each block."""
    mlp_ratio: WidthRatio = 4.0
    """Width of the feed-forward layer over that of the decoder."""
    attention_gate: bool = False
    """Gate of the attention, as `model.block.attention_gate`."""
    norm_eps: Share = 1e-6
    """Epsilon of its norms."""
    input_dropout: Rate = 0.0
    """Dropped fraction of the encoder output."""
    trains_positions: bool = True
    """Train the table of positions, which begins with sines and cosines."""

    def block(self) -> BlockConfig:
        """Return the settings of its blocks, which drop nothing."""
        return BlockConfig(
            width=self.width,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            norm_eps=self.norm_eps,
            attention_gate=self.attention_gate,
            attention_dropout=0.0,
            attention_output_dropout=0.0,
            mlp_dropout=0.0,
        )

    def check(self, model_width: int) -> list[str]:
        """Return one message for each contradiction between fields."""
        faults = [f"decoder: width {self.width} is not divisible by 4, which 2-D positions need"] * bool(self.width % 4)
        return faults + [fault.replace("block:", "decoder:") for fault in self.block().check()]


class MaskVector(nn.Module):
    """Puts visible tokens at their positions and one learned vector at all others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(1, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vector from N(0, 0.02)."""
        nn.init.normal_(self.vector, std=0.02)

    def forward(self, visible: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
        """(R, K, D) and the positions (R, K) of its tokens -> (R, T, D)."""
        rows, _, width = visible.shape
        masked = self.vector.to(visible.dtype).expand(rows, num_tokens, -1)
        return masked.scatter(1, keep[..., None].expand(-1, -1, width), visible)


class TransformerDecoder(nn.Module):
    """Mask vector, positions, blocks over all T tokens without extra ones, then a Linear without bias."""

    def __init__(self, config: TransformerDecoderConfig, model_width: int, grid: tuple[int, int]) -> None:
        """
        Args:
            config: settings.
            model_width: D.
            grid: rows and columns of its table of positions.
        """
        super().__init__()
        self.input_dropout = config.input_dropout
        if config.width != model_width:
            self.enter = nn.Linear(model_width, config.width, bias=False)
        self.mask_tokens = MaskVector(config.width)
        self.positions = GridPositions(config.width, *grid, trains=config.trains_positions)
        self.blocks = nn.ModuleList(Block(config.block()) for _ in range(config.depth))
        self.proj = nn.Linear(config.width, model_width, bias=False)

    def forward(self, visible: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
        """
        Args:
            visible: (R, K, D) encoder output.
            keep: (R, K) positions of the visible tokens.
            num_tokens: T, the tokens of its grid.

        Returns:
            (R, T, D) predictions, also of visible tokens.
        """
        x = dropout(visible, self.input_dropout, self.training)
        x = self.enter(x) if hasattr(self, "enter") else x
        x = self.positions(self.mask_tokens(x, keep, num_tokens))  # (R, T, C)
        for block in self.blocks:
            x, _ = block(x, None)
        return self.proj(x)
