"""Official checkpoints as the specification describes them: names and shapes of every tensor, and whole configurations.

Nothing here comes from the package's own tables.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

TEXT_VOCABULARY = 50265


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published network."""

    modality: str
    width: int
    heads: int
    prenet: int
    depth: int
    decoder: dict[str, Any]
    """decoder_dim, decoder_groups, decoder_kernel, decoder_layers and what else is not a default."""
    model: dict[str, Any]
    """Fields that are not defaults."""
    own: dict[str, Any]
    """Those of the modality."""
    vocabulary: int = TEXT_VOCABULARY

    def patch(self) -> int:
        return self.own.get("patch_size", 16)


def _decoder(dim: int, groups: int, kernel: int, layers: int, **others: Any) -> dict[str, Any]:
    sizes = {"decoder_dim": dim, "decoder_groups": groups, "decoder_kernel": kernel, "decoder_layers": layers}
    return {**sizes, "input_dropout": 0.1, **others}


_AUDIO = {
    "prenet_dropout": 0.1, "use_alibi_encoder": True, "learned_alibi_scale": True,
    "learned_alibi_scale_per_head": True, "mask_length": 5,
}  # fmt: skip
_INSTANCE = {"instance_norm_target_layer": True}
_IMAGE_MODEL = _INSTANCE | {
    "layer_norm_targets": True, "norm_eps": 1e-6, "cls_loss": 0.01, "ema_encoder_only": False, "encoder_dropout": 0,
    "post_mlp_drop": 0, "attention_dropout": 0, "min_target_var": 0, "min_pred_var": 0,
}  # fmt: skip
_IMAGE = {
    "inverse_mask": True, "mask_length": 3, "ema_local_encoder": True, "num_extra_tokens": 1,
    "init_extra_token_zero": False,
}  # fmt: skip
_TEXT_DECODER = _decoder(768, 1, 9, 5, decoder_residual=False, projection_layers=2, projection_ratio=2.0)
_TEXT = {"mask_length": 1, "max_source_positions": 512, "dropout": 0.1, "learned_pos": True, "no_scale_embedding": True}
_LARGE_TEXT = {"loss_scale": 1, "layer_norm_target_layer": True, "instance_norm_targets": True}

PUBLISHED = {
    "audio_base": Published(
        modality="audio", width=768, heads=12, prenet=0, depth=12, decoder=_decoder(384, 16, 7, 4), own=_AUDIO,
        model=_INSTANCE | {"average_top_k_layers": 8, "ema_encoder_only": False, "layerdrop": 0.05},
    ),
    "audio_large": Published(
        modality="audio", width=1024, heads=16, prenet=8, depth=16, decoder=_decoder(768, 16, 7, 4), own=_AUDIO,
        model=_INSTANCE | {"average_top_k_layers": 16, "ema_encoder_only": False},
    ),
    "image_base": Published(
        modality="image", width=768, heads=12, prenet=2, depth=10, decoder=_decoder(768, 16, 3, 6, input_dropout=0),
        model=_IMAGE_MODEL | {"average_top_k_layers": 10}, own=_IMAGE,
    ),
    "image_large": Published(
        modality="image", width=1024, heads=16, prenet=0, depth=24, decoder=_decoder(1024, 16, 5, 3, input_dropout=0),
        model=_IMAGE_MODEL | {"average_top_k_layers": 18}, own=_IMAGE | {"embed_dim": 1024},
    ),
    "image_huge14": Published(
        modality="image", width=1280, heads=16, prenet=0, depth=32,
        decoder=_decoder(1024, 16, 5, 3, input_dropout=0, final_layer_norm=True),
        model=_IMAGE_MODEL | {"average_top_k_layers": 24}, own=_IMAGE | {"embed_dim": 1280, "patch_size": 14},
    ),
    "image_huge16": Published(
        modality="image", width=1280, heads=16, prenet=0, depth=32, decoder=_decoder(1024, 16, 5, 3, input_dropout=0),
        model=_IMAGE_MODEL | {"average_top_k_layers": 24}, own=_IMAGE | {"embed_dim": 1280},
    ),
    "text_base": Published(
        modality="text", width=768, heads=12, prenet=0, depth=12, decoder=_TEXT_DECODER, own=_TEXT,
        model=_INSTANCE | {"average_top_k_layers": 12, "loss_scale": 1},
    ),
    "text_large": Published(
        modality="text", width=1024, heads=16, prenet=0, depth=24, decoder=_TEXT_DECODER, own=_TEXT,
        model=_LARGE_TEXT | {"average_top_k_layers": 24},
    ),
    "text_large_1m": Published(
        modality="text", width=1024, heads=16, prenet=0, depth=24, decoder=_TEXT_DECODER, own=_TEXT,
        model=_LARGE_TEXT | {"average_top_k_layers": 24, "loss_beta": 4},
    ),
}  # fmt: skip

