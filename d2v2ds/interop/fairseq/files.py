"""Official files -> our export folders, and back. Tensors keep their type and their bits in both directions."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.export_folder import Description, ModelFolder, Part, require_layout
from d2v2ds.interop.fairseq.heads import (
    HEAD,
    TunedConfig,
    head_state,
    official_configuration,
    official_task,
    read_head,
    tuned_config,
)
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.official_section import any_objective, official_section
from d2v2ds.interop.fairseq.read import (
    OWN_LICENCE,
    OfficialCheckpoint,
    Tensors,
    checked_section,
    network_states,
    read_official,
)
from d2v2ds.interop.fairseq.write import write_official
from d2v2ds.interop.imported_folder import layout_of, write_imported
from d2v2ds.interop.output_names import read_outputs
from d2v2ds.io.read import validate
from d2v2ds.modalities.known import modality_of
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.modalities.text.shards import SENTENCES
from d2v2ds.modalities.text.tokenizers import Tokenizer, load_tokenizer
from d2v2ds.objectives.data2vec2 import ModalityConfig
from d2v2ds.tasks.classify import ClassifyConfig

_Head = tuple[TunedConfig, Tensors]
"""Settings of a task, and the tensors of its head."""


def findings(checkpoint: OfficialCheckpoint) -> str:
    """Describe what an import found, one line for each finding."""
    student = checkpoint.trunk | checkpoint.decoder
    lines = [f"{checkpoint.modality}, student of {_counts(student)}"]
    if checkpoint.teacher is not None:
        lines.append(f"teacher of {_counts(checkpoint.teacher)}")
    if checkpoint.ignored:
        lines.append(f"ignored: {', '.join(checkpoint.ignored)}")
    lines += [f"WARNING: {warning}" for warning in checkpoint.warnings]
    return "\n".join([*lines, f"licence: {checkpoint.licence}"])


def _counts(tensors: Tensors) -> str:
    return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} parameters"


def write_folder(
    path: Path,
    checkpoint: OfficialCheckpoint,
    file_name: str,
    tokenizer: Tokenizer | None,
    head: _Head | None = None,
    sentences: int | None = None,
) -> None:
    """Write what was read as our export folder.

    Args:
        path: of the folder.
        checkpoint: what was read.
        file_name: of the official file, for the record.
        tokenizer: of text, to be copied.
        head: settings of the task and tensors of the head, instead of the objective of pretraining.
        sentences: of an input of a fine-tuned text model, 1 or 2; None: not known, or no text.

    Raises:
        CheckpointError: something else is in the way.
    """
    model, name = checkpoint.network.trunk, checkpoint.modality
    preprocessing = {name: modality_of(name, file_name).describe_preprocessing(model.modalities[name], None, None)}
    if tokenizer is not None:
        preprocessing[name] |= {"tokenizer": tokenizer.kind, "file": tokenizer.file_name}
    if sentences is not None:
        preprocessing[name][SENTENCES] = sentences
    if any(tensor.is_meta for tensor in (*checkpoint.trunk.values(), *({} if head is None else head[1]).values())):
        raise CheckpointError(f"{file_name}: expected weights, found names and shapes alone (of torch's device meta)")
    parts: dict[Part, Tensors] = {"model": checkpoint.trunk}
    if head is None:
        parts |= {"objective": checkpoint.decoder, "teacher": checkpoint.teacher or {}}
    else:
        parts["objective"] = head[1]
    description = Description(
        model=model,
        objective=_of_pretraining(checkpoint) if head is None else json.loads(json.dumps(asdict(head[0]))),
        preprocessing=preprocessing,
        origin={
            "kind": "official",
            "source": f"the official checkpoint {file_name}, read by d2v2ds",
            "licence": checkpoint.licence,
            "official": {
                "file": file_name,
                "modality": checkpoint.modality,
                "section": checkpoint.section,
                "prefix": checkpoint.prefix,
                "ignored": checkpoint.ignored,
            },
        },
    )
    files = {} if tokenizer is None else {tokenizer.file_name: tokenizer.data}
    write_imported(path, description, parts, files=files, has_task=head is not None)


def _of_pretraining(checkpoint: OfficialCheckpoint) -> dict[str, Any]:
    """Settings of the objective that an official file was pretrained with, as plain values."""
    objective = asdict(checkpoint.network.objective())
    del objective["mask"]  # a placeholder: what is read of an official configuration is the network
    return {"name": "data2vec2", "modalities": {checkpoint.modality: objective}}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import."""

    drop_unknown: bool = False
    """Leave out tensors of the encoder that our network lacks."""
    only_model: bool = False
    """Read nothing but weights and configuration, whatever else is in the file."""
    tokenizer: Path | None = None
    """Tokenizer of text: RoBERTa's tokenizer.json, or a sentencepiece .model. Without it the folder takes ids only."""
    outputs: Path | None = None
    """Names of the outputs of a fine-tuned model, see `read_outputs`; None: those of the file."""
    sentences: int | None = None
    """Sentences of an input of a fine-tuned text model: 1, or 2 for pairs; None: those that the file names, if any."""
    encoder_only: bool = False
    """Leave out the head of a fine-tuned model, whatever it is."""


