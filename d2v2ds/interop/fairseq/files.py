"""Read and write official data2vec 2.0 checkpoints (spec sections 10, 13 and 15). fairseq is not needed.

    python -m d2v2ds.interop.fairseq import FILE.pt --out FOLDER [--drop-unknown] [--tokenizer FILE]
    python -m d2v2ds.interop.fairseq export FOLDER --out FILE.pt [--modality audio]

`import` takes pretraining checkpoints (student and, under `_ema`, teacher) and fine-tuned ones (encoder and head) and
writes our export folder, see `folder.py`; nothing in the file is run. `export` writes the official layout back.
Tensors keep their type and their bits in both directions. Of the official configuration only the fields that define
the network are read and kept; everything else is listed and left behind.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from d2v2ds.errors import CheckpointError, D2V2Error
from d2v2ds.interop.card import write_card
from d2v2ds.interop.export_folder import (
    Description,
    Kind,
    ModelFolder,
    Part,
    new_folder,
    require_layout,
    write_config,
    write_tensors,
)
from d2v2ds.interop.fairseq.keymap import (
    is_alibi_scale,
    official_names,
    official_shape,
    with_official_shape,
    with_our_shape,
)
from d2v2ds.interop.fairseq.official_config import UnsupportedOptionError, official_section, read_section
from d2v2ds.interop.fairseq.pickles import plain, read_pickled
from d2v2ds.interop.hub.write import write_hub_files
from d2v2ds.interop.preprocessing import published_preprocessing
from d2v2ds.modalities.text.tokenizers import Tokenizer, load_tokenizer
from d2v2ds.model.trunk import Data2Vec2, ModelConfig
from d2v2ds.objectives.teacher_network import TargetNet

Tensors = dict[str, Tensor]

LICENCES = {
    "audio": "to our knowledge the official speech weights are under the MIT licence, like the code",
    "image": "the official VISION weights are offered for NON-COMMERCIAL use only (CC-BY-NC 4.0), and so is what is "
    "made of them",
    "text": "to our knowledge the official text weights are under the MIT licence, like the code",
}
"""What is known of the published weights; printed with every import."""


OWN_LICENCE = "weights of a run of d2v2ds: their owner decides"
"""Of what `export` writes of our own runs."""
_MADE_BY = "d2v2ds"
"""Key of `cfg` under which `export` says what it wrote, for `import` to find."""


def _licence(modality: str, configuration: Any) -> str:
    """What a file written by us says of itself, else what is known of the published ones."""
    made_by = configuration.get(_MADE_BY) if isinstance(configuration, dict) else None
    if isinstance(made_by, dict) and isinstance(made_by.get("licence"), str):
        return str(made_by["licence"])
    return f"{LICENCES[modality]}; check what came with your file, which alone is binding"


_TEACHER = "_ema"
_ANCHOR = "blocks.0.norm1.weight"
_MODALITY = re.compile(r"modality_encoders\.([A-Z0-9_]+)\.")
_MOST_NESTED = 12
"""Levels of the official configuration that are searched."""


@dataclass(frozen=True, kw_only=True)
class OfficialCheckpoint:
    """What an official file says."""

    modality: str
    model: ModelConfig
    section: dict[str, Any]
    """The official fields that define the network, in plain values, for writing back."""
    student: Tensors
    """By our names, in our shapes. Without decoder where the file has none."""
    teacher: Tensors | None
    """Likewise; None where the file has none."""
    head: Tensors
    """Of a fine-tuned file: everything outside the encoder, by its own names."""
    prefix: str
    """What stands before the encoder's names in a fine-tuned file."""
    ignored: list[str]
    """What the file has beside, as `name=value` or `name`."""
    licence: str
    """What is known of it."""
    warnings: list[str]

    @property
    def has_decoder(self) -> bool:
        """Whether pretraining can go on from it."""
        return any(name.startswith("decoders.") for name in self.student)


