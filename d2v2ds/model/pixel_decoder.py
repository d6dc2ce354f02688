"""Transformer decoder with a learned vector in place of masked tokens (MAE, arXiv 2111.06377)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from d2v2ds.bounds import Depth, Width, WidthRatio
from d2v2ds.model.block import Block, BlockConfig
from d2v2ds.model.encoder import run_blocks
from d2v2ds.model.flops import block_flops, linear_flops
from d2v2ds.model.transformer_decoder import MaskVector


@dataclass(frozen=True, kw_only=True)
class PixelDecoderConfig:
    """Settings of one modality's decoder."""

    width: Width
    """Dd, width of its blocks."""
    depth: Depth
    """Number of blocks."""
    num_heads: Width
    """Heads of each block; divides the width."""
    mlp_ratio: WidthRatio = 4.0
    """Width of a block's feed-forward layer over Dd."""

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        problems = []
        if self.width % self.num_heads:
            problems.append(f"decoder: width {self.width} is not divisible by num_heads {self.num_heads}")
        if self.width % 4:
            problems.append(f"decoder: width {self.width} is not divisible by 4, which 2-D positions need")
        return problems

    def block(self, block: BlockConfig) -> BlockConfig:
        """Return the settings of a block: those of the trunk in the decoder's size."""
        return replace(block, width=self.width, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio)

    def flops(self, block: BlockConfig, num_outputs: int, rows: int, tokens: Sequence[int]) -> float:
        """Count operations, forward.

        Args:
            block: settings of the trunk's blocks.
            num_outputs: P.
            rows: R.
            tokens: that it reads and that its blocks have, extra tokens included.
        """
        read, held = tokens
        return (
            linear_flops([block.width, self.width], rows, read)
            + block_flops(self.block(block), self.depth, rows, held)
            + linear_flops([self.width, num_outputs], rows, held)
        )


class PixelDecoder(nn.Module):
    """Projection to the decoder's width, mask vector, positions, blocks, norm and projection to the outputs."""

    def __init__(
        self,
        config: PixelDecoderConfig,
        block: BlockConfig,
        positions: nn.Module,
        num_outputs: int,
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            config: settings.
            block: settings of the trunk's blocks.
            positions: (R, E + T, Dd) -> (R, E + T, Dd), adds positions.
            num_outputs: P, numbers that are predicted for a token.
            activation_checkpointing: recompute the activations of each block in the backward pass.
        """
        super().__init__()
        own = config.block(block)
        self.embed = nn.Linear(block.width, config.width)
        self.mask_token = MaskVector(config.width)
        self.fixed_positions = positions
        self.blocks = nn.ModuleList(Block(own) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=own.norm_eps)
        self.proj = nn.Linear(config.width, num_outputs)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, encoded: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
        """
        Args:
            encoded: (R, E + K, D) output of the encoder, extra tokens first.
            keep: (R, K) positions of the visible tokens.
            num_tokens: T.

        Returns:
            (R, T, P) predictions, also of visible tokens.
        """
        x = self.embed(encoded)  # (R, E + K, Dd)
        num_extra = x.shape[1] - keep.shape[1]
        tokens = self.mask_token(x[:, num_extra:], keep, num_tokens)  # (R, T, Dd)
        x = self.fixed_positions(torch.cat((x[:, :num_extra], tokens), dim=1))  # (R, E + T, Dd)
        x, _ = run_blocks(self.blocks, x, [None] * len(self.blocks), checkpoint=self.activation_checkpointing)
        return self.proj(self.norm(x))[:, num_extra:]
