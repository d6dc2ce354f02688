"""Floating-point operations of the algorithm, counted from shapes. Pure functions.

A multiplication and its addition count as two. Only matrix products and convolutions count, over the tokens that the
algorithm needs: visible ones in the encoder, all in position convolutions and decoder.
The backward pass counts as twice the forward pass; recomputation under activation checkpointing does not count.
"""

from collections.abc import Sequence

from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.model.transformer_decoder import TransformerDecoderConfig
from d2v2ds.shapes import ConvLayer, conv_output_length


def block_flops(block: BlockConfig, depth: int, rows: int, tokens: int) -> float:
    """Count operations of `depth` transformer blocks on R rows of N tokens, forward."""
    width = block.width
    projections = 5 if block.attention_gate else 4  # qkv, output, gate
    linear = 2 * width * (projections * width + 2 * block.mlp_ratio * width)  # these, then the feed-forward layers
    attention = 4 * tokens * width  # logits and weighted sum
    return depth * rows * tokens * (linear + attention)


def conv_flops(widths: Sequence[int], taps: int, groups: int, rows: int, tokens: int) -> float:
    """Count operations of a stack of length-preserving convolutions, given the channels before and after each."""
    return sum(2.0 * rows * tokens * a * b * taps / groups for a, b in zip(widths[:-1], widths[1:], strict=True))


def linear_flops(widths: Sequence[int], rows: int, tokens: int) -> float:
    """Count operations of a stack of linear layers, given the widths before and after each."""
    return conv_flops(widths, 1, 1, rows, tokens)


def decoder_flops(
    config: DecoderConfig | TransformerDecoderConfig, width: int, dimensions: int, rows: int, tokens: int
) -> float:
    """Count operations of a decoder.

    Args:
        config: settings of the decoder.
        width: D of the model.
        dimensions: 1 for a sequence, 2 for a grid.
        rows: R.
        tokens: T.
    """
    if isinstance(config, TransformerDecoderConfig):
        ends = [[config.width, width]] + [[width, config.width]] * (config.width != width)
        linear = sum(linear_flops(pair, rows, tokens) for pair in ends)
        return linear + block_flops(config.block(), config.depth, rows, tokens)
    hidden = [int(config.width * config.projection_ratio)] * (config.projection_layers - 1)
    widths, taps = [width] + [config.width] * config.depth, config.kernel**dimensions
    return conv_flops(widths, taps, config.groups, rows, tokens) + linear_flops(
        [config.width, *hidden, width], rows, tokens
    )


def waveform_encoder_flops(layers: Sequence[ConvLayer], width: int, num_samples: int, size: int) -> float:
    """Count operations of strided convolutions over B waveforms of `size` samples, and of the projection to D."""
    total, channels_in = 0.0, 1
    for i, (channels, kernel, _) in enumerate(layers):
        tokens = conv_output_length(size, layers[: i + 1])
        total += 2.0 * num_samples * tokens * channels_in * channels * kernel
        channels_in = channels
    return total + 2.0 * num_samples * conv_output_length(size, layers) * channels_in * width


def position_conv_flops(width: int, depth: int, total_kernel: int, groups: int, rows: int, tokens: int) -> float:
    """Count operations of `ConvPositions` on R rows of T tokens."""
    return conv_flops([width] * (depth + 1), max(3, total_kernel // depth), groups, rows, tokens)
