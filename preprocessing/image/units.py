"""Units of image packing: what one process reads in one go, and findings that they are made from."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHIVE_SUFFIXES = (".tar", ".parquet")
MANIFEST_SUFFIXES = frozenset({".tsv", ".txt"})
MISSING = -1
"""Size of a file that does not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRun:
    """Image files that follow one another."""

    order: int
    """Position of the first file among all images."""
    size: int
    """Bytes."""
    root: str
    names: tuple[str, ...]
    """Paths below `root`."""
    ids: tuple[str | None, ...] | None
    """Ids that a manifest gives; None: the names."""
    labels: tuple[str | None, ...] | None
    """Labels that a manifest gives; None: the folders that hold the files."""

    @property
    def files(self) -> int:
        """Images in it."""
        return len(self.names)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Everything that the rows depend on beside the bytes of the files; the folder's location is left out."""
        return self.names, self.ids, self.labels


@dataclass(frozen=True, slots=True, kw_only=True)
class TarRun:
    """Members of a tar file that follow one another; members of one example stay together."""

    order: int
    size: int
    files: int
    path: str
    source: str
    start: int
    """Offset of the first header."""
    stop: int
    """Offset behind the last member."""
    begins_inside: bool
    """The members before `start` have the key of the first one here."""
    ends_inside: bool
    """The members behind `stop` have the key of the last one here."""
    has_stray_labels: bool
    """The archive has labels that belong to no image."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """Same as `FileRun.identity`."""
        return self.source, self.files, self.size, self.start, self.stop


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """One row group of a parquet table."""

    order: int
    size: int
    files: int
    path: str
    source: str
    number: int
    first_row: int

    @property
    def identity(self) -> tuple[Any, ...]:
        """Same as `FileRun.identity`."""
        return self.source, self.files, self.size, self.number


ImageUnit = FileRun | TarRun | RowGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Files of one folder tree or manifest, in order."""

    root: str
    names: list[str]
    ids: list[str | None] | None = None
    labels: list[str | None] | None = None
    places: list[str] | None = None
    """Location for messages; only a manifest's files must exist."""

    def paths(self) -> Iterator[str]:
        """Paths of the files."""
        return (os.path.join(self.root, name) for name in self.names)  # noqa: PTH118  (a million)


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A tar file or parquet table."""

    path: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Part of an archive that becomes one unit."""

    files: int
    size: int
    start: int
    """Offset in a tar file, or number of a row group."""
    stop: int = 0
    begins_inside: bool = False
    """As in `TarRun`."""
    ends_inside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveFacts:
    """Findings from opening an archive."""

    bytes: int = 0
    parts: tuple[Part, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Members that are not read, by suffix or kind."""
    stray_labels: int = 0
    """Labels among them: those that belong to no image."""
    fault: str | None = None
