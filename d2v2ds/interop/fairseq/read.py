"""Read an official data2vec 2.0 checkpoint without running anything in it.

Takes pretraining checkpoints (student and, under `_ema`, teacher) and fine-tuned ones (encoder and head). Tensors keep
their type and their bits. Of the official configuration only the fields that define the network are read and kept;
everything else is listed and left behind.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from d2v2ds.errors import CheckpointError, ConfigError
from d2v2ds.interop.fairseq.eat_folder import read_eat_folder
from d2v2ds.interop.fairseq.heads import READ_OPTIONS, Facts, read_facts
from d2v2ds.interop.fairseq.keymap import (
    is_alibi_scale,
    official_names,
    official_shape,
    with_our_shape,
)
from d2v2ds.interop.fairseq.official_config import OFFICIAL_NAMES, OfficialNetwork, read_section
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.pickles import plain
from d2v2ds.interop.fairseq.torch_file import read_pickled
from d2v2ds.modalities.settings import read_trunk
from d2v2ds.model.trunk import Trunk
from d2v2ds.objectives.data2vec2 import Data2Vec2Config, Data2Vec2Network, ModalityConfig
from d2v2ds.objectives.ema import EmaConfig

Tensors = dict[str, Tensor]

LICENCES = {
    "audio": "to our knowledge the official speech weights are under the MIT licence, like the code",
    "image": "the official VISION weights are offered for NON-COMMERCIAL use only (CC-BY-NC 4.0), and so is what is "
    "made of them",
    "spectrogram": "to our knowledge the weights of EAT are under the MIT licence, like the code",
    "text": "to our knowledge the official text weights are under the MIT licence, like the code",
}
"""Licence of the published weights; printed with every import."""


OWN_LICENCE = "weights of a run of d2v2ds: their owner decides"
"""Licence that `export` writes into files of our own runs."""
MADE_BY = "d2v2ds"
"""Key of `cfg` under which `export` says what it wrote, for `import` to find."""


def licence_of(modality: str, configuration: Any) -> str:
    """Licence named in a file that d2v2ds wrote, else that of the published files."""
    made_by = configuration.get(MADE_BY) if isinstance(configuration, dict) else None
    if isinstance(made_by, dict) and isinstance(made_by.get("licence"), str):
        return str(made_by["licence"])
    return f"{LICENCES[modality]}; check what came with your file, which alone is binding"


TEACHER = "_ema"
_ANCHOR = "blocks.0.norm1.weight"
DECODERS = "decoders."
_ANY_EMA = EmaConfig(start_decay=0.999, end_decay=0.999, anneal_steps=0)
"""For checks alone: an official file of weights says nothing of the schedule that matters here."""
_MODALITY = re.compile(r"modality_encoders\.([A-Z0-9_]+)\.")
_PATCHES = (".local_encoder.proj.weight", ".local_encoder.0.proj.weight")
_NO_NETWORK = (
    ConfigError, ValidationError, TypeError, ValueError, AttributeError, KeyError, SyntaxError, MemoryError,
    RecursionError,
)  # fmt: skip
"""Errors on values that are no configuration."""
_MOST_SHARED = 2
"""Times that the bytes of a file may be used, on average."""
_MOST_NESTED = 12
"""Levels of the official configuration that are searched."""


@dataclass(frozen=True, kw_only=True)
class OfficialCheckpoint:
    """Contents of an official file."""

    modality: str
    network: OfficialNetwork
    section: dict[str, Any]
    """The official fields that define the network, in plain values, for writing back."""
    trunk: Tensors
    """Student's trunk by our names, in our shapes."""
    decoder: Tensors
    """Student's decoder likewise; empty if the file has none."""
    teacher: Tensors | None
    """Likewise; None where the file has none."""
    head: Tensors
    """Tensors of a fine-tuned file outside the encoder, by its own names."""
    prefix: str
    """Prefix of the encoder's names in a fine-tuned file; empty in one of pretraining."""
    facts: Facts
    """What the file says of its head."""
    ignored: list[str]
    """Other entries of the file, as `name=value` or `name`."""
    licence: str
    """Licence, as far as it is known."""
    warnings: list[str]

    @property
    def has_decoder(self) -> bool:
        """True if pretraining can continue from the file."""
        return bool(self.decoder)


