"""The architecture fields of an official configuration as our settings, and back.

Every key is looked at: one that changes the computation and is not supported raises `UnsupportedOptionError`
with its name, so that nothing is computed differently in silence. `model_config` refuses unknown keys too;
`read_section` is for whole files, which carry keys of the run beside those of the network, and reports them.
"""

import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from d2v2ds.errors import D2V2Error
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec2 import ModalityConfig
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import NormKind, TargetConfig
from d2v2ds.shapes import ConvLayer

_ANY_MASK = MaskConfig(masked_fraction=0.5, num_masks=1, kind="random")


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

_TRAINING_ONLY = {
    # of the above: what only a training run computes differently; fine-tuned files set some of them
    "drop_path_rate", "start_drop_path_rate", "end_drop_path_rate", "dropout_input", "prenet_layerdrop",
    "local_grad_mult", "encoder_zero_mask",
}  # fmt: skip


@dataclass
class _Notes:
    """What a lenient reading finds, instead of refusing it."""

    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Known keys with their values, by the place they stand in."""
    ignored: list[str] = field(default_factory=list)
    """The others, as `place.key=value`."""


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

    def __init__(self, values: dict[str, Any] | None, where: str, notes: _Notes | None) -> None:
        self.values = values or {}
        self.where = where
        self.notes = notes
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
        """Refuse every unread key unless it is absent in effect or known to change nothing.

        With notes, unknown keys and those that only training looks at are written down instead.
        """
        unsupported = []
        known = {}
        for name, found in self.values.items():
            if name in self.read or name in _IGNORED or name in _MUST_BE:
                known[name] = found
            if name in self.read or name in _IGNORED or found is None or found in _MUST_BE.get(name, ()):
                continue
            if self.notes is not None and (name not in _MUST_BE or name in _TRAINING_ONLY):
                self.notes.ignored.append(f"{self.where}{name}={found!r}")
            else:
                unsupported.append(f"{self.where}{name}={found!r}")
        if unsupported:
            raise UnsupportedOptionError(", ".join(unsupported))
        if self.notes is not None:
            self.notes.known[self.where] = known


def _norms(fields: _Fields, kinds: dict[str, NormKind]) -> tuple[NormKind, ...]:
    return tuple(kind for key, kind in kinds.items() if fields(key, False))


_LAYER_NORMS: dict[str, NormKind] = {
    "instance_norm_target_layer": "instance",
    "layer_norm_target_layer": "layer",
    "batch_norm_target_layer": "batch",
}
_FINAL_NORMS: dict[str, NormKind] = {"layer_norm_targets": "layer", "instance_norm_targets": "instance"}


@dataclass(frozen=True)
class _Case:
    """What every modality reads beside its own section."""

    values: dict[str, Any]
    where: str
    width: int
    vocab_size: int | None
    notes: _Notes | None

    def decoder(self, fields: "_Fields", *, projections: bool) -> DecoderConfig:
        """The decoder's section; the image decoder always has one Linear."""
        inner = _Fields(fields("decoder", {}), f"{self.where}decoder.", self.notes)
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


_Network = AudioNetwork | ImageNetwork | TextNetwork
_Read = tuple[_Network, "_Fields", DecoderConfig]


def _audio(case: _Case) -> _Read:
    fields = _Fields(case.values, case.where, case.notes)
    config = AudioNetwork(
        prenet_depth=fields.required("prenet_depth"),
        conv_layers=conv_layers(fields("feature_encoder_spec", "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2")),
        position_depth=fields("conv_pos_depth", 5),
        position_total_kernel=fields("conv_pos_width", 95),
        position_groups=fields("conv_pos_groups", 16),
        prenet_dropout=fields("prenet_dropout", 0.0),
        **_alibi(fields),
    )
    return config, fields, case.decoder(fields, projections=True)


def _image(case: _Case) -> _Read:
    fields = _Fields(case.values, case.where, case.notes)
    patch_width = fields("embed_dim", 768)
    config = ImageNetwork(
        prenet_depth=fields.required("prenet_depth"),
        image_size=fields("input_size", 224),
        patch_size=fields("patch_size", 16),
        patch_width=None if patch_width == case.width else patch_width,
        num_extra_tokens=fields("num_extra_tokens", 0),
        prenet_dropout=fields("prenet_dropout", 0.0),
    )
    return config, fields, case.decoder(fields, projections=False)


def _text(case: _Case) -> _Read:
    fields = _Fields(case.values, case.where, case.notes)
    if case.vocab_size is None:
        raise UnsupportedOptionError("vocab_size is not given and has no known default")
    config = TextNetwork(
        prenet_depth=fields.required("prenet_depth"),
        vocab_size=case.vocab_size,
        max_tokens=fields("max_source_positions", 512),
        learned_positions=not fields("no_token_positional_embeddings", False),
        embedding_dropout=fields("dropout", 0.1),
        prenet_dropout=fields("prenet_dropout", 0.0),
        **_alibi(fields),
    )
    return config, fields, case.decoder(fields, projections=True)


