"""Files of JSON lines that a killed command continues: one record for each piece of work that is done."""

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from d2v2ds.errors import ConfigError, MachineError
from d2v2ds.io import durable
from d2v2ds.io.machine_faults import advice
from d2v2ds.io.output import sole_writer
from d2v2ds.io.read import json_lines, open_regular

BY = "by"
"""Key of a record for the work that made it: records of another model or other settings are never mixed."""


class Output(Protocol):
    """Place for the results of named pieces of work."""

    @property
    def done(self) -> Collection[Any]:
        """Names of the work that is done."""

    def write(self, name: Any, found: dict[str, Any]) -> None:
        """Write the result of one piece of work."""


class StandardOutput:
    """Lines on standard output; an `Output`."""

    done: tuple[str, ...] = ()

    def __init__(self, show: Callable[[str, dict[str, Any]], str]) -> None:
        """
        Args:
            show: name and result -> line.
        """
        self._show = show

    def write(self, name: str, found: dict[str, Any]) -> None:
        """Print one result."""
        sys.stdout.write(self._show(name, found) + "\n")


class RecordFile:
    """Records that are on disk, and new ones; an `Output`."""

    def __init__(self, path: Path, by: str, key: str) -> None:
        """
        Args:
            path: file; created with the first record.
            by: name of the work, a checksum of model and settings.
            key: field of a record that names its piece of work.

        Raises:
            ConfigError: the file has records of other work, or cannot be read.
        """
        self._path, self._by = path, by
        if path.exists():
            _require_records(path, key)
            _drop_torn_line(path)
        self.records: dict[Any, dict[str, Any]] = {}
        """Records by the name of their work."""
        for record in json_lines(path, ConfigError):
            if record.get(BY) != by:
                raise ConfigError(
                    f"{path}: expected records of {BY!r} {by}, found {record.get(BY)!r:.40}: it was made with another "
                    "model, other inputs or other settings; give another name, or remove it"
                )
            self.records[record.get(key)] = record
        self._key = key

    @property
    def done(self) -> Collection[Any]:
        """Names of the work that is done."""
        return self.records.keys()

    def write(self, name: Any, found: dict[str, Any]) -> None:
        """Append the record of a piece of work; it is on the disk when this returns.

        Raises:
            MachineError: it cannot be written.
        """
        record = {self._key: name, **found, BY: self._by}
        line = json.dumps(record)  # names of files need not be UTF-8
        try:
            durable.append_line(self._path, line)
        except OSError as error:
            raise MachineError(f"{self._path}: cannot be written: {error}; {advice(error)}") from error
        self.records[name] = record


@contextmanager
def open_records(path: Path, by: str, key: str) -> Iterator[RecordFile]:
    """Open a file of records, alone; arguments and errors as `RecordFile`.

    Raises:
        ConfigError: another process writes it, or its folder cannot be written.
    """
    try:
        with sole_writer(path, ConfigError):
            yield RecordFile(path, by, key)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}; {advice(error)}") from error


def _require_records(path: Path, key: str) -> None:
    """Refuse a file whose first bytes are not those of a record, before anything in it is changed.

    Raises:
        ConfigError: it is another file.
    """
    begins = b'{"' + key.encode() + b'": '
    with open_regular(path, ConfigError) as file:
        found = file.read(len(begins))
    if not begins.startswith(found):
        raise ConfigError(f"{path}: expected records of an earlier start, found another file; give another name")


def _drop_torn_line(path: Path) -> None:
    """Remove a last line without its end, which a crash cut off: nobody counts on it."""
    with open_regular(path, ConfigError) as file:
        end = 0
        for line in file:
            end += len(line) if line.endswith(b"\n") else 0
        is_torn = end < file.tell()
    if is_torn:
        os.truncate(path, end)
