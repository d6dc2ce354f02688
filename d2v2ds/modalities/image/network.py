"""Images: settings of their patches and prenet, and how their encoder and decoder are built."""

from dataclasses import dataclass

from d2v2ds.bounds import Count, CountOrZero
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.flops import linear_flops
from d2v2ds.model.local import PatchEncoder
from d2v2ds.model.network import NetworkSettings
from d2v2ds.model.positions import GridPositions


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

    @property
    def grid_side(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    def num_tokens(self, size: int) -> int:
        """T of an image of `size` pixels a side."""
        return (size // self.patch_size) ** 2

    def build_encoder(self, block: BlockConfig, shared_depth: int, *, with_local: bool) -> ModalityEncoder:
        """Build patch convolution, fixed positions, CLS tokens and prenet."""
        patch_width = self.patch_width or block.width
        return ModalityEncoder(
            local=PatchEncoder(self.patch_size, patch_width, block.width) if with_local else None,
            fixed_positions=GridPositions(block.width, self.grid_side),
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
        if block.width % 4:
            problems.append(f"width {block.width} is not divisible by 4, which 2-D positions need")
        return problems