def read_official(path: Path, drop_unknown: bool = False) -> OfficialCheckpoint:
    """Read an official file without running anything in it.

    Args:
        path: of the file, as `torch.save` wrote it.
        drop_unknown: leave out tensors of the encoder that our network lacks instead of refusing the file.

    Raises:
        CheckpointError: it is damaged, wants to run code, or is no data2vec 2.0; or its tensors are not those of
            its own configuration, with every difference.
        UnsupportedOptionError: its network computes something that ours does not, with the option.
        OSError: it cannot be opened.
    """
    content = read_pickled(path)
    weights = content.get("model")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{path}: expected official weights under `model`, found the keys {_listed(content)}")
    prefix, modality = _where(path, weights)
    encoder, head, ignored = _divided(weights, prefix)
    averaged = weights.get(prefix + _TEACHER)
    model, section, other = _network(path, content, modality, encoder)
    ignored += other + sorted(f"{key}" for key in content if key not in ("model", "cfg", "args"))

    faults: list[str] = []
    unknown: list[str] = []
    has_decoder = any(".decoder." in name for name in encoder)
    states = _states(model, has_decoder=has_decoder)
    student = _translated(encoder, _layout(states.student), "", faults, unknown)
    teacher, warnings = None, []
    if isinstance(averaged, dict) and averaged:
        layout = _layout(states.teacher, bare_blocks=_has_bare_blocks(section))
        teacher = _translated(averaged, layout, f"{_TEACHER}.", faults, unknown)
    elif has_decoder:
        warnings.append(f"no teacher (`{_TEACHER}`) in the file: a run that goes on from it starts with the student's")
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
        model=model,
        section=section,
        student=student,
        teacher=teacher,
        head=head,
        prefix=prefix,
        ignored=[name for name in ignored if name != f"cfg.{_MADE_BY}"],
        licence=_licence(modality, content.get("cfg")),
        warnings=warnings,
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
            "data2vec 1.0 and files of several modalities are not supported"
        )
    return found.pop()


def _divided(weights: Mapping[str, Any], prefix: str) -> tuple[Tensors, Tensors, list[str]]:
    """Tensors of the encoder without prefix, those of the head, and names of what is no weight."""
    encoder, head, ignored = {}, {}, []
    for name, value in weights.items():
        if name == prefix + _TEACHER:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            ignored.append(f"model.{name}")
        elif name.startswith(prefix):
            encoder[name.removeprefix(prefix)] = value.detach()
        else:
            head[name] = value.detach()
    return encoder, head, ignored


def _network(
    path: Path, content: Mapping[str, Any], modality: str, encoder: Tensors
) -> tuple[ModelConfig, dict[str, Any], list[str]]:
    """The network that the file's configuration describes, the fields that do, and the names of all others."""
    try:
        roots = {key: plain(content.get(key)) for key in ("cfg", "args")}
    except RecursionError as error:
        raise CheckpointError(f"{path}: its configuration contains itself") from error
    found = next(_sections(roots, modality), None)
    if found is None:
        raise CheckpointError(
            f"{path}: expected a configuration with embed_dim, depth and modalities.{modality} somewhere under cfg "
            "or args, found none; without it the network is not known"
        )
    place, official = found
    tokens = encoder.get("modality_encoders.TEXT.local_encoder.embed_tokens.weight")
    try:
        config, section, ignored = read_section(official, modality, None if tokens is None else len(tokens))
        model = TypeAdapter(ModelConfig).validate_python(asdict(config))
        problems = model.check()
    except UnsupportedOptionError as error:
        raise UnsupportedOptionError(f"{path}: {place}: not supported: {error}") from error
    except (ValidationError, TypeError, ValueError, AttributeError, SyntaxError, MemoryError) as error:
        raise CheckpointError(f"{path}: {place}: not the configuration of a network: {error}") from error
    if problems:
        raise CheckpointError(f"{path}: {place}: not the configuration of a network: {'; '.join(problems)}")
    return model, section, [f"{place}.{name}" for name in ignored] + _beside(roots, place)


