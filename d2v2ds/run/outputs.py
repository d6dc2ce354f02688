"""Letters or classes of a fine-tuning run: given, of an earlier start, or counted in the training data."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from d2v2ds.config.schema import RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.errors import ConfigError, ShardError
from d2v2ds.interop.output_names import read_outputs
from d2v2ds.io import durable
from d2v2ds.io.read import is_there
from d2v2ds.modalities.known import open_shards
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.encoding import TaskConfig
from d2v2ds.tasks.units import letters_of
from d2v2ds.tasks.vocabulary import spell
from d2v2ds.train.checkpointing import has_checkpoints

logger = logging.getLogger(__name__)

FILE = "outputs.json"
"""Name of the file in a run's folder."""
_SAMPLED_ROWS = 2000
"""Transcripts of a folder that are compared with the vocabulary."""
_MOST_UNKNOWN = 0.2
"""Share of unknown letters from which on a run does not start."""


def with_outputs(config: RunConfig) -> RunConfig:
    """Fill in the letters or classes of a task that has none in its settings.

    Those of a run that has checkpoints come first, then a file that the settings name, then the training data.

    Raises:
        ConfigError: a file is damaged, or the data have no such annotation.
        ShardError: a folder cannot be read.
    """
    objective = config.objective
    if not isinstance(objective, TaskConfig) or not objective.counts_outputs:
        return config
    file = config.run.dir / FILE
    if has_checkpoints(config.run.dir) and is_there(file, ConfigError):
        names = read_outputs(file)
    elif objective.outputs is not None:
        names = read_outputs(objective.outputs)
    else:
        data = config.data.modalities.get(objective.modality)
        if data is None:
            return config  # `RunConfig.check` reports this
        names = objective.names_of(count_annotations(folders_of(data.shards), objective.label_column))
    return replace(config, objective=objective.with_names(names))


def vocabulary_faults(config: RunConfig) -> list[str]:
    """Return a message if most letters of the transcripts are none of the vocabulary; warn of fewer.

    Raises:
        ShardError: a folder cannot be read.
    """
    objective = config.objective
    data = config.data.modalities.get(objective.modality) if isinstance(objective, CtcConfig) else None
    if not isinstance(objective, CtcConfig) or data is None:
        return []
    found: Counter[str] = Counter()
    for folder in folders_of(data.shards):
        shards = open_shards(folder)
        for row in range(0, len(shards), max(1, len(shards) // _SAMPLED_ROWS)):
            found.update(spell(getattr(shards.read_labels(row), objective.label_column, None) or ""))
    known = letters_of(objective.vocabulary) if objective.units else set(objective.vocabulary)
    unknown = {letter: count for letter, count in found.items() if letter not in known}
    if not unknown:
        return []
    share = sum(unknown.values()) / found.total()
    said = (
        f"objective.vocabulary lacks {share:.1%} of the letters of data.{objective.modality}.shards, such as "
        f"{' '.join(sorted(unknown, key=lambda letter: -unknown[letter])[:8])}; is it of another case or language?"
    )
    if share > _MOST_UNKNOWN:
        return [said]
    logger.warning("%s", said)
    return []


def count_annotations(folders: Sequence[Path], column: str) -> Counter[str]:
    """Count the values of an annotation in packed folders.

    Raises:
        ConfigError: no row has one.
        ShardError: a folder cannot be read, or its rows have no such annotation.
    """
    found: Counter[str] = Counter()
    for folder in folders:
        shards, before = open_shards(folder), found.total()
        if column not in shards.annotations:
            raise ShardError(
                f"{folder}: expected rows with a {column}, found {', '.join(shards.annotations) or 'none'}"
            )
        rows: Iterable[int] = tqdm(range(len(shards)), f"{column}s of {folder.name}", leave=False, disable=None)
        values = (getattr(shards.read_labels(row), column) for row in rows)
        found.update(value for value in values if value is not None and value.strip())
        if lacking := len(shards) - (found.total() - before):
            logger.warning("%s: %d of %d rows have no %s and are left out", folder, lacking, len(shards), column)
    if not found:
        raise ConfigError(f"{', '.join(map(str, folders))}: no row has a {column}; pack them with annotations")
    return found


def write_outputs(path: Path, names: Sequence[str]) -> None:
    """Write a file of outputs."""
    content: dict[str, Any] = {"outputs": list(names)}
    durable.replace_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
