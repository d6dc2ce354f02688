"""Read an official MAE checkpoint, whole, of the encoder alone or fine-tuned, without running anything in it.

Such a file has no configuration. Sizes follow from its tensors; numbers of heads do not, and are those of the published
models of the same width unless they are given.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from d2v2ds.errors import CheckpointError, ConfigError
from d2v2ds.interop.export_folder import require_layout
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.pickles import plain
from d2v2ds.interop.fairseq.read import MADE_BY, require_bytes
from d2v2ds.interop.fairseq.torch_file import read_pickled
from d2v2ds.interop.imported_folder import layout_of
from d2v2ds.interop.mae.keymap import to_ours
from d2v2ds.interop.mae.settings import MODALITY, OfficialMae, network_of
from d2v2ds.interop.output_names import read_outputs
from d2v2ds.io.read import validate
from d2v2ds.modalities.settings import read_trunk, write_trunk
from d2v2ds.objectives.mae import MaeConfig, MaeModality
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.heads import PatchHeadConfig

Tensors = dict[str, Tensor]
DECODERS, HEAD = "decoders.", "head."
BESIDE = (DECODERS, HEAD)
"""Beginnings of the names of what is no trunk."""
_HEADS = {768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {512: 16}
"""Heads of the published models by width; the official decoder has one size."""
_CLS, _TABLE = "encoders.image.extra.tokens", "encoders.image.fixed_positions.table"


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Facts that a file of weights does not have."""

    heads: int | None = None
    """Heads of the encoder; None: those of the published model of this width."""
    decoder_heads: int | None = None
    """Likewise of the decoder."""
    outputs: Path | None = None
    """Names of the classes of a fine-tuned model, see `read_outputs`."""
    raw_pixels: bool = False
    """The model predicts pixels that are not normalised in each patch; False: what the file says, else normalised."""


LICENCE = (
    "the official MAE weights are offered for NON-COMMERCIAL use only (CC-BY-NC 4.0), and so is what is made of them; "
    "check what came with your file, which alone is binding"
)


@dataclass(frozen=True, kw_only=True)
class _MadeBy:
    """Entries that `export` writes beside the weights."""

    arguments: dict[str, Any] = field(default_factory=dict)
    licence: str = LICENCE


@dataclass(frozen=True, kw_only=True)
class MaeCheckpoint:
    """Contents of an official checkpoint by our names."""

    network: OfficialMae
    trunk: Tensors
    beside: Tensors
    """Decoder, or head of a fine-tuned model; empty for an encoder alone."""
    task: ClassifyConfig | None
    """Settings of a fine-tuned model."""
    arguments: dict[str, Any]
    """Official arguments of the network."""
    ignored: list[str]
    warnings: list[str] = field(default_factory=list)
    licence: str = LICENCE
    """Licence, as far as it is known."""


def read_file(path: Path, options: ReadOptions | None = None) -> MaeCheckpoint:
    """Read a file of `torch.save` with the weights under `model`.

    Raises:
        CheckpointError: it is damaged, wants to run code or is no MAE, with every difference.
        UnsupportedOptionError: its network computes something that ours does not.
        MachineError: the machine is at fault.
    """
    content = read_pickled(path)
    weights = content.get("model")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        keys = ", ".join(sorted(map(str, content))[:8])
        raise CheckpointError(f"{path}: expected MAE weights under `model`, found the keys {keys or 'none'}")
    require_bytes(path, weights)
    if any(value.is_meta for value in weights.values() if isinstance(value, Tensor)):
        raise CheckpointError(f"{path}: expected weights, found names and shapes alone (of torch's device meta)")
    try:
        args = plain(content.get("args")) or {}
    except ValueError as error:
        raise CheckpointError(f"{path}: expected arguments of plain values, found {error}") from error
    known = {"norm_pix_loss": args["norm_pix_loss"]} if isinstance(args, dict) and "norm_pix_loss" in args else {}
    made_by = validate(_MadeBy, content.get(MADE_BY) or {}, f"{path}: {MADE_BY}", CheckpointError)
    others = [str(key) for key in content if key not in ("model", "args", MADE_BY)]
    found = checkpoint_of(path, weights, options or ReadOptions(), known | made_by.arguments, others)
    return replace(found, licence=made_by.licence)


