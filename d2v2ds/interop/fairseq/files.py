"""Official files -> our export folders, and back. Tensors keep their type and their bits in both directions."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.card import write_card
from d2v2ds.interop.export_folder import Description, Kind, ModelFolder, Part, require_layout
from d2v2ds.interop.export_write import new_folder, write_config, write_tensors
from d2v2ds.interop.fairseq.official_section import official_section
from d2v2ds.interop.fairseq.read import (
    OWN_LICENCE,
    OfficialCheckpoint,
    Tensors,
    checked_section,
    network_states,
    read_official,
)
from d2v2ds.interop.fairseq.write import write_official
from d2v2ds.interop.hub.write import write_hub_files
from d2v2ds.io.read import validate
from d2v2ds.modalities.known import modality_of
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.modalities.text.tokenizers import Tokenizer, load_tokenizer
from d2v2ds.objectives.data2vec2 import ModalityConfig


def findings(checkpoint: OfficialCheckpoint) -> str:
    """Describe what an import found, one line for each finding."""
    student = checkpoint.trunk | checkpoint.decoder
    lines = [f"{checkpoint.modality}, student of {_counts(student)}"]
    if checkpoint.teacher is not None:
        lines.append(f"teacher of {_counts(checkpoint.teacher)}")
    if checkpoint.head:
        lines.append(f"head, by its own names: {', '.join(checkpoint.head)}")
    if checkpoint.ignored:
        lines.append(f"ignored: {', '.join(checkpoint.ignored)}")
    lines += [f"WARNING: {warning}" for warning in checkpoint.warnings]
    return "\n".join([*lines, f"licence: {checkpoint.licence}"])


def _counts(tensors: Tensors) -> str:
    return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} parameters"


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
    model, name = checkpoint.network.trunk, checkpoint.modality
    preprocessing = {name: modality_of(name, file_name).describe_preprocessing(model.modalities[name], None, None)}
    if tokenizer is not None:
        preprocessing[name] |= {"tokenizer": tokenizer.kind, "file": tokenizer.file_name}
    if any(tensor.is_meta for tensor in checkpoint.trunk.values()):
        raise CheckpointError(f"{file_name}: expected weights, found names and shapes alone (of torch's device meta)")
    official = {
        "file": file_name,
        "modality": checkpoint.modality,
        "section": checkpoint.section,
        "prefix": checkpoint.prefix,
        "ignored": checkpoint.ignored,
    }
    parts: dict[Part, Tensors] = {
        "model": checkpoint.trunk,
        "objective": checkpoint.decoder,
        "teacher": checkpoint.teacher or {},
        "head": checkpoint.head,
    }
    objective = asdict(checkpoint.network.objective())
    del objective["mask"]  # a placeholder: what is read of an official configuration is the network
    description = Description(
        model=model,
        objective={"name": "data2vec2", "modalities": {name: objective}},
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
        num_parameters = sum(tensor.numel() for tensor in checkpoint.trunk.values())
        write_card(folder, description, path.name, num_parameters)
        write_config(folder, description, write_hub_files(folder, model, preprocessing))


def import_file(
    file: Path, folder: Path, drop_unknown: bool = False, tokenizer: Path | None = None, only_model: bool = False
) -> OfficialCheckpoint:
    """Read an official file and write our folder.

    Args:
        file: official checkpoint.
        folder: to write.
        drop_unknown: leave out tensors of the encoder that our network lacks.
        tokenizer: of text: RoBERTa's tokenizer.json, or a sentencepiece .model. Without it the folder takes ids only.
        only_model: read nothing but weights and configuration, whatever else is in the file.

    Returns:
        What was read, with warnings about it.

    Raises:
        CheckpointError: see `read_official`; or the tokenizer is not one of this model, or `folder` something else.
        UnsupportedOptionError: see `read_official`.
        ConfigError: the tokenizer cannot be read.
    """
    checkpoint = read_official(file, drop_unknown, only_model)
    loaded = None
    if tokenizer is not None:
        loaded = _tokenizer_of(checkpoint, tokenizer)
    elif isinstance(checkpoint.network.trunk.modalities[checkpoint.modality], TextNetwork):
        checkpoint.warnings.append("no --tokenizer: the folder gives features of token ids, not of text")
    write_folder(folder, checkpoint, file.name, loaded)
    return checkpoint


_TOKENIZER_KINDS = {".json": "bpe", ".model": "sentencepiece"}


def _tokenizer_of(checkpoint: OfficialCheckpoint, path: Path) -> Tokenizer:
    """The tokenizer of a text model, if its ids fit the embedding."""
    text = checkpoint.network.trunk.modalities[checkpoint.modality]
    if not isinstance(text, TextNetwork):
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


@dataclass(frozen=True, kw_only=True)
class _Official:
    """Notes of an import on the official file."""

    section: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Entries of `Description.origin` that an export in the official layout needs."""

    official: _Official = field(default_factory=_Official)
    licence: str = OWN_LICENCE


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
    active = list(model.modalities)
    if modality is None and len(active) > 1:
        raise CheckpointError(f"{path}: holds {', '.join(active)}; an official file holds one, choose it: --modality")
    modality = modality or active[0]
    origin = validate(_Origin, folder.description.origin, f"{path}: origin", CheckpointError)
    section = origin.official.section or official_section(model, _objective(folder, modality), modality)
    trunk, decoder, teacher = (
        dict(_of_modality(folder.tensors(part), modality)) for part in ("model", "objective", "teacher")
    )
    student = trunk | decoder
    tokens = student.get("encoders.text.local.tokens.weight")
    single, _, _ = checked_section(section, modality, tokens, f"{path}: origin.official.section")
    expected = network_states(single, modality, str(path), has_decoder=bool(decoder))
    require_layout(path, {name: Kind.of(tensor) for name, tensor in student.items()}, expected.student)
    if teacher:
        require_layout(path, {name: Kind.of(tensor) for name, tensor in teacher.items()}, expected.teacher)
    write_official(
        file,
        student,
        teacher or None,
        section,
        head=dict(folder.tensors("head")),
        prefix=origin.official.prefix,
        licence=origin.licence,
    )


def _objective(folder: ModelFolder, modality: str) -> ModalityConfig:
    """Settings of the objective that an export was trained with.

    Raises:
        CheckpointError: they are not known.
    """
    stored = (folder.description.objective or {}).get("modalities")
    if not isinstance(stored, dict) or stored.get(modality) is None:
        raise CheckpointError(f"{folder.path}: expected the settings of its objective for {modality}, found none")
    where = f"{folder.path}: objective.modalities.{modality}"
    return validate(ModalityConfig, stored[modality], where, CheckpointError)


def _of_modality(tensors: Iterable[tuple[str, Tensor]], modality: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one modality and the shared ones."""
    for name, tensor in tensors:
        if name.startswith(("blocks.", f"encoders.{modality}.", f"decoders.{modality}.")):
            yield name, tensor
