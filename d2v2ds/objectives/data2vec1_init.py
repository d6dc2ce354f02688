"""First weights of data2vec 1.0 where they differ from those of `model.init`."""

import math
import zlib
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from d2v2ds.model.block import Block
from d2v2ds.model.trunk import Trunk

FirstWeights = Literal["fairseq", "beit"]
"""fairseq: the rules of `model.init`, a mask vector from U(0, 1). beit: every Linear, convolution, CLS token and mask
vector from N(0, 0.02) cut at one standard deviation (0.011 in effect), biases 0, and the last layers of attention and
feed-forward of block i divided by sqrt(2 i)."""

_STD = 0.02


def draw_beit(trunk: Trunk, modality: str, others: Iterable[nn.Module], seed: int) -> None:
    """Draw the encoder of a modality, the shared blocks and other modules as BEiT does (arXiv 2106.08254).

    Changes the state of torch's global generator.

    Args:
        trunk: its weights are drawn already; they are drawn anew.
        modality: name.
        others: head and mask vector.
        seed: of the run.
    """
    torch.manual_seed(zlib.crc32(f"{seed} beit {modality}".encode()))
    encoder = trunk.encoder(modality)
    for part in [encoder, trunk.blocks, *others]:
        for module in part.modules():
            _draw(module)
    blocks = [*encoder.prenet.blocks, *trunk.blocks]
    for number, block in enumerate(blocks, start=1):
        assert isinstance(block, Block)
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data.div_(math.sqrt(2.0 * number))


def _draw(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        is_norm_or_table = isinstance(module, nn.LayerNorm) or not parameter.requires_grad
        if name == "bias" and not is_norm_or_table:
            nn.init.zeros_(parameter)
        elif name in ("weight", "tokens", "vector") and not is_norm_or_table:
            nn.init.trunc_normal_(parameter, std=_STD, a=-_STD, b=_STD)
