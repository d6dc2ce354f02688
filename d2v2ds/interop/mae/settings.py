"""The network that the arguments of the official MAE model describe, as our settings."""

from dataclasses import dataclass
from typing import Any

from d2v2ds.interop.fairseq.official_fields import Fields
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.transformer_decoder import TransformerDecoderConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.mae import MaeModality

MODALITY = "image"


@dataclass(frozen=True, kw_only=True)
class OfficialMae:
    """Settings of one official network."""

    trunk: TrunkConfig
    objective: MaeModality


def network_of(official: dict[str, Any]) -> OfficialMae:
    """Translate the arguments of `MaskedAutoencoderViT` (models_mae.py).

    Args:
        official: arguments by name; `norm_eps` and `mask_ratio` beside them.

    Raises:
        UnsupportedOptionError: naming an argument that is missing, or that our network lacks.
    """
    fields = Fields(official, "", None)
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
    decoder = TransformerDecoderConfig(
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
