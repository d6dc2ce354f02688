"""The network that an official configuration describes, as our settings.

`network_of` refuses unknown keys; `read_section` is for whole files, which carry keys of the run beside those of the
network, and reports them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from d2v2ds.interop.fairseq.official_fields import (
    FINAL_NORMS,
    LAYER_NORMS,
    Fields,
    Notes,
    UnsupportedOptionError,
    conv_layers,
)
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.spectrogram.network import SpectrogramNetwork
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec2 import ModalityConfig
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import NormKind, TargetConfig

OFFICIAL_NAMES = {"spectrogram": "image"}
"""Names of modalities in official sections where they are not ours."""
_ANY_MASK = MaskConfig(masked_fraction=0.5, num_masks=1, kind="random")


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
    """Translate the section of a network.

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
    notes = Notes()
    config = _translated(official, modality, vocab_size, notes)
    name = OFFICIAL_NAMES.get(modality, modality)
    own, where = notes.known[f"modalities.{name}."], f"modalities.{name}.decoder."
    section = notes.known[""] | {"modalities": {name: own | {"decoder": notes.known[where]}}}
    others = [one for one, value in official.get("modalities", {}).items() if one != name and value is not None]
    return config, section, notes.ignored + [f"modalities.{name}" for name in others]


def _translated(
    official: dict[str, Any], modality: str, vocab_size: int | None, notes: Notes | None
) -> OfficialNetwork:
    if modality not in _NETWORK_READERS:
        raise UnsupportedOptionError(f"modality={modality}")
    fields, name = Fields(official, "", notes), OFFICIAL_NAMES.get(modality, modality)
    values = fields("modalities", {}).get(name, {})
    target = TargetConfig(
        num_layers=fields.required("average_top_k_layers"),
        layer_norms=_norms(fields, LAYER_NORMS),
        final_norms=_norms(fields, FINAL_NORMS),
    )
    width, encoder_only = fields.required("embed_dim"), fields("ema_encoder_only", True)
    loss = LossConfig(scale=fields("loss_scale", None), beta=fields("loss_beta", 0), cls_weight=fields("cls_loss", 0))
    case = _Case(values=values or {}, where=f"modalities.{name}.", width=width, vocab_size=vocab_size, notes=notes)
    section, own, decoder = _NETWORK_READERS[modality](case)
    shares_local = not own("ema_local_encoder", False)
    own.finish()
    if encoder_only:
        _refuse_teacher_of_blocks(section, shares_local)
    trunk = TrunkConfig(
        block=BlockConfig(
            width=width,
            num_heads=fields("num_heads", 12),
            mlp_ratio=fields("mlp_ratio", 4),
            norm_eps=fields("norm_eps", 1e-6 if isinstance(section, ImageNetwork | SpectrogramNetwork) else 1e-5),
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


def _refuse_teacher_of_blocks(section: "_Network", shares_local: bool) -> None:
    """Refuse networks whose official teacher holds the shared blocks alone and computes something else than ours."""
    if not (isinstance(section, TextNetwork) and shares_local and section.prenet_depth == 0):
        raise UnsupportedOptionError(
            "ema_encoder_only=True (a teacher of nothing but shared blocks is known for text without prenet blocks)"
        )
    if section.alibi:
        raise UnsupportedOptionError(
            "use_alibi_encoder=True with ema_encoder_only=True (its teacher reads the student's scale, ours its own)"
        )


def _norms(fields: Fields, kinds: dict[str, NormKind]) -> tuple[NormKind, ...]:
    return tuple(kind for key, kind in kinds.items() if fields(key, False))


@dataclass(frozen=True)
class _Case:
    """Inputs that the readers of all modalities share."""

    values: dict[str, Any]
    where: str
    width: int
    vocab_size: int | None
    notes: Notes | None

    def decoder(self, fields: Fields, *, projections: bool) -> DecoderConfig:
        """Read the decoder's section; the official image decoder always has one Linear."""
        inner = Fields(fields("decoder", {}), f"{self.where}decoder.", self.notes)
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


def _alibi(fields: Fields) -> dict[str, bool]:
    """Read the distance penalty of speech or text."""
    return {
        "alibi": fields("use_alibi_encoder", False),
        "alibi_learned": fields("learned_alibi_scale", False),
        "alibi_per_head": fields("learned_alibi_scale_per_head", False),
        "alibi_per_block": fields("learned_alibi_scale_per_layer", False),
    }


_Network = AudioNetwork | ImageNetwork | TextNetwork | SpectrogramNetwork
_Read = tuple[_Network, Fields, DecoderConfig]


def _audio(case: _Case) -> _Read:
    fields = Fields(case.values, case.where, case.notes)
    config = AudioNetwork(
        prenet_depth=fields.required("prenet_depth"),
        conv_layers=conv_layers(fields("feature_encoder_spec", "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2")),
        position_depth=fields("conv_pos_depth", 5),
        position_total_kernel=fields("conv_pos_width", 95),
        position_groups=fields("conv_pos_groups", 16),
        conv_gradient=fields("local_grad_mult", 1.0),
        prenet_dropout=fields("prenet_dropout", 0.0),
        **_alibi(fields),
    )
    return config, fields, case.decoder(fields, projections=True)


def _image(case: _Case) -> _Read:
    fields = Fields(case.values, case.where, case.notes)
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


def _spectrogram(case: _Case) -> _Read:
    """Read the section `image` of EAT, whose images have one channel."""
    fields = Fields(case.values, case.where, case.notes)
    if (channels := fields("in_chans", 1)) != 1:
        raise UnsupportedOptionError(f"{case.where}in_chans={channels!r}")
    patch_width = fields("embed_dim", 768)
    fields("input_size", None)  # of images; a spectrogram's grid follows from target_length and 128 mel bins
    config = SpectrogramNetwork(
        prenet_depth=fields.required("prenet_depth"),
        target_length=fields("target_length", 1024),
        max_rows=fields("max_length", 768),
        patch_size=fields("patch_size", 16),
        patch_width=None if patch_width == case.width else patch_width,
        num_extra_tokens=fields("num_extra_tokens", 0),
        prenet_dropout=fields("prenet_dropout", 0.0),
    )
    return config, fields, case.decoder(fields, projections=False)


def _text(case: _Case) -> _Read:
    fields = Fields(case.values, case.where, case.notes)
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


_NETWORK_READERS: dict[str, Callable[[_Case], _Read]] = {
    "audio": _audio,
    "image": _image,
    "text": _text,
    "spectrogram": _spectrogram,
}
