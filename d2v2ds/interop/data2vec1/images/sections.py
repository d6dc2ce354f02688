"""Settings of official data2vec 1.0 models of images, from the tensors and arguments of a file, and back."""

import ast
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.fairseq.data2vec1_config import FirstNetwork, Layout, first_network_of
from d2v2ds.interop.fairseq.official_fields import FINAL_NORMS, LAYER_NORMS, UnsupportedOptionError
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec1 import Data2Vec1Config, WholeModalityConfig
from d2v2ds.whole_masks import GridBlocks

FAIRSEQ, BEIT = "data2vec_vision", "data2vec_vision_beit_layout"
_PUBLISHED: dict[str, Any] = {
    "num_mask_patches": 120, "min_mask_patches_per_block": 16, "max_mask_patches_per_block": 196, "l1_beta": 2.0,
    "l2_loss": False, "layer_results": "end", "target_layer_norm_last": True, "post_target_layer_norm": True,
    "ema_decay": 0.9998, "drop_path": 0.25, "attn_drop_rate": 0.05, "layer_scale_init_value": 1e-4,
}  # fmt: skip
"""Arguments of the fork of BEiT in the published commands (base), for files that do not say them."""
_WITHOUT_EFFECT = ("attention_path", "first_weights")
_MOST_LAYERS = 6
"""Target layers of the published models."""


