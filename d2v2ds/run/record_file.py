"""Files of JSON lines that a killed command continues: one record for each piece of work that is done.

Only the names of finished work are in memory. A record outlives its process as soon as it is written; a power cut takes
those of the last `SYNC_SECONDS` at most.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from d2v2ds.errors import ConfigError, MachineError
from d2v2ds.io import durable
from d2v2ds.io.machine_faults import advice
from d2v2ds.io.output import sole_writer, whole_file
from d2v2ds.io.read import json_lines, open_regular

logger = logging.getLogger(__name__)

BY = "by"
"""Key of a record for the work that made it: records of another model or other settings are never mixed."""
STAMP = "stamp"
"""Key of a record for the state of the file that it is about."""
SYNC_SECONDS = 10.0
"""Time from one forced write to the disk to the next."""


class Output(Protocol):
    """Place for the results of named pieces of work."""

    @property
    def done(self) -> Collection[Any]:
        """Names of the work that was done before."""

    def write(self, name: Any, found: dict[str, Any], stamp: str = "") -> None:
        """Write the result of one piece of work; `stamp` is the state of its file."""


class StandardOutput:
    """Lines on standard output; an `Output`."""

    done: tuple[str, ...] = ()

    def __init__(self, show: Callable[[str, dict[str, Any]], str]) -> None:
        """
        Args:
            show: name and result -> line.
        """
        self._show = show

    def write(self, name: str, found: dict[str, Any], stamp: str = "") -> None:
        """Print one result."""
        sys.stdout.write(self._show(name, found) + "\n")


class RecordFile:
    """Records that are on disk, and new ones; an `Output`."""

    def __init__(
        self, path: Path, by: str, key: str, is_stale: Callable[[dict[str, Any]], bool] = lambda record: False
    ) -> None:
        """
        Args:
            path: file; created with the first record.
            by: name of the work, a checksum of model and settings.
            key: field of a record that names its piece of work.
            is_stale: True for a record whose input is another one by now; it is removed.

        Raises:
            ConfigError: the file has records of other work, or cannot be read.
        """
        self._path, self._by, self._key, self._synced_at = path, by, key, -SYNC_SECONDS
        self._is_synced = True
        self.done: set[Any] = set()
        """Names of the work that was done before."""
        self.changed: set[Any] = set()
        """Names of the work whose record was removed."""
        if path.exists():
            _require_records(path, key)
            _drop_torn_line(path)
        for record in self.read():
            (self.changed if is_stale(record) else self.done).add(record[key])
        if self.changed:
            self._remove_changed()

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the records one by one.

        Raises:
            ConfigError: one is of other work, or has no name.
        """
        for record in json_lines(self._path, ConfigError):
            if record.get(BY) != self._by:
                raise ConfigError(
                    f"{self._path}: expected records of {BY!r} {self._by}, found {record.get(BY)!r:.40}: it was made "
                    "with another model, other inputs or other settings; give another name, or remove it"
                )
            if not isinstance(record.get(self._key), str | int):
                raise ConfigError(f"{self._path}: expected records with {self._key!r}, found {record!r:.80}")
            yield record

    def write(self, name: Any, found: dict[str, Any], stamp: str = "") -> None:
        """Append the record of a piece of work.

        Raises:
            MachineError: it cannot be written.
        """
        record = {self._key: name, **found, **({STAMP: stamp} if stamp else {}), BY: self._by}
        line = json.dumps(record)  # names of files need not be UTF-8
        self._is_synced = time.monotonic() - self._synced_at >= SYNC_SECONDS
        self._do(lambda: durable.append_line(self._path, line, synced=self._is_synced))
        if self._is_synced:
            self._synced_at = time.monotonic()

    def close(self) -> None:
        """Force what was written to the disk.

        Raises:
            MachineError: it failed.
        """
        if not self._is_synced:
            self._do(lambda: durable.sync(self._path))

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise MachineError(f"{self._path}: cannot be written: {error}; {advice(error)}") from error

    def _remove_changed(self) -> None:
        logger.warning(
            "%s: %d inputs changed since and are done again, such as %s",
            self._path, len(self.changed), next(iter(self.changed)),
        )  # fmt: skip
        with whole_file(self._path) as file:
            for record in self.read():
                if record[self._key] not in self.changed:
                    file.write(json.dumps(record).encode() + b"\n")


@contextmanager
def open_records(
    path: Path, by: str, key: str, is_stale: Callable[[dict[str, Any]], bool] = lambda record: False
) -> Iterator[RecordFile]:
    """Open a file of records, alone; arguments and errors as `RecordFile`.

    Raises:
        ConfigError: another process writes it, or its folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_writer(path, ConfigError))
            records = RecordFile(path, by, key, is_stale)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error}; {advice(error)}") from error
        stack.callback(records.close)
        yield records


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
