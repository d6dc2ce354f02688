"""Golden files with one value changed."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

SHARE = 0.01
"""Size of a change."""
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Change:
    """One value of one file."""

    file: str
    place: Place
    """Keys down to a value of a JSON file; the name of a tensor."""
    make: Callable[[Path], None]
    """Changes the value in a folder."""

    def __str__(self) -> str:
        return f"{self.file} {'.'.join(map(str, self.place))}"


def changes(folder: Path, files: list[str], seed: int = 0, share: float = SHARE) -> list[Change]:
    """List one change for every tensor and every leaf of JSON files.

    Args:
        folder: of golden vectors.
        files: names relative to it; others than `.json` and `.safetensors` are left out.
        seed: of the chosen element of each tensor.
        share: change of a tensor's value over the largest absolute value of the tensor, and of a number over its own;
            whole numbers change by 1 at least.
    """
    found: list[Change] = []
    for file in files:
        if file.endswith(".safetensors"):
            found += [Change(file, (key,), _tensor_change(file, key, seed, share)) for key in load_file(folder / file)]
        elif file.endswith(".json"):
            leaves = _leaves(json.loads((folder / file).read_text()), ())
            found += [Change(file, place, _leaf_change(file, place, share)) for place in leaves]
    return found


def copied(folder: Path, files: list[str], target: Path) -> Path:
    """Copy files to a new folder."""
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target / file)
    return target


def _tensor_change(file: str, key: str, seed: int, share: float) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = load_file(folder / file)
        flat = tensors[key].reshape(-1)
        finite = torch.isfinite(flat.double()).nonzero()[:, 0].tolist()
        at = finite[np.random.default_rng(seed).integers(len(finite))]
        if flat.is_floating_point():
            flat[at] += share * (float(flat[finite].abs().max()) or 1.0)
        else:
            most = int(flat.max())
            step = max(1, round(share * most))
            flat[at] = int(flat[at]) + (step if flat[at] <= most // 2 else -step)
        tensors[key] = flat.view(tensors[key].shape)
        save_file(tensors, folder / file)

    return make


def _leaves(value: Any, place: Place) -> Iterator[Place]:
    """Yield the places of all numbers, truth values and words."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(below, (*place, key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from _leaves(below, (*place, number))
    elif value is not None:
        yield place


def _leaf_change(file: str, place: Place, share: float) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        owner = values
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = _changed(owner[place[-1]], share)
        (folder / file).write_text(json.dumps(values))

    return make


def _changed(value: Any, share: float) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + max(1, round(share * abs(value)))
    if isinstance(value, float):
        return value * (1 + share) if value else share
    return f"{value}x"