READERS: dict[str, Callable[[_Case], _Read]] = {
    "audio": _audio,
    "image": _image,
    "text": _text,
}


@dataclass(frozen=True, kw_only=True)
class OfficialNetwork:
    """Settings of one official network: its trunk, and the objective it was trained with less masks and EMA."""

    trunk: TrunkConfig
    share_local_encoder: bool
    decoder: DecoderConfig
    target: TargetConfig
    loss: LossConfig

    def objective(self, mask: MaskConfig = _ANY_MASK) -> ModalityConfig:
        """Settings of the objective; the official section of the network has no masks that could be taken over."""
        return ModalityConfig(
            share_local_encoder=self.share_local_encoder,
            mask=mask,
            decoder=self.decoder,
            target=self.target,
            loss=self.loss,
        )


def network_of(official: dict[str, Any], modality: str, vocab_size: int | None = None) -> OfficialNetwork:
    """Translate.

    Args:
        official: the `model` section of an official configuration.
        modality: lower-case name of the one modality to build.
        vocab_size: V of text, which the official configuration does not hold.

    Raises:
        UnsupportedOptionError: naming the option.
    """
    return _translated(official, modality, vocab_size, None)


def read_section(
    official: dict[str, Any], modality: str, vocab_size: int | None = None
) -> tuple[OfficialNetwork, dict[str, Any], list[str]]:
    """Translate the section of a whole file, which has every default, other modalities and settings of the run.

    Args:
        official: its `model` section, in plain values.
        modality: lower-case name of the one modality to build.
        vocab_size: V of text.

    Returns:
        The network; the section with known keys of this modality alone; every other key with its value.

    Raises:
        UnsupportedOptionError: naming an option that is known to change the computation.
    """
    notes = _Notes()
    config = _translated(official, modality, vocab_size, notes)
    own, where = notes.known[f"modalities.{modality}."], f"modalities.{modality}.decoder."
    section = notes.known[""] | {"modalities": {modality: own | {"decoder": notes.known[where]}}}
    others = [name for name, value in official.get("modalities", {}).items() if name != modality and value is not None]
    return config, section, notes.ignored + [f"modalities.{name}" for name in others]


def _translated(
    official: dict[str, Any], modality: str, vocab_size: int | None, notes: _Notes | None
) -> OfficialNetwork:
    if modality not in READERS:
        raise UnsupportedOptionError(f"modality={modality}")
    fields = _Fields(official, "", notes)
    values = fields("modalities", {}).get(modality, {})
    target = TargetConfig(
        num_layers=fields.required("average_top_k_layers"),
        layer_norms=_norms(fields, _LAYER_NORMS),
        final_norms=_norms(fields, _FINAL_NORMS),
    )
    width, encoder_only = fields.required("embed_dim"), fields("ema_encoder_only", True)
    loss = LossConfig(scale=fields("loss_scale", None), beta=fields("loss_beta", 0), cls_weight=fields("cls_loss", 0))
    case = _Case(values=values or {}, where=f"modalities.{modality}.", width=width, vocab_size=vocab_size, notes=notes)
    section, own, decoder = READERS[modality](case)
    shares_local = not own("ema_local_encoder", False)
    own.finish()
    is_text = isinstance(section, TextNetwork)
    if encoder_only and not (shares_local and section.prenet_depth == 0 and is_text):
        raise UnsupportedOptionError(
            "ema_encoder_only=True (a teacher of nothing but shared blocks is known for text without prenet blocks)"
        )
    if encoder_only and isinstance(section, TextNetwork) and section.alibi:
        raise UnsupportedOptionError(
            "use_alibi_encoder=True with ema_encoder_only=True (its teacher reads the student's scale, ours its own)"
        )
    trunk = TrunkConfig(
        block=BlockConfig(
            width=width,
            num_heads=fields("num_heads", 12),
            mlp_ratio=fields("mlp_ratio", 4),
            norm_eps=fields("norm_eps", 1e-6 if isinstance(section, ImageNetwork) else 1e-5),
            attention_dropout=fields("attention_dropout", 0.1),
            attention_output_dropout=fields("encoder_dropout", 0.1),
            activation_dropout=fields("activation_dropout", 0.0),
            mlp_dropout=fields("post_mlp_drop", 0.1),
        ),
        shared_depth=fields.required("depth"),
        layer_drop=fields("layerdrop", 0.0),
        modalities={modality: section},
    )
    fields.finish()
    return OfficialNetwork(trunk=trunk, share_local_encoder=shares_local, decoder=decoder, target=target, loss=loss)


