"""Parameter names of BAT's checkpoints (arXiv 2602.16305) and ours, as data."""

from d2v2ds.interop.fairseq.keymap import translate

_OURS = "encoders.spectrogram"
ENCODER: list[tuple[str, str]] = [
    ("blocks.{p}", "blocks.{p}"),
    (f"{_OURS}.local.proj.{{p}}", "patch_embed.proj.{p}"),
    (f"{_OURS}.fixed_positions.table", "pos_embed"),
    (f"{_OURS}.extra.tokens", "cls_token"),
    (f"{_OURS}.prenet.norm.{{p}}", "pre_norm.{p}"),
]
"""(ours, BAT's) for the encoder; `{p}` stands for what follows."""
DECODER: list[tuple[str, str]] = [
    ("decoders.spectrogram.blocks.{p}", "blocks.{p}"),
    ("decoders.spectrogram.mask_tokens.vector", "mask_token"),
    ("decoders.spectrogram.positions.table", "pos_embed"),
    ("decoders.spectrogram.proj.{p}", "out_proj.{p}"),
]
"""(ours, BAT's) for the decoder."""


def our_bat_name(official: str, *, is_of_decoder: bool = False) -> str | None:
    """Translate the name of a parameter of BAT's encoder, or of its decoder; None if the table has none."""
    found = (translate(official, theirs, ours, 0) for ours, theirs in (DECODER if is_of_decoder else ENCODER))
    return next((name for name in found if name is not None), None)
