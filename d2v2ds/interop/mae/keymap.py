"""Parameter names of official MAE checkpoints (models_mae.py, models_vit.py) and ours, as data; shapes are the same.

`{p}` stands for what follows. Ours are those of an export: without `trunk.`.
"""

from d2v2ds.interop.fairseq.keymap import translate

TABLE = [
    ("encoders.image.local.proj.{p}", "patch_embed.proj.{p}"),
    ("encoders.image.fixed_positions.table", "pos_embed"),
    ("encoders.image.extra.tokens", "cls_token"),
    ("blocks.{p}", "blocks.{p}"),
    ("norm.{p}", "norm.{p}"),
    ("decoders.image.embed.{p}", "decoder_embed.{p}"),
    ("decoders.image.mask_token.vector", "mask_token"),
    ("decoders.image.fixed_positions.table", "decoder_pos_embed"),
    ("decoders.image.blocks.{p}", "decoder_blocks.{p}"),
    ("decoders.image.norm.{p}", "decoder_norm.{p}"),
    ("decoders.image.proj.{p}", "decoder_pred.{p}"),
    ("head.norm.{p}", "fc_norm.{p}"),
    ("head.proj.{p}", "head.{p}"),
]


def to_ours(official: str) -> str | None:
    """Our name of an official parameter; None if the table has none."""
    found = (translate(official, theirs, ours) for ours, theirs in TABLE)
    return next((name for name in found if name is not None), None)


def to_official(name: str) -> str | None:
    """The official name of one of our parameters; None if the table has none."""
    found = (translate(name, ours, theirs) for ours, theirs in TABLE)
    return next((official for official in found if official is not None), None)
