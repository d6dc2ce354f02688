"""The network and objective that an official data2vec 1.0 configuration describes, as our settings.

Every key is looked at; one that changes the computation and that this project does not have is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from d2v2ds.interop.fairseq.official_fields import (
    FINAL_NORMS,
    LAYER_NORMS,
    UnsupportedOptionError,
    conv_layers,
)
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.model.block import BlockConfig, TargetLayer
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec1 import Data2Vec1Config, TeacherInput, WholeModalityConfig
from d2v2ds.objectives.ema import EmaConfig
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import NormKind, TargetConfig
from d2v2ds.whole_masks import GridBlocks, SpanWholeMask, WholeMask

Layout = Literal["audio", "text", "image", "image of BEiT"]
"""Key of `data2vec1_keymap.TABLES`."""


@dataclass(frozen=True, kw_only=True)
class FirstNetwork:
    """Settings of one official network of data2vec 1.0."""

    layout: Layout
    modality: str
    trunk: TrunkConfig
    objective: Data2Vec1Config
    teacher_prefix: str
    """Prefix of an official student's names that its teacher's names lack."""

    @property
    def own(self) -> WholeModalityConfig:
        """Settings of the objective for its modality."""
        return self.objective.modalities[self.modality]


class _Keys:
    """Keys of an official section; remembers which were read."""

    def __init__(
        self, values: Mapping[str, Any], where: str, ignored: tuple[str, ...], notes: list[str] | None = None
    ) -> None:
        """
        Args:
            values: of the section.
            where: prefix of its keys in messages.
            ignored: keys that change no computation of ours.
            notes: takes the keys that nothing has read, as `name=value`; None refuses them.
        """
        self.values, self.where, self.seen, self.notes = values, where, set(ignored), notes

    def __call__(self, name: str, default: Any) -> Any:
        self.seen.add(name)
        found = self.values.get(name)
        return default if found is None else found

    def must_be(self, **expected: Any) -> None:
        """Refuse another value of a key than the one given, where it is there.

        Raises:
            UnsupportedOptionError: naming it.
        """
        for name, value in expected.items():
            if (found := self(name, value)) != value:
                raise UnsupportedOptionError(f"{self.where}{name}={found!r}, expected {value!r}")

    def finish(self) -> None:
        """Refuse, or note, every key that nothing has read.

        Raises:
            UnsupportedOptionError: naming them.
        """
        unknown = [
            f"{self.where}{name}={v!r}" for name, v in self.values.items() if name not in self.seen and v is not None
        ]
        if self.notes is not None:
            self.notes += unknown
        elif unknown:
            raise UnsupportedOptionError(", ".join(unknown))


_OF_RUNS = (
    "_name",
    "ema_decay",
    "ema_end_decay",
    "ema_anneal_end_step",
    "min_target_var",
    "min_pred_var",
    "max_update",
)


_OF_SPEECH_RUNS = ("require_same_masks", "required_seq_len_multiple", "log_norms")


def first_network_of(official: Mapping[str, Any], modality: str, **context: Any) -> FirstNetwork:
    """Translate the section of a network.

    Args:
        official: the `model` section of an official configuration.
        modality: lower-case name.
        context: what stands outside the section: `vocab_size`, `mask_token` and `teacher_input` of text; `mask`,
            `target_layers` and `objective` of the fork of BEiT; and for whole files, which have every default beside,
            `notes`, a list that takes the keys that are not known, instead of refusing them.

    Raises:
        UnsupportedOptionError: naming the option.
    """
    reader = _READERS.get(str(official.get("_name", f"data2vec_{modality}")))
    if reader is None:
        raise UnsupportedOptionError(f"model._name={official.get('_name')!r}")
    return reader(official, context)


def _ema(keys: _Keys, default_steps: int = 1) -> EmaConfig:
    start = keys("ema_decay", 0.999)
    return EmaConfig(
        start_decay=start,
        end_decay=keys("ema_end_decay", start),
        anneal_steps=keys("ema_anneal_end_step", default_steps),
    )


def _target(keys: _Keys, layer: TargetLayer, count: int | None = None) -> TargetConfig:
    layers: tuple[NormKind, ...] = tuple(kind for key, kind in _ORDERED_LAYER_NORMS.items() if keys(key, False))
    final: tuple[NormKind, ...] = tuple(kind for key, kind in FINAL_NORMS.items() if keys(key, False))
    return TargetConfig(
        num_layers=keys("average_top_k_layers", 8) if count is None else count,
        layer=layer,
        layer_norms=layers,
        final_norms=final,
    )


_ORDERED_LAYER_NORMS: dict[str, NormKind] = {
    key: LAYER_NORMS[key]
    for key in ("batch_norm_target_layer", "instance_norm_target_layer", "layer_norm_target_layer")
}


def _scale(value: float | None, *, zero: float | None) -> float | None:
    """Return our scale for `loss_scale`; zero or less is taken literally, as 1, or as 1 / sqrt(D) (None)."""
    return value if value is None or value > 0 else zero


def _audio(official: Mapping[str, Any], context: Mapping[str, Any]) -> FirstNetwork:
    keys = _Keys(official, "model.", (*_OF_RUNS, *_OF_SPEECH_RUNS), context.get("notes"))
    keys.must_be(
        extractor_mode="layer_norm", layer_norm_first=False, conv_bias=False, activation_fn="gelu", mask_dropout=0.0,
        dropout_features=0.0, dropout_input=0.0, mask_channel_prob=0.0, layer_type="transformer",
        quantize_targets=False, quantize_input=False, attn_type="", pos_enc_type="abs",
        mask_selection="static", mask_other=0, no_mask_overlap=False, mask_min_space=1, group_norm_target_layer=False,
    )  # fmt: skip
    if (keys("instance_norm_targets", False)) and not keys("instance_norm_target_layer", False):
        raise UnsupportedOptionError(
            "model.instance_norm_targets=True without instance_norm_target_layer: normalises over the batch"
        )
    layers_only = keys("ema_layers_only", False)
    if not (keys("ema_transformer_only", True) or layers_only):
        raise UnsupportedOptionError("model.ema_transformer_only=False: a teacher of the whole speech model")
    width, depth = keys("encoder_embed_dim", 768), keys("encoder_layers", 12)
    loss_scale = keys("loss_scale", None)
    own = WholeModalityConfig(
        share_local_encoder=True,
        mask=SpanWholeMask(fraction=keys("mask_prob", 0.65), length=keys("mask_length", 10)),
        target=_target(keys, "feed_forward"),
        loss=LossConfig(scale=loss_scale, beta=keys("loss_beta", 0.0)),
        copied=("positions",) if layers_only else (),
    )
    network = AudioNetwork(
        prenet_depth=0,
        conv_layers=conv_layers(keys("conv_feature_layers", "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] * 2")),
        position_depth=keys("pos_conv_depth", 1),
        position_total_kernel=keys("conv_pos", 128),
        position_groups=keys("conv_pos_groups", 16),
        conv_gradient=keys("feature_grad_mult", 1.0),
        prenet_dropout=keys("dropout", 0.1),
        alibi=False,
    )
    block = BlockConfig(
        width=width,
        num_heads=keys("encoder_attention_heads", 12),
        mlp_ratio=keys("encoder_ffn_embed_dim", 3072) / width,
        attention_dropout=keys("attention_dropout", 0.1),
        attention_output_dropout=keys("dropout", 0.1),
        mlp_dropout=keys("dropout", 0.1),
    )
    if keys("activation_dropout", 0.0):
        raise UnsupportedOptionError("model.activation_dropout: expected 0")
    trunk = TrunkConfig(
        block=block, shared_depth=depth, modalities={"audio": network}, layer_drop=keys("encoder_layerdrop", 0.0)
    )
    objective = Data2Vec1Config(ema=_ema(keys), modalities={"audio": own})
    keys.finish()
    return FirstNetwork(layout="audio", modality="audio", trunk=trunk, objective=objective, teacher_prefix="encoder.")


def _text(official: Mapping[str, Any], context: Mapping[str, Any]) -> FirstNetwork:
    notes = context.get("notes")
    keys = _Keys(official, "model.", (*_OF_RUNS, "transformer", "load_checkpoint_heads"), notes)
    inner = _Keys(official.get("transformer") or {}, "model.transformer.", ("encoder",), notes)
    encoder = _Keys(inner.values.get("encoder") or {}, "model.transformer.encoder.", (), notes)
    inner.must_be(
        layernorm_embedding=True, activation_fn="gelu", no_scale_embedding=True, activation_dropout=0.0,
        no_token_positional_embeddings=False, adaptive_input=False,
    )  # fmt: skip
    encoder.must_be(normalize_before=False, learned_pos=True)
    keys.must_be(ema_transformer_layers_only=True, group_norm_target_layer=False)
    if "vocab_size" not in context or "mask_token" not in context:
        raise UnsupportedOptionError("vocab_size and mask_token are not given and have no known default")
    width, dropout = encoder("embed_dim", 768), inner("dropout", 0.1)
    task = context.get("task", {})
    own = WholeModalityConfig(
        share_local_encoder=False,
        mask=SpanWholeMask(
            fraction=task.get("mask_prob", 0.35), length=int(task.get("mask_multiple_length", 4)), starts_anywhere=True
        ),
        target=_target(keys, "feed_forward"),
        loss=LossConfig(scale=_scale(keys("loss_scale", 0.0), zero=None), beta=keys("loss_beta", 0.0)),
        head_layers=keys("head_layers", 1),
        mask_token=context["mask_token"],
        teacher_input=_teacher_input(context),
        copied=("local",),
    )
    network = TextNetwork(
        prenet_depth=0,
        vocab_size=context["vocab_size"],
        max_tokens=inner("max_source_positions", 512),
        embedding_dropout=dropout,
    )
    block = BlockConfig(
        width=width,
        num_heads=encoder("attention_heads", 12),
        mlp_ratio=encoder("ffn_embed_dim", 3072) / width,
        attention_dropout=inner("attention_dropout", 0.1),
        attention_output_dropout=dropout,
        mlp_dropout=dropout,
    )
    trunk = TrunkConfig(
        block=block,
        shared_depth=encoder("layers", 12),
        modalities={"text": network},
        layer_drop=encoder("layerdrop", 0.0),
    )
    objective = Data2Vec1Config(ema=_ema(keys), modalities={"text": own})
    for section in (keys, inner, encoder):
        section.finish()
    prefix = "encoder.sentence_encoder."
    return FirstNetwork(layout="text", modality="text", trunk=trunk, objective=objective, teacher_prefix=prefix)


def _teacher_input(context: Mapping[str, Any]) -> TeacherInput:
    return "masked_tokens" if context.get("teacher_input") == "masked_tokens" else "whole"


def _image_trunk(keys: _Keys, network: Mapping[str, Any], layer_scale: float, **block: Any) -> TrunkConfig:
    """Build the settings that both image layouts share."""
    return TrunkConfig(
        block=BlockConfig(
            pre_norm=True,
            key_bias=False,
            layer_scale=layer_scale or None,
            num_heads=keys("num_heads", 12),
            attention_output_dropout=0.0,
            mlp_dropout=0.0,
            **block,
        ),
        shared_depth=keys("depth", 12),
        modalities={
            "image": ImageNetwork(
                prenet_depth=0, patch_size=keys("patch_size", 16), positions="relative", num_extra_tokens=1, **network
            )
        },
    )


def _image(official: Mapping[str, Any], context: Mapping[str, Any]) -> FirstNetwork:
    keys = _Keys(official, "model.", (*_OF_RUNS, "mlp_ratio"))  # the ratio is read by nothing: always 4
    keys.must_be(shared_rel_pos_bias=True, batch_norm_target_layer=False, in_channels=3)
    image_size, is_block = keys("image_size", 224), keys("end_of_block_targets", True)
    blocks = GridBlocks(
        count=keys("num_mask_patches", 75),
        least=keys("min_mask_patches_per_block", 16),
        most=keys("max_mask_patches_per_block", 196),
    )
    trunk = _image_trunk(
        keys,
        {"image_size": image_size},
        keys("layer_scale_init_value", 1e-4),
        width=keys("embed_dim", 768),
        norm_eps=1e-5,
        attention_dropout=keys("attention_dropout", 0.0),
    )
    shares = keys("ema_transformer_only", True)
    own = WholeModalityConfig(
        share_local_encoder=shares,
        mask=blocks,
        target=_target(keys, "block" if is_block else "feed_forward"),
        loss=LossConfig(scale=_scale(keys("loss_scale", None), zero=1.0), beta=keys("loss_beta", 0.0)),
        head_layers=0,
        copied=("extra",) if shares else (),
        first_weights="fairseq_image",
    )
    objective = Data2Vec1Config(ema=_ema(keys), drop_path=keys("drop_path", 0.0), modalities={"image": own})
    keys.finish()
    prefix = "encoder." if shares else ""
    return FirstNetwork(layout="image", modality="image", trunk=trunk, objective=objective, teacher_prefix=prefix)


def _image_of_beit(official: Mapping[str, Any], context: Mapping[str, Any]) -> FirstNetwork:
    keys = _Keys(official, "model.", _OF_RUNS)
    keys.must_be(qkv_bias=True, use_abs_pos_emb=False, use_shared_rel_pos_bias=True, use_rel_pos_bias=False)
    mask = _Keys(context.get("mask", {}), "mask.", ())
    loss = _Keys(context.get("objective", {}), "objective.", ())
    depth, width = keys("depth", 12), keys("embed_dim", 768)
    top = list(context.get("target_layers", range(depth - 6, depth)))
    if top != list(range(depth - len(top), depth)):
        raise UnsupportedOptionError(f"target_layers={top}, expected the last ones of {depth}")
    trunk = _image_trunk(
        keys,
        {"image_size": keys("img_size", 224)},
        keys("init_values", 1e-4),
        width=width,
        mlp_ratio=keys("mlp_ratio", 4),
        norm_eps=keys("norm_eps", 1e-6),
        attention_dropout=keys("attn_drop_rate", 0.0),
    )
    is_block = loss("layer_results", "end") == "end"
    own = WholeModalityConfig(
        share_local_encoder=False,
        mask=_blocks(mask),
        target=TargetConfig(
            num_layers=len(top),
            layer="block" if is_block else "feed_forward",
            layer_norms=("layer",) if loss("target_layer_norm_last", True) else (),
            final_norms=("layer",) if loss("post_target_layer_norm", False) else (),
        ),
        loss=LossConfig(scale=1.0 / width, beta=0.0 if loss("l2_loss", False) else loss("l1_beta", 2.0)),
        first_weights="beit",
    )
    decay = official.get("ema_decay", context.get("ema_decay", 0.9998))
    ema = EmaConfig(start_decay=decay, end_decay=decay, anneal_steps=0)
    objective = Data2Vec1Config(ema=ema, drop_path=keys("drop_path_rate", 0.0), modalities={"image": own})
    for section in (keys, mask, loss):
        section.finish()
    return FirstNetwork(
        layout="image of BEiT",
        modality="image",
        trunk=trunk,
        objective=objective,
        teacher_prefix="",
    )


def _blocks(mask: _Keys) -> WholeMask:
    return GridBlocks(
        count=mask("num_masking_patches", 120), least=mask("min_num_patches", 16), most=mask("max_num_patches", 196)
    )


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], FirstNetwork]] = {
    "data2vec_audio": _audio,
    "data2vec_text": _text,
    "data2vec_vision": _image,
    "data2vec_image": _image,
    "data2vec_vision_beit_layout": _image_of_beit,
}
"""Reader of a section by the official name of the model."""
