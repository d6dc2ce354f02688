"""Every bound of every field of a configuration is kept, and a value beyond it is reported under the field's name."""

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from d2v2ds.bounds import Bounds
from d2v2ds.config.load import CONFIG_FOLDER, load_config, read_config, to_yaml
from d2v2ds.config.schema import DataSection, RunConfig
from d2v2ds.modalities.known import SHIPPED
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig

BEYOND = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
"""Added to a limit, it gives a value that breaks it."""
WITHOUT_BOUNDS = (".mask.adjust", ".loss.scale", ".weights.0", ".features.mean")
"""Ends of the names of numbers that may have either sign, or that are checked beside the folders they belong to."""


def numbers(annotation: Any, name: str) -> Iterator[tuple[str, Bounds | None]]:
    """Each number that an annotation holds, with its bounds: itself, or items of a tuple, or fields further down."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        if arguments[0] in (int, float):
            yield name, next((found for found in arguments[1:] if isinstance(found, Bounds)), None)
    elif origin in (typing.Union, types.UnionType):
        kinds = [member for member in arguments if dataclasses.is_dataclass(member)]
        for member in arguments:
            if len(kinds) < 2 or member is kinds[0]:  # the others have cases of their own
                yield from numbers(member, name)
    elif origin is tuple:
        for number, item in enumerate(argument for argument in arguments if argument is not ...):
            yield from numbers(item, f"{name}.{number}")
    elif origin is Mapping:
        for modality in SHIPPED:
            yield from numbers(arguments[1], f"{name}.{modality.name}")
    elif dataclasses.is_dataclass(annotation):
        yield from fields(typing.cast(type, annotation), name)
    elif annotation in (int, float):
        yield name, None


def fields(section: type, name: str = "") -> Iterator[tuple[str, Bounds | None]]:
    """Each number of a section by its name in YAML."""
    hints = typing.get_type_hints(section, include_extras=True)
    for field, annotation in hints.items():
        if section is DataSection and field == "modalities":
            for modality in SHIPPED:
                yield from fields(modality.data, f"{name}.{modality.name}")
        elif section is TrunkConfig and field == "modalities":
            for modality in SHIPPED:
                yield from fields(modality.network, f"{name}.{field}.{modality.name}")
        else:
            yield from numbers(annotation, f"{name}.{field}".lstrip("."))


FIELDS = dict(fields(RunConfig))
TASKS = {"finetune/ctc_tiny": CtcConfig, "finetune/image_classify_tiny": ClassifyConfig}


def cases(found: Mapping[str, Bounds | None]) -> list[tuple[str, float]]:
    """Values beyond the bounds."""
    return [
        (name, getattr(bounds, limit) + step)
        for name, bounds in found.items()
        for limit, step in BEYOND.items()
        if bounds is not None and getattr(bounds, limit) is not None
    ]


CASES = cases(FIELDS)
TASK_CASES = [(task, *case) for task, kind in TASKS.items() for case in cases(dict(fields(kind, "objective")))]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a configuration of all modalities."""
    values, other = (
        yaml.safe_load((CONFIG_FOLDER / f"{name}_tiny.yaml").read_text()) for name in ("multimodal", "spectrogram")
    )
    values["data"]["spectrogram"] = other["data"]["spectrogram"]
    for section in ("model", "objective"):
        values[section]["modalities"]["spectrogram"] = other[section]["modalities"]["spectrogram"]
    file = tmp_path_factory.mktemp("every") / "every.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


@pytest.fixture(scope="module")
def plain(every: str) -> dict[str, Any]:
    """The same as plain values."""
    return yaml.safe_load(to_yaml(load_config(every)))


def override(name: str, value: float, plain: dict[str, Any]) -> str:
    """The setting that gives a number a value; the other items of a list keep theirs."""
    field, *items = re.split(r"\.(?=\d)", name)
    if not items:
        return f"{field}={value}"
    found: Any = copy.deepcopy(plain)
    for part in field.split("."):
        found = found[part]
    whole = found
    for item in items[:-1]:
        found = found[int(item)]
    found[int(items[-1])] = value
    return f"{field}={whole}"


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_value_beyond_its_bounds_is_reported_under_its_name(
    name: str, value: float, every: str, plain: dict[str, Any]
) -> None:
    config, problems = read_config(every, [override(name, value, plain)])
    assert config is not None, "the rest can be checked too"
    (problem,) = problems
    assert problem.startswith(f"{name}: Input should be ")
    assert problem.endswith(f", found {value}")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configurations of tasks with every optional section."""
    mask = {"time": {"fraction": 0.5, "length": 3}, "channels": {"fraction": 0.5, "length": 3}}
    files = {}
    for task in TASKS:
        values = yaml.safe_load((CONFIG_FOLDER / f"{task}.yaml").read_text())
        values["objective"]["mask"] = mask
        if TASKS[task] is ClassifyConfig:
            values["objective"] |= {"waveform_mixing": {"least": 0.5}, "head": {"kind": "patches"}}
            values["objective"]["erasing"] = {"area": [0.02, 0.3]}
        files[task] = tmp_path_factory.mktemp("full") / "task.yaml"
        files[task].write_text(yaml.safe_dump(values))
    return files


@pytest.mark.parametrize(("task", "name", "value"), TASK_CASES)
def test_a_task_keeps_its_bounds(task: str, name: str, value: float, full: dict[str, Path]) -> None:
    plain = yaml.safe_load(full[task].read_text())
    config, problems = read_config(str(full[task]), [override(name, value, plain)])
    assert config is not None
    assert any(problem.startswith(f"{name}: Input should be ") and f"found {value}" in problem for problem in problems)


def test_all_of_them_are_reported_at_once(every: str, plain: dict[str, Any]) -> None:
    broken = {name.split(".0")[0]: (name, value) for name, value in CASES if not re.search(r"\.[1-9]", name)}
    _, problems = read_config(every, [override(name, value, plain) for name, value in broken.values()])
    assert sorted(problem.split(":")[0] for problem in problems) == sorted(name for name, _ in broken.values())


def test_every_number_has_bounds_but_those_that_need_none() -> None:
    without = [name for name, bounds in FIELDS.items() if bounds is None]
    assert [name for name in without if not name.endswith(WITHOUT_BOUNDS)] == []
