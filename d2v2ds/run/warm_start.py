"""`init.weights`: begin a pretraining run with the weights of an export, and say beforehand what does not fit.

In: the run's configuration and a folder written by `d2v2ds.export` or `d2v2ds.interop.fairseq`. The optimizer, the
schedules and the position in the data are those of a new run.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v2ds.api import tokenizer_faults
from d2v2ds.config.load import RunConfig, to_dict
from d2v2ds.data.joined import folders_of
from d2v2ds.distributed.engine import Engine
from d2v2ds.distributed.initial_weights import start_from
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import CheckpointError, ShardError
from d2v2ds.interop.export_folder import Kind, ModelFolder, Part
from d2v2ds.model.trunk import Data2Vec2

logger = logging.getLogger(__name__)

MAY_DIFFER = {"layer_drop", "attention_path", "loss", "target", "mask_noise_std", "share_local_encoder", "vocab_size"}
"""Settings of the model that change how it is trained, not what its weights mean, or that their shapes show; and
everything named dropout."""

MOST_SHAPES = 5
"""Tensors of other shapes that are listed; where one setting differs there may be hundreds."""


class WarmStart:
    """The weights that a run begins with."""

    def __init__(self, config: RunConfig, path: Path) -> None:
        """
        Raises:
            CheckpointError: if there is no such export.
        """
        self.folder = ModelFolder(path)
        self._config, self._skip = config, config.init.skip
        with torch.device("meta"):
            self._expected = {n: tuple(t.shape) for n, t in Data2Vec2(config.model).state_dict().items()}
        self._found = {part: self._kept(self.folder.layout(part)) for part in ("model", "teacher")}

    def faults(self) -> list[str]:
        """Why these weights do not fit the run's model, as sentences."""
        where = f"init.weights {self.folder.path}"
        problems = [
            f"{where}: was made with {key} {theirs!r}, this run has {ours!r}"
            for key, theirs, ours in self._other_settings()
        ]
        other = [
            (part, name, kind.shape)
            for part, layout in self._found.items()
            for name, kind in layout.items()
            if kind.shape != self._expected[name]
        ]
        with_way_out = not problems  # leaving tensors out does not make another setting fit
        for part, name, shape in other[:MOST_SHAPES]:
            way_out = f"; change the model, or leave it out with init.skip=[{name}]" if with_way_out else ""
            problems.append(f"{where}: {part} {name} has shape {shape}, this run's {self._expected[name]}{way_out}")
        if len(other) > MOST_SHAPES:
            problems.append(f"{where}: {len(other) - MOST_SHAPES} more tensors have other shapes")
        if not any(name.startswith("blocks.") for name in self._found["model"]):
            problems.append(f"{where}: has none of the shared blocks")
        problems += [f"init.skip: {prefix!r} is no parameter or part of one" for prefix in self._skip if not any(
            _within(name, prefix) for name in self._expected
        )]  # fmt: skip
        return problems

    def takes_embeddings(self) -> bool:
        """Whether ids of text must mean what they meant."""
        return self._has("encoders.text.local.tokens")

    def fresh(self) -> list[str]:
        """Parts of the student that these weights do not have, and that are drawn."""
        missing = self._expected.keys() - self._found["model"].keys()
        return sorted({".".join(name.split(".")[:2]) for name in missing})

    def load(self, student: Engine, teacher: Teacher) -> None:
        """Put the weights in place. Collective."""
        if fresh := self.fresh():
            logger.warning("init.weights %s lacks %s: drawn anew", self.folder.path, ", ".join(fresh))
        if not self.folder.has("teacher"):
            logger.warning("init.weights %s has no teacher: it starts as a copy of the student", self.folder.path)
        sources = {part: _Whole(self.folder, part, self._found[part]) for part in ("model", "teacher")}
        start_from(student, teacher, sources["model"], sources["teacher"])
        logger.info("weights of %s, a new optimizer", self.folder.path)

    def _kept(self, layout: Mapping[str, Kind]) -> dict[str, Kind]:
        """Those that the run's model has and that are wanted; other modalities of the export do not matter."""
        return {
            name: kind
            for name, kind in layout.items()
            if name in self._expected and not any(_within(name, prefix) for prefix in self._skip)
        }

    def _other_settings(self) -> Iterable[tuple[str, Any, Any]]:
        """Settings by which the same weights would compute something else: name, the export's, the run's."""
        theirs, ours = to_dict(self.folder.description.model), to_dict(self._config.model)
        for name in ("audio", "image", "text"):
            sides = (theirs["modalities"], ours["modalities"])
            if any(side[name] is None for side in sides) or not self._has(f"encoders.{name}"):
                for side in sides:
                    del side[name]
            elif not self._has(f"decoders.{name}"):
                for side in sides:
                    del side[name]["decoder"]
        yield from _differences(theirs, ours, "model")

    def _has(self, prefix: str) -> bool:
        return any(_within(name, prefix) for name in self._found["model"])


class _Whole:
    """Reads tensors by name."""

    def __init__(self, folder: ModelFolder, part: Part, names: Iterable[str]) -> None:
        self._folder, self._part, self._names = folder, part, set(names)

    def __call__(self, name: str) -> Tensor | None:
        return self._folder.tensor(self._part, name) if name in self._names else None


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _differences(theirs: Any, ours: Any, where: str) -> Iterable[tuple[str, Any, Any]]:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        if theirs != ours:
            yield where, theirs, ours
        return
    for key in theirs.keys() | ours.keys():
        if key not in MAY_DIFFER and "dropout" not in key:
            yield from _differences(theirs.get(key), ours.get(key), f"{where}.{key}")


def open_warm_start(config: RunConfig) -> tuple[WarmStart | None, list[str]]:
    """What `init.weights` names, and why it cannot be used, as sentences."""
    if config.init.weights is None:
        return None, []
    try:
        start = WarmStart(config, config.init.weights)
        problems = start.faults()
        if config.data.text is not None and start.takes_embeddings():
            for shards in folders_of(config.data.text.shards):
                problems += [f"init.weights: {fault}" for fault in tokenizer_faults(start.folder, shards)]
    except CheckpointError as error:
        return None, [f"init.weights: {error}"]
    except ShardError:  # said by those who check the data
        return start, problems
    return start, problems