def official_section(config: TrunkConfig, objective: ModalityConfig, modality: str) -> dict[str, Any]:
    """Write the official `model` section of one modality of a network, for files that are read elsewhere.

    The settings of a training run that the official section has beside (masks, the teacher's schedule) are not in it.
    `loss.cls_rows` has no counterpart: the official loss sums over the rows of each micro-batch, as without it.

    Args:
        config: settings of the trunk.
        objective: settings of the objective for the modality.
        modality: one that the trunk has.

    Raises:
        UnsupportedOptionError: the network has no such modality, or something the official section cannot express.
    """
    own = config.modalities.get(modality)
    if own is None or modality not in WRITERS:
        raise UnsupportedOptionError(f"modality={modality}: the model has {', '.join(config.modalities)}")
    block, decoder, target, loss = config.block, objective.decoder, objective.target, objective.loss
    section: dict[str, Any] = {
        "_name": "data2vec_multi",
        "supported_modality": modality.upper(),
        "depth": config.shared_depth,
        "embed_dim": block.width,
        "num_heads": block.num_heads,
        "mlp_ratio": block.mlp_ratio,
        "norm_eps": block.norm_eps,
        "attention_dropout": block.attention_dropout,
        "encoder_dropout": block.attention_output_dropout,
        "activation_dropout": block.activation_dropout,
        "post_mlp_drop": block.mlp_dropout,
        "layerdrop": config.layer_drop,
        "loss_scale": loss.scale,
        "loss_beta": loss.beta,
        "cls_loss": loss.cls_weight,
        "average_top_k_layers": target.num_layers,
        "ema_encoder_only": _averages_blocks_alone(own, objective),
        **{key: kind in target.layer_norms for key, kind in _LAYER_NORMS.items()},
        **{key: kind in target.final_norms for key, kind in _FINAL_NORMS.items()},
    }
    projections = {"projection_layers": decoder.projection_layers, "projection_ratio": decoder.projection_ratio}
    section["modalities"] = {
        modality: {
            "prenet_depth": own.prenet_depth,
            "prenet_dropout": own.prenet_dropout,
            "ema_local_encoder": not objective.share_local_encoder,
            "mask_noise_std": decoder.mask_noise_std,
            **WRITERS[modality](own, block.width),
            "decoder": {
                "decoder_dim": decoder.width,
                "decoder_layers": decoder.depth,
                "decoder_kernel": decoder.kernel,
                "decoder_groups": decoder.groups,
                "input_dropout": decoder.input_dropout,
                "decoder_residual": decoder.residual,
                **({} if isinstance(own, ImageNetwork) else projections),
            },
        }
    }
    wanted = OfficialNetwork(
        trunk=replace(config, block=replace(block, attention_path="auto"), modalities={modality: own}),
        share_local_encoder=objective.share_local_encoder,
        decoder=decoder,
        target=target,
        loss=replace(loss, cls_rows=None),
    )
    found = network_of(section, modality, getattr(own, "vocab_size", None))
    if found != wanted:
        raise UnsupportedOptionError(f"no official option for {', '.join(_differences(asdict(wanted), asdict(found)))}")
    return section


def _differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Fields of nested dictionaries that differ, as `a.b=value`."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [fault for key in wanted for fault in _differences(wanted[key], found[key], f"{where}.{key}")]
    return [] if wanted == found else [f"{where[1:]}={wanted!r}"]


def _averages_blocks_alone(own: Any, objective: ModalityConfig) -> bool:
    """Whether the official teacher of such a modality holds nothing but the shared blocks, without prefix."""
    return isinstance(own, TextNetwork) and objective.share_local_encoder and own.prenet_depth == 0 and not own.alibi


def _written_alibi(own: AudioNetwork | TextNetwork) -> dict[str, Any]:
    return {
        "use_alibi_encoder": own.alibi,
        "learned_alibi_scale": own.alibi_learned,
        "learned_alibi_scale_per_head": own.alibi_per_head,
        "learned_alibi_scale_per_layer": own.alibi_per_block,
    }


def _written_audio(own: AudioNetwork, width: int) -> dict[str, Any]:
    return _written_alibi(own) | {
        "feature_encoder_spec": str(list(own.conv_layers)),
        "conv_pos_depth": own.position_depth,
        "conv_pos_width": own.position_total_kernel,
        "conv_pos_groups": own.position_groups,
    }


def _written_image(own: ImageNetwork, width: int) -> dict[str, Any]:
    return {
        "input_size": own.image_size,
        "patch_size": own.patch_size,
        "embed_dim": own.patch_width or width,
        "num_extra_tokens": own.num_extra_tokens,
    }


def _written_text(own: TextNetwork, width: int) -> dict[str, Any]:
    return _written_alibi(own) | {
        "max_source_positions": own.max_tokens,
        "no_token_positional_embeddings": not own.learned_positions,
        "dropout": own.embedding_dropout,
    }


WRITERS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "audio": _written_audio,
    "image": _written_image,
    "text": _written_text,
}
