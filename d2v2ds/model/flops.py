"""Floating-point operations of the algorithm, counted from shapes (spec section 19). Pure functions.

A multiplication and its addition count as two. Only matrix products and convolutions count, and only over the
tokens that the algorithm must look at: visible ones in the encoder, all in position convolutions and decoder.
The backward pass counts as twice the forward pass; recomputation under activation checkpointing does not count.
"""

from dataclasses import dataclass

from d2v2ds.model.audio import AudioConfig
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.data2vec2 import ModelConfig
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


def _convs(widths: list[int], kernel: int, groups: int, rows: int, tokens: int) -> float:
    return sum(2.0 * rows * tokens * a * b * kernel / groups for a, b in zip(widths[:-1], widths[1:], strict=True))


def _front_end(config: AudioConfig, width: int, samples: int, length: int) -> float:
    total, channels_in = 0.0, 1
    for i, (channels, kernel, _) in enumerate(config.conv_layers):
        tokens = conv_output_length(length, config.conv_layers[: i + 1])
        total += 2.0 * samples * tokens * channels_in * channels * kernel
        channels_in = channels
    return total + 2.0 * samples * conv_output_length(length, config.conv_layers) * channels_in * width


def audio_step_flops(model: ModelConfig, *, num_samples: int, length: int, num_masks: int, visible: int) -> StepFlops:
    """
    Args:
        model: with a speech modality.
        num_samples: B clips.
        length: S samples each.
        num_masks: M.
        visible: K tokens of each row.
    """
    config = model.modalities.audio
    assert config is not None
    block, depth = model.block, config.prenet_depth + model.shared_depth
    tokens, rows = conv_output_length(length, config.conv_layers), num_samples * num_masks
    kernel = max(3, config.position_total_kernel // config.position_depth)
    position_widths = [block.width] * (config.position_depth + 1)
    front_end = _front_end(config, block.width, num_samples, length)
    decoder_widths = [block.width] + [config.decoder.width] * config.decoder.depth
    student = (
        front_end
        + _convs(position_widths, kernel, config.position_groups, rows, tokens)
        + _blocks(block, depth, rows, visible)
        + _convs(decoder_widths, config.decoder.kernel, config.decoder.groups, rows, tokens)
        + 2.0 * rows * tokens * config.decoder.width * block.width
    )
    teacher = _convs(position_widths, kernel, config.position_groups, num_samples, tokens) + _blocks(
        block, depth, num_samples, tokens
    )
    if not config.share_local_encoder:
        teacher += front_end
    return StepFlops(student, teacher)
