"""Spectrograms: settings of their patches and prenet, and how their encoder and decoder are built.

A token is a patch of 16 frames x 16 mel bins; mel comes fastest, so that the tokens of a shorter recording are the
first ones of a longer one.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from d2v2ds.bounds import Count, CountOrZero
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.flops import linear_flops
from d2v2ds.model.local import PatchEncoder
from d2v2ds.model.network import NetworkSettings
from d2v2ds.model.positions import GridPositions


class SpectrogramPatches(PatchEncoder):
    """Patch convolution over (time, mel)."""

    def forward(self, source: Tensor) -> Tensor:
        """(B, F, S) normalised features, F mel bins of S frames -> (B, T, D), mel fastest."""
        return super().forward(source.transpose(1, 2)[:, None])


def count_patches(patch_size: int, columns: int, frames: Tensor) -> Tensor:
    """(B,) real frames -> (B,) patches that hold any of them."""
    return (frames + patch_size - 1).div(patch_size, rounding_mode="floor") * columns


@dataclass(frozen=True, kw_only=True)
class SpectrogramNetwork(NetworkSettings):
    """Settings of the spectrogram encoder."""

    mel_bins: Count = 128
    """F, mel bins of a frame."""
    target_length: Count = 1024
    """Frames of every input in pretraining and fine-tuning (10 ms each); in evaluation any number will do."""
    patch_size: Count = 16
    """Side of a patch in frames and mel bins; divides both numbers."""
    max_rows: Count = 768
    """Rows of patches in the table of positions: the longest input, in patches (`max_length` of EAT)."""
    patch_width: Count | None = None
    """Channels of the patch convolution (`embed_dim` of the modality); None: the model's width."""
    num_extra_tokens: CountOrZero = 1
    """CLS tokens; the last of them predicts the mean target."""
    positions: Literal["time_mel", "swapped"] = "time_mel"
    """Table of sines and cosines for (time, mel). `swapped` is the table of BAT's released weights (arXiv 2602.16305):
    made for rows of mel bins, but read by tokens whose rows are times. Each token still has a code of its own, which
    does not say its time or mel bin; inputs then have `target_length` frames exactly."""

    @property
    def grid_columns(self) -> int:
        """Patches at one time."""
        return self.mel_bins // self.patch_size

    @property
    def position_grid(self) -> tuple[int, int]:
        """Rows and columns of the table of `target_length` frames, which a transformer decoder has too."""
        rows, columns = self.target_length // self.patch_size, self.grid_columns
        return (columns, rows) if self.positions == "swapped" else (rows, columns)

    @property
    def has_fixed_length(self) -> bool:
        """True if every input must have `target_length` frames."""
        return self.positions == "swapped"

    def num_tokens(self, size: int) -> int:
        """T of `size` frames."""
        return size // self.patch_size * self.grid_columns

    def build_encoder(self, block: BlockConfig, shared_depth: int, *, with_local: bool) -> ModalityEncoder:
        """Build patch convolution, fixed positions, CLS tokens and prenet."""
        local = SpectrogramPatches(self.patch_size, self.patch_width or block.width, block.width, 1)
        table = (
            GridPositions(block.width, *self.position_grid)
            if self.has_fixed_length
            else GridPositions(block.width, self.max_rows, self.grid_columns, extends=True)
        )
        return ModalityEncoder(
            local=local if with_local else None,
            num_tokens=partial(count_patches, self.patch_size, self.grid_columns),  # can be pickled
            fixed_positions=table,
            num_extra_tokens=self.num_extra_tokens,
            prenet=Prenet(PrenetConfig(depth=self.prenet_depth, dropout=self.prenet_dropout), block),
            attention_path=block.attention_path,
        )

    def local_flops(self, width: int, num_samples: int, size: int) -> float:
        """Operations of the patch convolution and of the Linear that may follow it."""
        patch_width, tokens = self.patch_width or width, self.num_tokens(size)
        widen = 0.0 if patch_width == width else linear_flops([patch_width, width], num_samples, tokens)
        return linear_flops([self.patch_size**2, patch_width], num_samples, tokens) + widen

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Return one message for each contradiction."""
        problems = [
            f"{name} {size} is not divisible by patch_size {self.patch_size}"
            for name, size in (("mel_bins", self.mel_bins), ("target_length", self.target_length))
            if size % self.patch_size
        ]
        if block.width % 4:
            problems.append(f"width {block.width} is not divisible by 4, which 2-D positions need")
        if not self.has_fixed_length and self.target_length > self.max_rows * self.patch_size:
            problems.append(
                f"target_length {self.target_length} is more than max_rows {self.max_rows} of {self.patch_size} frames"
            )
        return problems
