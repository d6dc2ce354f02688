"""Settings of the network's part for sensors, and how its encoder and decoder are built."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from d2v2ds.bounds import Count, CountOrZero, Positive
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.flops import conv_flops, linear_flops, position_conv_flops
from d2v2ds.model.local import ConvLayerNorm, count_conv_tokens
from d2v2ds.model.network import AlibiSettings
from d2v2ds.model.positions import ConvPositions
from d2v2ds.shapes import ConvLayer, conv_output_length


class SensorEncoder(nn.Module):
    """Local encoder: strided convolutions over time, all channels at once, then norm and projection to the width."""

    def __init__(self, num_channels: int, layers: tuple[ConvLayer, ...], width: int) -> None:
        """
        Args:
            num_channels: C of the recordings.
            layers: (channels, kernel, stride) of each convolution.
            width: D.
        """
        super().__init__()
        widths = [num_channels, *(channels for channels, _, _ in layers)]
        self.convs = nn.Sequential(*(ConvLayerNorm(w, layer) for w, layer in zip(widths[:-1], layers, strict=True)))
        self.norm = nn.LayerNorm(widths[-1])
        self.project = nn.Linear(widths[-1], width)

    def forward(self, source: Tensor) -> Tensor:
        """(B, C, S) -> (B, T, D)."""
        x = source.to(self.project.weight.dtype).transpose(1, 2).contiguous()  # (B, S, C)
        return self.project(self.norm(self.convs(x)))


@dataclass(frozen=True, kw_only=True)
class SensorNetwork(AlibiSettings):
    """Settings of the section `model.modalities.sensors`."""

    num_channels: Count
    """C, channels of a recording."""
    sample_rate_hz: Positive
    """Samples per second of a recording."""
    conv_layers: tuple[ConvLayer, ...]
    """(channels, kernel, stride) of each convolution; the strides decide how much time a token covers."""
    prenet_depth: CountOrZero = 0
    position_depth: Count = 5
    """Number of position convolutions."""
    position_total_kernel: Count = 25
    """Their kernel is max(3, position_total_kernel // position_depth) tokens."""
    position_groups: Count = 16
    """Groups of each position convolution."""
    alibi: bool = True
    alibi_learned: bool = True
    alibi_per_head: bool = True

    def num_tokens(self, size: int) -> int:
        """T of a recording of `size` samples; 0 if `check` refuses the layers."""
        return conv_output_length(size, self.conv_layers) if self._has_layers else 0

    @property
    def _has_layers(self) -> bool:
        return bool(self.conv_layers) and min(min(layer) for layer in self.conv_layers) >= 1

    def build_encoder(self, block: BlockConfig, shared_depth: int, *, with_local: bool) -> ModalityEncoder:
        """Build front end, position convolutions, distance penalty and prenet."""
        return ModalityEncoder(
            local=SensorEncoder(self.num_channels, self.conv_layers, block.width) if with_local else None,
            num_tokens=partial(count_conv_tokens, self.conv_layers),  # can be pickled
            positions=ConvPositions(
                block.width,
                depth=self.position_depth,
                total_kernel=self.position_total_kernel,
                groups=self.position_groups,
            ),
            alibi=self.build_alibi(block, shared_depth),
            prenet=Prenet(PrenetConfig(depth=self.prenet_depth, dropout=self.prenet_dropout), block),
            attention_path=block.attention_path,
        )

    def local_flops(self, width: int, num_samples: int, size: int) -> float:
        """Operations of the front end for B recordings of `size` samples."""
        widths = [self.num_channels, *(channels for channels, _, _ in self.conv_layers)]
        convs = sum(
            conv_flops(pair, kernel, 1, num_samples, conv_output_length(size, self.conv_layers[: number + 1]))
            for number, (pair, (_, kernel, _)) in enumerate(zip(pairwise(widths), self.conv_layers, strict=True))
        )
        return convs + linear_flops([widths[-1], width], num_samples, self.num_tokens(size))

    def position_flops(self, width: int, rows: int, tokens: int) -> float:
        """Operations of the position convolutions for R rows of T tokens."""
        return position_conv_flops(
            width, self.position_depth, self.position_total_kernel, self.position_groups, rows, tokens
        )

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Return one message for each contradiction."""
        problems = []
        if block.width % self.position_groups:
            problems.append(f"position_groups {self.position_groups} does not divide the model width {block.width}")
        if not self._has_layers:
            problems.append(f"conv_layers are {self.conv_layers}, expected one or more (channels, kernel, stride)")
        return problems