def beit_network(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> tuple[FirstNetwork, dict[str, Any]]:
    """Derive the settings of a file of the fork of BEiT: sizes from its tensors, the rest from its arguments.

    Args:
        tensors: by official name; all blocks share the table of offsets, or each has one.
        arguments: of the command, as far as the file has them.

    Returns:
        The network, and the arguments that were used.

    Raises:
        CheckpointError: a tensor is missing or of other dimensions.
        UnsupportedOptionError: an argument asks for something else than this project has.
    """
    kernel = _tensor(tensors, "patch_embed.proj.weight", 4)
    tables = ("rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table")
    table = _tensor(tensors, next((name for name in tables if name in tensors), tables[0]), 2)
    side = (math.isqrt(max(len(table) - 3, 0)) + 1) // 2
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    known = {name: arguments.get(name, value) for name, value in _PUBLISHED.items()}
    section = {
        "_name": BEIT,
        "img_size": side * kernel.shape[-1],
        "patch_size": kernel.shape[-1],
        "embed_dim": len(kernel),
        "depth": depth,
        "num_heads": table.shape[1],
        "mlp_ratio": len(_tensor(tensors, "blocks.0.mlp.fc1.weight", 2)) / max(len(kernel), 1),
        "init_values": known["layer_scale_init_value"] if "blocks.0.gamma_1" in tensors else 0.0,
        "attn_drop_rate": known["attn_drop_rate"],
        "drop_path_rate": known["drop_path"],
    }
    known["target_layers"] = _target_layers(arguments.get("target_layers"), depth)
    return first_network_of(section, "image", **_beit_context(known)), known


def _beit_context(known: Mapping[str, Any]) -> dict[str, Any]:
    objective = ("l1_beta", "l2_loss", "layer_results", "target_layer_norm_last", "post_target_layer_norm")
    return {
        "mask": {
            "num_masking_patches": known["num_mask_patches"],
            "min_num_patches": known["min_mask_patches_per_block"],
            "max_num_patches": known["max_mask_patches_per_block"],
        },
        "target_layers": known["target_layers"],
        "objective": {name: known[name] for name in objective},
        "ema_decay": known["ema_decay"],
    }


def _target_layers(given: Any, depth: int) -> list[int]:
    """Read the list of target layers, which the command has as text; None for those of the published models."""
    if isinstance(given, str):
        given = ast.literal_eval(given)
    return list(given) if given is not None else list(range(max(depth - _MOST_LAYERS, 0), depth))


def _tensor(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    if name not in tensors or tensors[name].ndim != dimensions:
        raise CheckpointError(f"expected {name} of {dimensions} dimensions, found none")
    return tensors[name]


def official_arguments(
    trunk: TrunkConfig, objective: Data2Vec1Config, tensors: Mapping[str, Tensor], layout: Layout
) -> tuple[FirstNetwork, dict[str, Any]]:
    """Write the official settings of one of our networks, and read them again.

    Args:
        trunk: settings of the trunk.
        objective: settings of the objective.
        tensors: of the student, by official names.
        layout: of fairseq's port (`image`), or of the fork of BEiT.

    Returns:
        The network as it is read from them, and the section of fairseq or the arguments of BEiT.

    Raises:
        UnsupportedOptionError: naming settings that they cannot express.
    """
    own, block = objective.modalities["image"], trunk.block
    mask = own.mask
    if not isinstance(mask, GridBlocks):
        raise UnsupportedOptionError(f"mask.kind is {mask.kind!r}, official models of images have 'grid_blocks'")
    shared = {
        "num_mask_patches": mask.count,
        "min_mask_patches_per_block": mask.least,
        "max_mask_patches_per_block": mask.most,
        "drop_path": objective.drop_path,
        "layer_scale_init_value": block.layer_scale or 0.0,
    }
    if layout == "image":
        written = _fairseq_section(trunk, own, objective) | shared
        found = first_network_of(written, "image")
    else:
        depth = trunk.shared_depth
        written = shared | {
            "l1_beta": own.loss.beta,
            "l2_loss": own.loss.beta == 0.0,
            "layer_results": "end" if own.target.layer == "block" else "fc",
            "target_layer_norm_last": "layer" in own.target.layer_norms,
            "post_target_layer_norm": "layer" in own.target.final_norms,
            "ema_decay": objective.ema.start_decay,
            "attn_drop_rate": block.attention_dropout,
            "target_layers": list(range(depth - own.target.num_layers, depth)),
        }
        found, _ = beit_network(tensors, written)
    different = [*_different(trunk, found.trunk, "model"), *_different(own, found.own, "objective.modalities.image")]
    if different:
        raise UnsupportedOptionError(f"no official model of images has {', '.join(different)}")
    return found, written


def _fairseq_section(trunk: TrunkConfig, own: WholeModalityConfig, objective: Data2Vec1Config) -> dict[str, Any]:
    network, ema = trunk.modalities["image"], objective.ema
    return {
        "_name": FAIRSEQ,
        "image_size": network.image_size,
        "patch_size": network.patch_size,
        "embed_dim": trunk.block.width,
        "depth": trunk.shared_depth,
        "num_heads": trunk.block.num_heads,
        "attention_dropout": trunk.block.attention_dropout,
        "shared_rel_pos_bias": True,
        "loss_scale": own.loss.scale,
        "loss_beta": own.loss.beta,
        "average_top_k_layers": own.target.num_layers,
        "end_of_block_targets": own.target.layer == "block",
        **{key: kind in own.target.layer_norms for key, kind in LAYER_NORMS.items()},
        **{key: kind in own.target.final_norms for key, kind in FINAL_NORMS.items()},
        "ema_transformer_only": own.share_local_encoder,
        "ema_decay": ema.start_decay,
        "ema_end_decay": ema.end_decay,
        "ema_anneal_end_step": ema.anneal_steps,
    }


def _different(ours: Any, theirs: Any, where: str) -> list[str]:
    """Name the fields in which two settings differ, but for those that change no result of given weights."""
    if ours == theirs:
        return []
    if hasattr(ours, "__dataclass_fields__") and type(ours) is type(theirs):
        names = [name for name in ours.__dataclass_fields__ if name not in _WITHOUT_EFFECT]
        return [one for n in names for one in _different(getattr(ours, n), getattr(theirs, n), f"{where}.{n}")]
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping) and ours.keys() == theirs.keys():
        return [one for name in ours for one in _different(ours[name], theirs[name], f"{where}.{name}")]
    return [f"{where} {ours!r}"]
