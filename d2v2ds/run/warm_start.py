"""`init.weights`: begin a run with the weights of an export, and report beforehand what does not fit.

In: the run's configuration and a folder written by `d2v2ds.export` or `d2v2ds.interop.fairseq`. The optimizer, the
schedules and the position in the data are those of a new run.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v2ds.config.load import to_dict
from d2v2ds.config.schema import RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.distributed.engine import Engine
from d2v2ds.distributed.initial_weights import set_initial_weights
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import CheckpointError, ShardError
from d2v2ds.interop.export_folder import Kind, ModelFolder, Part
from d2v2ds.modalities.known import known_modalities
from d2v2ds.modalities.settings import write_trunk

logger = logging.getLogger(__name__)

MAY_DIFFER = {
    "layer_drop", "attention_path", "vocab_size", "conv_gradient", "alibi_learned", "final_norm", "relative_per_block",
}  # fmt: skip
"""Settings of the trunk that change how it is trained, not what its weights mean, or that show in their shapes; and
everything named dropout."""
SHARED_TABLE = ".relative.table"
"""End of the name of a table that all blocks of an export may share; a run with one for each block copies it."""
DECODER_MAY_DIFFER = {"mask_noise_std"}
"""The same of a decoder."""
MOST_SHAPES = 5
"""Tensors of other shapes that are listed; where one setting differs there may be hundreds."""
PARTS: tuple[Part, ...] = ("model", "objective", "teacher")
"""Parts of an export that a run takes."""


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
            network = config.objective.build(config.model, config.run.seed).build_network(
                activation_checkpointing=False
            )
        self._expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        self._found = {part: self._kept(part, self.folder.layout(part)) for part in PARTS}
        """Kinds of the tensors that are taken, by part and by the network's names."""

    def faults(self) -> list[str]:
        """Return one message for each reason why these weights do not fit the run's network."""
        where = f"init.weights {self.folder.path}"
        problems = [
            f"{where}: was made with {key} {theirs!r}, this run has {ours!r}"
            for key, theirs, ours in self._other_settings()
        ]
        other = [
            (part, name, kind.shape)
            for part, layout in self._found.items()
            for name, kind in layout.items()
            if not _fits(name, kind.shape, self._expected[name])
        ]
        with_way_out = not problems  # leaving tensors out does not make another setting fit
        for part, name, shape in other[:MOST_SHAPES]:
            own = _export_name(name)
            way_out = f"; change the model, or leave it out with init.skip=[{own}]" if with_way_out else ""
            problems.append(f"{where}: {part} {own} has shape {shape}, this run's {self._expected[name]}{way_out}")
        if len(other) > MOST_SHAPES:
            problems.append(f"{where}: {len(other) - MOST_SHAPES} more tensors have other shapes")
        theirs = self.folder.description.objective or {}
        outputs = theirs.get("vocabulary") or theirs.get("classes")
        if outputs and self._has("head") and tuple(outputs) != getattr(self._config.objective, "names", ()):
            problems.append(f"{where}: its head has other outputs than this run's; leave it out with init.skip=[head]")
        if not any(name.startswith("trunk.blocks.") for name in self._found["model"]):
            problems.append(f"{where}: has none of the shared blocks")
        problems += [f"init.skip: {prefix!r} is no parameter or part of one" for prefix in self._skip if not any(
            _within(_export_name(name), prefix) for name in self._expected
        )]  # fmt: skip
        return problems

    def takes_input_layer(self, modality: str) -> bool:
        """Return True if inputs of a modality must mean what they meant to the export."""
        return self._has(f"trunk.encoders.{modality}.{known_modalities()[modality].input_layer}")

    def fresh(self) -> list[str]:
        """Parts of the network that these weights lack, and that are drawn."""
        missing = self._expected.keys() - self._found["model"].keys() - self._found["objective"].keys()
        return sorted({".".join(_export_name(name).split(".")[:2]) for name in missing})

    def load(self, student: Engine, teacher: Teacher | None) -> None:
        """Put the weights in place. Collective."""
        if fresh := self.fresh():
            logger.warning("init.weights %s lacks %s: drawn anew", self.folder.path, ", ".join(fresh))
        if teacher is not None and not self.folder.has("teacher"):
            logger.warning("init.weights %s has no teacher: it starts as a copy of the student", self.folder.path)
        sources = [self.reader("model"), self.reader("objective")]

        def student_source(name: str) -> Tensor | None:
            return next((found for source in sources if (found := source(name)) is not None), None)

        set_initial_weights(student, teacher, student_source, self.reader("teacher"))
        logger.info("weights of %s, a new optimizer", self.folder.path)

    def reader(self, part: Part) -> "PartReader":
        """Return what reads a part of the export by the names and in the shapes of the run's network."""
        return PartReader(self.folder, part, {name: self._expected[name] for name in self._found[part]})

    def _kept(self, part: Part, layout: Mapping[str, Kind]) -> dict[str, Kind]:
        """Tensors that the run's network has and that are wanted; other modalities of the export do not matter."""
        named = {_network_name(part, name): kind for name, kind in layout.items()}
        return {
            name: kind
            for name, kind in named.items()
            if name in self._expected and not any(_within(_export_name(name), skipped) for skipped in self._skip)
        }

    def _other_settings(self) -> Iterable[tuple[str, Any, Any]]:
        """Settings by which the same weights would compute something else: name, the export's, the run's."""
        theirs, ours = write_trunk(self.folder.description.model), write_trunk(self._config.model)
        objective = to_dict(self._config.objective).get("modalities", {})
        export = (self.folder.description.objective or {}).get("modalities", {})
        for name in theirs["modalities"].keys() | ours["modalities"].keys():
            has_both = name in theirs["modalities"] and name in ours["modalities"]
            if not has_both or not self._has(f"trunk.encoders.{name}"):
                for side in (theirs, ours):
                    side["modalities"].pop(name, None)
            elif self._has(f"decoders.{name}") and name in export and name in objective:
                before, now = export[name]["decoder"], objective[name]["decoder"]
                yield from _differences(before, now, f"objective.modalities.{name}.decoder", DECODER_MAY_DIFFER)
        yield from _differences(theirs, ours, "model", MAY_DIFFER)

    def _has(self, prefix: str) -> bool:
        return any(_within(name, prefix) for part in self._found.values() for name in part)


