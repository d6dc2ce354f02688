"""One YAML file describes one run: load it, override it, check it, print it.

    python -m d2v2ds.config audio_large optim.clip_norm=0.5 [--world 64]

prints the resolved run, its parameter counts, memory per rank, steps, samples and operations, and exits.
Precedence: default of the dataclass < YAML < `section.field=value` on the command line. Unknown keys, wrong
types and contradictions are all reported in one `ConfigError`, before anything else starts.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from d2v2ds.errors import ConfigError, below
from d2v2ds.modalities.audio.reader import AudioDataConfig
from d2v2ds.modalities.image.reader import ImageDataConfig
from d2v2ds.modalities.text.reader import TextDataConfig
from d2v2ds.model.trunk import ModelConfig
from d2v2ds.train.guard import HealthConfig
from d2v2ds.train.optim import OptimConfig
from d2v2ds.train.schedule import EmaConfig, LearningRateConfig

MISSING = "???"
"""What a shipped YAML says where the user must give a value."""
CONFIG_FOLDER = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """How long, where, and how often to look and save."""

    dir: Path
    """Folder of the run: resolved configuration, checkpoints, metrics."""
    total_steps: int | None = None
    """Optimizer steps of the whole run; the learning rate reaches its minimum there. Or let them follow from one of
    `hours`, `epochs` and `tokens`, so that a run keeps its length when the global batch changes."""
    hours: float | None = None
    """Audio seen by the whole run, before the masks multiply it (hours)."""
    epochs: float | None = None
    """Passes over `epoch_images` images."""
    epoch_images: int | None = None
    """Images of one such pass, as the recipe counts them."""
    tokens: float | None = None
    """Text tokens seen by the whole run, before the masks multiply them."""
    seed: int = 1
    """Of weights, sample order, crops, masks, dropout and noise."""
    save_every_steps: int = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept; 0 keeps all. The one with the lowest validation loss is kept besides."""
    keep_every_steps: int | None = None
    """Checkpoints whose step is a multiple of it are kept for good."""
    async_checkpoints: bool = True
    """Write checkpoints while training goes on; takes host memory for a copy of this rank's part."""
    log_every_steps: int = 50
    """Optimizer steps between lines of metrics."""
    health_every_steps: int = 500
    """Optimizer steps between effective ranks and position shares, which cost an eigendecomposition each."""

    def check(self) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        floors = {"save_every_steps": 1, "log_every_steps": 1, "health_every_steps": 1}
        problems = below(self, "run.", **floors, keep_checkpoints=0, seed=0)
        given = [name for name in ("total_steps", "hours", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            problems.append(
                "run: expected exactly one of total_steps, hours, epochs and tokens, found "
                f"{', '.join(given) or 'none'}; set the others to null"
            )
        problems += [f"run.{n} is {getattr(self, n)}, expected more than 0" for n in given if getattr(self, n) <= 0]
        if self.keep_every_steps is not None and (
            self.keep_every_steps < 1 or self.keep_every_steps % self.save_every_steps
        ):
            problems.append(
                f"run.keep_every_steps is {self.keep_every_steps}, expected a multiple of run.save_every_steps "
                f"{self.save_every_steps}"
            )
        if self.epochs is not None and (self.epoch_images is None or self.epoch_images < 1):
            problems.append(f"run.epochs is given, and run.epoch_images is {self.epoch_images}, expected 1 or more")
        return problems


DataConfig = AudioDataConfig | ImageDataConfig | TextDataConfig


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where samples come from: one field per modality, those that the model has."""

    num_workers: int = 2
    """Loader processes on each rank; 0 loads in the training process."""
    audio: AudioDataConfig | None = None
    image: ImageDataConfig | None = None
    text: TextDataConfig | None = None

    def active(self) -> dict[str, DataConfig]:
        """Settings of the modalities in use, by name, in the order in which a step sees them."""
        return {name: section for name, section in vars(self).items() if name in PACKERS and section is not None}

    def check(self) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        problems = below(self, "data.", num_workers=0)
        for name, section in self.active().items():
            problems += section.check()
            try:
                section.mask.check()
            except ValueError as error:
                problems.append(f"data.{name}.mask: {error}")
        return problems

    def missing(self) -> list[str]:
        """Folders that the user still has to name, as sentences."""
        active = self.active()
        return [
            f"data.{name}.shards: required, give data.{name + '.' if len(active) > 1 else ''}shards=FOLDER "
            f"(written by python -m preprocessing.pack_{PACKERS[name]})"
            for name, section in active.items()
            if str(section.shards) == MISSING
        ]


PACKERS = {"audio": "audio", "image": "images", "text": "text"}
"""Ending of the packer of each modality."""


@dataclass(frozen=True, kw_only=True)
class ValidSection:
    """Which packed folders are held out, and how often they are looked at."""

    audio: Path | None = None
    """Folder of held-out recordings; None validates no speech."""
    image: Path | None = None
    text: Path | None = None
    every_steps: int = 1000
    """Optimizer steps between validations."""
    micro_batches: int = 32
    """Micro-batches of each modality that are looked at, over all ranks; fewer if the folder has fewer."""

    def folders(self) -> dict[str, Path]:
        """Those that are given, by modality."""
        return {name: path for name in ("audio", "image", "text") if (path := getattr(self, name)) is not None}

    def check(self) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        return below(self, "valid.", every_steps=1, micro_batches=1)


@dataclass(frozen=True, kw_only=True)
class InitSection:
    """Where the first weights come from; drawn from the seed if nothing is given."""

    weights: Path | None = None
    """Folder written by `d2v2ds.export` or `d2v2ds.interop.fairseq`. Its student and teacher are taken, optimizer and
    warm-up begin anew; a run that has checkpoints goes on from those."""
    skip: tuple[str, ...] = ()
    """Parameters that are drawn all the same: names or beginnings of names, such as `decoders` or
    `encoders.text.local.tokens`."""


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """Which DeepSpeed configuration, and what it cannot say."""

    deepspeed: str = "zero3_bf16"
    """Name of a file in `ds_configs/` without its ending, or a path."""
    activation_checkpointing: bool = True
    """Recompute every transformer block in the backward pass instead of keeping its activations."""
    timeout_minutes: float = 30.0
    """How long a rank waits for the others before it gives up."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    run: RunSection
    data: DataSection
    model: ModelConfig
    optim: OptimConfig
    lr: LearningRateConfig
    ema: EmaConfig
    init: InitSection = InitSection()
    engine: EngineSection = EngineSection()
    health: HealthConfig = HealthConfig()
    valid: ValidSection = ValidSection()

    def check(self) -> list[str]:
        """Contradictions within and between the sections, as sentences; empty if there are none."""
        if wild := list(_not_finite(self)):
            return wild
        problems = [f"model: {problem}" for problem in self.model.check()]
        problems += below(self.engine, "engine.", timeout_minutes=0.01) + self.lr.check()
        of_run = self.run.check()
        of_valid = self.valid.check()
        problems += of_run + of_valid + self.health.check()
        problems += self.optim.check() + self.ema.check() + self.data.check()
        data, model = self.data.active(), self.model.modalities.active()
        for name in data.keys() ^ model.keys():
            here, there = ("data", "model.modalities") if name in data else ("model.modalities", "data")
            problems.append(f"{here}.{name} is configured and {there}.{name} is not; give both, or set both to null")
        for name in self.valid.folders().keys() - data.keys():
            problems.append(f"valid.{name} is given and data.{name} is not; validation needs the settings of its data")
        save, validate = self.run.save_every_steps, self.valid.every_steps
        if self.valid.folders() and not (of_run or of_valid) and max(save, validate) % min(save, validate):
            problems.append(
                f"run.save_every_steps is {save} and valid.every_steps {validate}, expected one to be a multiple of "
                "the other: the best checkpoint is chosen among those that were validated"
            )
        if not of_run:
            try:
                steps = self.total_steps
            except (ValueError, ZeroDivisionError) as error:
                return [*problems, str(error)]
            if self.lr.warmup_steps > steps:
                problems.append(f"lr.warmup_steps {self.lr.warmup_steps} is more than the {steps} steps of the run")
        return problems

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Raises:
            ValueError: if they cannot follow, because the run has no such modality.
        """
        run, data = self.run, self.data
        if run.total_steps is not None:
            return run.total_steps
        if run.hours is not None and data.audio is not None:
            return round(run.hours * 3600 / data.audio.global_batch_seconds)
        if run.epochs is not None and run.epoch_images is not None and data.image is not None:
            return round(run.epochs * run.epoch_images / data.image.global_batch_images)
        if run.tokens is not None and data.text is not None:
            return round(run.tokens / data.text.global_batch_tokens)
        needed = {"hours": "data.audio", "epochs": "data.image", "tokens": "data.text"}
        given = next(name for name in needed if getattr(run, name) is not None)
        raise ValueError(f"run.{given} needs {needed[given]}, which is not configured; give run.total_steps")


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply overrides.

    Args:
        name_or_path: name of a file in `d2v2ds/configs/` without its ending, or a path to a YAML file.
        overrides: `section.field=value`; the value is read as YAML.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    config, problems = read_config(name_or_path, overrides)
    if config is None or problems:
        raise config_error(name_or_path, problems)
    return config


def read_config(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[str]]:
    """`load_config` for a caller that has more to check: returns the problems instead of raising them.

    Returns:
        The configuration, None if it cannot be built at all, and everything that is wrong with it, as sentences.

    Raises:
        ConfigError: if there is no such file or it is not YAML.
    """
    values = _read_yaml(name_or_path)
    problems = []
    for override in overrides:
        try:
            _apply(values, override)
        except ConfigError as error:
            problems.append(str(error))
    problems += _drop_unknown_keys(values, RunConfig, "")
    config: RunConfig | None
    try:
        config = TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        problems += [_sentence(fault) for fault in error.errors()]
        config = _without_faulty_values(values, _read_yaml(name_or_path), error)
        if config is None:
            return None, problems
    return config, problems + config.check()


def _without_faulty_values(values: dict[str, Any], shipped: dict[str, Any], error: ValidationError) -> RunConfig | None:
    """What is left if faulty values give way to the file's own: something to go on checking with."""
    for fault in error.errors():
        inner: Any = values
        own: Any = shipped
        *path, leaf = fault["loc"]
        for part in path:
            inner = inner.get(part) if isinstance(inner, dict) else None
            own = own.get(part) if isinstance(own, dict) else None
        if not isinstance(inner, dict):
            return None
        inner.pop(leaf, None)
        if isinstance(own, dict) and leaf in own:
            inner[leaf] = own[leaf]
    try:
        return TypeAdapter(RunConfig).validate_python(values)
    except ValidationError:
        return None


def config_error(name: str, problems: Sequence[str]) -> ConfigError:
    """One error for all problems of a configuration."""
    return ConfigError(f"{name}: {len(problems)} problem(s)\n" + "\n".join(f"  - {problem}" for problem in problems))


def _read_yaml(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIG_FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml"))
        raise ConfigError(f"--config {name_or_path}: no file {path}; give a YAML file or one of: {', '.join(names)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections, found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: expected section.field=value")
    if parts == ["data", "shards"]:
        parts = _shards_of_the_only_modality(values, override)
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    try:
        values[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _shards_of_the_only_modality(values: dict[str, Any], override: str) -> list[str]:
    """What `data.shards` stands for where there is one modality."""
    data = values.get("data")
    names = [name for name in PACKERS if isinstance(data, dict) and isinstance(data.get(name), dict)]
    if len(names) != 1:
        raise ConfigError(f"override {override!r}: the run has data for {', '.join(names) or 'nothing'}; name one, "
                          "such as data.audio.shards=FOLDER")  # fmt: skip
    return ["data", names[0], "shards"]


def _dataclasses_in(annotation: Any) -> Iterator[type]:
    """The dataclasses an annotation may hold: itself, or members of a union."""
    if dataclasses.is_dataclass(annotation):
        yield typing.cast(type, annotation)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _dataclasses_in(member)


def _drop_unknown_keys(values: dict[str, Any], section: type, prefix: str) -> list[str]:
    """Remove keys that no field has, for pydantic would do so in silence; say which and what was meant."""
    hints = typing.get_type_hints(section)
    problems = []
    for key in list(values):
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            meant = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            problems.append(f"{prefix}{key}: unknown key; {meant}")
            del values[key]
        elif isinstance(values[key], dict):
            for inner in _dataclasses_in(hints[key]):
                problems += _drop_unknown_keys(values[key], inner, f"{prefix}{key}.")
    return problems


def _sentence(fault: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{where}: required, not given"
    return f"{where}: {fault['msg']}, found {fault['input']!r}"


def _not_finite(value: Any, where: str = "") -> Iterator[str]:
    """Every number that is none, as a sentence; comparisons with it would pass or fail by accident."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _not_finite(getattr(value, field.name), f"{where}.{field.name}".lstrip("."))
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}, expected a finite number"


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values that YAML and JSON can hold."""
    return json.loads(TypeAdapter(type(config)).dump_json(config))  # type: ignore[no-any-return]


def to_yaml(config: RunConfig) -> str:
    """The resolved run as YAML; `load_config` reads it back to an equal `RunConfig`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def main(arguments: list[str] | None = None) -> int:
    """Print the resolved run."""
    from d2v2ds.config.summary import batch_advice, summary  # here, for it reads the configuration itself

    parser = argparse.ArgumentParser(prog="python -m d2v2ds.config", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="name in d2v2ds/configs or path of a YAML file")
    parser.add_argument("--world", type=int, default=1, help="ranks, for the memory of one (1)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    if options.world < 1:
        parser.error(f"--world {options.world}: expected 1 rank or more")
    try:
        config = load_config(options.config, options.overrides)
        lines = summary(config, options.world) + batch_advice(options.config, config)
    except (ConfigError, ValueError) as error:  # ValueError: masks that cannot be drawn
        print(error, file=sys.stderr)
        return 2
    print(to_yaml(config), end="")
    print("\n".join(f"# {line}" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