def read_official(path: Path, drop_unknown: bool = False, only_model: bool = False) -> OfficialCheckpoint:
    """Read an official file without running anything in it.

    Args:
        path: of the file, as `torch.save` wrote it; or a folder of EAT for transformers.
        drop_unknown: leave out tensors of the encoder that our network lacks instead of refusing the file.
        only_model: read nothing but weights and configuration, whatever else is in the file.

    Raises:
        CheckpointError: it is damaged, wants to run code, or is no data2vec 2.0; or its tensors are not those of
            its own configuration, with every difference.
        UnsupportedOptionError: its network computes something that ours does not, with the option.
        MachineError: the machine is at fault.
    """
    content, path = _content(path, only_model)
    weights = content.get("model")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{path}: expected official weights under `model`, found the keys {_listed(content)}")
    require_bytes(path, weights)
    prefix, modality = _where(path, weights)
    encoder, head, ignored = _divided(weights, prefix)
    modality = _kind(modality, encoder)
    averaged = weights.get(prefix + TEACHER)
    network, section, other = _network(path, content, modality, encoder)
    ignored += other + sorted(f"{key}" for key in content if key not in ("model", "cfg", "args"))

    faults: list[str] = []
    unknown: list[str] = []
    has_decoder = _has_decoder(encoder)
    states = network_states(network, modality, str(path), has_decoder=has_decoder)
    student = _translated(encoder, _layout(states.student), "", faults, unknown)
    teacher, warnings = None, []
    if isinstance(averaged, dict) and averaged and all(isinstance(name, str) for name in averaged):
        layout = _layout(states.teacher, bare_blocks=has_bare_blocks(section))
        teacher = _translated(averaged, layout, f"{TEACHER}.", faults, unknown)
    elif has_decoder:
        warnings.append(f"no teacher (`{TEACHER}`) in the file: a run that goes on from it starts with the student's")
    if not has_decoder:
        warnings.append("no decoder in the file: it can be fine-tuned or give features, not be pretrained further")
    if drop_unknown:
        warnings += [f"left out, unknown to our network: {name}" for name in unknown]
    else:
        faults += [f"{name}: unknown to our network (--drop-unknown leaves it out)" for name in unknown]
    if faults:
        raise CheckpointError(f"{path}: not the tensors of its own configuration:\n  " + "\n  ".join(faults))
    return OfficialCheckpoint(
        modality=modality,
        network=network,
        section=section,
        trunk={name: tensor for name, tensor in student.items() if not name.startswith(DECODERS)},
        decoder={name: tensor for name, tensor in student.items() if name.startswith(DECODERS)},
        teacher=teacher,
        head=head,
        prefix=prefix,
        facts=_facts(path, content),
        ignored=[name for name in ignored if name != f"cfg.{MADE_BY}"],
        licence=licence_of(modality, content.get("cfg")),
        warnings=warnings,
    )


def _content(path: Path, only_model: bool) -> tuple[dict[str, Any], Path]:
    """Content of a file or of EAT's folder, and the file with the weights."""
    if path.is_dir():
        return read_eat_folder(path), path / "model.safetensors"
    return read_pickled(path, only_model), path


def _facts(path: Path, content: Mapping[str, Any]) -> Facts:
    try:
        return read_facts(content, MADE_BY)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: expected a dictionary of plain values under task_state, found {error}"
        ) from error


def require_bytes(path: Path, weights: Mapping[str, Any]) -> None:
    """Refuse weights that share their bytes so often that the file holds a small part of what they would become."""
    inner = [value for value in weights.values() if isinstance(value, dict)]
    tensors = [one for values in (weights, *inner) for one in values.values() if isinstance(one, Tensor)]
    size, room = sum(one.nbytes for one in tensors if not one.is_meta), _MOST_SHARED * path.stat().st_size
    if size > room:
        raise CheckpointError(
            f"{path}: expected weights of at most {room:,} bytes by the size of the file, found {size:,}"
        )


def _listed(names: Any, most: int = 8) -> str:
    found = sorted(str(name) for name in names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "") or "none"


