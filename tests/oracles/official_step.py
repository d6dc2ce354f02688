"""Speech cases that the recorded vectors lack, computed by the second implementation (`official_model.py`).

Shapes and options that the recorded vectors lack (padding, even kernels, 6 and 12 heads, one mask per sample, the
teacher's own front end, scales per block) are compared as well; that both implementations read the specification alike
is what the recorded vectors prove.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.oracles.official_model import Draw, frames, write

A = "modality_encoders.AUDIO."


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a case varies; sizes stay tiny."""

    width: int = 48
    heads: int = 6
    prenet: int = 1
    depth: int = 2
    masks: int = 3
    samples: int = 2
    length: int = 900
    convs: tuple[tuple[int, int, int], ...] = ((32, 10, 5), (32, 4, 2), (32, 2, 2))
    position_kernel: int = 10
    decoder_width: int = 24
    decoder_kernel: int = 4
    scale_shape: str = "head"
    """head, one, block (per head and block) or none (no ALiBi)."""
    learned_scale: bool = True
    own_front_end: bool = False
    real_samples: tuple[int, ...] | None = None
    """Unpadded length of each sample."""
    uneven: bool = False
    beta: float = 0.0
    layer_norm: str = "instance"
    final_norm: str | None = None


def _draw_weights(o: Options, draw: Draw) -> None:
    channels = 1
    for i, (width, kernel, _) in enumerate(o.convs):
        draw.linear(f"{A}local_encoder.conv_layers.{i}.0", width, channels, kernel)
        del draw.weights[f"{A}local_encoder.conv_layers.{i}.0.bias"]
        draw.norm(f"{A}local_encoder.conv_layers.{i}.2.1", width)
        channels = width
    draw.norm(f"{A}project_features.1", channels)
    draw.linear(f"{A}project_features.2", o.width, channels)
    for i in (1, 2):
        draw.linear(f"{A}relative_positional_encoder.{i}.0", o.width, o.width // 8, o.position_kernel)
    shapes = {"head": (1, 1, o.heads, 1, 1), "one": (1, 1, 1, 1, 1), "block": (o.prenet + o.depth, 1, o.heads, 1, 1)}
    if o.scale_shape in shapes:
        draw.alibi_scale(f"{A}alibi_scale", *shapes[o.scale_shape])
    draw.norm(f"{A}context_encoder.norm", o.width)
    for name in [f"{A}context_encoder.blocks.{i}" for i in range(o.prenet)] + [f"blocks.{i}" for i in range(o.depth)]:
        draw.block(name, o.width)
    for i, width in enumerate((o.width, o.decoder_width)):
        draw.linear(f"{A}decoder.blocks.{i}.0", o.decoder_width, width // 8, o.decoder_kernel)
    draw.linear(f"{A}decoder.proj", o.width, o.decoder_width)


def write_case(folder: Path, name: str, o: Options, model_changes: dict | None = None) -> None:
    """Compute one step and write NAME.json, NAME.safetensors and NAME.grads.safetensors."""
    draw = Draw(7)
    _draw_weights(o, draw)
    shared = ("local_encoder", "project_features")
    teacher = draw.teacher(lambda n: o.own_front_end or not any(s in n for s in shared))
    length = frames(o.length, list(o.convs))
    num_masked = [length // 2 + extra for extra in ((0, -3, 2, 1) if o.uneven else (0,))]
    given = draw.given(draw.normal(o.samples, o.length), teacher, o.masks, length, num_masked)
    if o.real_samples is not None:
        given["in/padding_mask"] = torch.arange(o.length)[None] >= torch.tensor(o.real_samples)[:, None]
    write(folder, name, "audio", _model(o) | (model_changes or {}), given)


def _model(o: Options) -> dict:
    audio = {
        "feature_encoder_spec": str(list(o.convs)), "conv_pos_depth": 2, "conv_pos_width": 2 * o.position_kernel,
        "conv_pos_groups": 8, "prenet_depth": o.prenet, "mask_noise_std": 0.5, "ema_local_encoder": o.own_front_end,
        "use_alibi_encoder": o.scale_shape != "none", "learned_alibi_scale": o.learned_scale,
        "learned_alibi_scale_per_head": o.scale_shape in ("head", "block"),
        "learned_alibi_scale_per_layer": o.scale_shape == "block",
        "decoder": {"input_dropout": 0, "decoder_dim": o.decoder_width, "decoder_groups": 8,
                    "decoder_kernel": o.decoder_kernel, "decoder_layers": 2},
    }  # fmt: skip
    return {
        "ema_encoder_only": False, "loss_beta": o.beta, "loss_scale": None,
        "depth": o.depth, "embed_dim": o.width, "num_heads": o.heads,
        "clone_batch": o.masks, "average_top_k_layers": o.depth, "norm_eps": 1e-5, "mlp_ratio": 4,
        "instance_norm_target_layer": o.layer_norm == "instance", "layer_norm_target_layer": o.layer_norm == "layer",
        "layer_norm_targets": o.final_norm == "layer", "instance_norm_targets": o.final_norm == "instance",
        "encoder_dropout": 0, "post_mlp_drop": 0, "attention_dropout": 0, "modalities": {"audio": audio},
    }  # fmt: skip
