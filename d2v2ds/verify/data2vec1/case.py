"""One golden case of data2vec 1.0 as read from disk: networks with the official weights, and its batch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from d2v2ds.batch import Batch, SpanMasks
from d2v2ds.errors import D2V2Error
from d2v2ds.interop.fairseq.data2vec1_config import FirstNetwork, first_network_of
from d2v2ds.interop.fairseq.data2vec1_keymap import is_buffer, to_ours, translate
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.objectives.data2vec1 import Data2Vec1, Data2Vec1Network
from d2v2ds.objectives.teacher_network import TeacherNetwork
from d2v2ds.shapes import PAD_ID
from d2v2ds.verify.case import ReadTensors, dropping

_CONTEXT = ("vocab_size", "mask", "target_layers", "objective", "task", "ema_decay")
"""Entries beside the section of the network that decide about it."""


@dataclass(frozen=True)
class FirstCase:
    """One golden case."""

    name: str
    meta: Mapping[str, Any]
    network: FirstNetwork
    tensors: ReadTensors
    grads: ReadTensors

    @staticmethod
    def read(folder: Path, name: str) -> "FirstCase":
        """Load NAME.json and its tensors.

        Raises:
            UnsupportedOptionError: the network computes something that ours does not, or drops at random.
        """
        meta = json.loads((folder / f"{name}.json").read_text())
        tensors = ReadTensors(load_file(folder / f"{name}.safetensors"))
        context = {
            key: meta[key] for key in ("vocab_size", "mask", "target_layers", "objective", "task") if key in meta
        }
        if meta.get("pad_id") not in (None, PAD_ID):
            raise UnsupportedOptionError(f"pad_id={meta['pad_id']}, expected {PAD_ID}")
        if meta.get("mask_token_id") is not None:
            context |= {"mask_token": meta["mask_token_id"], "teacher_input": _teacher_input(tensors)}
        network = first_network_of(meta["model"], meta["modality"].lower(), **context)
        if found := list(dropping(asdict(network.trunk))):
            raise UnsupportedOptionError(f"{', '.join(found)} (expected 0: what was dropped is not recorded)")
        return FirstCase(name, meta, network, tensors, ReadTensors(load_file(folder / f"{name}.grads.safetensors")))

    def build(self) -> tuple[Data2Vec1, Data2Vec1Network, TeacherNetwork]:
        """Build objective, student and teacher, and load the recorded weights.

        Raises:
            D2V2Error: the tensors of the case are not those of its network.
        """
        objective = self.network.objective.build(self.network.trunk, seed=0)
        student = objective.build_network(activation_checkpointing=False)
        teacher = objective.build_teacher_network().eval()
        weights = self.of_student(self.part("student/"))
        load(student, weights)
        load(teacher, self.of_teacher(self.part("teacher/"), weights))
        return objective, student, teacher

    def part(self, prefix: str, *, of_grads: bool = False) -> dict[str, Tensor]:
        """Return the tensors under a prefix, without it."""
        source = self.grads if of_grads else self.tensors
        return {key.removeprefix(prefix): source[key] for key in source if key.startswith(prefix)}

    def of_student(self, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate tensors of the student, less those that the model does not use."""
        unused = set(self.meta["no_gradient"])
        return to_ours({key: value for key, value in official.items() if key not in unused}, self.network.layout)

    def of_teacher(self, official: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate tensors of the teacher; the parts that it copies and the file leaves out are the student's."""
        prefix, layout = self.network.teacher_prefix, self.network.layout
        kept = {f"{prefix}{key}": value for key, value in official.items() if not self.is_idle(key)}
        found = to_ours(kept, layout)
        copied = tuple(f"trunk.encoders.{self.network.modality}.{part}" for part in self.network.own.copied)
        return {name: value for name, value in student.items() if copied and name.startswith(copied)} | found

    def is_idle(self, key: str) -> bool:
        """Return True for an entry of the official teacher that its output does not depend on."""
        found = translate(f"{self.network.teacher_prefix}{key}", self.network.layout)
        return found is not None and not found[0].startswith("trunk.")

    def buffers(self) -> dict[str, Tensor]:
        """Return the recorded entries that hold no weight, by their whole key."""
        names = {**self.tensors, **self.grads}
        return {
            key: value for key, value in names.items() if is_buffer(_official_name(key, self.network.teacher_prefix))
        }

    def batch(self) -> Batch:
        """Build the recorded input, unmasked, with its masks."""
        source, padding = self.tensors["in/source"], self.tensors.get("in/padding_mask")
        masked = self.tensors["mask/mask"].bool()
        return Batch(
            modality=self.network.modality,
            source=self.tensors.get("in/tokens_unmasked", source),
            padding=None if padding is None else padding.bool(),
            ids=torch.arange(len(source)),
            span_masks=SpanMasks(time=masked),
            num_masked=int(masked.sum()),
        )


def _teacher_input(tensors: ReadTensors) -> str:
    """Find out whether the recorded teacher read all tokens or the masked ones alone."""
    wanted, masked = tensors["in/target_tokens"], tensors["mask/mask"].bool()
    if torch.equal(wanted, tensors["in/tokens_unmasked"]):
        return "whole"
    if torch.equal(wanted, tensors["in/tokens_unmasked"].masked_fill(~masked, PAD_ID)):
        return "masked_tokens"
    raise D2V2Error("in/target_tokens: expected all tokens, or the masked ones with padding in between")


def _official_name(key: str, teacher_prefix: str) -> str:
    side, _, name = key.partition("/")
    return f"{teacher_prefix}{name}" if side in ("teacher", "ema_after") else name


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module.

    Raises:
        D2V2Error: the names or the numbers of elements differ.
    """
    state = module.state_dict()
    if set(state) != set(tensors):
        raise D2V2Error(f"the file and the model differ in {', '.join(sorted(set(state) ^ set(tensors))[:5])}")
    for name, value in tensors.items():
        if value.numel() != state[name].numel():
            raise D2V2Error(f"{name}: expected {tuple(state[name].shape)}, found {tuple(value.shape)}")
    module.load_state_dict({name: value.reshape(state[name].shape) for name, value in tensors.items()})
