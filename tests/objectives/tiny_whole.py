"""data2vec 1.0 for small trunks of speech and text, and batches with masks of whole inputs."""

from dataclasses import replace

import torch

from d2v2ds.batch import Batch, SpanMasks
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec1 import Data2Vec1, Data2Vec1Config, WholeModalityConfig
from d2v2ds.objectives.ema import EmaConfig
from d2v2ds.objectives.targets import TargetConfig
from d2v2ds.whole_masks import SpanWholeMask
from tests.model.tiny_joint import VOCAB, joint_batch, joint_trunk_config

EMA = EmaConfig(start_decay=0.5, end_decay=0.9, anneal_steps=10)
TARGET = TargetConfig(num_layers=2, layer_norms=("instance",))
SPEECH = WholeModalityConfig(
    share_local_encoder=True, mask=SpanWholeMask(fraction=0.5, length=3), target=TARGET, copied=("positions",)
)
TEXT = WholeModalityConfig(
    share_local_encoder=False,
    mask=SpanWholeMask(fraction=0.35, length=4, starts_anywhere=True),
    target=TARGET,
    head_layers=2,
    mask_token="last",
    copied=("local",),
)


def whole_trunk(modality: str, *, layer_drop: float = 0.0) -> TrunkConfig:
    """Two shared blocks without prenet, distance penalty and dropout."""
    joint = joint_trunk_config(prenet_depth=0)
    network = replace(joint.modalities[modality], alibi=False)
    return replace(joint, modalities={modality: network}, layer_drop=layer_drop)


def whole_objective(
    modality: str, *, layer_drop: float = 0.0, per_micro_batch: bool = False, **own: object
) -> Data2Vec1:
    """The objective; `own` changes its settings for the modality."""
    settings = replace({"audio": SPEECH, "text": TEXT}[modality], **own)
    config = Data2Vec1Config(ema=EMA, ema_per_micro_batch=per_micro_batch, modalities={modality: settings})
    return config.build(whole_trunk(modality, layer_drop=layer_drop), seed=3)


def whole_batch(modality: str, seed: int = 0, *, padded: bool = False) -> Batch:
    """Two random inputs, about a third of their tokens masked; of the second, half is padding if it is asked for."""
    source = joint_batch(modality, seed).source
    size = source.shape[-1]
    tokens = whole_trunk(modality).modalities[modality].num_tokens(size)
    masked = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)) < 0.35
    masked[:, 1] = True
    padding = None
    if padded:
        padding = torch.zeros(2, size, dtype=torch.bool)
        padding[1, size // 2 :] = True
        masked[1, whole_trunk(modality).modalities[modality].num_tokens(size // 2) :] = False
        source = source.masked_fill(padding, 1 if modality == "text" else 0)
    return Batch(
        modality=modality,
        source=source,
        padding=padding,
        ids=torch.arange(2),
        span_masks=SpanMasks(time=masked),
        num_masked=int(masked.sum()),
    )


MASK_ID = VOCAB - 1
