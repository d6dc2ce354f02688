"""data2vec 2.0 for the trunks of `tests.model.tiny` and `tests.model.tiny_joint`."""

from dataclasses import replace

from d2v2ds.masking import MaskConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.objectives.data2vec2 import Data2Vec2Config, ModalityConfig
from d2v2ds.objectives.ema import EmaConfig
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import TargetConfig

EMA = EmaConfig(start_decay=0.9, end_decay=0.9, anneal_steps=0)


def tiny_objective_config(*, share_local_encoder: bool = True) -> Data2Vec2Config:
    """Settings for speech, with mask noise and without dropout."""
    audio = ModalityConfig(
        share_local_encoder=share_local_encoder,
        mask=MaskConfig(masked_fraction=0.5, num_masks=2, kind="random"),
        decoder=DecoderConfig(width=8, depth=2, kernel=3, groups=4, input_dropout=0.0),
        target=TargetConfig(num_layers=2, layer_norms=("instance",)),
    )
    return Data2Vec2Config(ema=EMA, modalities={"audio": audio})


def joint_objective_config() -> Data2Vec2Config:
    """Settings for all three modalities, without dropout and noise, so that a step has nothing to draw."""
    (audio,) = tiny_objective_config().modalities.values()
    audio = replace(audio, decoder=replace(audio.decoder, mask_noise_std=0.0))
    return Data2Vec2Config(
        ema=EMA,
        modalities={
            "audio": audio,
            "image": replace(audio, share_local_encoder=False, loss=LossConfig(cls_weight=0.01)),
            "text": replace(audio, loss=LossConfig(scale=1.0)),
        },
    )
