"""Letters or classes of a fine-tuning run: given, of an earlier start, or counted in the training data."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from d2v2ds.config.schema import RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.errors import ConfigError, ShardError
from d2v2ds.io import durable
from d2v2ds.io.read import is_there, read_json
from d2v2ds.modalities.known import open_shards
from d2v2ds.tasks.encoding import TaskConfig

FILE = "outputs.json"
"""Name of the file in a run's folder."""
_MOST_BYTES = 64 << 20


def with_outputs(config: RunConfig) -> RunConfig:
    """Fill in the letters or classes of a task that has none in its settings.

    Those of an earlier start of the run come first, then a file that the settings name, then the training data.

    Raises:
        ConfigError: a file is damaged, or the data have no such annotation.
        ShardError: a folder cannot be read.
    """
    objective = config.objective
    if not isinstance(objective, TaskConfig) or not objective.counts_outputs:
        return config
    file = config.run.dir / FILE
    if is_there(file, ConfigError):
        names = read_outputs(file)
    elif objective.outputs is not None:
        names = read_outputs(objective.outputs)
    else:
        shards = config.data.modalities[objective.modality].shards
        names = objective.names_of(count_annotations(folders_of(shards), objective.label_column))
    return replace(config, objective=objective.with_names(names))


def count_annotations(folders: Sequence[Path], column: str) -> Counter[str]:
    """Count the values of an annotation in packed folders.

    Raises:
        ConfigError: no row has one.
        ShardError: a folder cannot be read, or its rows have no such annotation.
    """
    found: Counter[str] = Counter()
    for folder in folders:
        shards = open_shards(folder)
        if column not in shards.annotations:
            raise ShardError(
                f"{folder}: expected rows with a {column}, found {', '.join(shards.annotations) or 'none'}"
            )
        rows: Iterable[int] = tqdm(range(len(shards)), f"{column}s of {folder.name}", leave=False, disable=None)
        found.update(value for row in rows if (value := getattr(shards.read_labels(row), column)) is not None)
    if not found:
        raise ConfigError(f"{', '.join(map(str, folders))}: no row has a {column}; pack them with annotations")
    return found


def read_outputs(path: Path) -> tuple[str, ...]:
    """Read a file of outputs.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    found = read_json(path, ConfigError, _MOST_BYTES).get("outputs")
    if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
        raise ConfigError(f"{path}: expected 'outputs', a list of names, found {found!r:.60}")
    if len(set(found)) != len(found):
        raise ConfigError(f"{path}: expected different names, found some twice")
    return tuple(found)


def write_outputs(path: Path, names: Sequence[str]) -> None:
    """Write a file of outputs."""
    content: dict[str, Any] = {"outputs": list(names)}
    durable.replace_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
