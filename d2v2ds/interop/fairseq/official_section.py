"""The official `model` section of one of our networks."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from d2v2ds.interop.fairseq.official_config import OFFICIAL_NAMES, OfficialNetwork, network_of
from d2v2ds.interop.fairseq.official_fields import FINAL_NORMS, LAYER_NORMS, UnsupportedOptionError
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.spectrogram.network import SpectrogramNetwork
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec2 import ModalityConfig
from d2v2ds.objectives.targets import TargetConfig

_OF_PATCHES = (ImageNetwork, SpectrogramNetwork)


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
    if own is None or modality not in _NETWORK_WRITERS:
        raise UnsupportedOptionError(f"modality={modality}: the model has {', '.join(config.modalities)}")
    block, decoder, target, loss = config.block, objective.decoder, objective.target, objective.loss
    if not isinstance(decoder, DecoderConfig):
        raise UnsupportedOptionError(f"no official option for decoder.kind={decoder.kind!r}")
    name = OFFICIAL_NAMES.get(modality, modality)
    section: dict[str, Any] = {
        "_name": "data2vec_multi",
        "supported_modality": name.upper(),
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
        **{key: kind in target.layer_norms for key, kind in LAYER_NORMS.items()},
        **{key: kind in target.final_norms for key, kind in FINAL_NORMS.items()},
    }
    section["modalities"] = {
        name: {
            "prenet_depth": own.prenet_depth,
            "prenet_dropout": own.prenet_dropout,
            "ema_local_encoder": not objective.share_local_encoder,
            "mask_noise_std": decoder.mask_noise_std,
            **_NETWORK_WRITERS[modality](own, block.width),
            "decoder": _written_decoder(decoder, has_projections=not isinstance(own, _OF_PATCHES)),
        }
    }
    _require_same(section, modality, config, objective, decoder)
    return section


def any_objective(config: TrunkConfig, modality: str) -> ModalityConfig:
    """Settings of an objective for a network whose pretraining is not known: the official defaults.

    The official classes of fine-tuned models build a decoder by them, and drop it.

    Args:
        config: settings of the trunk.
        modality: one that the trunk has.
    """
    groups = 16 if config.block.width % 16 == 0 else 1
    return ModalityConfig(
        share_local_encoder=not isinstance(config.modalities[modality], _OF_PATCHES),
        mask=MaskConfig(masked_fraction=0.5, num_masks=1, kind="random"),
        decoder=DecoderConfig(width=384, depth=5, kernel=5, groups=groups),
        target=TargetConfig(num_layers=config.shared_depth, layer_norms=("instance",)),
    )


def _require_same(
    section: dict[str, Any], modality: str, config: TrunkConfig, objective: ModalityConfig, decoder: DecoderConfig
) -> None:
    """Read a written section again and compare.

    Raises:
        UnsupportedOptionError: naming each setting that the section cannot express.
    """
    own = config.modalities[modality]
    block = replace(config.block, attention_path="auto")
    wanted = OfficialNetwork(
        trunk=replace(config, block=block, modalities={modality: own}),
        share_local_encoder=objective.share_local_encoder,
        decoder=decoder,
        target=objective.target,
        loss=replace(objective.loss, cls_rows=None),
    )
    found = network_of(section, modality, getattr(own, "vocab_size", None))
    if found != wanted:
        raise UnsupportedOptionError(f"no official option for {', '.join(_differences(asdict(wanted), asdict(found)))}")


def _written_decoder(decoder: DecoderConfig, *, has_projections: bool) -> dict[str, Any]:
    written = {
        "decoder_dim": decoder.width,
        "decoder_layers": decoder.depth,
        "decoder_kernel": decoder.kernel,
        "decoder_groups": decoder.groups,
        "input_dropout": decoder.input_dropout,
        "decoder_residual": decoder.residual,
    }
    if has_projections:
        written |= {"projection_layers": decoder.projection_layers, "projection_ratio": decoder.projection_ratio}
    return written


def _differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    """List the fields of nested dictionaries that differ, as `a.b=value`."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [fault for key in wanted for fault in _differences(wanted[key], found[key], f"{where}.{key}")]
    return [] if wanted == found else [f"{where[1:]}={wanted!r}"]


def _averages_blocks_alone(own: Any, objective: ModalityConfig) -> bool:
    """Return True if the official teacher of such a modality holds the shared blocks alone, without prefix."""
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
        "local_grad_mult": own.conv_gradient,
    }


def _written_image(own: ImageNetwork, width: int) -> dict[str, Any]:
    return {
        "input_size": own.image_size,
        "patch_size": own.patch_size,
        "embed_dim": own.patch_width or width,
        "num_extra_tokens": own.num_extra_tokens,
    }


def _written_spectrogram(own: SpectrogramNetwork, width: int) -> dict[str, Any]:
    return {
        "in_chans": 1,
        "target_length": own.target_length,
        "max_length": own.max_rows,
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


_NETWORK_WRITERS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "audio": _written_audio,
    "image": _written_image,
    "spectrogram": _written_spectrogram,
    "text": _written_text,
}
