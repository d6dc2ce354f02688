"""First weights of data2vec 1.0 where they differ from those of `model.init`."""

import math
import zlib
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from d2v2ds.model.block import Block
from d2v2ds.model.encoder import ExtraTokens
from d2v2ds.model.local import PatchEncoder
from d2v2ds.model.trunk import Trunk

FirstWeights = Literal["fairseq", "fairseq_image", "beit"]
"""fairseq: the rules of `model.init`, a mask vector from U(0, 1) (speech, text).

fairseq_image: the same, but for CLS token and mask vector, which come from N(0.02, 1) cut at -2 and 2 (the official
data2vec_vision.py gives a standard deviation as the mean), and torch's default for the patch convolution.

beit: every Linear, convolution, CLS token and mask vector from N(0, 0.02) cut at one standard deviation (0.011 in
effect), biases 0.

In both kinds for images, the last layers of attention and feed-forward of block i are divided by sqrt(2 i)."""

_STD = 0.02


def draw_images(rule: FirstWeights, trunk: Trunk, modality: str, others: Iterable[nn.Module], seed: int) -> None:
    """Draw the encoder of a modality, the shared blocks and other modules by one of the rules for images.

    Source of beit: arXiv 2106.08254. Changes the state of torch's global generator.

    Args:
        rule: `fairseq_image` or `beit`.
        trunk: its weights are drawn already by `model.init`.
        modality: name.
        others: head and mask vector.
        seed: of the run.
    """
    torch.manual_seed(zlib.crc32(f"{seed} {rule} {modality}".encode()))
    encoder = trunk.encoder(modality)
    draw = _draw_beit if rule == "beit" else _draw_fairseq
    for part in [encoder, trunk.blocks, *others]:
        for module in part.modules():
            draw(module)
    blocks = [*encoder.prenet.blocks, *trunk.blocks]
    for number, block in enumerate(blocks, start=1):
        assert isinstance(block, Block)
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data.div_(math.sqrt(2.0 * number))


def _draw_beit(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        is_norm_or_table = isinstance(module, nn.LayerNorm) or not parameter.requires_grad
        if name == "bias" and not is_norm_or_table:
            nn.init.zeros_(parameter)
        elif name in ("weight", "tokens", "vector") and not is_norm_or_table:
            nn.init.trunc_normal_(parameter, std=_STD, a=-_STD, b=_STD)


def _draw_fairseq(module: nn.Module) -> None:
    if isinstance(module, PatchEncoder):
        module.proj.reset_parameters()
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, ExtraTokens) or name == "vector":
            nn.init.trunc_normal_(parameter, mean=_STD, std=1.0)