def _where(path: Path, weights: Mapping[str, Any]) -> tuple[str, str]:
    """The prefix of the encoder's names, and its modality."""
    places = [name.removesuffix(_ANCHOR) for name in weights if name.endswith(_ANCHOR)]
    found = {
        (place, modality[1].lower())
        for place in places
        for name in weights
        if name.startswith(place) and (modality := _MODALITY.match(name, len(place)))
    }
    if len(found) != 1:
        encoders = ", ".join(f"{prefix}modality_encoders.{modality.upper()}" for prefix, modality in sorted(found))
        raise CheckpointError(
            f"{path}: expected one data2vec 2.0 encoder, found {encoders or 'none'} among {_listed(weights)}; "
            "files of several modalities are not supported; those of data2vec 1.0: python -m d2v2ds.interop.data2vec1"
        )
    return found.pop()


def _kind(official: str, encoder: Tensors) -> str:
    """Our modality of an official encoder: EAT calls its spectrograms, which have one channel, images."""
    patches = (tensor for name, tensor in encoder.items() if name.endswith(_PATCHES))
    has_one_channel = any(tensor.ndim == 4 and tensor.shape[1] == 1 for tensor in patches)
    others = [ours for ours, theirs in OFFICIAL_NAMES.items() if theirs == official]
    return others[0] if others and has_one_channel else official


def _divided(weights: Mapping[str, Any], prefix: str) -> tuple[Tensors, Tensors, list[str]]:
    """Tensors of the encoder without prefix, those of the head, and names of what is no weight."""
    encoder, head, ignored = {}, {}, []
    for name, value in weights.items():
        if name == prefix + TEACHER:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            ignored.append(f"model.{name}")
        elif name.startswith(prefix):
            encoder[name.removeprefix(prefix)] = value.detach()
        else:
            head[name] = value.detach()
    return encoder, head, ignored


def _has_decoder(encoder: Iterable[str]) -> bool:
    """Return True if official names of an encoder are with those of a decoder."""
    return any(".decoder." in name for name in encoder)


def _network(
    path: Path, content: Mapping[str, Any], modality: str, encoder: Tensors
) -> tuple[OfficialNetwork, dict[str, Any], list[str]]:
    """The network that the file's configuration describes, the fields that do, and the names of all others."""
    try:
        roots = {key: plain(content.get(key)) for key in ("cfg", "args")}
    except ValueError as error:
        raise CheckpointError(f"{path}: expected a configuration of plain values, found {error}") from error
    found, name = next(_sections(roots, modality), None), OFFICIAL_NAMES.get(modality, modality)
    if found is None:
        raise CheckpointError(
            f"{path}: expected a configuration with embed_dim, depth and modalities.{name} somewhere under cfg "
            "or args, found none; without it the network is not known"
        )
    place, official = found
    tokens = encoder.get("modality_encoders.TEXT.local_encoder.embed_tokens.weight")
    has_decoder = _has_decoder(encoder)
    network, section, ignored = checked_section(official, modality, tokens, f"{path}: {place}", has_decoder=has_decoder)
    return network, section, [f"{place}.{name}" for name in ignored] + _beside(roots, place)


def checked_section(
    official: Any, modality: str, tokens: Tensor | None, where: str, *, has_decoder: bool
) -> tuple[OfficialNetwork, dict[str, Any], list[str]]:
    """Translate an official section from a file, and check every number in it.

    Args:
        official: plain values.
        modality: of the network.
        tokens: embedding of text.
        where: file and place, for messages.
        has_decoder: check the settings of pretraining too, which mean nothing to a fine-tuned model.

    Returns:
        As `read_section`.

    Raises:
        UnsupportedOptionError, CheckpointError: naming what does not fit.
    """
    try:
        network, section, ignored = read_section(official, modality, None if tokens is None else len(tokens))
        read_trunk(asdict(network.trunk), where)  # for the bounds of single fields
        TypeAdapter(ModalityConfig).validate_python(asdict(network.objective()))
        objective = Data2Vec2Config(ema=_ANY_EMA, modalities={modality: network.objective()})
        problems = network.trunk.check() + (objective.check(network.trunk) if has_decoder else [])
    except UnsupportedOptionError as error:
        raise UnsupportedOptionError(f"{where}: not supported: {error}") from error
    except _NO_NETWORK as error:
        raise CheckpointError(f"{where}: not the configuration of a network: {error}") from error
    if problems:
        raise CheckpointError(f"{where}: not the configuration of a network: {'; '.join(problems)}")
    return network, section, ignored


