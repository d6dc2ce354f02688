"""A trunk of all three modalities with a few thousand parameters, and a batch of each."""

import torch

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.trunk import TrunkConfig
from tests.model.tiny import CONV_LAYERS

VOCAB = 40


def joint_trunk_config(width: int = 16, prenet_depth: int = 1) -> TrunkConfig:
    """Two shared blocks, no dropout."""
    return TrunkConfig(
        block=BlockConfig(
            width=width, num_heads=4, attention_dropout=0.0, attention_output_dropout=0.0, mlp_dropout=0.0
        ),
        shared_depth=2,
        modalities={
            "audio": AudioNetwork(
                prenet_depth=prenet_depth,
                conv_layers=CONV_LAYERS,
                position_depth=2,
                position_total_kernel=6,
                position_groups=4,
            ),
            "image": ImageNetwork(prenet_depth=prenet_depth, image_size=16, patch_size=4),
            "text": TextNetwork(prenet_depth=prenet_depth, vocab_size=VOCAB, max_tokens=24, embedding_dropout=0.0),
        },
    )


def joint_batch(modality: str, seed: int, samples: int = 2, num_masks: int = 2) -> Batch:
    """Random input with half of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    source = {
        "audio": torch.randn(samples, 400, generator=generator),
        "image": torch.randint(0, 256, (samples, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "text": torch.randint(4, VOCAB, (samples, 20), generator=generator),
    }[modality]
    tokens = joint_trunk_config().modalities[modality].num_tokens(source.shape[-1])
    order = torch.rand(samples, num_masks, tokens, generator=generator).argsort(-1)
    keep = order[..., : tokens - tokens // 2].sort(-1).values
    masked = torch.ones(samples, num_masks, tokens, dtype=torch.bool).scatter(2, keep, False)
    return Batch(
        modality=modality,
        source=source,
        ids=torch.arange(samples),
        masks=MaskSet(keep=keep, masked=masked),
        num_masked=int(masked.sum()),
    )
