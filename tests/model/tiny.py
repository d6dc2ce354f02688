"""A speech trunk of a few thousand parameters and a batch for it."""

import torch

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.shapes import conv_output_length

CONV_LAYERS = ((16, 10, 5), (16, 3, 2), (16, 2, 2))


def tiny_trunk_config(width: int = 16, *, position_depth: int = 2) -> TrunkConfig:
    """Two shared blocks, one prenet block, no dropout."""
    return TrunkConfig(
        block=BlockConfig(
            width=width, num_heads=4, attention_dropout=0.0, attention_output_dropout=0.0, mlp_dropout=0.0
        ),
        shared_depth=2,
        modalities={
            "audio": AudioNetwork(
                prenet_depth=1,
                conv_layers=CONV_LAYERS,
                position_depth=position_depth,
                position_total_kernel=6,
                position_groups=4,
            )
        },
    )


def tiny_batch(samples: int = 2, *, num_masks: int = 2, length: int = 800, seconds_of_padding: bool = False) -> Batch:
    """Random waveforms with half of the tokens masked; optionally the second half of each clip is padding."""
    generator = torch.Generator().manual_seed(5)
    tokens = conv_output_length(length, CONV_LAYERS)
    order = torch.rand(samples, num_masks, tokens, generator=generator).argsort(-1)
    keep = order[..., : tokens - tokens // 2].sort(-1).values
    masked = torch.ones(samples, num_masks, tokens, dtype=torch.bool).scatter(2, keep, False)
    padding = None
    if seconds_of_padding:
        padding = torch.zeros(samples, length, dtype=torch.bool)
        padding[:, length // 2 :] = True
    return Batch(
        modality="audio",
        source=torch.randn(samples, length, generator=generator),
        padding=padding,
        ids=torch.arange(samples),
        masks=MaskSet(keep=keep, masked=masked),
        num_masked=int(masked.sum()),
    )
