"""Parameter names of official data2vec 1.0 checkpoints and ours, as data.

`{i}` stands for a layer number, `{p}` for what follows; `[n]` is the n-th part of one of our tensors, for the official
speech and text models keep queries, keys and values apart. Shapes differ in leading axes of length 1 at most.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from d2v2ds.errors import D2V2Error

Row = tuple[str, str]

_POST_NORM_BLOCK: list[Row] = [
    ("trunk.blocks.{i}.attn.qkv.{p}[0]", "layers.{i}.self_attn.q_proj.{p}"),
    ("trunk.blocks.{i}.attn.qkv.{p}[1]", "layers.{i}.self_attn.k_proj.{p}"),
    ("trunk.blocks.{i}.attn.qkv.{p}[2]", "layers.{i}.self_attn.v_proj.{p}"),
    ("trunk.blocks.{i}.attn.proj.{p}", "layers.{i}.self_attn.out_proj.{p}"),
    ("trunk.blocks.{i}.norm1.{p}", "layers.{i}.self_attn_layer_norm.{p}"),
    ("trunk.blocks.{i}.mlp.fc1.{p}", "layers.{i}.fc1.{p}"),
    ("trunk.blocks.{i}.mlp.fc2.{p}", "layers.{i}.fc2.{p}"),
    ("trunk.blocks.{i}.norm2.{p}", "layers.{i}.final_layer_norm.{p}"),
]
_IMAGE_BLOCK: list[Row] = [
    ("trunk.blocks.{i}.attn.qkv.{p}", "blocks.{i}.attn.qkv.{p}"),
    ("trunk.blocks.{i}.attn.bias.queries", "blocks.{i}.attn.q_bias"),
    ("trunk.blocks.{i}.attn.bias.values", "blocks.{i}.attn.v_bias"),
    ("trunk.blocks.{i}.attn.proj.{p}", "blocks.{i}.attn.proj.{p}"),
    ("trunk.blocks.{i}.norm1.{p}", "blocks.{i}.norm1.{p}"),
    ("trunk.blocks.{i}.norm2.{p}", "blocks.{i}.norm2.{p}"),
    ("trunk.blocks.{i}.attention_scale.factors", "blocks.{i}.gamma_1"),
    ("trunk.blocks.{i}.mlp_scale.factors", "blocks.{i}.gamma_2"),
    ("trunk.norm.{p}", "norm.{p}"),
    ("trunk.encoders.image.relative.table", "rel_pos_bias.relative_position_bias_table"),
]


def _inside(prefix: str, rows: list[Row]) -> list[Row]:
    return [(ours, prefix + official) for ours, official in rows]


TABLES: dict[str, list[Row]] = {
    "audio": [
        ("trunk.encoders.audio.local.convs.layers.{i}.conv.{p}", "feature_extractor.conv_layers.{i}.0.{p}"),
        ("trunk.encoders.audio.local.convs.layers.{i}.norm.{p}", "feature_extractor.conv_layers.{i}.2.1.{p}"),
        ("trunk.encoders.audio.local.norm.{p}", "layer_norm.{p}"),
        ("trunk.encoders.audio.local.project.{p}", "post_extract_proj.{p}"),
        ("mask_vectors.audio.vector", "mask_emb"),
        ("trunk.encoders.audio.positions.layers.{i}.conv.{p}", "encoder.pos_conv.{i}.0.{p}"),
        ("trunk.encoders.audio.prenet.norm.{p}", "encoder.layer_norm.{p}"),
        *_inside("encoder.", _POST_NORM_BLOCK),
        ("heads.audio.0.{p}", "final_proj.{p}"),
    ],
    "text": [
        ("trunk.encoders.text.local.tokens.{p}", "encoder.sentence_encoder.embed_tokens.{p}"),
        ("trunk.encoders.text.local.places.{p}", "encoder.sentence_encoder.embed_positions.{p}"),
        ("trunk.encoders.text.local.norm.{p}", "encoder.sentence_encoder.layernorm_embedding.{p}"),
        *_inside("encoder.sentence_encoder.", _POST_NORM_BLOCK),
        ("heads.text.{i}.{p}", "encoder.regression_head.{i}.{p}"),
    ],
    "image": [
        ("trunk.encoders.image.extra.tokens", "cls_emb"),
        ("mask_vectors.image.vector", "mask_emb"),
        ("trunk.encoders.image.local.proj.{p}", "patch_embed.conv.{p}"),
        *_inside("encoder.", _IMAGE_BLOCK),
        *_inside(
            "encoder.", [(f"trunk.blocks.{{i}}.mlp.fc{n + 1}.{{p}}", f"blocks.{{i}}.mlp.{2 * n}.{{p}}") for n in (0, 1)]
        ),
        ("heads.image.0.{p}", "final_proj.{p}"),
    ],
    "image of BEiT": [
        ("trunk.encoders.image.extra.tokens", "cls_token"),
        ("mask_vectors.image.vector", "mask_token"),
        ("trunk.encoders.image.local.proj.{p}", "patch_embed.proj.{p}"),
        *_IMAGE_BLOCK,
        ("trunk.blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.fc1.{p}"),
        ("trunk.blocks.{i}.mlp.fc2.{p}", "blocks.{i}.mlp.fc2.{p}"),
        ("heads.image.0.{p}", "lm_head.{p}"),
    ],
}
"""Rows of (ours, official) by layout: fairseq's three models, and the fork of BEiT with the published image models."""