def _beside(roots: dict[str, Any], place: str) -> list[str]:
    """The sections and settings that stand around the way to a section."""
    way = place.split(".")
    found, values = [], roots
    for depth, step in enumerate(way):
        others = (str(key) for key, one in values.items() if key != step and one is not None)
        found += [".".join([*way[:depth], key]) for key in others if not (depth and key in READ_OPTIONS)]
        values = values[step]
    return found


def _sections(roots: dict[str, Any], modality: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Architecture sections, the least nested first, each with its place; interpolations are followed."""
    name = OFFICIAL_NAMES.get(modality, modality)
    level: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
        (key, value, ()) for key, value in roots.items() if isinstance(value, dict)
    ]
    for _ in range(_MOST_NESTED):
        for place, values, around in level:
            sections = values.get("modalities")
            if {"embed_dim", "depth"} <= values.keys() and isinstance(sections, dict) and sections.get(name):
                yield place, followed(values, (*around, values)[::-1])
        level = [
            (f"{place}.{key}", inner, (*around, values))
            for place, values, around in level
            for key, inner in values.items()
            if isinstance(inner, dict)
        ]


def followed(value: Any, scopes: tuple[Any, ...]) -> Any:
    """Replace `${a.b}` by what stands there in the nearest scope that has it, and leave out what is `???`."""
    if isinstance(value, dict):
        return {key: followed(one, scopes) for key, one in value.items() if one != "???"}
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if reference is None:
        return value
    for scope in scopes:
        for key in reference[1].split("."):
            scope = scope.get(key) if isinstance(scope, dict) else None
        if scope is not None:
            return scope
    return value


@dataclass(frozen=True)
class Expected:
    """One tensor of the official layout."""

    name: str
    """Ours."""
    shape: tuple[int, ...]
    """Official."""


@dataclass(frozen=True)
class _States:
    """The parameters of both networks, by our names, without memory."""

    student: Tensors
    teacher: Tensors


def network_states(network: OfficialNetwork, modality: str, where: str, *, has_decoder: bool) -> _States:
    """Build both networks of an official file, without memory for their weights.

    Raises:
        CheckpointError: naming the file `where` the settings come from, if no tensor can have their sizes.
    """
    own = network.objective()
    try:
        with torch.device("meta"):
            student = Data2Vec2Network(network.trunk, {modality: own}).state_dict()
            teacher = Trunk(network.trunk, with_local={modality: not own.share_local_encoder}).state_dict()
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{where}: its settings describe no network: {error}") from error
    names = {name.removeprefix("trunk."): name for name in student}
    kept = {ours: student[name] for ours, name in names.items() if has_decoder or not ours.startswith(DECODERS)}
    return _States(kept, teacher)


def _layout(state: Mapping[str, Tensor], *, bare_blocks: bool = False) -> dict[str, Expected]:
    """Every tensor of a network by its official name."""
    names = official_names(state, bare_blocks=bare_blocks)
    return {names[name]: Expected(name, official_shape(name, tuple(tensor.shape))) for name, tensor in state.items()}


def has_bare_blocks(section: Mapping[str, Any]) -> bool:
    """True if the names of the teacher begin with the number of a block."""
    return bool(section.get("ema_encoder_only", True))


def _translated(
    tensors: Mapping[str, Any], layout: Mapping[str, Expected], where: str, faults: list[str], unknown: list[str]
) -> Tensors:
    """Tensors by our names and in our shapes; adds what is wrong to `faults`, and names without place to `unknown`."""
    translated = {}
    for official, tensor in tensors.items():
        expected = layout.get(official)
        if expected is None or not isinstance(tensor, Tensor):
            unknown.append(f"{where}{official}")
            continue
        if is_alibi_scale(expected.name) and tensor.ndim == 4:
            tensor = tensor[None]  # as older files have it
        if tensor.shape == expected.shape:
            translated[expected.name] = with_our_shape(expected.name, tensor.detach())
        else:
            faults.append(f"{where}{official}: expected {expected.shape}, found {tuple(tensor.shape)}")
    faults += [
        f"{where}{official}: missing, expected {expected.shape}"
        for official, expected in layout.items()
        if official not in tensors
    ]
    return translated
