"""Image and text cases that the recorded vectors lack, computed by the second implementation (`official_model.py`).

A case is a set of official options that differ from a small published-like configuration; its weights, inputs and masks
are drawn to fit them. What the specification leaves open is an assumption and is marked so here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles.official_model import Draw, Weights, write

VOCABULARY, TOKENS = 30, 12
COMMON: dict[str, Any] = {
    "depth": 2, "embed_dim": 24, "num_heads": 6, "average_top_k_layers": 2, "mlp_ratio": 4, "encoder_dropout": 0,
    "post_mlp_drop": 0, "attention_dropout": 0, "activation_dropout": 0, "instance_norm_target_layer": True,
}  # fmt: skip
MODEL: dict[str, dict[str, Any]] = {
    "image": COMMON | {"ema_encoder_only": False, "layer_norm_targets": True, "norm_eps": 1e-6, "cls_loss": 0.01},
    "text": COMMON | {"ema_encoder_only": True, "loss_scale": 1, "norm_eps": 1e-5},
}
OWN: dict[str, dict[str, Any]] = {
    "image": {"input_size": 16, "patch_size": 4, "embed_dim": 24, "prenet_depth": 1, "ema_local_encoder": True,
              "num_extra_tokens": 1, "init_extra_token_zero": False, "mask_noise_std": 0.5},
    "text": {"max_source_positions": TOKENS + 3, "dropout": 0, "prenet_depth": 0, "mask_noise_std": 0.5},
}  # fmt: skip
DECODER: dict[str, dict[str, Any]] = {
    "image": {"decoder_dim": 24, "decoder_groups": 4, "decoder_kernel": 3, "decoder_layers": 2, "input_dropout": 0},
    "text": {"decoder_dim": 16, "decoder_groups": 1, "decoder_kernel": 5, "decoder_layers": 2, "input_dropout": 0,
             "decoder_residual": False, "projection_layers": 2, "projection_ratio": 2.0},
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "num_heads": 12, "mlp_ratio": 4, "ema_encoder_only": True, "input_size": 224, "patch_size": 16,
    "max_source_positions": 512, "decoder_dim": 384, "decoder_groups": 16, "decoder_kernel": 5, "decoder_layers": 5,
    "projection_layers": 1,
}  # fmt: skip
"""What a weight's shape follows where a configuration leaves an option out (section 13)."""
PATCH_WIDTH = 768
"""Default width of an image's patches; the option is named as the model's width is."""
ABSENT = object()
"""In place of a value: the configuration does not name the option."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options that differ from `MODEL`, `OWN` (of the modality) and `DECODER`, and the shape of the batch."""

    modality: str
    model: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    decoder: Mapping[str, Any] = field(default_factory=dict)
    masks: int = 3
    samples: int = 2
    num_masked: tuple[int, ...] = (7,)
    """Masked positions of row 0, row 1, .. and round again."""
    real_tokens: tuple[int, ...] | None = None
    """Tokens of each sample before padding; None where nothing is padded."""
    padding_is_masked: bool = False
    """No padded position is kept."""

    def options(self) -> dict[str, Any]:
        """The `model` section of the official configuration."""
        own = _changed(OWN[self.modality], self.own)
        own["decoder"] = _changed(DECODER[self.modality], self.decoder)
        return _changed(MODEL[self.modality], self.model) | {"modalities": {self.modality: own}}


def _changed(options: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (options | dict(changes)).items() if value is not ABSENT}


