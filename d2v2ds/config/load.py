"""One YAML file describes one run: load it, override it, check it, write it.

Precedence: default of the dataclass < YAML < `section.field=value` on the command line. Unknown keys, wrong types and
contradictions are all reported in one `ConfigError`, before anything else starts.

The settings of a modality are a dataclass of that modality. They are validated first and put into the sections, which
only know that they are mappings by name (`config.modalities`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from d2v2ds.config.faults import drop_unknown_keys, validated
from d2v2ds.config.modalities import build_modalities, fold, unfold
from d2v2ds.config.schema import RunConfig
from d2v2ds.config.unions import build_unions
from d2v2ds.config.words import read_word
from d2v2ds.errors import ConfigError
from d2v2ds.io.read import is_there, parse_yaml, read_text
from d2v2ds.modalities.known import known_modalities

CONFIG_FOLDER = Path(__file__).parents[1] / "configs"


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply overrides.

    Args:
        name_or_path: name of a file in `d2v2ds/configs/` without its ending, or a path to a YAML file.
        overrides: `section.field=value`; the value is read as the type of its field.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    config, problems = read_config(name_or_path, overrides)
    if config is None or problems:
        raise config_error(name_or_path, problems)
    return config


def read_config(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[str]]:
    """Read a YAML file for a caller that has more to check: returns the problems instead of raising them.

    Returns:
        The configuration, None if it cannot be built at all, and one message for each problem.

    Raises:
        ConfigError: if there is no such file or it is not YAML.
    """
    values = named_yaml(name_or_path)
    problems = []
    for override in overrides:
        try:
            apply_word(values, override)
        except ConfigError as error:
            problems.append(str(error))
    shipped = named_yaml(name_or_path)
    for one in (values, shipped):
        fold(one)
    problems += drop_unknown_keys(values, RunConfig, "")
    whole, faults = build_modalities(values, shipped)
    problems += faults
    build_modalities(shipped, {})  # in case a section is replaced by the file's own
    built, faults = build_unions(values, shipped, RunConfig)
    problems += faults
    build_unions(shipped, {}, RunConfig)
    config, faults = validated(RunConfig, values, shipped)
    problems += faults
    if config is None or not whole or not built:
        return None, problems
    return config, problems + config.check()


def config_error(name: str, problems: Sequence[str]) -> ConfigError:
    """Make one error of all problems of a configuration."""
    return ConfigError(f"{name}: {len(problems)} problem(s)\n" + "\n".join(f"  - {problem}" for problem in problems))


def named_yaml(name_or_path: str, folder: Path = CONFIG_FOLDER, option: str = "--config ") -> dict[str, Any]:
    """Read the sections of a YAML file.

    Args:
        name_or_path: name of a file in the folder without its ending, or a path to a YAML file.
        folder: with shipped files.
        option: said before the name if there is no such file.

    Raises:
        ConfigError: there is no such file, or it is not YAML.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name_or_path}.yaml"
    if not is_there(path, ConfigError):
        names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
        raise ConfigError(f"{option}{name_or_path}: no file {path}; give a YAML file or one of: {', '.join(names)}")
    values = parse_yaml(read_text(path, ConfigError), path, ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections, found {type(values).__name__}")
    return values


def apply_word(values: dict[str, Any], override: str, root: type = RunConfig) -> None:
    """Put `section.field=value` into raw values.

    Args:
        values: changed in place.
        override: the word.
        root: dataclass of the values.

    Raises:
        ConfigError: it is no such word, or its value is no YAML where that is needed.
    """
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: expected section.field=value")
    if parts == ["data", "shards"] and root is RunConfig:
        parts = _shards_of_the_only_modality(values, override)
    field = tuple(parts)
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    values[parts[-1]] = read_word(text, field, root)


def _shards_of_the_only_modality(values: dict[str, Any], override: str) -> list[str]:
    """Path of `data.shards` if the run has one modality."""
    data = values.get("data")
    names = [name for name in known_modalities() if isinstance(data, dict) and isinstance(data.get(name), dict)]
    if len(names) != 1:
        raise ConfigError(
            f"override {override!r}: the run has data for {', '.join(names) or 'nothing'}; name one, such as "
            f"data.{next(iter(names), 'audio')}.shards=FOLDER"
        )
    return ["data", names[0], "shards"]


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass of settings to plain values that YAML and JSON can hold."""
    values: dict[str, Any] = json.loads(TypeAdapter(type(config)).dump_json(config))
    return values


def to_yaml(config: RunConfig) -> str:
    """Write the resolved run as YAML; `load_config` reads it back to an equal `RunConfig`."""
    values = to_dict(config)
    unfold(values)
    return yaml.safe_dump(values, sort_keys=False)
