"""`Data2VecAudioModel` and `Data2VecTextModel` of transformers: names of parameters and settings, as data.

Official names and settings stand on the other side; `fairseq.data2vec1_keymap` and `data2vec1_config` translate those.
Source: transformers' models/data2vec, and the shapes of the published folders.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError, conv_layers

Row = tuple[str, str]
_AUDIO: list[Row] = [
    ("feature_extractor.conv_layers.{i}.0.{p}", "feature_extractor.conv_layers.{i}.conv.{p}"),
    ("feature_extractor.conv_layers.{i}.2.1.{p}", "feature_extractor.conv_layers.{i}.layer_norm.{p}"),
    ("layer_norm.{p}", "feature_projection.layer_norm.{p}"),
    ("post_extract_proj.{p}", "feature_projection.projection.{p}"),
    ("mask_emb", "masked_spec_embed"),
    ("encoder.pos_conv.{i}.0.{p}", "encoder.pos_conv_embed.layers.{i}.conv.{p}"),
    ("encoder.layer_norm.{p}", "encoder.layer_norm.{p}"),
    ("encoder.layers.{i}.self_attn.{q}.{p}", "encoder.layers.{i}.attention.{q}.{p}"),
    ("encoder.layers.{i}.self_attn_layer_norm.{p}", "encoder.layers.{i}.layer_norm.{p}"),
    ("encoder.layers.{i}.fc1.{p}", "encoder.layers.{i}.feed_forward.intermediate_dense.{p}"),
    ("encoder.layers.{i}.fc2.{p}", "encoder.layers.{i}.feed_forward.output_dense.{p}"),
    ("encoder.layers.{i}.final_layer_norm.{p}", "encoder.layers.{i}.final_layer_norm.{p}"),
]
_TEXT_LAYER: list[Row] = [
    ("self_attn.q_proj.{p}", "attention.self.query.{p}"),
    ("self_attn.k_proj.{p}", "attention.self.key.{p}"),
    ("self_attn.v_proj.{p}", "attention.self.value.{p}"),
    ("self_attn.out_proj.{p}", "attention.output.dense.{p}"),
    ("self_attn_layer_norm.{p}", "attention.output.LayerNorm.{p}"),
    ("fc1.{p}", "intermediate.dense.{p}"),
    ("fc2.{p}", "output.dense.{p}"),
    ("final_layer_norm.{p}", "output.LayerNorm.{p}"),
]
_OF_TEXT = "encoder.sentence_encoder."
_TEXT: list[Row] = [
    (f"{_OF_TEXT}embed_tokens.{{p}}", "embeddings.word_embeddings.{p}"),
    (f"{_OF_TEXT}embed_positions.{{p}}", "embeddings.position_embeddings.{p}"),
    (f"{_OF_TEXT}layernorm_embedding.{{p}}", "embeddings.LayerNorm.{p}"),
    *((f"{_OF_TEXT}layers.{{i}}.{ours}", f"encoder.layer.{{i}}.{theirs}") for ours, theirs in _TEXT_LAYER),
]
TABLES = {"audio": _AUDIO, "text": _TEXT}
"""Rows of (official, transformers) by layout."""
PREFIXES = {"audio": "data2vec_audio.", "text": "data2vec_text."}
"""Beginning of the encoder's names in a model of a task."""
TYPES = {"data2vec-audio": "audio", "data2vec-text": "text"}
"""Layout by `model_type` of config.json."""
CLASSES = {"audio": "Data2VecAudioModel", "text": "Data2VecTextModel"}
_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
_GENERATED = ("embeddings.position_ids", "embeddings.token_type_ids")
_LN_EPS = 1e-5


def _translated(name: str, rows: list[Row], source: int) -> str | None:
    for row in rows:
        pattern = re.escape(row[source])
        for mark, group in (
            (r"\{i\}", r"(?P<i>\d+)"),
            (r"\{p\}", r"(?P<p>\w+)"),
            (r"\{q\}", r"(?P<q>[qkv]_proj|out_proj)"),
        ):
            pattern = pattern.replace(mark, group)
        if found := re.fullmatch(pattern, name):
            return row[1 - source].format(**found.groupdict())
    return None


def to_official(tensors: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], list[str]]:
    """Translate the tensors of a folder to official names.

    Args:
        tensors: by the names of transformers, of the encoder alone or of a model of a task.
        layout: key of `TABLES`.

    Returns:
        The encoder by official names, and the names of what stands beside it, such as a head.

    Raises:
        UnsupportedOptionError: token types are used, which the official model lacks.
    """
    prefix = PREFIXES[layout]
    is_task = any(name.startswith(prefix) for name in tensors)
    found: dict[str, Tensor] = {}
    beside: list[str] = []
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        official = _translated(own, TABLES[layout], 1) if not is_task or name.startswith(prefix) else None
        if official is not None:
            found[official] = tensor
        elif own == _TOKEN_TYPES:
            if tensor.abs().max() > 0:
                raise UnsupportedOptionError(f"{name}: expected zeros, found other values")
        elif own not in _GENERATED:
            beside.append(name)
    return found, beside


def from_official(tensors: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], list[str]]:
    """Translate official tensors to the names of a folder.

    Returns:
        Those that transformers' encoder has, and the official names of the others: heads.
    """
    found: dict[str, Tensor] = {}
    others = []
    for name, tensor in tensors.items():
        own = _translated(name, TABLES[layout], 0)
        if own is None:
            others.append(name)
        else:
            found[own] = tensor.contiguous()
    norm = found.get("embeddings.LayerNorm.weight")
    if norm is not None:
        found[_TOKEN_TYPES] = norm.new_zeros(1, len(norm))
    return found, others