def _beside(roots: dict[str, Any], place: str) -> list[str]:
    """The sections and settings that stand around the way to a section."""
    way = place.split(".")
    found, values = [], roots
    for depth, step in enumerate(way):
        found += [".".join([*way[:depth], str(key)]) for key, one in values.items() if key != step and one is not None]
        values = values[step]
    return found


def _sections(roots: dict[str, Any], modality: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Architecture sections, the least nested first, each with its place; interpolations are followed."""
    level: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
        (key, value, ()) for key, value in roots.items() if isinstance(value, dict)
    ]
    for _ in range(_MOST_NESTED):
        for place, values, around in level:
            sections = values.get("modalities")
            if {"embed_dim", "depth"} <= values.keys() and isinstance(sections, dict) and sections.get(modality):
                yield place, _followed(values, (*around, values)[::-1])
        level = [
            (f"{place}.{key}", inner, (*around, values))
            for place, values, around in level
            for key, inner in values.items()
            if isinstance(inner, dict)
        ]


def _followed(value: Any, scopes: tuple[Any, ...]) -> Any:
    """Replace `${a.b}` by what stands there in the nearest scope that has it, and leave out what is `???`."""
    if isinstance(value, dict):
        return {key: _followed(one, scopes) for key, one in value.items() if one != "???"}
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


def _states(model: ModelConfig, *, has_decoder: bool) -> _States:
    with torch.device("meta"):
        student, teacher = Data2Vec2(model), TargetNet(model)
    kept = {name: p for name, p in student.state_dict().items() if has_decoder or not name.startswith("decoders.")}
    return _States(kept, teacher.state_dict())


def _layout(state: Mapping[str, Tensor], *, bare_blocks: bool = False) -> dict[str, Expected]:
    """Every tensor of a network by its official name."""
    names = official_names(state, bare_blocks=bare_blocks)
    return {names[name]: Expected(name, official_shape(name, tuple(tensor.shape))) for name, tensor in state.items()}


def _has_bare_blocks(section: Mapping[str, Any]) -> bool:
    """Whether the names of the teacher begin with the number of a block."""
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


def write_official(
    path: Path,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor] | None,
    section: Mapping[str, Any],
    *,
    head: Mapping[str, Tensor] | None = None,
    prefix: str = "",
    licence: str = OWN_LICENCE,
) -> None:
    """Write the official layout, of plain containers and tensors alone.

    Args:
        path: of the new file.
        student: by our names, in our shapes, each in the type that the file shall have, on the CPU.
        teacher: likewise, or None.
        section: official fields of the network, see `official_section`.
        head: tensors outside the encoder, by their own names.
        prefix: put before the encoder's names.
        licence: of the weights, for a later import.

    Raises:
        KeyError: a tensor has no official name.
    """
    model: dict[str, Any] = {prefix + name: tensor for name, tensor in _official(student)} | dict(head or {})
    if teacher is not None:
        model[prefix + _TEACHER] = dict(_official(teacher, bare_blocks=_has_bare_blocks(section)))
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"args": None, "cfg": {"model": dict(section), _MADE_BY: {"licence": licence}}, "model": model}, temporary
    )
    temporary.replace(path)


def _official(tensors: Mapping[str, Tensor], *, bare_blocks: bool = False) -> Iterator[tuple[str, Tensor]]:
    for name, official in official_names(tensors, bare_blocks=bare_blocks).items():
        tensor = with_official_shape(name, tensors[name].detach().contiguous())
        is_alone = tensor.untyped_storage().nbytes() == tensor.nbytes
        yield official, tensor if is_alone else tensor.clone()  # torch.save writes whole storages


def write_folder(path: Path, checkpoint: OfficialCheckpoint, file_name: str, tokenizer: Tokenizer | None) -> None:
    """Write what was read as our export folder.

    Args:
        path: of the folder.
        checkpoint: what was read.
        file_name: of the official file, for the record.
        tokenizer: of text, to be copied.

    Raises:
        CheckpointError: something else is in the way.
    """
    preprocessing = published_preprocessing(checkpoint.model)
    if tokenizer is not None:
        preprocessing["text"] |= {"tokenizer": tokenizer.kind, "file": tokenizer.file_name}
    official = {
        "file": file_name,
        "modality": checkpoint.modality,
        "section": checkpoint.section,
        "prefix": checkpoint.prefix,
        "ignored": checkpoint.ignored,
    }
    parts: dict[Part, Tensors] = {
        "model": checkpoint.student,
        "teacher": checkpoint.teacher or {},
        "head": checkpoint.head,
    }
    description = Description(
        model=checkpoint.model,
        preprocessing=preprocessing,
        origin={
            "kind": "official",
            "source": f"the official checkpoint {file_name}, read by d2v2ds",
            "licence": checkpoint.licence,
            "official": official,
        },
    )
    with new_folder(path) as folder:
        for part, tensors in parts.items():
            if tensors:
                layout = {name: Kind.of(tensor) for name, tensor in tensors.items()}
                write_tensors(folder, part, layout, tensors.items())
        if tokenizer is not None:
            (folder / tokenizer.file_name).write_bytes(tokenizer.data)
        num_parameters = sum(tensor.numel() for tensor in checkpoint.student.values())
        write_card(folder, description, path.name, num_parameters)
        write_config(folder, description, write_hub_files(folder, checkpoint.model, preprocessing))


def import_file(
    file: Path, folder: Path, drop_unknown: bool = False, tokenizer: Path | None = None
) -> OfficialCheckpoint:
    """Read an official file and write our folder.

    Args:
        file: official checkpoint.
        folder: to write.
        drop_unknown: leave out tensors of the encoder that our network lacks.
        tokenizer: of text: RoBERTa's tokenizer.json, or a sentencepiece .model. Without it the folder takes ids only.

    Returns:
        What was read, with warnings about it.

    Raises:
        CheckpointError: see `read_official`; or the tokenizer is not one of this model, or `folder` something else.
        UnsupportedOptionError: see `read_official`.
        ConfigError: the tokenizer cannot be read.
    """
    checkpoint = read_official(file, drop_unknown)
    loaded = None
    if tokenizer is not None:
        loaded = _tokenizer_of(checkpoint, tokenizer)
    elif checkpoint.model.modalities.text is not None:
        checkpoint.warnings.append("no --tokenizer: the folder gives features of token ids, not of text")
    write_folder(folder, checkpoint, file.name, loaded)
    return checkpoint


_TOKENIZER_KINDS = {".json": "bpe", ".model": "sentencepiece"}


def _tokenizer_of(checkpoint: OfficialCheckpoint, path: Path) -> Tokenizer:
    """The tokenizer of a text model, if its ids fit the embedding."""
    text = checkpoint.model.modalities.text
    if text is None:
        raise CheckpointError(f"--tokenizer {path}: the checkpoint is of {checkpoint.modality}; leave it out")
    if path.suffix not in _TOKENIZER_KINDS:
        raise CheckpointError(f"--tokenizer {path}: expected a tokenizer.json or a sentencepiece .model")
    tokenizer = load_tokenizer(_TOKENIZER_KINDS[path.suffix], path)
    if tokenizer.vocab_size > text.vocab_size:
        raise CheckpointError(
            f"--tokenizer {path}: has {tokenizer.vocab_size} ids, the checkpoint embeds {text.vocab_size}; it was "
            "trained with another tokenizer"
        )
    if tokenizer.vocab_size < text.vocab_size:
        checkpoint.warnings.append(
            f"the tokenizer has {tokenizer.vocab_size} ids, the checkpoint {text.vocab_size}: is it the right one?"
        )
    return tokenizer


def export_file(path: Path, file: Path, modality: str | None = None) -> None:
    """Write an export folder of ours, or the file of an earlier version, in the official layout.

    Args:
        path: of the folder.
        file: to write.
        modality: which, where the network has several.

    Raises:
        CheckpointError: the folder cannot be read, or its tensors are not those of its network.
        UnsupportedOptionError: the official configuration cannot say what the network computes.
    """
    folder = ModelFolder(path)
    model = folder.description.model
    active = list(model.modalities.active())
    if modality is None and len(active) > 1:
        raise CheckpointError(f"{path}: holds {', '.join(active)}; an official file holds one, choose it: --modality")
    modality = modality or active[0]
    official = folder.description.origin.get("official", {})
    section = official.get("section") or official_section(model, modality)
    student, teacher = (dict(_of_modality(folder.tensors(part), modality)) for part in ("model", "teacher"))
    tokens = student.get("encoders.text.local.tokens.weight")
    single, _, _ = read_section(section, modality, None if tokens is None else len(tokens))
    expected = _states(single, has_decoder=any(name.startswith("decoders.") for name in student))
    require_layout(path, {name: Kind.of(tensor) for name, tensor in student.items()}, expected.student)
    if teacher:
        require_layout(path, {name: Kind.of(tensor) for name, tensor in teacher.items()}, expected.teacher)
    write_official(
        file,
        student,
        teacher or None,
        section,
        head=dict(folder.tensors("head")),
        prefix=official.get("prefix", ""),
        licence=folder.description.origin.get("licence", OWN_LICENCE),
    )


def _of_modality(tensors: Iterable[tuple[str, Tensor]], modality: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one modality and the shared ones."""
    for name, tensor in tensors:
        if name.startswith(("blocks.", f"encoders.{modality}.", f"decoders.{modality}.")):
            yield name, tensor


def _print_report(file: Path, folder: Path, checkpoint: OfficialCheckpoint) -> None:
    """What an import found, for a person."""
    count = sum(tensor.numel() for tensor in checkpoint.student.values())
    print(f"{file}: {checkpoint.modality}, student of {len(checkpoint.student)} tensors, {count:,} parameters")
    if checkpoint.teacher is not None:
        count = sum(tensor.numel() for tensor in checkpoint.teacher.values())
        print(f"teacher of {len(checkpoint.teacher)} tensors, {count:,} parameters")
    if checkpoint.head:
        print(f"head, by its own names: {', '.join(checkpoint.head)}")
    if checkpoint.ignored:
        print(f"ignored: {', '.join(checkpoint.ignored)}")
    for warning in checkpoint.warnings:
        print(f"WARNING: {warning}")
    print(f"licence: {checkpoint.licence}")
    print(f"written: {folder}")


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m d2v2ds.interop.fairseq", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="official file -> our folder")
    importing.add_argument("source", type=Path, metavar="FILE.pt", help="official checkpoint")
    importing.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write")
    importing.add_argument(
        "--drop-unknown", action="store_true", help="leave out tensors that our network lacks instead of stopping"
    )
    importing.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="of text: RoBERTa's tokenizer.json or a sentencepiece .model"
    )
    exporting = commands.add_parser("export", help="our folder -> official file")
    exporting.add_argument("source", type=Path, metavar="FOLDER", help="an export of this project")
    exporting.add_argument("--out", type=Path, required=True, metavar="FILE.pt", help="to write")
    exporting.add_argument("--modality", help="which, of a network of several")
    options = parser.parse_args(arguments)
    try:
        if options.command == "import":
            found = import_file(options.source, options.out, options.drop_unknown, options.tokenizer)
            _print_report(options.source, options.out, found)
        else:
            export_file(options.source, options.out, options.modality)
            print(f"written: {options.out}")
    except (D2V2Error, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