DEFAULTS = {
    "loss_beta": 0, "loss_scale": None, "num_heads": 12, "norm_eps": 1e-5, "norm_affine": True, "encoder_dropout": 0.1,
    "post_mlp_drop": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0, "dropout_input": 0.0, "layerdrop": 0.0,
    "mlp_ratio": 4, "layer_norm_first": False, "end_of_block_targets": False, "clone_batch": 8,
    "layer_norm_target_layer": False, "batch_norm_target_layer": False, "instance_norm_target_layer": False,
    "instance_norm_targets": False, "layer_norm_targets": False, "ema_decay": 0.999, "ema_encoder_only": True,
    "start_drop_path_rate": 0, "end_drop_path_rate": 0, "cls_loss": 0, "recon_loss": 0, "d2v_loss": 1,
    "mae_init": False, "decoder_group": False, "min_target_var": 0.1, "min_pred_var": 0.01,
}  # fmt: skip
_OWN_DEFAULTS = {
    "learned_alibi": False, "prenet_dropout": 0.0, "prenet_layerdrop": 0.0, "mask_length": 5, "mask_noise_std": 0.01,
    "mask_dropout": 0.0, "mask_prob": 0.5, "keep_masked_pct": 0, "encoder_zero_mask": True, "num_extra_tokens": 0,
    "init_extra_token_zero": True, "ema_local_encoder": False, "local_grad_mult": 1.0, "use_alibi_encoder": False,
    "learned_alibi_scale": False, "learned_alibi_scale_per_head": False, "learned_alibi_scale_per_layer": False,
    "alibi_scale": 1.0, "add_masks": False, "inverse_mask": False, "mask_prob_adjust": 0.0,
}  # fmt: skip
_OWN = {
    "audio": {
        "feature_encoder_spec": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "conv_pos_width": 95, "conv_pos_groups": 16, "conv_pos_depth": 5,
    },
    "image": {"input_size": 224, "in_chans": 3, "patch_size": 16, "embed_dim": 768, "fixed_positions": True},
    "text": {"max_source_positions": 512, "learned_pos": True, "dropout": 0.1, "no_scale_embedding": True,
             "layernorm_embedding": True, "no_token_positional_embeddings": False},
}  # fmt: skip
_DECODER_DEFAULTS = {
    "decoder_dim": 384, "decoder_groups": 16, "decoder_kernel": 5, "decoder_layers": 5, "input_dropout": 0.1,
    "add_positions_masked": False, "add_positions_all": False, "decoder_residual": True, "projection_layers": 1,
    "projection_ratio": 2.0,
}  # fmt: skip
RUN_FIELDS = {"data": "/corpora/speech", "seed": 1, "max_update": "${optimization.max_update}", "shared_decoder": None}
"""Of the model's section, and not of the network."""


def section_of(network: Published) -> dict[str, Any]:
    """The `model` section of a whole configuration: every default filled in, for the other modalities too."""
    modalities: dict[str, Any] = {
        name: _OWN_DEFAULTS | own | {"type": name.upper(), "prenet_depth": 4, "decoder": dict(_DECODER_DEFAULTS)}
        for name, own in _OWN.items()
    }
    modalities[network.modality] |= network.own | {
        "prenet_depth": network.prenet,
        "decoder": _DECODER_DEFAULTS | network.decoder,
    }
    sizes = {"embed_dim": network.width, "num_heads": network.heads, "depth": network.depth}
    named = {"_name": "data2vec_multi", "supported_modality": network.modality.upper()}
    return DEFAULTS | named | network.model | sizes | RUN_FIELDS | {"modalities": modalities}


def configuration_of(network: Published) -> Any:
    """The whole `cfg` as omegaconf holds it."""
    return OmegaConf.create(
        {
            "_name": None,
            "common": {"seed": 1, "fp16": True, "tensorboard_logdir": "tb"},
            "model": section_of(network),
            "optimization": {"max_update": 400000, "lr": [0.00075]},
            "task": {"_name": "audio_pretraining", "data": "/corpora/speech", "sample_rate": 16000},
        }
    )