def positions_2d(rows: int, columns: int, width: int) -> Tensor:
    """Sine-cosine table (1, rows * columns, width): column in the first half, row in the second (section 3.2)."""
    quarter = width // 4
    table = torch.zeros(1, rows * columns, width, dtype=torch.float64)
    for place in range(rows * columns):
        for half, p in enumerate((place % columns, place // columns)):
            angle = torch.tensor([p * 10000 ** (-j / quarter) for j in range(quarter)], dtype=torch.float64)
            start = half * width // 2
            table[0, place, start : start + 2 * quarter] = torch.cat([angle.sin(), angle.cos()])
    return table.float()


def _draw_weights(draw: Draw, modality: str, options: Mapping[str, Any]) -> None:
    own, width, depth = DEFAULTS | options["modalities"][modality], options["embed_dim"], options["depth"]
    prefix, decoder, prenet = f"modality_encoders.{modality.upper()}.", DEFAULTS | own["decoder"], own["prenet_depth"]
    options = DEFAULTS | dict(options)
    w = draw.weights
    if modality == "image":
        patch, inner = own["patch_size"], own.get("embed_dim", PATCH_WIDTH)
        rows, columns = [own["input_size"] // patch] * 2
        if (channels := own.get("in_chans", 3)) == 1:
            rows, columns = own["max_length"], 128 // patch
        draw.linear(f"{prefix}local_encoder.{'proj' if inner == width else '0.proj'}", inner, channels, patch, patch)
        if inner != width:
            draw.linear(f"{prefix}local_encoder.1", width, inner)
        w[f"{prefix}fixed_positional_encoder.positions"] = positions_2d(rows, columns, width)
    else:
        w[f"{prefix}local_encoder.embed_tokens.weight"] = draw.normal(VOCABULARY, width)
        if not own.get("no_token_positional_embeddings", False):
            w[f"{prefix}local_encoder.embed_positions.weight"] = draw.normal(own["max_source_positions"] + 2, width)
        draw.norm(f"{prefix}local_encoder.layernorm_embedding", width)
    if own.get("num_extra_tokens", 0):
        w[f"{prefix}extra_tokens"] = draw.normal(1, own["num_extra_tokens"], width)
    if own.get("use_alibi_encoder", False):
        # Assumption: as for speech, the scale exists (at 1, without gradient) where it is not learned.
        heads = options["num_heads"] if own.get("learned_alibi_scale_per_head", False) else 1
        blocks = prenet + depth if own.get("learned_alibi_scale_per_layer", False) else 1
        draw.alibi_scale(f"{prefix}alibi_scale", blocks, 1, heads, 1, 1)
    if modality == "image" or prenet:
        draw.norm(f"{prefix}context_encoder.norm", width)
    for name in [f"{prefix}context_encoder.blocks.{i}" for i in range(prenet)] + [f"blocks.{i}" for i in range(depth)]:
        draw.block(name, width, options["mlp_ratio"])
    channels, kernel = width, decoder["decoder_kernel"]
    for i in range(decoder["decoder_layers"]):
        shape = (kernel, kernel) if modality == "image" else (kernel,)
        group = channels // decoder["decoder_groups"]
        draw.linear(f"{prefix}decoder.blocks.{i}.0", decoder["decoder_dim"], group, *shape)
        channels = decoder["decoder_dim"]
    count = 1 if modality == "image" else decoder["projection_layers"]
    for i in range(count):
        last = i == count - 1
        to = width if last else int(channels * decoder["projection_ratio"]) if i == 0 else channels
        draw.linear(f"{prefix}decoder.proj" + ("" if count == 1 else f".{2 * i}"), to, channels)
        channels = to


def _draw_teacher(draw: Draw, modality: str, options: Mapping[str, Any]) -> Weights:
    """What section 9 lists.

    Text without `ema_encoder_only` is in no published configuration. Assumption: the rules of speech hold, that is the
    teacher owns scale, prenet and blocks under their full names, the embeddings only with `ema_local_encoder`.
    """
    if options.get("ema_encoder_only", True):
        return draw.teacher(lambda n: n.startswith("blocks."), bare="blocks.")
    own_local = options["modalities"][modality].get("ema_local_encoder", False)
    teacher = draw.teacher(lambda n: own_local or ".local_encoder." not in n)
    table = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    return teacher | {n: w for n, w in draw.weights.items() if n == table}  # not trained, so the same in both


def write_case(folder: Path, name: str, case: Case) -> None:
    """Compute one step and write NAME.json, NAME.safetensors and NAME.grads.safetensors."""
    draw, options = Draw(11), case.options()
    _draw_weights(draw, case.modality, options)
    teacher = _draw_teacher(draw, case.modality, options)
    padding = None
    if case.modality == "image":
        own = DEFAULTS | options["modalities"]["image"]
        sides = [own["input_size"]] * 2 if own.get("in_chans", 3) != 1 else [own["target_length"], 128]
        source = draw.normal(case.samples, own.get("in_chans", 3), *sides)
        length = sides[0] * sides[1] // own["patch_size"] ** 2
    else:
        source, length = torch.randint(3, VOCABULARY, (case.samples, TOKENS), generator=draw.generator), TOKENS
        source[:, 0] = 0
        if case.real_tokens is not None:
            padding = torch.arange(length)[None] >= torch.tensor(case.real_tokens)[:, None]
            source = source.masked_fill(padding, 1)
    always = padding if case.padding_is_masked else None
    given = draw.given(source, teacher, case.masks, length, case.num_masked, always)
    if padding is not None:
        given["in/padding_mask"] = padding
    write(folder, name, case.modality, options, given)
