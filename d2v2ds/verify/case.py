"""Golden cases: which ones a folder has, and one case as read from disk."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.errors import D2V2Error
from d2v2ds.interop.fairseq.official_config import OfficialNetwork, network_of
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.modalities.spectrogram.network import SpectrogramNetwork

Tensors = dict[str, Tensor]


class ReadTensors(Tensors):
    """Tensors of a case that remember which of them were read, so that none stays without comparison."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.seen: set[str] = {"in/id"}  # it seeds the official sampler of masks; a case carries the masks themselves

    def __getitem__(self, key: str) -> Tensor:
        self.seen.add(key)
        if key not in self:
            raise D2V2Error(f"expected {key} in the case, found none")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a tensor, or the default if the case did not record it."""
        self.seen.add(key)
        return super().get(key, default)

    def unseen(self) -> list[str]:
        """Return the names of tensors that nothing was compared with."""
        return sorted(set(self) - self.seen)


_OFFICIAL_DROPOUTS = {
    "attention_output_dropout": "encoder_dropout",
    "mlp_dropout": "post_mlp_drop",
    "layer_drop": "layerdrop",
    "embedding_dropout": "dropout",
}


def dropping(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options, by their official names, by which a training step drops something at random."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from dropping(value)
        elif value and name.endswith(("dropout", "layer_drop")):
            yield f"{_OFFICIAL_DROPOUTS.get(name, name)}={value}"


@dataclass(frozen=True)
class Case:
    """One golden case as read from disk."""

    name: str
    modality: str
    network: OfficialNetwork
    tensors: ReadTensors
    grads: Tensors

    @staticmethod
    def read(folder: Path, name: str) -> "Case":
        """Load NAME.json and its tensors.

        Raises:
            UnsupportedOptionError: the network computes something that ours does not, or drops at random.
        """
        meta = json.loads((folder / f"{name}.json").read_text())
        modality = meta["modality"].lower()
        network = network_of(meta["model"], modality, meta.get("vocab_size"))
        if found := list(dropping(asdict(network))):
            raise UnsupportedOptionError(f"{', '.join(found)} (expected 0: what was dropped is not recorded)")
        return Case(
            name,
            modality,
            network,
            ReadTensors(load_file(folder / f"{name}.safetensors")),
            load_file(folder / f"{name}.grads.safetensors"),
        )

    def batch(self, mask: Tensor | None = None) -> Batch:
        """Build the recorded input; with another mask (R, T) the visible tokens come in ascending order."""
        source, padding = self.tensors["in/source"], self.tensors.get("in/padding_mask")
        if isinstance(self.network.trunk.modalities[self.modality], SpectrogramNetwork):
            source = source[:, 0].transpose(1, 2)  # (B, 1, S, F) -> (B, F, S)
        samples = source.shape[0]
        if mask is None:
            masked, keep = self.tensors["mask/mask"].bool(), self.tensors["mask/ids_keep"].long()
        else:
            masked = mask.bool()
            visible = int(masked.shape[1] - masked[0].sum())  # the official code takes K of row 0
            keep = masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :visible]
        return Batch(
            modality=self.modality,
            source=source,
            padding=None if padding is None else padding.bool(),
            ids=torch.arange(samples),
            masks=MaskSet(keep=keep.view(samples, -1, keep.shape[1]), masked=masked.view(samples, -1, masked.shape[1])),
            num_masked=int(masked.sum()),
        )


TASKS = {
    "ctc": "audio",
    "ctc trajectory": "audio",
    "image classification": "image",
    "sentence prediction": "text",
    "audio classification": "audio",
}
"""Modality by the task of a case of fine-tuning."""

_ONLY_OF_CASES = (".grads.safetensors", ".traj.json", ".traj.safetensors")


def case_names(folder: Path, modality: str | None) -> list[str]:
    """List the cases of a folder, those of one modality if it is given.

    Any file that only a case has makes one: a case of which some files are gone must fail, not vanish. For the same
    reason a case whose modality cannot be read belongs to every modality.
    """
    names = set()
    for path in folder.glob("*"):
        ending = next((ending for ending in _ONLY_OF_CASES if path.name.endswith(ending)), None)
        if ending is not None:
            names.add(path.name.removesuffix(ending))
        elif path.suffix == ".json" and _is_case(folder, path.stem):
            names.add(path.stem)
    return sorted(name for name in names if modality is None or _modality_of(folder, name) in (modality, None))


def has_trajectory(folder: Path, name: str) -> bool:
    """Return True if a case recorded whole optimizer steps; one of the two files is enough."""
    return any((folder / f"{name}.traj{ending}").exists() for ending in (".json", ".safetensors"))


def _is_case(folder: Path, name: str) -> bool:
    """Return True if NAME.json describes a case, or cannot be read and weights lie beside it."""
    try:
        values = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return (folder / f"{name}.safetensors").exists()
    return isinstance(values, dict) and bool({"modality", "task"} & values.keys())


def is_task(folder: Path, name: str) -> bool:
    """Return True if a case is one of fine-tuning."""
    try:
        values = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "task" in values


def model_name(folder: Path, name: str) -> str:
    """Return the `_name` of a case's model; empty if it has none or cannot be read."""
    try:
        values = json.loads((folder / f"{name}.json").read_text())
        return str(values["model"]["_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _modality_of(folder: Path, name: str) -> str | None:
    try:
        values = json.loads((folder / f"{name}.json").read_text())
        is_plain = "modality" in values
        return str(values["modality"]).lower().split()[0] if is_plain else TASKS.get(values["task"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
