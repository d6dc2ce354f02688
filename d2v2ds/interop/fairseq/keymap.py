"""Parameter names of the official checkpoints and ours, as data.

`{i}` stands for a layer number, `{p}` for what follows. The offset is added to our number to get theirs.
Shapes are the same but for one parameter: the scale of the distance penalty, (L or 1, H or 1) here and
(L or 1, 1, H or 1, 1, 1) there.
"""

import re
from collections.abc import Collection

from torch import Tensor

Row = tuple[str, str, int]


def _of_modality(name: str, rows: list[Row], official: str | None = None) -> list[Row]:
    """Put the two prefixes of a modality in front of its rows, which begin with E (encoder) or D (decoder)."""
    ours, official = {"E": f"encoders.{name}", "D": f"decoders.{name}"}, official or name.upper()
    theirs = {"E": f"modality_encoders.{official}", "D": f"modality_encoders.{official}.decoder"}
    return [(ours[mine[0]] + mine[1:], theirs[mine[0]] + official, offset) for mine, official, offset in rows]


_PRENET: list[Row] = [
    ("E.prenet.norm.{p}", ".context_encoder.norm.{p}", 0),
    ("E.prenet.blocks.{p}", ".context_encoder.blocks.{p}", 0),
]
_DECODER: list[Row] = [
    ("D.layers.{i}.conv.{p}", ".blocks.{i}.0.{p}", 0),
    ("D.proj.{p}", ".proj.{p}", 0),
]

_PATCHES: list[Row] = [
    ("E.local.proj.{p}", ".local_encoder.proj.{p}", 0),
    ("E.local.proj.{p}", ".local_encoder.0.proj.{p}", 0),  # where `widen` follows, see `official_names`
    ("E.local.widen.{p}", ".local_encoder.1.{p}", 0),
    ("E.fixed_positions.table", ".fixed_positional_encoder.positions", 0),
    ("E.extra.tokens", ".extra_tokens", 0),
    *_PRENET,
    *_DECODER,
]

TABLE: list[Row] = [
    ("blocks.{p}", "blocks.{p}", 0),
    *_of_modality(
        "audio",
        [
            ("E.local.convs.layers.{i}.conv.{p}", ".local_encoder.conv_layers.{i}.0.{p}", 0),
            ("E.local.convs.layers.{i}.norm.{p}", ".local_encoder.conv_layers.{i}.2.1.{p}", 0),
            ("E.local.norm.{p}", ".project_features.1.{p}", 0),
            ("E.local.project.{p}", ".project_features.2.{p}", 0),
            ("E.positions.layers.{i}.conv.{p}", ".relative_positional_encoder.{i}.0.{p}", 1),
            ("E.alibi.scale", ".alibi_scale", 0),
            *_PRENET,
            *_DECODER,
        ],
    ),
    *_of_modality("image", _PATCHES),
    *_of_modality("spectrogram", _PATCHES, "IMAGE"),  # EAT calls its spectrograms images
    *_of_modality(
        "text",
        [
            ("E.local.tokens.{p}", ".local_encoder.embed_tokens.{p}", 0),
            ("E.local.places.{p}", ".local_encoder.embed_positions.{p}", 0),
            ("E.local.norm.{p}", ".local_encoder.layernorm_embedding.{p}", 0),
            ("E.alibi.scale", ".alibi_scale", 0),
            *_PRENET,
            *_DECODER,
        ],
    ),
    # last: the official text teacher is the list of shared blocks itself, so its names begin with a number
    ("blocks.{i}.{p}", "{i}.{p}", 0),
]


def translate(name: str, source: str, target: str, offset: int = 0) -> str | None:
    """Translate a name by one row of a table; None if the row is of other names.

    Args:
        name: to translate.
        source: its form, with `{i}` and `{p}`.
        target: form of the result.
        offset: added to the number at `{i}`.
    """
    pattern = re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", r"(?P<p>.+)")
    found = re.fullmatch(pattern, name)
    if found is None:
        return None
    groups = found.groupdict()
    number = str(int(groups["i"]) + offset) if "i" in groups else ""
    return target.replace("{i}", number).replace("{p}", groups.get("p", ""))


def to_ours(official: str, modality: str | None = None) -> str | None:
    """Our name of an official parameter, None if the table has none.

    Args:
        official: name.
        modality: ours, where official files give two modalities the same names; None: the first in the table.
    """
    for ours, theirs, offset in TABLE:
        if modality is not None and ours.startswith(_OF_MODALITIES) and ours.split(".")[1] != modality:
            continue
        name = translate(official, theirs, ours, -offset)
        if name is not None:
            return name
    return None


def to_official(name: str, *, widens: bool = False) -> str | None:
    """The official name of one of our parameters, None if the table has none.

    Args:
        name: ours.
        widens: the patches of the network have a width of their own, and a Linear after them.
    """
    for ours, theirs, offset in TABLE:
        official = translate(name, ours, theirs, offset)
        if official is not None and not (widens and official.endswith(_PATCHES_OF_MODEL_WIDTH)):
            return official
    return None


_OF_MODALITIES = ("encoders.", "decoders.")
_PATCHES_OF_MODEL_WIDTH = (".local_encoder.proj.weight", ".local_encoder.proj.bias")


def official_names(names: Collection[str], *, bare_blocks: bool = False) -> dict[str, str]:
    """The official names of a whole network.

    Args:
        names: ours.
        bare_blocks: of a teacher that is nothing but the list of shared blocks (`ema_encoder_only`): no prefix.

    Returns:
        Ours -> official.

    Raises:
        KeyError: the table has none for one of them.
    """
    widens = any(".local.widen." in name for name in names)
    found = {}
    for name in names:
        official = to_official(name, widens=widens)
        if official is None:
            raise KeyError(f"{name} has no official name")
        found[name] = official.removeprefix("blocks.") if bare_blocks else official
    return found


def is_alibi_scale(name: str) -> bool:
    """True for the parameter whose shape differs from the official one."""
    return name.endswith(".alibi.scale")


def official_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The official shape of one of our parameters, of which ours is given."""
    return (shape[0], 1, shape[1], 1, 1) if is_alibi_scale(name) else shape


def with_official_shape(name: str, tensor: Tensor) -> Tensor:
    """One of our parameters as the official files have it; the same memory."""
    return tensor.view(official_shape(name, tuple(tensor.shape)))


def with_our_shape(name: str, tensor: Tensor) -> Tensor:
    """The reverse: (L, 1, H, 1, 1) -> (L, H) for the scale of the distance penalty, else as it is."""
    return tensor[:, 0, :, 0, 0] if is_alibi_scale(name) else tensor
