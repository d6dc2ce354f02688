"""The network that the arguments of the official MAE model describe, as our settings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from d2v2ds.interop.fairseq.official_fields import Fields, UnsupportedOptionError
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.pixel_decoder import PixelDecoderConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.mae import MaeModality

MODALITY = "image"


@dataclass(frozen=True, kw_only=True)
class OfficialMae:
    """Settings of one official network."""

    trunk: TrunkConfig
    objective: MaeModality


def network_of(official: Mapping[str, Any]) -> OfficialMae:
    """Translate the arguments of `MaskedAutoencoderViT` (models_mae.py).

    Args:
        official: arguments by name; `norm_eps` and `mask_ratio` beside them.

    Raises:
        UnsupportedOptionError: naming an argument that is missing, or that our network lacks.
    """
    fields = Fields(dict(official), "", None)
    mlp_ratio = fields("mlp_ratio", 4)
    block = BlockConfig(
        width=fields.required("embed_dim"),
        num_heads=fields.required("num_heads"),
        mlp_ratio=mlp_ratio,
        norm_eps=fields("norm_eps", 1e-6),
        attention_dropout=0.0,
        attention_output_dropout=0.0,
        mlp_dropout=0.0,
        pre_norm=True,
    )
    image = ImageNetwork(
        prenet_depth=0,
        image_size=fields("img_size", 224),
        patch_size=fields("patch_size", 16),
        has_extra_positions=True,
    )
    decoder = PixelDecoderConfig(
        width=fields("decoder_embed_dim", 512),
        depth=fields("decoder_depth", 8),
        num_heads=fields("decoder_num_heads", 16),
        mlp_ratio=mlp_ratio,
    )
    objective = MaeModality(
        mask=MaskConfig(masked_fraction=fields("mask_ratio", 0.75), num_masks=1, kind="random"),
        decoder=decoder,
        normalise_pixels=fields("norm_pix_loss", False),
    )
    trunk = TrunkConfig(block=block, shared_depth=fields.required("depth"), modalities={MODALITY: image})
    fields.finish()
    return OfficialMae(trunk=trunk, objective=objective)


def arguments_of(trunk: TrunkConfig, objective: MaeModality | None) -> dict[str, Any]:
    """Write the official arguments of one of our networks.

    Args:
        trunk: settings of the trunk.
        objective: settings of the objective; None for an encoder alone, which gets the official decoder's defaults.

    Raises:
        UnsupportedOptionError: the network has something that the official model lacks.
    """
    image = trunk.modalities.get(MODALITY)
    if not isinstance(image, ImageNetwork) or len(trunk.modalities) > 1:
        raise UnsupportedOptionError(f"a model of {', '.join(trunk.modalities)}; MAE has images alone")
    block = trunk.block
    arguments: dict[str, Any] = {
        "img_size": image.image_size,
        "patch_size": image.patch_size,
        "in_chans": 3,
        "embed_dim": block.width,
        "depth": trunk.shared_depth,
        "num_heads": block.num_heads,
        "mlp_ratio": block.mlp_ratio,
        "norm_eps": block.norm_eps,
    }
    if objective is not None:
        decoder = objective.decoder
        arguments |= {
            "decoder_embed_dim": decoder.width,
            "decoder_depth": decoder.depth,
            "decoder_num_heads": decoder.num_heads,
            "norm_pix_loss": objective.normalise_pixels,
        }
    _require_same(network_of(arguments), trunk, objective)
    return arguments


def _require_same(found: OfficialMae, trunk: TrunkConfig, objective: MaeModality | None) -> None:
    """Raise UnsupportedOptionError if official arguments describe another computation than ours."""
    theirs, image, block = found.trunk, trunk.modalities[MODALITY], trunk.block
    plain = replace(
        block,
        attention_dropout=0.0,
        attention_output_dropout=0.0,
        mlp_dropout=0.0,
        activation_dropout=0.0,
        attention_path=theirs.block.attention_path,
    )
    width = image.patch_width if image.patch_width != block.width else None
    own = replace(image, has_extra_positions=True, prenet_dropout=0.0, patch_width=width, relative_per_block=False)
    pairs = [("model.block", plain, theirs.block), (f"model.modalities.{MODALITY}", own, theirs.modalities[MODALITY])]
    if objective is not None:
        pairs.append(("objective.decoder", objective.decoder, found.objective.decoder))
    for name, ours, official in pairs:
        if ours != official:
            raise UnsupportedOptionError(f"{name}: the official model has {official}, this one {ours}")
