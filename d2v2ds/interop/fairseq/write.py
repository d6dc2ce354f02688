"""Write the official layout of a checkpoint, of plain containers and tensors alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v2ds.interop.fairseq.keymap import (
    official_names,
    with_official_shape,
)
from d2v2ds.interop.fairseq.read import MADE_BY, OWN_LICENCE, TEACHER, has_bare_blocks
from d2v2ds.io.output import whole_file


def write_official(
    path: Path,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor] | None,
    section: Mapping[str, Any],
    *,
    head: Mapping[str, Tensor] | None = None,
    prefix: str = "",
    licence: str = OWN_LICENCE,
    model: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the official layout, of plain containers and tensors alone.

    Args:
        path: of the new file.
        student: by our names, in our shapes, each in the type that the file shall have, on the CPU.
        teacher: likewise, or None.
        section: official fields of the network, see `official_section`.
        head: tensors outside the encoder, by official names.
        prefix: put before the encoder's names.
        licence: of the weights, for a later import.
        model: configuration of a fine-tuned model, which has the section inside; None: the section itself.
        facts: what a later import finds beside it.

    Raises:
        KeyError: a tensor has no official name.
    """
    weights: dict[str, Any] = {prefix + name: tensor for name, tensor in _official(student)} | dict(head or {})
    if teacher is not None:
        weights[prefix + TEACHER] = dict(_official(teacher, bare_blocks=has_bare_blocks(section)))
    made_by = {"licence": licence, **(facts or {})}
    configuration = {"model": dict(section if model is None else model), MADE_BY: made_by}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        torch.save({"args": None, "cfg": configuration, "model": weights}, file)


def _official(tensors: Mapping[str, Tensor], *, bare_blocks: bool = False) -> Iterator[tuple[str, Tensor]]:
    for name, official in official_names(tensors, bare_blocks=bare_blocks).items():
        tensor = with_official_shape(name, tensors[name].detach().contiguous())
        is_alone = tensor.untyped_storage().nbytes() == tensor.nbytes
        yield official, tensor if is_alone else tensor.clone()  # torch.save writes whole storages
