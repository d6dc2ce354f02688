"""Sentencepiece units of a fine-tuning run: given, of an earlier start, or trained on the training transcripts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2v2ds.config.schema import RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.errors import ConfigError
from d2v2ds.io.output import whole_file
from d2v2ds.io.read import is_there, read_bytes
from d2v2ds.run.outputs import count_annotations
from d2v2ds.tasks.ctc import Ctc, CtcConfig
from d2v2ds.tasks.encoding import TaskConfig
from d2v2ds.tasks.units import FILE, count_words, train_units, units_of
from d2v2ds.train.checkpointing import has_checkpoints

_MOST_BYTES = 64 << 20


def with_units(config: RunConfig) -> tuple[RunConfig, bytes]:
    """Fill in the units of a recogniser that has any.

    Those of a run that has checkpoints come first, then a model that the settings name, then the training data.

    Returns:
        The configuration, and the content of the sentencepiece model; unchanged and empty without units.

    Raises:
        ConfigError: a file is damaged, the settings contradict each other, or the data allow no such units.
        ShardError: a folder cannot be read.
        MissingExtraError: sentencepiece is not installed.
    """
    objective = config.objective
    given = objective.outputs if isinstance(objective, CtcConfig) else None
    is_given = given is not None and given.suffix == ".model"
    if not isinstance(objective, CtcConfig) or not (objective.units or is_given):
        return config, b""
    kept = config.run.dir / FILE
    data = config.data.modalities.get(objective.modality)
    if has_checkpoints(config.run.dir) and is_there(kept, ConfigError):
        where, model = str(kept), read_bytes(kept, ConfigError, _MOST_BYTES)
    elif is_given:
        assert given is not None
        where, model = f"objective.outputs {given}", read_bytes(given, ConfigError, _MOST_BYTES)
    elif given is not None:
        raise ConfigError(
            f"objective.units is {objective.units}, expected a sentencepiece model (NAME.model) in objective.outputs, "
            f"found {given}; leave out one of them"
        )
    elif data is None:
        return config, b""  # `RunConfig.check` reports this
    else:
        where = "objective.units"
        model = trained(count_annotations(folders_of(data.shards), objective.label_column), objective.units)
    units = units_of(model, where)
    count = len(units) - 1
    if objective.units not in (0, count):
        raise ConfigError(f"objective.units is {objective.units}, {where} has {count}; give that number, or none")
    if objective.vocabulary not in ((), units):
        raise ConfigError(f"objective.vocabulary is given and is not that of {where}; leave it out")
    return replace(config, objective=replace(objective, vocabulary=units, units=count)), model


def trained(transcripts: Mapping[str, int], count: int) -> bytes:
    """Train units on counted transcripts.

    Raises:
        ConfigError, MissingExtraError: as `train_units`.
    """
    return train_units(count_words(transcripts), count)


def write_trained(path: Path, transcripts: Mapping[str, int], task: TaskConfig, count: int) -> tuple[str, ...]:
    """Train units on counted transcripts and write their model for `objective.outputs`; returns the outputs.

    Raises:
        ConfigError, MissingExtraError: as `train_units`; the task or the name of the file is of another kind.
    """
    if not isinstance(task, CtcConfig) or path.suffix != ".model" or count < 1:
        raise ConfigError(
            f"--units {count} --to {path}: expected a task of ctc, 1 unit or more and a file NAME.model, found "
            f"{getattr(task, 'name', 'another')}"
        )
    model = trained(transcripts, count)
    write_units(path, model)
    return units_of(model, path)


def write_units(path: Path, model: bytes) -> None:
    """Write a sentencepiece model, whole or not there."""
    with whole_file(path) as file:
        file.write(model)


def give_units(task: Any, model: bytes, where: str) -> None:
    """Give a recogniser of units its model, if there is one.

    Raises:
        ConfigError: it is damaged, or that of another recogniser.
    """
    if model and isinstance(task, Ctc):
        task.set_units(model, where)


def read_units(task: Any, folder: Path) -> None:
    """Read the model of a recogniser of units from the folder of its run or export.

    Without it the recogniser finds text but spells none, so that it needs it where words are given.

    Raises:
        ConfigError: it is damaged, or that of another recogniser.
    """
    if isinstance(task, Ctc) and task.config.units and is_there(folder / FILE, ConfigError):
        give_units(task, read_bytes(folder / FILE, ConfigError, _MOST_BYTES), str(folder / FILE))
