"""Read a word of the command line as the type of its field: a path is text, whatever YAML would make of it.

YAML cuts ` #2` off as a comment, takes 010 for 8, `~` for nothing and 2024 for a number. Only lists, mappings and whole
sections are read as YAML.
"""

import functools
import operator
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2v2ds.config.schema import RunConfig
from d2v2ds.config.unions import merged_hints
from d2v2ds.errors import ConfigError
from d2v2ds.io.read import parse_yaml
from d2v2ds.modalities.known import known_modalities

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE = re.compile(r"[+-]?\d{1,30}")
_NUMBER = re.compile(r"[+-]?(\d{1,30}\.?\d{0,30}|\.\d{1,30})([eE][+-]?\d{1,3})?")
_NOT_FINITE = re.compile(r"([+-]?)\.?(nan|inf)", re.IGNORECASE)


def read_word(text: str, field: Sequence[str], root: type = RunConfig) -> Any:
    """Read a value.

    Args:
        text: behind the equals sign.
        field: its path, as in YAML.
        root: dataclass of the whole file.

    Raises:
        ConfigError: a list or section that is not valid YAML.
    """
    kinds = _members(_type_of(field, root))
    if types.NoneType in kinds and text in ("null", "") or (text == "~" and Path not in kinds and str not in kinds):
        return None
    if text.startswith("[") or not kinds & {Path, str, bool, int, float}:
        return parse_yaml(text, f"override {'.'.join(field)}", ConfigError)
    if bool in kinds and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if kinds & {int, float} and _WHOLE.fullmatch(text):
        return int(text)
    if kinds & {int, float} and _NUMBER.fullmatch(text):
        return float(text)
    if kinds & {int, float} and (special := _NOT_FINITE.fullmatch(text)):
        return float(special[1] + special[2])
    return text  # a path, a name, or what no number is: said by the check of its type


def _type_of(field: Sequence[str], root: type) -> Any:
    """Find the annotation of a field; Any if there is no such field, or it is a section."""
    kind: Any = root
    for number, part in enumerate(field):
        where = tuple(field[:number])
        hints = merged_hints(kind)
        if part in hints:
            kind = hints[part]
        elif where in (("data",), ("model", "modalities")) and part in known_modalities():
            kind = known_modalities()[part].data if where == ("data",) else known_modalities()[part].network
        elif "modalities" in hints and part in known_modalities():  # beside other keys, as in `valid`
            kind = typing.get_args(hints["modalities"])[1]
        elif values := _values_of(kind):
            kind = functools.reduce(operator.or_, values)
        else:
            return Any
    return kind


def _values_of(annotation: Any) -> list[Any]:
    """List the annotations of the values of a mapping, or of all mappings of a union, such as those of objectives."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if is_union else (annotation,)
    return [typing.get_args(one)[1] for one in options if typing.get_origin(one) is Mapping]


def _members(annotation: Any) -> set[Any]:
    """List the plain types that an annotation allows; those of a `Literal` are the types of its values."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return {kind for member in typing.get_args(annotation) for kind in _members(member)}
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return {origin or annotation}