class PartReader:
    """Reads tensors of one part of an export by the names of the run's network."""

    def __init__(self, folder: ModelFolder, part: Part, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """
        Args:
            folder: the export.
            part: of it.
            shapes: of the run's tensors, by name; others are not read.
        """
        self._folder, self._part, self._shapes = folder, part, shapes

    def __call__(self, name: str) -> Tensor | None:
        if name not in self._shapes:
            return None
        return self._folder.tensor(self._part, _export_name(name)).expand(self._shapes[name])


def _network_name(part: Part, name: str) -> str:
    """Name of a tensor of an export in an objective's network."""
    return name if part == "objective" else f"trunk.{name}"


def _export_name(name: str) -> str:
    """Name of a tensor of an objective's network in an export, and in `init.skip`."""
    return name.removeprefix("trunk.")


def _fits(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return True if a tensor has the run's shape, or is a table that all blocks share and the run has one for each."""
    is_shared = name.endswith(SHARED_TABLE) and found[:1] == (1,)
    return found == expected or (is_shared and found[1:] == expected[1:])


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _differences(theirs: Any, ours: Any, where: str, may_differ: set[str]) -> Iterable[tuple[str, Any, Any]]:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        if theirs != ours:
            yield where, theirs, ours
        return
    for key in theirs.keys() | ours.keys():
        if key not in may_differ and "dropout" not in key:
            yield from _differences(theirs.get(key), ours.get(key), f"{where}.{key}", may_differ)


def open_warm_start(config: RunConfig) -> tuple[WarmStart | None, list[str]]:
    """Open what `init.weights` names; returns one message for each reason why it cannot be used, too."""
    if config.init.weights is None:
        return None, []
    try:
        start = WarmStart(config, config.init.weights)
    except CheckpointError as error:
        return None, [f"init.weights: {error}"]
    problems = start.faults()
    for name, data in config.data.modalities.items():
        if not start.takes_input_layer(name):
            continue
        preprocessing = start.folder.description.preprocessing[name]
        for shards in folders_of(data.shards):
            try:
                found = known_modalities()[name].packed_faults(start.folder.path, preprocessing, shards)
            except ShardError:
                continue  # those who check the data report this
            problems += [f"init.weights: {fault}" for fault in found]
    return start, problems
