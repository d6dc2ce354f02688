"""Speech: its settings and how its encoder and decoder are wired (spec section 3.1)."""

from dataclasses import dataclass, field

from torch import Tensor

from d2v2ds.errors import below
from d2v2ds.modalities.network import build_alibi, common_faults
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import Decoder, DecoderConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.local import WaveformEncoder
from d2v2ds.model.positions import ConvPositions
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import TargetConfig
from d2v2ds.shapes import AUDIO_CONV_LAYERS, ConvLayer, conv_output_length


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Front end, positions, prenet, decoder, targets and loss of speech."""

    prenet_depth: int
    """Speech blocks before the shared ones."""
    decoder: DecoderConfig
    target: TargetConfig
    loss: LossConfig = LossConfig()
    conv_layers: tuple[ConvLayer, ...] = field(default=AUDIO_CONV_LAYERS)
    """(channels, kernel, stride) of the front end."""
    position_depth: int = 5
    """Number of position convolutions."""
    position_total_kernel: int = 95
    """Their kernel is max(3, position_total_kernel // position_depth) tokens."""
    position_groups: int = 16
    """Groups of each position convolution."""
    prenet_dropout: float = 0.0
    """Dropped fraction after the prenet's input norm."""
    alibi: bool = True
    """Add a distance penalty to the attention logits."""
    alibi_learned: bool = True
    """Train its scale."""
    alibi_per_head: bool = True
    """One scale per head instead of one."""
    alibi_per_block: bool = False
    """Separate scales in every block."""
    share_local_encoder: bool = True
    """The teacher reads the student's local features (published). False gives it its own front end, which
    keeps small runs from collapsing to a code of position."""

    num_extra_tokens = 0
    input_size = None
    grid_side = None

    def num_tokens(self, size: int) -> int:
        """T of a waveform of `size` samples; 0 of layers that `check` refuses, so that it can be asked before."""
        return conv_output_length(size, self.conv_layers) if self._has_layers else 0

    @property
    def _has_layers(self) -> bool:
        return bool(self.conv_layers) and min(min(layer) for layer in self.conv_layers) >= 1

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        few = below(self, "", position_depth=1, position_total_kernel=1, position_groups=1)
        problems = common_faults(self, block, shared_depth) + few
        if not few and block.width % self.position_groups:
            problems.append(f"position_groups {self.position_groups} does not divide the model width {block.width}")
        if not self._has_layers:
            problems.append(
                f"conv_layers are {self.conv_layers}, expected (channels, kernel, stride) of 1 or more each"
            )
        return problems


def build_audio_encoder(
    config: AudioConfig, block: BlockConfig, shared_depth: int, *, with_local: bool
) -> ModalityEncoder:
    """The speech encoder of a student, or of a teacher (`with_local` per `share_local_encoder`)."""

    def num_tokens(num_samples: Tensor) -> Tensor:
        for _, kernel, stride in config.conv_layers:
            num_samples = (num_samples - kernel).div(stride, rounding_mode="floor") + 1
        return num_samples.clamp(min=0)

    return ModalityEncoder(
        local=WaveformEncoder(config.conv_layers, block.width) if with_local else None,
        num_tokens=num_tokens,
        positions=ConvPositions(
            block.width,
            depth=config.position_depth,
            total_kernel=config.position_total_kernel,
            groups=config.position_groups,
        ),
        alibi=build_alibi(config, block, shared_depth),
        prenet=Prenet(PrenetConfig(depth=config.prenet_depth, dropout=config.prenet_dropout), block),
        attention_path=block.attention_path,
    )


def build_audio_decoder(config: AudioConfig, block: BlockConfig) -> Decoder:
    """The decoder of speech."""
    return Decoder(config.decoder, block.width)
