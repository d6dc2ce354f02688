"""Images: their settings and how their encoder and decoder are wired (spec section 3.2)."""

from dataclasses import dataclass

from d2v2ds.errors import below
from d2v2ds.modalities.network import common_faults
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import Decoder, DecoderConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.local import PatchEncoder
from d2v2ds.model.positions import GridPositions
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import TargetConfig


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Patches, prenet, decoder, targets and loss of images."""

    prenet_depth: int
    """Image blocks before the shared ones."""
    decoder: DecoderConfig
    target: TargetConfig
    loss: LossConfig = LossConfig()
    image_size: int = 224
    """Side of the square input, in pixels."""
    patch_size: int = 16
    """Side of a patch, in pixels; divides the image's."""
    patch_width: int | None = None
    """Channels of the patch convolution (`embed_dim` of the modality); None: the model's width."""
    num_extra_tokens: int = 1
    """CLS tokens; the last of them predicts the mean target."""
    prenet_dropout: float = 0.0
    """Dropped fraction after the prenet's input norm."""
    share_local_encoder: bool = False
    """False (published): the teacher has its own patch embedding. True: it reads the student's."""

    @property
    def input_size(self) -> int:
        """Side of the input, in pixels."""
        return self.image_size

    @property
    def grid_side(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    def num_tokens(self, size: int) -> int:
        """T of an image of `size` pixels a side."""
        return (size // self.patch_size) ** 2

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        few = below(self, "", image_size=1, patch_size=1, num_extra_tokens=0)
        problems = common_faults(self, block, shared_depth) + few
        if not few and self.image_size % self.patch_size:
            problems.append(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if block.width % 4:
            problems.append(f"width {block.width} is not divisible by 4, which 2-D positions need")
        if self.patch_width is not None and self.patch_width < 1:
            problems.append(f"patch_width is {self.patch_width}, expected 1 or more")
        return problems


def build_image_encoder(
    config: ImageConfig, block: BlockConfig, shared_depth: int, *, with_local: bool
) -> ModalityEncoder:
    """The image encoder of a student, or of a teacher (`with_local` unless `share_local_encoder`)."""
    patch_width = config.patch_width or block.width
    return ModalityEncoder(
        local=PatchEncoder(config.patch_size, patch_width, block.width) if with_local else None,
        fixed_positions=GridPositions(block.width, config.grid_side),
        num_extra_tokens=config.num_extra_tokens,
        prenet=Prenet(PrenetConfig(depth=config.prenet_depth, dropout=config.prenet_dropout), block),
        attention_path=block.attention_path,
    )


def build_image_decoder(config: ImageConfig, block: BlockConfig) -> Decoder:
    """The decoder of images, over the grid of patches."""
    return Decoder(config.decoder, block.width, grid_side=config.grid_side)
