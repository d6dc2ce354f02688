"""Networks of a few thousand parameters with a head, and batches for them."""

from dataclasses import replace
from typing import Any

import torch

from d2v2ds.batch import Batch, Labels, SpanMasks
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.shapes import conv_output_length
from tests.model.tiny import CONV_LAYERS
from tests.model.tiny_joint import joint_trunk_config

WIDTH = 16


def trunk_of(modality: str, **changes: Any) -> TrunkConfig:
    """Trunk of one modality: a prenet block and two shared blocks, no dropout; changes are those of its network."""
    config = joint_trunk_config(WIDTH)
    return replace(config, modalities={modality: replace(config.modalities[modality], **changes)})


def built(config: Any, trunk: TrunkConfig | None = None, *, checkpointing: bool = False) -> tuple[Any, Any]:
    """Objective and network with weights of a fixed seed; masked frames become zeros."""
    trunk = trunk or trunk_of(config.modality)
    task = replace(config, mask_noise_std=0.0).build(trunk, 0)
    torch.manual_seed(0)
    network = task.build_network(activation_checkpointing=checkpointing)
    task.initialise(network, 0)
    return task, network


def audio_batch(*, lengths: tuple[int, ...], labels: Labels | None = None, masks: bool = False, seed: int = 3) -> Batch:
    """Random waveforms, each the same at every length of the batch; masks for training."""
    size = max(lengths)
    source = torch.zeros(len(lengths), size)
    for row, length in enumerate(lengths):
        own = torch.randn(4000, generator=torch.Generator().manual_seed(seed + row))
        source[row, :length] = own[:length]
    padding = torch.arange(size) >= torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(9)
    tokens = conv_output_length(size, CONV_LAYERS)
    spans = SpanMasks(
        time=torch.rand(len(lengths), tokens, generator=generator) < 0.3,
        channels=torch.rand(len(lengths), WIDTH, generator=generator) < 0.2,
    )
    return Batch(
        modality="audio",
        source=source,
        padding=padding if padding.any() else None,
        ids=torch.arange(len(lengths)),
        span_masks=spans if masks else None,
        labels=labels,
    )


def letters(*rows: tuple[int, ...]) -> Labels:
    """Labels of CTC."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=1)
    return Labels(values=padded, lengths=torch.tensor([len(row) for row in rows]))