BUFFERS = ("encoder.sentence_encoder.version", "relative_position_index")
"""Endings of official entries that hold no weight."""


def is_buffer(official: str) -> bool:
    """Return True for an official entry that holds no weight."""
    return official.endswith(BUFFERS)


def translate(official: str, layout: str) -> tuple[str, int | None] | None:
    """Translate an official name: ours, and which part of it; None if the table has none."""
    for ours, theirs in TABLES[layout]:
        found = re.fullmatch(_pattern(theirs), official)
        if found is not None:
            name, part = re.fullmatch(r"(.*?)(?:\[(\d)\])?", ours).groups()  # type: ignore[union-attr]
            return _filled(name, found.groupdict()), None if part is None else int(part)
    return None


def official_parts(name: str, layout: str) -> list[str]:
    """Translate one of our names: the official one, or those of its parts in order; empty if the table has none."""
    found = []
    for ours, theirs in TABLES[layout]:
        match = re.fullmatch(_pattern(re.sub(r"\[\d\]$", "", ours)), name)
        if match is not None:
            found.append(_filled(theirs, match.groupdict()))
    return found


def _pattern(row: str) -> str:
    return re.escape(row).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", r"(?P<p>[^.]+)")


def _filled(row: str, groups: Mapping[str, str]) -> str:
    return row.replace("{i}", groups.get("i", "")).replace("{p}", groups.get("p", ""))


def to_ours(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Translate the tensors of a model; queries, keys and values become one.

    Args:
        tensors: by official name; buffers are left out.
        layout: key of `TABLES`.

    Returns:
        By our name; leading axes of length 1 are as in the official file.

    Raises:
        D2V2Error: a name is unknown, or a part of a tensor is missing.
    """
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for official, value in tensors.items():
        if is_buffer(official):
            continue
        found = translate(official, layout)
        if found is None:
            raise D2V2Error(f"{official}: data2vec 1.0 for {layout} has no such parameter")
        name, part = found
        if part is None:
            whole[name] = value
        else:
            parts.setdefault(name, {})[part] = value
    for name, pieces in parts.items():
        if sorted(pieces) != [0, 1, 2]:
            raise D2V2Error(f"{name}: expected queries, keys and values, found {len(pieces)} of the three")
        whole[name] = torch.cat([pieces[number] for number in range(3)])
    return whole


def to_official(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Translate the tensors of one of our networks to the official names and shapes.

    Raises:
        D2V2Error: a name has no official counterpart.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        names = official_parts(name, layout)
        if not names:
            raise D2V2Error(f"{name}: data2vec 1.0 for {layout} has no such parameter")
        for official, piece in zip(names, value.chunk(len(names)), strict=True):
            found[official] = _with_official_shape(official, piece, layout).contiguous()
    return found


def _with_official_shape(official: str, piece: Tensor, layout: str) -> Tensor:
    """Return the mask vector of images as (1, 1, D), and a shared table of offsets as (offsets + 3, H)."""
    if official in ("mask_emb", "mask_token") and layout in ("image", "image of BEiT"):
        return piece.view(1, 1, -1)
    return piece[0] if official.endswith("relative_position_bias_table") else piece
