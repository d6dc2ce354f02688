"""Floating-point operations of the algorithm, counted from shapes (spec section 19). Pure functions.

A multiplication and its addition count as two. Only matrix products and convolutions count, and only over the
tokens that the algorithm must look at: visible ones in the encoder, all in position convolutions and decoder.
The backward pass counts as twice the forward pass; recomputation under activation checkpointing does not count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from d2v2ds.modalities.audio.network import AudioConfig
from d2v2ds.modalities.image.network import ImageConfig
from d2v2ds.modalities.text.network import TextConfig
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.model.trunk import ModelConfig
from d2v2ds.shapes import conv_output_length


@dataclass(frozen=True)
class StepFlops:
    """Of one micro-batch: forward of student and teacher, backward of the student."""

    student_forward: float
    teacher_forward: float

    @property
    def total(self) -> float:
        """Teacher forward, student forward and backward."""
        return 3.0 * self.student_forward + self.teacher_forward


def _blocks(block: BlockConfig, depth: int, rows: int, tokens: int) -> float:
    width = block.width
    linear = 2 * width * (4 * width + 2 * block.mlp_ratio * width)  # qkv and output, then the feed-forward layers
    attention = 4 * tokens * width  # logits and weighted sum
    return depth * rows * tokens * (linear + attention)


def _convs(widths: list[int], taps: int, groups: int, rows: int, tokens: int) -> float:
    return sum(2.0 * rows * tokens * a * b * taps / groups for a, b in zip(widths[:-1], widths[1:], strict=True))


def _linears(widths: list[int], rows: int, tokens: int) -> float:
    return _convs(widths, 1, 1, rows, tokens)


def _decoder(config: DecoderConfig, width: int, taps: int, rows: int, tokens: int) -> float:
    hidden = [int(config.width * config.projection_ratio)] * (config.projection_layers - 1)
    return _convs([width] + [config.width] * config.depth, taps, config.groups, rows, tokens) + _linears(
        [config.width, *hidden, width], rows, tokens
    )


def _audio_local(config: AudioConfig, width: int, samples: int, size: int) -> float:
    total, channels_in = 0.0, 1
    for i, (channels, kernel, _) in enumerate(config.conv_layers):
        tokens = conv_output_length(size, config.conv_layers[: i + 1])
        total += 2.0 * samples * tokens * channels_in * channels * kernel
        channels_in = channels
    return total + 2.0 * samples * conv_output_length(size, config.conv_layers) * channels_in * width


def _audio_positions(config: AudioConfig, width: int, rows: int, tokens: int) -> float:
    kernel = max(3, config.position_total_kernel // config.position_depth)
    return _convs([width] * (config.position_depth + 1), kernel, config.position_groups, rows, tokens)


def _image_local(config: ImageConfig, width: int, samples: int, size: int) -> float:
    patch_width, tokens = config.patch_width or width, config.num_tokens(size)
    widen = 0.0 if patch_width == width else _linears([patch_width, width], samples, tokens)
    return _linears([3 * config.patch_size**2, patch_width], samples, tokens) + widen


@dataclass(frozen=True)
class _Costs:
    """What a modality adds to the blocks that all have."""

    local: Callable[[Any, int, int, int], float]
    """(settings, D, samples, size) -> operations of the local encoder."""
    positions: Callable[[Any, int, int, int], float]
    """(settings, D, rows, T) -> operations of the positions."""
    decoder_dimensions: int
    """Of its convolutions: a kernel has that many sides."""


def _nothing(*_: Any) -> float:
    return 0.0


_COSTS: dict[type, _Costs] = {
    AudioConfig: _Costs(_audio_local, _audio_positions, 1),
    ImageConfig: _Costs(_image_local, _nothing, 2),
    TextConfig: _Costs(_nothing, _nothing, 1),
}


def step_flops(
    model: ModelConfig, modality: str, *, num_samples: int, size: int, num_masks: int, visible: int
) -> StepFlops:
    """
    Args:
        model: the network.
        modality: one that it has.
        num_samples: B.
        size: of each sample: audio samples, image side in pixels, text tokens.
        num_masks: M.
        visible: K tokens of each row.
    """
    config = model.modalities.active()[modality]
    costs, block, depth = _COSTS[type(config)], model.block, config.prenet_depth + model.shared_depth
    tokens, rows, extra = config.num_tokens(size), num_samples * num_masks, config.num_extra_tokens
    local = costs.local(config, block.width, num_samples, size)
    student = (
        local
        + costs.positions(config, block.width, rows, tokens)
        + _blocks(block, depth, rows, extra + visible)
        + _decoder(config.decoder, block.width, config.decoder.kernel**costs.decoder_dimensions, rows, tokens)
    )
    teacher = costs.positions(config, block.width, num_samples, tokens) + _blocks(
        block, depth, num_samples, extra + tokens
    )
    if not config.share_local_encoder:
        teacher += local
    return StepFlops(student, teacher)
