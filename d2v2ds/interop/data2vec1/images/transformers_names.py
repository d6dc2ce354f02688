"""Parameter names of transformers' `Data2VecVisionModel` and `...ForImageClassification`, and ours, as data.

`{i}` stands for a layer number, `{p}` for weight or bias; `[n]` is the n-th part of one of our tensors. In a model with
a head all names but those of `classifier` begin with `data2vec_vision.`, which the table leaves out.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from d2v2ds.errors import CheckpointError

PREFIX = "data2vec_vision."
"""Beginning of the encoder's names in a model with a head."""
SHARED_TABLE = "encoder.relative_position_bias.relative_position_bias_table"
OWN_TABLE = "encoder.layer.{i}.attention.attention.relative_position_bias.relative_position_bias_table"
OUR_TABLE = "encoders.image.relative.table"
MASK = "mask_vectors.image.vector"
_BLOCK = "encoder.layer.{i}."
_QKV = _BLOCK + "attention.attention."

TABLE: list[tuple[str, str]] = [
    ("encoders.image.extra.tokens", "embeddings.cls_token"),
    (MASK, "embeddings.mask_token"),
    ("encoders.image.local.proj.{p}", "embeddings.patch_embeddings.projection.{p}"),
    (OUR_TABLE, SHARED_TABLE),
    (OUR_TABLE + "[{i}]", OWN_TABLE),
    ("blocks.{i}.attn.qkv.weight[0]", _QKV + "query.weight"),
    ("blocks.{i}.attn.qkv.weight[1]", _QKV + "key.weight"),
    ("blocks.{i}.attn.qkv.weight[2]", _QKV + "value.weight"),
    ("blocks.{i}.attn.bias.queries", _QKV + "query.bias"),
    ("blocks.{i}.attn.bias.values", _QKV + "value.bias"),
    ("blocks.{i}.attn.proj.{p}", _BLOCK + "attention.output.dense.{p}"),
    ("blocks.{i}.norm1.{p}", _BLOCK + "layernorm_before.{p}"),
    ("blocks.{i}.norm2.{p}", _BLOCK + "layernorm_after.{p}"),
    ("blocks.{i}.attention_scale.factors", _BLOCK + "lambda_1"),
    ("blocks.{i}.mlp_scale.factors", _BLOCK + "lambda_2"),
    ("blocks.{i}.mlp.fc1.{p}", _BLOCK + "intermediate.dense.{p}"),
    ("blocks.{i}.mlp.fc2.{p}", _BLOCK + "output.dense.{p}"),
    ("norm.{p}", "layernorm.{p}"),
    ("head.norm.{p}", "pooler.layernorm.{p}"),
    ("head.proj.{p}", "classifier.{p}"),
]
"""Rows of (ours, transformers')."""


def to_ours(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Translate the tensors of a model; parts of one tensor are joined.

    Args:
        tensors: by transformers' name.
        shapes: of our tensors, by name.

    Returns:
        By our name.

    Raises:
        CheckpointError: a name is unknown, a part is missing, or numbers of elements differ.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for theirs, value in tensors.items():
        place = _ours(theirs.removeprefix(PREFIX))
        if place is None:
            raise CheckpointError(f"{theirs}: data2vec 1.0 for images has no such parameter")
        found.setdefault(place[0], {})[place[1]] = value
    joined = {}
    for name, parts in found.items():
        shape = shapes.get(name)
        if shape is None:
            raise CheckpointError(f"{name}: its config.json describes a model without it")
        if sorted(parts) != list(range(len(parts))):
            raise CheckpointError(f"{name}: expected parts 0 to {len(parts) - 1}, found {sorted(parts)}")
        whole = torch.cat([parts[number] for number in range(len(parts))])
        if whole.numel() != torch.Size(shape).numel():
            raise CheckpointError(f"{name}: expected {shape}, found {tuple(whole.shape)}")
        joined[name] = whole.view(shape)
    if missing := sorted(shapes.keys() - joined.keys()):
        raise CheckpointError(f"missing: {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}")
    return joined


def to_theirs(tensors: Mapping[str, Tensor], *, has_head: bool, per_block: bool) -> dict[str, Tensor]:
    """Translate our tensors to names and shapes of transformers.

    Args:
        tensors: by our name.
        has_head: the encoder's names begin with `PREFIX`.
        per_block: each block has a table of offsets.

    Raises:
        CheckpointError: a tensor has no place there.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == OUR_TABLE:
            names = [OWN_TABLE.format(i=i) for i in range(len(value))] if per_block else [SHARED_TABLE]
            parts = list(value.unbind(0))
        else:
            names = _theirs(name)
            parts = list(value.chunk(max(len(names), 1)))
        if not names:
            raise CheckpointError(f"{name}: transformers' model of images has no such parameter")
        for theirs, part in zip(names, parts, strict=True):
            prefix = PREFIX if has_head and not theirs.startswith("classifier") else ""
            found[prefix + theirs] = (part.view(1, 1, -1) if name == MASK else part).contiguous()
    return found


def _ours(theirs: str) -> tuple[str, int] | None:
    """Translate a name of transformers: ours, and the number of the part."""
    for ours, row in TABLE:
        if (match := re.fullmatch(_pattern(row), theirs)) is not None:
            name, _, part = _filled(ours, match.groupdict()).partition("[")
            return name, int(part.rstrip("]") or 0)
    return None


def _theirs(name: str) -> list[str]:
    """Translate one of our names: those of its parts in order."""
    rows = [(re.sub(r"\[\d\]$", "", ours), row) for ours, row in TABLE]
    matches = [(re.fullmatch(_pattern(ours), name), row) for ours, row in rows]
    return [_filled(row, match.groupdict()) for match, row in matches if match is not None]


def _pattern(row: str) -> str:
    return re.escape(row).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", r"(?P<p>weight|bias)")


def _filled(row: str, groups: Mapping[str, str]) -> str:
    return row.replace("{i}", groups.get("i", "")).replace("{p}", groups.get("p", ""))
