"""A model of all three modalities with a few thousand parameters, and a batch of each."""

import torch

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.modalities.audio.network import AudioConfig
from d2v2ds.modalities.image.network import ImageConfig
from d2v2ds.modalities.text.network import TextConfig
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.model.trunk import ModalitiesConfig, ModelConfig
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import TargetConfig
from tests.model.tiny import CONV_LAYERS

VOCAB = 40


def joint_model_config(width: int = 16, prenet_depth: int = 1) -> ModelConfig:
    """Two shared blocks; no dropout and no noise, so that a step has nothing to draw."""
    decoder = DecoderConfig(width=8, depth=2, kernel=3, groups=4, input_dropout=0.0, mask_noise_std=0.0)
    target = TargetConfig(num_layers=2, layer_norms=("instance",))
    return ModelConfig(
        block=BlockConfig(
            width=width, num_heads=4, attention_dropout=0.0, attention_output_dropout=0.0, mlp_dropout=0.0
        ),
        shared_depth=2,
        modalities=ModalitiesConfig(
            audio=AudioConfig(
                prenet_depth=prenet_depth,
                conv_layers=CONV_LAYERS,
                position_depth=2,
                position_total_kernel=6,
                position_groups=4,
                decoder=decoder,
                target=target,
            ),
            image=ImageConfig(
                prenet_depth=prenet_depth,
                image_size=16,
                patch_size=4,
                decoder=decoder,
                target=target,
                loss=LossConfig(cls_weight=0.01),
            ),
            text=TextConfig(
                prenet_depth=prenet_depth,
                vocab_size=VOCAB,
                max_tokens=24,
                embedding_dropout=0.0,
                decoder=decoder,
                target=target,
                loss=LossConfig(scale=1.0),
            ),
        ),
    )


def joint_batch(modality: str, seed: int, samples: int = 2, num_masks: int = 2) -> Batch:
    """Random input with half of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    config = joint_model_config().modalities.active()[modality]
    source = {
        "audio": torch.randn(samples, 400, generator=generator),
        "image": torch.randint(0, 256, (samples, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "text": torch.randint(4, VOCAB, (samples, 20), generator=generator),
    }[modality]
    tokens = config.num_tokens(source.shape[-1])
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
