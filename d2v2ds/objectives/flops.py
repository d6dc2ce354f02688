"""Floating-point operations of one micro-batch of data2vec. Pure functions."""

from dataclasses import dataclass

from d2v2ds.model.flops import block_flops, decoder_flops
from d2v2ds.model.network import AnyDecoder, NetworkSettings
from d2v2ds.model.trunk import TrunkConfig


@dataclass(frozen=True)
class StepFlops:
    """Operations of one micro-batch: forward of student and teacher, backward of the student."""

    student_forward: float
    teacher_forward: float

    @property
    def total(self) -> float:
        """Operations of teacher forward, student forward and student backward."""
        return 3.0 * self.student_forward + self.teacher_forward


def step_flops(
    trunk: TrunkConfig,
    modality: str,
    *,
    decoder: AnyDecoder,
    share_local_encoder: bool,
    num_samples: int,
    size: int,
    num_masks: int,
    visible: int,
) -> StepFlops:
    """Count the operations of one micro-batch.

    Args:
        trunk: settings of the trunk.
        modality: its name.
        decoder: settings of its decoder.
        share_local_encoder: whether the teacher reads the student's local features.
        num_samples: B.
        size: of each sample, as the modality counts it.
        num_masks: M.
        visible: K tokens of each row.
    """
    network: NetworkSettings = trunk.modalities[modality]
    block, depth, width = trunk.block, trunk.depth(modality), trunk.block.width
    tokens, rows, extra = network.num_tokens(size), num_samples * num_masks, network.num_extra_tokens
    local = network.local_flops(width, num_samples, size)
    dimensions = 1 if network.grid_columns is None else 2
    student = (
        local
        + network.position_flops(width, rows, tokens)
        + block_flops(block, depth, rows, extra + visible)
        + decoder_flops(decoder, width, dimensions, rows, tokens)
    )
    teacher = network.position_flops(width, num_samples, tokens) + block_flops(
        block, depth, num_samples, extra + tokens
    )
    if not share_local_encoder:
        teacher += local
    return StepFlops(student, teacher)


def whole_step_flops(
    trunk: TrunkConfig, modality: str, *, share_local_encoder: bool, head: float, num_samples: int, size: int
) -> StepFlops:
    """Count the operations of one micro-batch of data2vec 1.0: student and teacher read all tokens.

    Args:
        trunk: settings of the trunk.
        modality: its name.
        share_local_encoder: whether the teacher reads the student's local features.
        head: operations of the head, forward.
        num_samples: B.
        size: of each sample, as the modality counts it.
    """
    network: NetworkSettings = trunk.modalities[modality]
    width, tokens = trunk.block.width, network.num_tokens(size)
    local = network.local_flops(width, num_samples, size)
    blocks = network.position_flops(width, num_samples, tokens) + block_flops(
        trunk.block, trunk.depth(modality), num_samples, network.num_extra_tokens + tokens
    )
    return StepFlops(local + blocks + head, blocks + (0.0 if share_local_encoder else local))
