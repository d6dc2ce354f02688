"""Files with the names of a task's outputs: of `d2v2ds.outputs`, of runs, and dictionaries of official models."""

import logging
import re
from fnmatch import fnmatch
from pathlib import Path

from d2v2ds.errors import ConfigError
from d2v2ds.io.read import read_json, read_text

logger = logging.getLogger(__name__)

_MOST_BYTES = 64 << 20
_DICTIONARY = "dict*"
"""Names of official dictionaries, such as dict.ltr.txt."""
_COUNTED = re.compile(r"(\S+)\s+\d+")
"""Line of an official dictionary: a symbol and how often it occurs."""


def read_outputs(path: Path) -> tuple[str, ...]:
    """Read letters or classes in the order of the outputs.

    Args:
        path: JSON with a list `outputs`; or a text with one name in each line. In an official dictionary, a text named
            dict... such as dict.ltr.txt, every line is a symbol and its count, which is left out.

    Raises:
        ConfigError: the file cannot be read, or is none of these.
        MachineError: the machine is at fault.
    """
    if path.suffix == ".model":
        raise ConfigError(
            f"{path}: expected names of letters or classes, found a sentencepiece model; only a run of ctc takes one, "
            "as objective.outputs"
        )
    if path.suffix == ".json":
        found = read_json(path, ConfigError, _MOST_BYTES).get("outputs")
        if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
            raise ConfigError(f"{path}: expected 'outputs', a list of names, found {found!r:.60}")
    else:
        lines = [line.strip() for line in read_text(path, ConfigError, _MOST_BYTES).split("\n")]
        found = [line for line in lines if line]
        if not found:
            raise ConfigError(f"{path}: expected a name in each line, found an empty file")
        counted = [_COUNTED.fullmatch(line) for line in found]
        if all(counted) and fnmatch(path.name, _DICTIONARY):
            found = [match[1] for match in counted if match]
        elif all(counted):
            logger.warning("%s: names that end with numbers; were these counts, it would be named dict.txt", path)
    if len(set(found)) != len(found):
        raise ConfigError(f"{path}: expected different names, found some twice")
    return tuple(found)
