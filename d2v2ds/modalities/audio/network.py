"""Speech: settings of its front end, positions and prenet, and how its encoder and decoder are built."""

from dataclasses import dataclass
from functools import partial

from d2v2ds.bounds import Count, CountOrZero, PositiveOrZero
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.flops import position_conv_flops, waveform_encoder_flops
from d2v2ds.model.local import WaveformEncoder, count_conv_tokens
from d2v2ds.model.network import AlibiSettings
from d2v2ds.model.positions import ConvPositions
from d2v2ds.shapes import AUDIO_CONV_LAYERS, conv_output_length


@dataclass(frozen=True, kw_only=True)
class AudioNetwork(AlibiSettings):
    """Settings of the speech encoder."""

    conv_layers: tuple[tuple[Count, Count, Count], ...] = AUDIO_CONV_LAYERS
    """(channels, kernel, stride) of each convolution of the front end."""
    position_depth: Count = 5
    """Number of position convolutions."""
    position_total_kernel: Count = 95
    """Their kernel is max(3, position_total_kernel // position_depth) tokens."""
    position_groups: Count = 16
    """Groups of each position convolution."""
    conv_gradient: PositiveOrZero = 1.0
    """Factor of the gradient of the front end's convolutions and their norms, not of the projection behind them; 0
    does not train them (official name: `local_grad_mult`, `feature_grad_mult`)."""
    num_extra_tokens: CountOrZero = 0
    """Learned tokens without position in front of the frames, for an utterance loss (emotion2vec, arXiv 2312.15185)."""
    alibi: bool = True
    alibi_learned: bool = True
    alibi_per_head: bool = True

    def num_tokens(self, size: int) -> int:
        """T of a waveform of `size` samples."""
        return conv_output_length(size, self.conv_layers)

    def build_encoder(self, block: BlockConfig, shared_depth: int, *, with_local: bool) -> ModalityEncoder:
        """Build front end, position convolutions, distance penalty and prenet."""
        return ModalityEncoder(
            local=WaveformEncoder(self.conv_layers, block.width, self.conv_gradient) if with_local else None,
            num_tokens=partial(count_conv_tokens, self.conv_layers),  # can be pickled
            positions=ConvPositions(
                block.width,
                depth=self.position_depth,
                total_kernel=self.position_total_kernel,
                groups=self.position_groups,
            ),
            alibi=self.build_alibi(block, shared_depth),
            num_extra_tokens=self.num_extra_tokens,
            prenet=Prenet(PrenetConfig(depth=self.prenet_depth, dropout=self.prenet_dropout), block),
            attention_path=block.attention_path,
        )

    def local_flops(self, width: int, num_samples: int, size: int) -> float:
        """Operations of the front end."""
        return waveform_encoder_flops(self.conv_layers, width, num_samples, size)

    def position_flops(self, width: int, rows: int, tokens: int) -> float:
        """Operations of the position convolutions."""
        return position_conv_flops(
            width, self.position_depth, self.position_total_kernel, self.position_groups, rows, tokens
        )

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Return one message for each contradiction."""
        problems = []
        if block.width % self.position_groups:
            problems.append(f"position_groups {self.position_groups} does not divide the model width {block.width}")
        if self.num_extra_tokens and self.alibi and block.attention_path == "flex":
            problems.append("attention_path 'flex' has no tokens without position, num_extra_tokens needs another")
        if not self.conv_layers:
            problems.append("conv_layers: expected one or more of (channels, kernel, stride), found none")
        return problems
