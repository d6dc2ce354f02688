"""Preprocessing of a run's inputs: what its data say, and what the run's folder keeps for when they are gone."""

import json
import logging
from pathlib import Path

from d2v2ds.config.schema import RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.data.schema import Index, read_index
from d2v2ds.errors import ConfigError, ShardError
from d2v2ds.interop.export_folder import Preprocessing
from d2v2ds.io import durable
from d2v2ds.io.read import is_there, read_json, validate
from d2v2ds.modalities.known import known_modalities
from d2v2ds.model.trunk import TrunkConfig

logger = logging.getLogger(__name__)

FILE = "preprocessing.json"
"""Name of the file in a run's folder."""


def first_index(config: RunConfig, modality: str) -> Index | None:
    """Read the index of a modality's first packed folder; None, with a warning, if it cannot be read."""
    data = config.data.modalities.get(modality)
    if data is None:
        return None
    try:
        return read_index(folders_of(data.shards)[0])
    except (ShardError, OSError) as error:
        logger.warning("the run's shards cannot be read: %s", error)
        return None


def describe(config: RunConfig, model: TrunkConfig, run_dir: Path | None = None) -> Preprocessing:
    """Describe the preprocessing of every modality.

    Args:
        config: of the run.
        model: settings of its trunk.
        run_dir: its folder, which knows what data that cannot be read would say; None for a run that begins.

    Raises:
        ConfigError: the file of the folder is damaged.
    """
    kept = {} if run_dir is None else _kept(run_dir / FILE)
    found: Preprocessing = {}
    for name, network in model.modalities.items():
        index = first_index(config, name)
        described = known_modalities()[name].describe_preprocessing(network, config.data.modalities.get(name), index)
        found[name] = described if index is not None else kept.get(name, {}) | described
    return found


def write(config: RunConfig) -> None:
    """Write the file of a run that begins. On one rank alone."""
    text = json.dumps(describe(config, config.model), ensure_ascii=False, indent=1)
    durable.replace_text(config.run.dir / FILE, text + "\n")


def _kept(path: Path) -> Preprocessing:
    return (
        validate(Preprocessing, read_json(path, ConfigError), path, ConfigError) if is_there(path, ConfigError) else {}
    )
