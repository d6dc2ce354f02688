"""The architecture fields of an official configuration as our `ModelConfig` (names and defaults: spec section 13).

Every key is looked at: one that changes the computation and is not supported raises `UnsupportedOptionError`
with its name, so that nothing is computed differently in silence.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from d2v2ds.errors import D2V2Error
from d2v2ds.model.audio import AudioConfig
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.data2vec2 import ModalitiesConfig, ModelConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.model.image import ImageConfig
from d2v2ds.model.loss import LossConfig
from d2v2ds.model.targets import NormKind, TargetConfig
from d2v2ds.model.text import TextConfig
from d2v2ds.shapes import ConvLayer


class UnsupportedOptionError(D2V2Error):
    """An official option that changes the computation and that this project does not have."""


_IGNORED = {
    # names, and what belongs to the mask sampler, the teacher's schedule or the run rather than to the network
    "_name", "supported_modality", "clone_batch", "ema_decay", "ema_end_decay", "ema_anneal_end_step",
    "min_target_var", "min_pred_var", "mask_prob", "mask_prob_adjust", "mask_length", "mask_dropout",
    "inverse_mask", "add_masks", "keep_masked_pct", "mask_noise_std", "init_extra_token_zero",
    "mae_init", "decoder_group",
    # start value of a parameter that the case carries, and width of hidden projection layers where there are none
    "alibi_scale", "projection_ratio",
}  # fmt: skip

_MUST_BE: dict[str, tuple[Any, ...]] = {
    # value(s) at which an option changes nothing here
    "layer_norm_first": (False,), "end_of_block_targets": (False,), "drop_path_rate": (0,),
    "start_drop_path_rate": (0,), "end_drop_path_rate": (0,), "norm_affine": (True,), "recon_loss": (0,),
    "d2v_loss": (1,), "dropout_input": (0,), "prenet_layerdrop": (0,), "num_extra_tokens": (0,),
    "local_grad_mult": (1,), "encoder_zero_mask": (True,), "learned_alibi": (False,), "use_alibi_encoder": (False,),
    "learned_alibi_scale": (False,), "learned_alibi_scale_per_head": (False,),
    "learned_alibi_scale_per_layer": (False,),
    "add_positions_masked": (False,), "add_positions_all": (False,), "projection_layers": (1,),
    "batch_norm_targets": (False,), "no_scale_embedding": (True,), "learned_pos": (True,), "in_chans": (3,),
    "layernorm_embedding": (True,), "fixed_positions": (True,),
}  # fmt: skip


def conv_layers(text: str) -> tuple[ConvLayer, ...]:
    """Read a layer list such as ``[(512, 10, 5)] + [(512, 3, 2)] * 4`` without executing it.

    Raises:
        ValueError: if it is anything but lists, tuples, integers, ``+`` and ``*``.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(value(item) for item in node.elts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return value(node.left) * value(node.right)
        raise ValueError(f"feature_encoder_spec: expected a list of (channels, kernel, stride), found {text!r}")

    layers = value(ast.parse(text, mode="eval").body)
    if not isinstance(layers, list) or not all(isinstance(layer, tuple) and len(layer) == 3 for layer in layers):
        raise ValueError(f"feature_encoder_spec: expected a list of (channels, kernel, stride), found {text!r}")
    return tuple(layers)


class _Fields:
    """One level of an official config: reads with defaults and remembers what was read."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.read: set[str] = set()

    def __call__(self, name: str, default: Any) -> Any:
        self.read.add(name)
        return self.values.get(name, default)

    def required(self, name: str) -> Any:
        """A value for which no default is known."""
        if name not in self.values:
            raise UnsupportedOptionError(f"{self.where}{name} is not given and has no known default")
        return self(name, None)

    def finish(self) -> None:
        """Refuse every unread key unless it is absent in effect or known to change nothing."""
        unsupported = [
            f"{self.where}{name}={found!r}"
            for name, found in self.values.items()
            if name not in self.read and name not in _IGNORED and found is not None
            if name not in _MUST_BE or found not in _MUST_BE[name]
        ]
        if unsupported:
            raise UnsupportedOptionError(", ".join(unsupported))


def _norms(fields: _Fields, kinds: dict[str, NormKind]) -> tuple[NormKind, ...]:
    return tuple(kind for key, kind in kinds.items() if fields(key, False))


@dataclass(frozen=True)
class _Case:
    """What every modality reads beside its own section."""

    values: dict[str, Any]
    where: str
    width: int
    target: TargetConfig
    loss: LossConfig
    vocab_size: int | None

    def decoder(self, fields: "_Fields", *, projections: bool) -> DecoderConfig:
        """The decoder's section; the image decoder always has one Linear."""
        inner = _Fields(fields("decoder", {}), f"{self.where}decoder.")
        layers, ratio = inner("projection_layers", 1), inner("projection_ratio", 2.0)
        config = DecoderConfig(
            width=inner("decoder_dim", 384),
            depth=inner("decoder_layers", 5),
            kernel=inner("decoder_kernel", 5),
            groups=inner("decoder_groups", 16),
            input_dropout=inner("input_dropout", 0.1),
            residual=inner("decoder_residual", True),
            mask_noise_std=self.values.get("mask_noise_std", 0.01),
            projection_layers=layers if projections else 1,
            projection_ratio=ratio,
        )
        inner.finish()
        return config


def _alibi(fields: "_Fields") -> dict[str, bool]:
    """The distance penalty of speech or text."""
    return {
        "alibi": fields("use_alibi_encoder", False),
        "alibi_learned": fields("learned_alibi_scale", False),
        "alibi_per_head": fields("learned_alibi_scale_per_head", False),
        "alibi_per_block": fields("learned_alibi_scale_per_layer", False),
    }


def _audio(case: _Case) -> AudioConfig:
    fields = _Fields(case.values, case.where)
    config = AudioConfig(
        prenet_depth=fields.required("prenet_depth"),
        target=case.target,
        loss=case.loss,
        conv_layers=conv_layers(fields("feature_encoder_spec", "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2")),
        position_depth=fields("conv_pos_depth", 5),
        position_total_kernel=fields("conv_pos_width", 95),
        position_groups=fields("conv_pos_groups", 16),
        prenet_dropout=fields("prenet_dropout", 0.0),
        **_alibi(fields),
        share_local_encoder=not fields("ema_local_encoder", False),
        decoder=case.decoder(fields, projections=True),
    )
    fields.finish()
    return config


def _image(case: _Case) -> ImageConfig:
    fields = _Fields(case.values, case.where)
    patch_width = fields("embed_dim", 768)
    config = ImageConfig(
        prenet_depth=fields.required("prenet_depth"),
        target=case.target,
        loss=case.loss,
        image_size=fields("input_size", 224),
        patch_size=fields("patch_size", 16),
        patch_width=None if patch_width == case.width else patch_width,
        num_extra_tokens=fields("num_extra_tokens", 0),
        prenet_dropout=fields("prenet_dropout", 0.0),
        share_local_encoder=not fields("ema_local_encoder", False),
        decoder=case.decoder(fields, projections=False),
    )
    fields.finish()
    return config


def _text(case: _Case) -> TextConfig:
    fields = _Fields(case.values, case.where)
    if case.vocab_size is None:
        raise UnsupportedOptionError("vocab_size is not given and has no known default")
    config = TextConfig(
        prenet_depth=fields.required("prenet_depth"),
        target=case.target,
        loss=case.loss,
        vocab_size=case.vocab_size,
        max_tokens=fields("max_source_positions", 512),
        learned_positions=not fields("no_token_positional_embeddings", False),
        embedding_dropout=fields("dropout", 0.1),
        prenet_dropout=fields("prenet_dropout", 0.0),
        **_alibi(fields),
        share_local_encoder=not fields("ema_local_encoder", False),
        decoder=case.decoder(fields, projections=True),
    )
    fields.finish()
    return config


READERS: dict[str, Callable[[_Case], AudioConfig | ImageConfig | TextConfig]] = {
    "audio": _audio,
    "image": _image,
    "text": _text,
}


def model_config(official: dict[str, Any], modality: str, vocab_size: int | None = None) -> ModelConfig:
    """Translate.

    Args:
        official: the `model` section of an official configuration.
        modality: lower-case name of the one modality to build.
        vocab_size: V of text, which the official configuration does not hold.

    Raises:
        UnsupportedOptionError: naming the option.
    """
    if modality not in READERS:
        raise UnsupportedOptionError(f"modality={modality}")
    fields = _Fields(official, "")
    values = fields("modalities", {}).get(modality, {})
    target = TargetConfig(
        num_layers=fields.required("average_top_k_layers"),
        layer_norms=_norms(
            fields,
            {
                "instance_norm_target_layer": "instance",
                "layer_norm_target_layer": "layer",
                "batch_norm_target_layer": "batch",
            },
        ),
        final_norms=_norms(fields, {"layer_norm_targets": "layer", "instance_norm_targets": "instance"}),
    )
    width, encoder_only = fields.required("embed_dim"), fields("ema_encoder_only", True)
    case = _Case(
        values=values,
        where=f"modalities.{modality}.",
        width=width,
        target=target,
        loss=LossConfig(
            scale=fields("loss_scale", None), beta=fields("loss_beta", 0), cls_weight=fields("cls_loss", 0)
        ),
        vocab_size=vocab_size,
    )
    section = READERS[modality](case)
    if encoder_only and not (section.share_local_encoder and section.prenet_depth == 0 and modality == "text"):
        raise UnsupportedOptionError(
            "ema_encoder_only=True (a teacher of nothing but shared blocks is known for text without prenet blocks)"
        )
    if encoder_only and isinstance(section, TextConfig) and section.alibi:
        raise UnsupportedOptionError(
            "use_alibi_encoder=True with ema_encoder_only=True (its teacher reads the student's scale, ours its own)"
        )
    config = ModelConfig(
        block=BlockConfig(
            width=width,
            num_heads=fields("num_heads", 12),
            mlp_ratio=fields("mlp_ratio", 4),
            norm_eps=fields("norm_eps", 1e-5 if modality != "image" else 1e-6),
            attention_dropout=fields("attention_dropout", 0.1),
            attention_output_dropout=fields("encoder_dropout", 0.1),
            activation_dropout=fields("activation_dropout", 0.0),
            mlp_dropout=fields("post_mlp_drop", 0.1),
        ),
        shared_depth=fields.required("depth"),
        layer_drop=fields("layerdrop", 0.0),
        modalities=replace(ModalitiesConfig(), **{modality: section}),  # type: ignore[arg-type]
    )
    fields.finish()
    return config
