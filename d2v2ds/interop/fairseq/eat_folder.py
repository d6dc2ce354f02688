"""Read a folder of EAT weights for transformers (`config.json`, `model.safetensors`); its python files are not run.

The names of tensors are those of the public code (arXiv 2401.03497); no published folder was at hand to compare with.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.io.read import read_json
from d2v2ds.model.positions import sin_cos_grid

_WEIGHTS = "model.safetensors"
_PREFIX = "model."
_OWN = "modality_encoders.IMAGE."
_TABLE = f"{_OWN}fixed_positional_encoder.positions"
_NAMES = {
    "blocks.": "blocks.",
    "local_encoder.": f"{_OWN}local_encoder.",
    "extra_tokens": f"{_OWN}extra_tokens",
    "fixed_positional_encoder.": f"{_OWN}fixed_positional_encoder.",
    "pre_norm.": f"{_OWN}context_encoder.norm.",
}
"""Beginnings of the folder's names, behind the prefix, and of those in fairseq's files."""
_COPIED = {"depth": 12, "embed_dim": 768, "num_heads": 12, "mlp_ratio": 4.0, "norm_eps": 1e-6}
"""Settings that fairseq's section has under the same name, and their defaults."""


def read_eat_folder(folder: Path) -> dict[str, Any]:
    """Read a folder as the content of an official file: `model` with weights, `cfg` with the network's section.

    Raises:
        CheckpointError: it is no folder of EAT, or damaged.
        UnsupportedOptionError: it is a fine-tuned one.
        MachineError: the machine is at fault.
    """
    config = read_json(folder / "config.json", CheckpointError)
    if not isinstance(config, dict) or config.get("model_type") != "eat":
        raise CheckpointError(f"{folder}: expected config.json with model_type 'eat', found another")
    if (variant := config.get("model_variant", "pretrain")) != "pretrain":
        raise UnsupportedOptionError(f"{folder}: model_variant={variant!r:.40}, expected 'pretrain'")
    patch, mel_bins, length = config.get("patch_size", 16), config.get("mel_bins", 128), config.get("max_length", 768)
    own = {"in_chans": config.get("in_chans", 1), "patch_size": patch, "max_length": length, "prenet_depth": 0}
    image = config.get("img_size", [1024, mel_bins])
    if mel_bins != 128 or not isinstance(image, list) or len(image) != 2 or image[1] != mel_bins:
        raise UnsupportedOptionError(f"{folder}: mel_bins={mel_bins!r:.40}, img_size={image!r:.40}, expected 128 bins")
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / _WEIGHTS}: cannot be read: {error}") from error
    weights = {_official_name(name): tensor for name, tensor in tensors.items()}
    width = config.get("embed_dim", 768)
    _renew_table(weights, length, patch, width)
    section = {name: config.get(name, default) for name, default in _COPIED.items()} | {
        "average_top_k_layers": config.get("depth", 12), "instance_norm_target_layer": True, "layer_norm_targets": True,
        "ema_encoder_only": False, "cls_loss": 1,
        "attention_dropout": 0, "encoder_dropout": 0, "post_mlp_drop": 0,
    }  # fmt: skip
    own |= {"target_length": image[0], "embed_dim": width, "num_extra_tokens": 1, "ema_local_encoder": True}
    own["decoder"] = {"decoder_groups": 1}  # the folder has none
    return {"model": weights, "cfg": {"model": section | {"modalities": {"image": own}}}}


def _official_name(name: str) -> str:
    """Translate a name; one that is not known stays as it is, and is refused later."""
    bare = name.removeprefix(_PREFIX)
    return next((theirs + bare.removeprefix(ours) for ours, theirs in _NAMES.items() if bare.startswith(ours)), name)


def _renew_table(weights: dict[str, Tensor], length: Any, patch: Any, width: Any) -> None:
    """Compute the table of positions anew where an older file has another number of rows."""
    table = weights.get(_TABLE)
    if table is None or not all(isinstance(size, int) and 0 < size < 10_000 for size in (length, patch, width)):
        return
    wanted = sin_cos_grid(width, length, 128 // patch)[None]
    if table.ndim == 3 and table.shape[1] != wanted.shape[1]:
        weights[_TABLE] = wanted.to(table.dtype)
