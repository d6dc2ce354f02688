"""Every bound of every field of a configuration is kept, and a value beyond it is reported under the field's name."""

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import pytest
import yaml

from d2v2ds.bounds import Bounds
from d2v2ds.config.load import load_config, read_config, to_yaml
from d2v2ds.config.schema import DataSection, RunConfig
from d2v2ds.modalities.known import SHIPPED
from d2v2ds.model.trunk import TrunkConfig

BEYOND = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
"""Added to a limit, it gives a value that breaks it."""
WITHOUT_BOUNDS = (".mask.adjust", ".loss.scale", ".weights.0")
"""Ends of the names of numbers that may have either sign, or that are checked beside the folders they belong to."""


def numbers(annotation: Any, name: str) -> Iterator[tuple[str, Bounds | None]]:
    """Each number that an annotation holds, with its bounds: itself, or items of a tuple, or fields further down."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        if arguments[0] in (int, float):
            yield name, next((found for found in arguments[1:] if isinstance(found, Bounds)), None)
    elif origin in (typing.Union, types.UnionType):
        for member in arguments:
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
CASES = [
    (name, getattr(bounds, limit) + step)
    for name, bounds in FIELDS.items()
    for limit, step in BEYOND.items()
    if bounds is not None and getattr(bounds, limit) is not None
]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """A configuration of all modalities as plain values."""
    return yaml.safe_load(to_yaml(load_config("multimodal_tiny")))


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
def test_a_value_beyond_its_bounds_is_reported_under_its_name(name: str, value: float, plain: dict[str, Any]) -> None:
    config, problems = read_config("multimodal_tiny", [override(name, value, plain)])
    assert config is not None, "the rest can be checked too"
    (problem,) = problems
    assert problem.startswith(f"{name}: Input should be ")
    assert problem.endswith(f", found {value}")


def test_all_of_them_are_reported_at_once(plain: dict[str, Any]) -> None:
    broken = {name.split(".0")[0]: (name, value) for name, value in CASES if not re.search(r"\.[1-9]", name)}
    _, problems = read_config("multimodal_tiny", [override(name, value, plain) for name, value in broken.values()])
    assert sorted(problem.split(":")[0] for problem in problems) == sorted(name for name, _ in broken.values())


def test_every_number_has_bounds_but_those_that_need_none() -> None:
    without = [name for name, bounds in FIELDS.items() if bounds is None]
    assert [name for name in without if not name.endswith(WITHOUT_BOUNDS)] == []