def import_file(file: Path, folder: Path, options: ImportOptions | None = None) -> OfficialCheckpoint:
    """Read an official file and write our folder.

    Args:
        file: official checkpoint.
        folder: to write.
        options: what is left out and what is added.

    Returns:
        What was read, with warnings about it.

    Raises:
        CheckpointError: see `read_official` and `read_head`; or the tokenizer is not one of this model, or `folder`
            something else.
        UnsupportedOptionError: see `read_official` and `read_head`.
        ConfigError: the tokenizer or the file of outputs cannot be read.
    """
    options = options or ImportOptions()
    checkpoint = read_official(file, options.drop_unknown, options.only_model)
    head = _head_of(file, checkpoint, options)
    is_text = isinstance(checkpoint.network.trunk.modalities[checkpoint.modality], TextNetwork)
    sentences = _sentences_of(file, checkpoint, options, is_text and head is not None)
    loaded = None
    if options.tokenizer is not None:
        loaded = _tokenizer_of(checkpoint, options.tokenizer)
    elif is_text:
        checkpoint.warnings.append("no --tokenizer: the folder gives features of token ids, not of text")
    write_folder(folder, checkpoint, file.name, loaded, head, sentences)
    return checkpoint


def _head_of(file: Path, checkpoint: OfficialCheckpoint, options: ImportOptions) -> _Head | None:
    """Translate the head of a fine-tuned file; None for one of pretraining, and where it is not wanted."""
    names = () if options.outputs is None else read_outputs(options.outputs)
    if not checkpoint.prefix or options.encoder_only:
        if names:
            raise CheckpointError(
                f"--outputs {options.outputs}: {file} has no head, or it is left out; leave it out too"
            )
        if checkpoint.head:
            checkpoint.warnings.append(f"left out: {', '.join(checkpoint.head)}")
        return None
    trunk = checkpoint.network.trunk
    try:
        head = read_head(checkpoint.head, checkpoint.prefix, checkpoint.modality, checkpoint.facts, names, trunk)
    except (CheckpointError, UnsupportedOptionError) as error:
        raise type(error)(f"{file}: {error}") from error
    if head[0].counts_outputs:
        checkpoint.warnings.append("no --outputs: the classes have numbers and no names, and cannot be evaluated")
    if isinstance(head[0], ClassifyConfig) and head[0].kind == "number" and checkpoint.facts.settings is None:
        checkpoint.warnings.append("its numbers are those of its training: official labels of STS-B are divided by 5")
    if checkpoint.has_decoder or checkpoint.teacher is not None:
        checkpoint.warnings.append("left out: decoder and teacher, which a fine-tuned model does not use")
    return head


def _sentences_of(file: Path, checkpoint: OfficialCheckpoint, options: ImportOptions, has_them: bool) -> int | None:
    """Sentences of an input; None for other models than fine-tuned ones of text, and where nobody says."""
    if not has_them:
        if options.sentences is not None:
            raise CheckpointError(f"--sentences {options.sentences}: {file} is no fine-tuned text model; leave it out")
        return None
    found = options.sentences or checkpoint.facts.sentences
    if found is None:
        checkpoint.warnings.append("no --sentences: it is not known whether its inputs are pairs")
    return found


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
    model, settings = folder.description.model, folder.description.objective or {}
    tuned = tuned_config(settings, f"{path}: objective")
    modality = _chosen(path, [tuned.modality] if tuned else list(model.modalities), modality)
    preprocessing = folder.description.preprocessing[modality]
    origin = validate(_Origin, folder.description.origin, f"{path}: origin", CheckpointError)
    section = origin.official.section
    if not section:
        objective = _objective(folder, modality) if tuned is None else any_objective(model, modality)
        section = official_section(model, objective, modality)
    trunk, beside, teacher = (
        dict(_of_modality(folder.tensors(part), modality)) for part in ("model", "objective", "teacher")
    )
    tokens = trunk.get("encoders.text.local.tokens.weight")
    head = {name: tensor for name, tensor in beside.items() if name.startswith(HEAD)}
    decoder = {name: tensor for name, tensor in beside.items() if name not in head}
    where = f"{path}: origin.official.section"
    single, _, _ = checked_section(section, modality, tokens, where, has_decoder=bool(decoder))
    expected = network_states(single, modality, str(path), has_decoder=bool(decoder))
    require_layout(path, layout_of(trunk | decoder), expected.student)
    if teacher:
        require_layout(path, layout_of(teacher), expected.teacher)
    if tuned is None:
        prefix = origin.official.prefix
        write_official(file, trunk | decoder, teacher or None, section, prefix=prefix, licence=origin.licence)
        return
    require_layout(path, layout_of(head), head_state(tuned, model))
    task = official_task(tuned)
    write_official(
        file,
        trunk,
        None,
        section,
        head={task.official_name(name): tensor for name, tensor in head.items()},
        prefix=task.prefix,
        licence=origin.licence,
        model=official_configuration(tuned, section),
        facts={"objective": settings} | {key: value for key, value in preprocessing.items() if key == SENTENCES},
    )


def _chosen(path: Path, found: list[str], wanted: str | None) -> str:
    """Choose the modality of an official file, which holds one."""
    if wanted is None and len(found) > 1:
        raise CheckpointError(f"{path}: holds {', '.join(found)}; an official file holds one, choose it: --modality")
    return wanted or found[0]


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
    """The tensors of one modality and the shared ones, and those of a head."""
    for name, tensor in tensors:
        if name.startswith(("blocks.", HEAD, f"encoders.{modality}.", f"decoders.{modality}.")):
            yield name, tensor
