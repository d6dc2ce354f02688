"""Images: settings of their patches and prenet, and how their encoder and decoder are built."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2v2ds.bounds import Count, CountOrZero
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.flops import linear_flops
from d2v2ds.model.local import PatchEncoder, normalise_pixels
from d2v2ds.model.network import NetworkSettings
from d2v2ds.model.positions import GridPositions, RelativePositions


@dataclass(frozen=True, kw_only=True)
class ImageNetwork(NetworkSettings):
    """Settings of the image encoder."""

    image_size: Count = 224
    """Side of the square input, in pixels."""
    patch_size: Count = 16
    """Side of a patch, in pixels; divides the image's."""
    patch_width: Count | None = None
    """Channels of the patch convolution (`embed_dim` of the modality); None: the model's width."""
    num_extra_tokens: CountOrZero = 1
    """CLS tokens; the last of them predicts the mean target."""
    positions: Literal["sin_cos", "relative"] = "sin_cos"
    """A fixed table of 2-D sines and cosines, or a learned attention bias for each offset of two patches, as in
    data2vec 1.0; that one needs one CLS token and an objective that reads all tokens."""
    has_extra_positions: bool = False
    """Rows of zeros for the CLS tokens in the table of positions, as in MAE (arXiv 2111.06377): they change nothing but
    the number of parameters."""
    relative_per_block: bool = False
    """Relative positions: separate biases in every block, as after fine-tuning; False shares one table."""

    @property
    def grid_side(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def grid_columns(self) -> int:
        """Patches in a row."""
        return self.grid_side

    @property
    def position_grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.grid_side, self.grid_side

    @property
    def patch_numbers(self) -> int:
        """P, pixels of a patch times colours."""
        return 3 * self.patch_size**2

    @property
    def needs_all_tokens(self) -> bool:
        """True for relative positions."""
        return self.positions == "relative"

    def patches(self, source: Tensor) -> Tensor:
        """(B, 3, Y, X), uint8 or normalised float -> (B, T, P) fp32; a patch in the order (row, column, colour)."""
        size = self.patch_size
        pixels = normalise_pixels(source, torch.float32) if source.dtype == torch.uint8 else source.float()
        x = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, 3, Gh, size, Gw, size)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def build_fixed_positions(self, width: int, num_extra: int) -> GridPositions:
        """Build the table of 2-D sines and cosines."""
        return GridPositions(width, self.grid_side, num_extra=num_extra)

    def num_tokens(self, size: int) -> int:
        """T of an image of `size` pixels a side."""
        return (size // self.patch_size) ** 2

    def build_encoder(self, block: BlockConfig, shared_depth: int, *, with_local: bool) -> ModalityEncoder:
        """Build patch convolution, fixed positions, CLS tokens and prenet."""
        patch_width, is_relative = self.patch_width or block.width, self.positions == "relative"
        layers = self.prenet_depth + shared_depth if self.relative_per_block else None
        side, num_extra = self.grid_side, self.num_extra_tokens if self.has_extra_positions else 0
        return ModalityEncoder(
            local=PatchEncoder(self.patch_size, patch_width, block.width) if with_local else None,
            fixed_positions=None if is_relative else self.build_fixed_positions(block.width, num_extra),
            relative=RelativePositions(side, side, block.num_heads, layers) if is_relative else None,
            num_extra_tokens=self.num_extra_tokens,
            prenet=Prenet(PrenetConfig(depth=self.prenet_depth, dropout=self.prenet_dropout), block),
            attention_path=block.attention_path,
        )

    def local_flops(self, width: int, num_samples: int, size: int) -> float:
        """Operations of the patch convolution and of the Linear that may follow it."""
        patch_width, tokens = self.patch_width or width, self.num_tokens(size)
        widen = 0.0 if patch_width == width else linear_flops([patch_width, width], num_samples, tokens)
        return linear_flops([3 * self.patch_size**2, patch_width], num_samples, tokens) + widen

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Return one message for each contradiction."""
        problems = []
        if self.image_size % self.patch_size:
            problems.append(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.positions == "sin_cos" and block.width % 4:
            problems.append(f"width {block.width} is not divisible by 4, which 2-D positions need")
        if self.positions == "relative" and self.num_extra_tokens != 1:
            problems.append(f"positions 'relative' need num_extra_tokens 1 (CLS), found {self.num_extra_tokens}")
        other = {"sin_cos": "relative_per_block", "relative": "has_extra_positions"}[self.positions]
        if getattr(self, other):
            problems.append(f"{other} is true, positions {self.positions!r} have no such setting; set it to false")
        return problems