def checkpoint_of(
    path: Path, weights: Mapping[str, Any], options: ReadOptions, known: Mapping[str, Any], ignored: Iterable[str] = ()
) -> MaeCheckpoint:
    """Translate weights by their official names.

    Args:
        path: they come from, for messages.
        weights: tensors by official names.
        options: what was given beside them.
        known: official arguments that are known; the others follow from the tensors.
        ignored: other contents of the file.

    Raises:
        CheckpointError, UnsupportedOptionError: see `read_file`.
    """
    tensors = {name: value.detach() for name, value in weights.items() if isinstance(value, Tensor)}
    has_decoder, task = "mask_token" in tensors, _task(path, tensors, options.outputs)
    warnings: list[str] = []
    if task is not None and not task.classes:
        warnings.append("no --outputs: the classes have numbers and no names, and cannot be evaluated")
    elif task is None and not has_decoder:
        warnings.append("no decoder in the file: it can be fine-tuned or give features, not be pretrained further")
    arguments = _arguments(path, tensors, options, known, warnings)
    network = _network(path, arguments)
    if task is not None:
        network = replace(network, trunk=replace(network.trunk, final_norm=False))
    translated = {to_ours(name) or name: tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        config = task or MaeConfig(modalities={MODALITY: network.objective})
        state = config.build(network.trunk, seed=0).build_network(activation_checkpointing=False).state_dict()
    expected = {name.removeprefix("trunk."): tensor for name, tensor in state.items()}
    expected = {name: tensor for name, tensor in expected.items() if has_decoder or not name.startswith(DECODERS)}
    require_layout(path, layout_of(translated), expected)
    _fold_extra_position(translated, warnings)
    return MaeCheckpoint(
        network=network,
        trunk={name: tensor for name, tensor in translated.items() if not name.startswith(BESIDE)},
        beside={name: tensor for name, tensor in translated.items() if name.startswith(BESIDE)},
        task=task,
        arguments=arguments,
        ignored=[*ignored, *(f"model.{name}" for name in weights if name not in tensors)],
        warnings=warnings,
    )


def _arguments(
    path: Path, tensors: Tensors, options: ReadOptions, known: Mapping[str, Any], warnings: list[str]
) -> dict[str, Any]:
    """Derive the official arguments of a network from its tensors."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != dimensions:
            raise CheckpointError(f"{path}: expected an MAE with {name} of {dimensions} dimensions, found none")
        return tuple(tensors[name].shape)

    width, patch, rows = shape("cls_token", 3)[2], shape("patch_embed.proj.weight", 4)[3], shape("pos_embed", 3)[1]
    side = math.isqrt(max(rows - 1, 0))
    if side * side != rows - 1:
        raise CheckpointError(f"{path}: expected pos_embed with 1 + n x n rows, found {rows}")
    found: dict[str, Any] = {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": _depth(tensors, "blocks"),
        "num_heads": options.heads or known.get("num_heads") or _heads(path, _HEADS, width, "--heads"),
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 2)[0] / max(width, 1),
    }
    if "mask_token" in tensors:
        inner = shape("mask_token", 3)[2]
        heads = options.decoder_heads or known.get("decoder_num_heads")
        found |= {
            "decoder_embed_dim": inner,
            "decoder_depth": _depth(tensors, "decoder_blocks"),
            "decoder_num_heads": heads or _heads(path, _DECODER_HEADS, inner, "--decoder-heads"),
        }
        if "norm_pix_loss" not in known and not options.raw_pixels:
            warnings.append("the file does not say whether pixels are normalised in each patch; taken as normalised")
    is_normalised = False if options.raw_pixels else bool(known.get("norm_pix_loss", True))
    return {**known, **found, "norm_pix_loss": is_normalised}


def _task(path: Path, tensors: Tensors, outputs: Path | None) -> ClassifyConfig | None:
    """Return the settings of a fine-tuned model (models_vit.py with global_pool); None for one of pretraining."""
    if "head.weight" not in tensors:
        if outputs is not None:
            raise CheckpointError(f"--outputs {outputs}: {path} has no head; leave it out")
        return None
    names, weight = () if outputs is None else read_outputs(outputs), tensors["head.weight"]
    count = len(weight) if weight.ndim == 2 else 0
    if "fc_norm.weight" not in tensors:
        raise UnsupportedOptionError(f"{path}: a head on the CLS token (global_pool=False)")
    if names and len(names) != count:
        raise CheckpointError(f"--outputs {outputs}: expected {count} names, found {len(names)}")
    return ClassifyConfig(modality=MODALITY, head=PatchHeadConfig(), classes=names, num_outputs=max(count, 1))


def _depth(tensors: Iterable[str], blocks: str) -> int:
    numbers = [int(found[1]) for name in tensors if (found := re.match(rf"{blocks}\.(\d{{1,4}})\.", name))]
    return max(numbers, default=-1) + 1


def _heads(path: Path, published: Mapping[int, int], width: int, option: str) -> int:
    if width not in published:
        raise CheckpointError(
            f"{path}: no published model has width {width}, and weights do not show the number of heads; give {option}"
        )
    return published[width]


def _network(path: Path, arguments: Mapping[str, Any]) -> OfficialMae:
    try:
        network = network_of(arguments)
        read_trunk(write_trunk(network.trunk), str(path))  # for the bounds of single fields
        TypeAdapter(MaeModality).validate_python(asdict(network.objective))
        problems = network.trunk.check() + MaeConfig(modalities={MODALITY: network.objective}).check(network.trunk)
    except (ConfigError, ValidationError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its tensors describe no network: {error}") from error
    if problems:
        raise CheckpointError(f"{path}: its tensors describe no network: {'; '.join(problems)}")
    return network


def _fold_extra_position(tensors: Tensors, warnings: list[str]) -> None:
    """Add the position of the CLS token, which our network does not read, to the token itself."""
    first = tensors[_TABLE][:, :1]
    if first.abs().max() > 0:
        warnings.append("pos_embed has a position for the CLS token: added to cls_token")
        tensors[_CLS] = tensors[_CLS] + first
        tensors[_TABLE] = torch.cat((torch.zeros_like(first), tensors[_TABLE][:, 1:]), dim=1)