def _linear(name: str, w_in: int, w_out: int) -> Shapes:
    return {f"{name}.weight": (w_out, w_in), f"{name}.bias": (w_out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _blocks(prefix: str, number: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(number):
        at = f"{prefix}{i}"
        shapes |= _norm(f"{at}.norm1", width) | _linear(f"{at}.attn.qkv", width, 3 * width)
        shapes |= _linear(f"{at}.attn.proj", width, width) | _norm(f"{at}.norm2", width)
        shapes |= _linear(f"{at}.mlp.fc1", width, 4 * width) | _linear(f"{at}.mlp.fc2", 4 * width, width)
    return shapes


def layout_of(network: Published) -> tuple[Shapes, Shapes]:
    """Names and shapes of `model` and of its `_ema`."""
    at, width = f"modality_encoders.{network.modality.upper()}", network.width
    blocks = _blocks("blocks.", network.depth, width)
    context = _blocks(f"{at}.context_encoder.blocks.", network.prenet, width)
    if network.modality != "text" or network.prenet:
        context |= _norm(f"{at}.context_encoder.norm", width)
    local, shared, kernel_rank = _LOCAL[network.modality](network, at)
    decoder = _decoder_shapes(network, at, kernel_rank)
    student = local | shared | context | decoder | blocks
    teacher = {
        "audio": shared | context | blocks,
        "image": local | shared | context | blocks,
        "text": _blocks("", network.depth, width),
    }[network.modality]
    return student, teacher


def _decoder_shapes(network: Published, at: str, kernel_rank: int) -> Shapes:
    dim, kernel, groups, layers = (network.decoder[f"decoder_{n}"] for n in ("dim", "kernel", "groups", "layers"))
    shapes: Shapes = {}
    for i in range(layers):
        w_in = dim if i else network.width
        shapes[f"{at}.decoder.blocks.{i}.0.weight"] = (dim, w_in // groups) + (kernel,) * kernel_rank
        shapes[f"{at}.decoder.blocks.{i}.0.bias"] = (dim,)
    if network.decoder.get("projection_layers", 1) == 1:
        return shapes | _linear(f"{at}.decoder.proj", dim, network.width)
    return (
        shapes | _linear(f"{at}.decoder.proj.0", dim, 2 * dim) | _linear(f"{at}.decoder.proj.2", 2 * dim, network.width)
    )


def _audio_local(network: Published, at: str) -> tuple[Shapes, Shapes, int]:
    local = _norm(f"{at}.project_features.1", 512) | _linear(f"{at}.project_features.2", 512, network.width)
    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        local[f"{at}.local_encoder.conv_layers.{i}.0.weight"] = (512, 512 if i else 1, kernel)
        local |= _norm(f"{at}.local_encoder.conv_layers.{i}.2.1", 512)
    shared: Shapes = {f"{at}.alibi_scale": (1, 1, network.heads, 1, 1)}
    for i in range(1, 6):
        shared[f"{at}.relative_positional_encoder.{i}.0.weight"] = (network.width, network.width // 16, 19)
        shared[f"{at}.relative_positional_encoder.{i}.0.bias"] = (network.width,)
    return local, shared, 1


def _image_local(network: Published, at: str) -> tuple[Shapes, Shapes, int]:
    patch, patch_width, width = network.patch(), network.own.get("embed_dim", 768), network.width
    first = f"{at}.local_encoder.proj" if patch_width == width else f"{at}.local_encoder.0.proj"
    local: Shapes = {f"{first}.weight": (patch_width, 3, patch, patch), f"{first}.bias": (patch_width,)}
    if patch_width != width:
        local |= _linear(f"{at}.local_encoder.1", patch_width, width)
    places = (network.own.get("input_size", 224) // patch) ** 2
    shared = {f"{at}.extra_tokens": (1, 1, width), f"{at}.fixed_positional_encoder.positions": (1, places, width)}
    return local, shared, 2


def _text_local(network: Published, at: str) -> tuple[Shapes, Shapes, int]:
    tokens, places = f"{at}.local_encoder.embed_tokens.weight", f"{at}.local_encoder.embed_positions.weight"
    local: Shapes = {tokens: (network.vocabulary, network.width), places: (514, network.width)}
    return local | _norm(f"{at}.local_encoder.layernorm_embedding", network.width), {}, 1


_LOCAL = {"audio": _audio_local, "image": _image_local, "text": _text_local}


def tensors_of(shapes: Shapes, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Random tensors, or tensors without memory on the meta device."""
    if device == "meta":
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def content_of(network: Published, device: str = "cpu") -> dict[str, Any]:
    """All of a file as the official trainer leaves it: half precision, the teacher in fp32."""
    student, teacher = layout_of(network)
    weights: dict[str, Any] = tensors_of(student, torch.float16, device)
    weights["_ema"] = tensors_of(teacher, torch.float32, device, seed=1)
    return {
        "args": None,
        "cfg": configuration_of(network),
        "model": weights,
        "optimizer_history": [{"num_updates": 400000, "optimizer_name": "FP16Optimizer"}],
        "extra_state": {"epoch": 7, "train_iterator": {"epoch": 7, "iterations_in_epoch": 3}},
    }


def save(path: Path, content: Any, **options: Any) -> Path:
    """`torch.save`, and the path."""
    torch.save(content, path, **options)
    return path