def _read_audio(settings: Mapping[str, Any]) -> dict[str, Any]:
    depth = settings.get("num_conv_pos_embeddings", 5)
    layers = list(zip(settings["conv_dim"], settings["conv_kernel"], settings["conv_stride"], strict=True))
    return {
        "_name": "data2vec_audio",
        "extractor_mode": "layer_norm",
        "conv_feature_layers": str(layers),
        "conv_bias": settings.get("conv_bias", False),
        "encoder_layers": settings["num_hidden_layers"],
        "encoder_embed_dim": settings["hidden_size"],
        "encoder_ffn_embed_dim": settings["intermediate_size"],
        "encoder_attention_heads": settings["num_attention_heads"],
        "activation_fn": settings.get("hidden_act", "gelu"),
        "dropout": settings.get("hidden_dropout", 0.1),
        "attention_dropout": settings.get("attention_dropout", 0.1),
        "encoder_layerdrop": settings.get("layerdrop", 0.0),
        "pos_conv_depth": depth,
        "conv_pos": settings.get("conv_pos_kernel_size", 19) * depth,
        "conv_pos_groups": settings.get("num_conv_pos_embedding_groups", 16),
        "average_top_k_layers": min(8, settings["num_hidden_layers"]),
        "instance_norm_target_layer": True,
        "ema_layers_only": True,
    }


def _written_audio(official: Mapping[str, Any]) -> dict[str, Any]:
    layers, depth = conv_layers(official["conv_feature_layers"]), official["pos_conv_depth"]
    return {
        "conv_dim": [layer[0] for layer in layers],
        "conv_kernel": [layer[1] for layer in layers],
        "conv_stride": [layer[2] for layer in layers],
        "conv_bias": False,
        "num_feat_extract_layers": len(layers),
        "num_hidden_layers": official["encoder_layers"],
        "hidden_size": official["encoder_embed_dim"],
        "intermediate_size": official["encoder_ffn_embed_dim"],
        "num_attention_heads": official["encoder_attention_heads"],
        "hidden_dropout": official["dropout"],
        "attention_dropout": official["attention_dropout"],
        "activation_dropout": 0.0,
        "layerdrop": official["encoder_layerdrop"],
        "num_conv_pos_embeddings": depth,
        "conv_pos_kernel_size": max(3, official["conv_pos"] // depth),
        "num_conv_pos_embedding_groups": official["conv_pos_groups"],
        "mask_time_prob": 0.05,  # above 0, or the mask vector has no place
    }


def _read_text(settings: Mapping[str, Any]) -> dict[str, Any]:
    if (found := settings.get("position_embedding_type", "absolute")) != "absolute":
        raise UnsupportedOptionError(f"position_embedding_type={found!r}")
    return {
        "_name": "data2vec_text",
        "head_layers": 2,
        "average_top_k_layers": min(10, settings["num_hidden_layers"]),
        "layer_norm_target_layer": True,
        "loss_scale": 1.0,
        "loss_beta": 4.0,
        "transformer": {
            "dropout": settings.get("hidden_dropout_prob", 0.1),
            "attention_dropout": settings.get("attention_probs_dropout_prob", 0.1),
            "max_source_positions": settings["max_position_embeddings"] - 2,
            "activation_fn": settings.get("hidden_act", "gelu"),
            "encoder": {
                "embed_dim": settings["hidden_size"],
                "ffn_embed_dim": settings["intermediate_size"],
                "layers": settings["num_hidden_layers"],
                "attention_heads": settings["num_attention_heads"],
            },
        },
    }


def _written_text(official: Mapping[str, Any]) -> dict[str, Any]:
    transformer = official["transformer"]
    encoder = transformer["encoder"]
    return {
        "hidden_dropout_prob": transformer["dropout"],
        "attention_probs_dropout_prob": transformer["attention_dropout"],
        "max_position_embeddings": transformer["max_source_positions"] + 2,
        "hidden_size": encoder["embed_dim"],
        "intermediate_size": encoder["ffn_embed_dim"],
        "num_hidden_layers": encoder["layers"],
        "num_attention_heads": encoder["attention_heads"],
        "type_vocab_size": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


_READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"audio": _read_audio, "text": _read_text}
_WRITERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"audio": _written_audio, "text": _written_text}


def official_section(settings: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Read config.json of a folder: the layout, and the official section of its network.

    Raises:
        CheckpointError: it is of another model, or a size is missing.
        UnsupportedOptionError: naming an option that ours does not have.
    """
    layout = TYPES.get(str(settings.get("model_type")))
    if layout is None:
        raise CheckpointError(
            f"{where}: expected model_type {' or '.join(TYPES)}, found {settings.get('model_type')!r}"
        )
    if (eps := settings.get("layer_norm_eps")) != _LN_EPS:
        raise UnsupportedOptionError(f"{where}: layer_norm_eps={eps}, expected {_LN_EPS}, that of the official code")
    try:
        return layout, _READERS[layout](settings)
    except KeyError as error:
        raise CheckpointError(f"{where}: expected {error} among its settings, found none") from error


def config_json(official: Mapping[str, Any], layout: str, vocab_size: int | None) -> dict[str, Any]:
    """Write config.json of `CLASSES`.

    Args:
        official: section of the network, as `sections.official_section` writes it.
        layout: key of `TABLES`.
        vocab_size: V of text.
    """
    kind = next(name for name, one in TYPES.items() if one == layout)
    found = {"architectures": [CLASSES[layout]], "model_type": kind, "hidden_act": "gelu", "layer_norm_eps": _LN_EPS}
    return found | _WRITERS[layout](official) | ({} if vocab_size is None else {"vocab_size": vocab_size})
