"""data2vec 1.0 files of fairseq and folders of transformers -> our folders, and back. Tensors keep their bits."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.data2vec1 import transformers_names
from d2v2ds.interop.data2vec1.read import FirstCheckpoint, network_states, read_first
from d2v2ds.interop.data2vec1.sections import official_section
from d2v2ds.interop.export_folder import Description, ModelFolder, require_layout
from d2v2ds.interop.fairseq.data2vec1_config import FirstNetwork
from d2v2ds.interop.fairseq.data2vec1_keymap import to_official
from d2v2ds.interop.fairseq.read import MADE_BY, OWN_LICENCE, TEACHER
from d2v2ds.interop.imported_folder import layout_of, write_imported
from d2v2ds.io.output import whole_file
from d2v2ds.io.read import validate
from d2v2ds.modalities.known import modality_of
from d2v2ds.modalities.text.tokenizers import load_tokenizer
from d2v2ds.objectives.data2vec1 import Data2Vec1Config

_TOKENIZERS = {".json": "bpe", ".model": "sentencepiece"}
_VERSION = "encoder.sentence_encoder.version"
_VERSION_OF_TEXT = 3.0
"""Constant of fairseq's sentence encoder."""


def import_first(source: Path, folder: Path, tokenizer: Path | None = None) -> FirstCheckpoint:
    """Read a checkpoint of pretraining and write our folder.

    Args:
        source: file of fairseq, or folder of transformers.
        folder: to write.
        tokenizer: of text, to be copied: RoBERTa's tokenizer.json or a sentencepiece .model.

    Returns:
        What was read, with warnings about it.

    Raises:
        CheckpointError: it cannot be read, or the tokenizer is not one of this model; or `folder` is something else.
        UnsupportedOptionError: its network computes something that ours does not.
    """
    checkpoint = read_first(source)
    network = checkpoint.network
    settings = network.trunk.modalities[network.modality]
    preprocessing = modality_of(network.modality, source.name).describe_preprocessing(settings, None, None)
    files: dict[str, bytes] = {}
    if tokenizer is not None:
        kind = _TOKENIZERS.get(tokenizer.suffix)
        vocab_size = getattr(settings, "vocab_size", None)
        if kind is None or vocab_size is None:
            raise CheckpointError(f"--tokenizer {tokenizer}: expected a tokenizer.json or .model, for a model of text")
        loaded = load_tokenizer(kind, tokenizer)
        if loaded.vocab_size > vocab_size:
            raise CheckpointError(
                f"--tokenizer {tokenizer}: has {loaded.vocab_size} ids, the checkpoint embeds {vocab_size}; it was "
                "trained with another tokenizer"
            )
        preprocessing |= {"tokenizer": loaded.kind, "file": loaded.file_name}
        files[loaded.file_name] = loaded.data
    elif hasattr(settings, "vocab_size"):
        checkpoint.warnings.append("no --tokenizer: the folder gives features of token ids, not of text")
    description = Description(
        model=network.trunk,
        objective=json.loads(json.dumps(asdict(network.objective))),
        preprocessing={network.modality: preprocessing},
        origin={
            "kind": "official",
            "source": f"the data2vec 1.0 checkpoint {source.name}, read by d2v2ds",
            "licence": checkpoint.licence,
            "official": {"file": source.name, "ignored": checkpoint.ignored},
        },
    )
    parts = {"model": checkpoint.trunk, "objective": checkpoint.objective, "teacher": checkpoint.teacher or {}}
    write_imported(folder, description, parts, files=files)  # type: ignore[arg-type]
    return checkpoint


def findings(checkpoint: FirstCheckpoint) -> str:
    """Describe what an import found, one line for each finding."""
    student = checkpoint.trunk | checkpoint.objective
    lines = [f"data2vec 1.0 of {checkpoint.network.modality}, student of {_counts(student)}"]
    lines += [f"teacher of {_counts(checkpoint.teacher)}"] if checkpoint.teacher else []
    lines += [f"ignored: {', '.join(checkpoint.ignored)}"] if checkpoint.ignored else []
    lines += [f"WARNING: {warning}" for warning in checkpoint.warnings]
    return "\n".join([*lines, f"licence: {checkpoint.licence}"])


def _counts(tensors: Mapping[str, Tensor]) -> str:
    return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} parameters"


def export_first(path: Path, target: Path, *, as_transformers: bool = False) -> list[str]:
    """Write an export folder of ours as an official file, or as a folder of transformers.

    Args:
        path: of our folder.
        target: file or folder to write.
        as_transformers: write a folder that `Data2VecAudioModel.from_pretrained` or `Data2VecTextModel` loads.

    Returns:
        Official names of what transformers has no place for.

    Raises:
        CheckpointError: the folder cannot be read, is of another objective, or has tensors of another network.
        UnsupportedOptionError: the official model lacks something of this one.
    """
    folder = ModelFolder(path)
    stored: Any = folder.description.objective or {}
    if stored.get("name") != "data2vec1":
        raise CheckpointError(f"{path}: expected a model pretrained as data2vec 1.0, found {stored.get('name')!r}")
    objective = validate(Data2Vec1Config, dict(stored), f"{path}: objective", CheckpointError)
    trunk = folder.description.model
    network, section = official_section(trunk, objective, next(iter(trunk.modalities)))
    student = {f"trunk.{name}": tensor for name, tensor in folder.tensors("model")}
    student |= dict(folder.tensors("objective"))
    teacher = {f"trunk.{name}": tensor for name, tensor in folder.tensors("teacher")}
    wanted, averaged = network_states(network)
    if any(name.startswith("heads.") for name in student):
        require_layout(path, layout_of(student), wanted)
    if teacher:
        require_layout(path, layout_of(teacher), averaged)
    official = to_official(student, network.layout)
    if as_transformers:
        return _write_hub_folder(target, official, section, network)
    weights: dict[str, Any] = _for_fairseq(official, "")
    if teacher:
        prefix = network.teacher_prefix
        of_teacher = _for_fairseq(to_official(teacher, network.layout), prefix)
        weights[f"{prefix.partition('sentence')[0] if _VERSION in weights else ''}{TEACHER}"] = of_teacher
    licence = folder.description.origin.get("licence", OWN_LICENCE)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        torch.save({"args": None, "cfg": {"model": section, MADE_BY: {"licence": licence}}, "model": weights}, file)
    return []


def _for_fairseq(official: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors without a prefix, each alone in its storage, with the constant that a sentence encoder has beside."""
    found = {name.removeprefix(prefix): tensor.clone() for name, tensor in official.items()}
    if any(name.startswith(_VERSION.removesuffix("version")) for name in official):
        found[_VERSION.removeprefix(prefix)] = torch.tensor([_VERSION_OF_TEXT])
    return found


def _write_hub_folder(
    target: Path, official: Mapping[str, Tensor], section: Mapping[str, Any], network: FirstNetwork
) -> list[str]:
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target}: expected a new folder, found files in it; give another name")
    target.mkdir(parents=True, exist_ok=True)
    vocab_size = getattr(network.trunk.modalities[network.modality], "vocab_size", None)
    settings = transformers_names.config_json(section, network.layout, vocab_size)
    tensors, others = transformers_names.from_official(official, network.layout)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return others
