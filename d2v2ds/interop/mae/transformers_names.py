"""Names of `ViTMAEForPreTraining` of transformers and official names, as data; settings in its config.json.

Query, key and value have a matrix each there, one above the other in the official `qkv`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d2v2ds.interop.fairseq.keymap import translate

MODEL_TYPE = "vit_mae"
_PLAIN = [
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.patch_embeddings.projection.{p}", "patch_embed.proj.{p}"),
    ("vit.layernorm.{p}", "norm.{p}"),
    ("decoder.mask_token", "mask_token"),
    ("decoder.decoder_pos_embed", "decoder_pos_embed"),
    ("decoder.decoder_embed.{p}", "decoder_embed.{p}"),
    ("decoder.decoder_norm.{p}", "decoder_norm.{p}"),
    ("decoder.decoder_pred.{p}", "decoder_pred.{p}"),
]
_BLOCKS = {"vit.layers.{i}.": "blocks.{i}.", "decoder.decoder_layers.{i}.": "decoder_blocks.{i}."}
_INSIDE = [
    ("layernorm_before.{p}", "norm1.{p}"),
    ("layernorm_after.{p}", "norm2.{p}"),
    ("attention.o_proj.{p}", "attn.proj.{p}"),
    ("mlp.fc1.{p}", "mlp.fc1.{p}"),
    ("mlp.fc2.{p}", "mlp.fc2.{p}"),
    ("attention.q_proj.{p}", "attn.qkv.{p}#0"),
    ("attention.k_proj.{p}", "attn.qkv.{p}#1"),
    ("attention.v_proj.{p}", "attn.qkv.{p}#2"),
]
"""`#n` marks the n-th third of a tensor."""
_TABLE = _PLAIN + [(a + one, b + other) for a, b in _BLOCKS.items() for one, other in _INSIDE]
_OLD = [
    (r"^vit\.encoder\.layer\.", "vit.layers."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),  # version 5.24 saves these
    (r"attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r"attention.\1_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(?<!attention\.)output\.dense\.", "mlp.fc2."),
]
"""Names in folders that transformers before version 5 wrote; later versions save some of them too."""

_SETTINGS = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "norm_eps",
    "decoder_hidden_size": "decoder_embed_dim",
    "decoder_num_hidden_layers": "decoder_depth",
    "decoder_num_attention_heads": "decoder_num_heads",
    "norm_pix_loss": "norm_pix_loss",
}
"""Keys of config.json and official arguments."""


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the tensors of a folder; unknown ones keep their names."""
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in _OLD:
            new = re.sub(pattern, replacement, new)
        official = next((one for row in _TABLE if (one := translate(new, *row)) is not None), name)
        whole, mark, third = official.partition("#")
        if mark:
            thirds.setdefault(whole, {})[third] = tensor
        else:
            found[official] = tensor
    for name, parts in thirds.items():
        found[name] = torch.cat([parts[third] for third in sorted(parts)])
    return found


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate official tensors to those of a folder.

    Raises:
        KeyError: there is no name for one of them.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = dict(enumerate(tensor.chunk(3))) if ".attn.qkv." in name else {None: tensor}
        for third, part in parts.items():
            marked = name if third is None else f"{name}#{third}"
            own = next((one for theirs, row in _TABLE if (one := translate(marked, row, theirs)) is not None), None)
            if own is None:
                raise KeyError(f"{name} has no name in transformers")
            found[own] = part.clone()
    return found


def known_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the official arguments that config.json holds."""
    return {ours: settings[theirs] for theirs, ours in _SETTINGS.items() if theirs in settings}


def config_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Write the settings of `ViTMAEConfig`."""
    found = {theirs: arguments[ours] for theirs, ours in _SETTINGS.items() if ours in arguments}
    ratio = arguments["mlp_ratio"]
    found["intermediate_size"] = int(arguments["embed_dim"] * ratio)
    if "decoder_embed_dim" in arguments:
        found["decoder_intermediate_size"] = int(arguments["decoder_embed_dim"] * ratio)
    return {"architectures": ["ViTMAEForPreTraining"], "model_type": MODEL_TYPE, "hidden_act": "gelu", **found}
