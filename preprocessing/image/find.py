"""Images to pack: folders, TSV manifests, tar files and parquet tables become one list of units, in a fixed order.

A unit is what one process reads in one go: files that follow one another, members of a tar file from one offset to
another, or one row group of a parquet table. So even one single archive is spread over all processes, and only names
and sizes are in memory.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2v2ds.errors import ConfigError
from preprocessing.driver.input_files import listed, read_manifest, source_name, utf8, walk
from preprocessing.driver.progress import Report

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"}
)
LABEL_SUFFIXES = frozenset({"cls", "json", "txt"})
"""Members of a tar file that may hold the label of the image of the same key, best first: see `MemberReader`."""
ARCHIVE_SUFFIXES = (".tar", ".parquet")
MANIFEST_SUFFIXES = frozenset({".tsv", ".txt"})
MISSING = -1
"""Size of a file that does not exist."""
_UNITS_PER_SHARD = 64
_MAX_UNIT_FILES = 1024


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
    """Members of a tar file that follow one another; members of one key stay together."""

    order: int
    size: int
    files: int
    path: str
    source: str
    start: int
    """Offset of the first header."""
    stop: int
    """Offset behind the last member."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveFacts:
    """Findings from opening an archive."""

    bytes: int = 0
    parts: tuple[Part, ...] = ()
    fault: str | None = None


def find_images(inputs: Sequence[Path], label_column: str, ignored: Counter[str]) -> list[Listing | Archive]:
    """List what all inputs hold, in an order that depends on nothing else.

    Args:
        inputs: folders, TSV manifests, tar files and parquet tables.
        label_column: the manifest column stored as label.
        ignored: other files of folders are counted here by suffix.

    Raises:
        ConfigError: if an input is missing, empty or of another kind, or a manifest is malformed.
    """
    found: list[Listing | Archive] = []
    for root in inputs:
        suffix = root.suffix.lower()
        if root.is_dir():
            inside = _listings_of_folder(root, ignored)
        elif not root.is_file():
            raise ConfigError(f"--input {root}: expected a folder, manifest, tar file or parquet table, found nothing")
        elif suffix in ARCHIVE_SUFFIXES:
            inside = [Archive(path=str(root), source=utf8(root.name))]
        elif suffix in MANIFEST_SUFFIXES:
            inside = [_listing_of_manifest(root, label_column)]
        else:
            raise ConfigError(
                f"--input {root}: expected a folder, or a file named *.tsv, *.tar or *.parquet; compressed tar files "
                "cannot be read from the middle: unpack them (gunzip, zstd -d)"
            )
        if not any(isinstance(one, Archive) or one.names for one in inside):
            raise ConfigError(
                f"--input {root}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), tar files or parquet tables, "
                "found none"
            )
        found.extend(inside)
    return found


def file_sizes(paths: Sequence[str], report: Report) -> list[int]:
    """Bytes of every file; `MISSING` where there is none."""
    sizes = []
    for path in paths:
        try:
            sizes.append(os.stat(path).st_size)  # noqa: PTH116  (a Path per file costs a tenth of the scan)
        except OSError:
            sizes.append(MISSING)
        report(1, 0)
    return sizes


@dataclass(frozen=True, kw_only=True)
class ArchiveScan:
    """Finds the parts of archives; a class, so that it travels to other processes with its settings."""

    part_bytes: int
    """A part of a tar file ends when it has so many."""
    image_column: str
    label_column: str

    def __call__(self, archives: Sequence[Archive], report: Report) -> list[ArchiveFacts]:
        """Findings from opening each archive; no image is read."""
        facts = []
        for archive in archives:
            try:
                is_table = archive.path.lower().endswith(".parquet")
                parts = self._parts_of_table(archive.path) if is_table else self._parts_of_tar(archive.path)
                facts.append(ArchiveFacts(bytes=os.stat(archive.path).st_size, parts=parts))  # noqa: PTH116
            except (tarfile.TarError, pa.ArrowException, OSError, ConfigError) as error:
                facts.append(ArchiveFacts(fault=str(error).splitlines()[0]))
            report(1, 0)
        return facts

    def _parts_of_tar(self, path: str) -> tuple[Part, ...]:
        parts: list[Part] = []
        names: set[str] = set()
        start, size, files, key = 0, 0, 0, ""
        for member in tar_members(path, 0):
            if files and size >= self.part_bytes and member_key(member.name) != key:
                parts.append(Part(files=files, size=size, start=start, stop=member.offset))
                start, size, files = member.offset, 0, 0
            key = member_key(member.name)
            if is_image_member(member.name):
                if member.name in names:
                    raise ConfigError(f"member {member.name!r} occurs more than once")
                names.add(member.name)
                size += member.size
                files += 1
        if files:
            parts.append(Part(files=files, size=size, start=start, stop=os.stat(path).st_size))  # noqa: PTH116
        return tuple(parts)

    def _parts_of_table(self, path: str) -> tuple[Part, ...]:
        with pq.ParquetFile(path) as table:
            names = image_field(table.schema_arrow, self.image_column)
            if self.label_column != "label" and self.label_column not in names:
                raise ConfigError(f"expected a column {self.label_column!r}, found {names}")
            groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
            return tuple(
                Part(files=group.num_rows, size=self._image_bytes(group), start=number)
                for number, group in enumerate(groups)
            )

    def _image_bytes(self, group: Any) -> int:
        """Bytes of the images in a row group, as stored (encoded images hardly compress)."""
        columns = [group.column(number) for number in range(group.num_columns)]
        return sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema in (self.image_column, f"{self.image_column}.bytes")
        )


def make_units(
    found: Sequence[Listing | Archive],
    sizes: Sequence[int],
    facts: Sequence[ArchiveFacts],
    shard_bytes: int,
) -> list[ImageUnit]:
    """Divide everything into units, in order.

    Args:
        found: of `find_images`.
        sizes: of the files of all listings, one after another.
        facts: of all archives.
        shard_bytes: units are small against it, so that shards come out even.

    Raises:
        ConfigError: if an archive cannot be read, or a manifest names files that do not exist.
    """
    archives = [one for one in found if isinstance(one, Archive)]
    if bad := [f"{one.path}: {fact.fault}" for one, fact in zip(archives, facts, strict=True) if fact.fault]:
        raise ConfigError(
            f"{len(bad)} archives cannot be read to their end; repair or fetch them again, or take them out of the "
            f"input:\n{listed(bad, len(bad))}"
        )
    units: list[ImageUnit] = []
    order, first = 0, 0
    remaining = iter(facts)
    for one in found:
        inside: list[FileRun] | list[TarRun | RowGroup]
        if isinstance(one, Archive):
            inside = list(_archive_units(one, next(remaining).parts, order))
        else:
            inside = list(_file_runs(one, sizes[first : first + len(one.names)], order, part_bytes(shard_bytes)))
            first += len(one.names)
        units.extend(inside)
        order += sum(unit.files for unit in inside)
    return units


def part_bytes(shard_bytes: int) -> int:
    """Bytes after which a unit ends."""
    return max(1, shard_bytes // _UNITS_PER_SHARD)


def tar_members(path: str, start: int) -> Iterator[tarfile.TarInfo]:
    """Regular, visible members from the header at offset `start` on.

    Raises:
        tarfile.TarError: if this is no uncompressed tar file, or it was cut off.
    """
    with open(path, "rb") as file:  # noqa: PTH123
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else all headers of the archive stay in memory
                if member.isreg() and not os.path.basename(member.name).startswith("."):  # noqa: PTH119
                    yield member
            # `next` takes a damaged header and the end of the file for the end mark, which is a block of zeros
            file.seek(archive.offset)
            block = file.read(tarfile.BLOCKSIZE)
            if any(block):
                raise tarfile.ReadError(f"damaged header at byte {archive.offset}")
            if len(block) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError(
                    f"cut off: expected the end mark at byte {archive.offset}, found {len(block)} bytes"
                )


def member_key(name: str) -> str:
    """Key that members of one example share: the name up to the first dot behind the folders (webdataset)."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def is_image_member(name: str) -> bool:
    """Return True if the suffix of a tar file's member is that of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def folder_label(name: str) -> str | None:
    """The label of a class folder: the folder that holds the file; None for files that lie in none."""
    return name.rpartition("/")[0].rpartition("/")[2] or None


def json_label(data: bytes, column: str) -> str | None:
    """The label in a JSON object, None if it has none.

    Raises:
        ValueError: if this is no JSON object.
    """
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    value = values.get(column)
    return None if value is None else str(value)


def image_field(schema: pa.Schema, column: str) -> list[str]:
    """Check the column of a parquet table that holds encoded images; returns the names of all columns.

    Raises:
        ConfigError: if there is none, or it holds something else.
    """
    index = schema.get_field_index(column)
    if index < 0:
        raise ConfigError(f"expected a column {column!r}, found {schema.names}; give --image-column")
    field = schema.field(index)
    kind = field.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ConfigError(f"column {column!r}: expected binary, or a struct with 'bytes', found {field.type}")
    return list(schema.names)


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Names of the numbered classes of a column, where the library `datasets` has left them in a table's metadata."""
    described = (schema.metadata or {}).get(b"huggingface")
    if not described:
        return None
    feature = json.loads(described).get("info", {}).get("features", {}).get(column, {})
    names = feature.get("names") if isinstance(feature, dict) else None
    return list(names) if names else None


def _listings_of_folder(root: Path, ignored: Counter[str]) -> list[Listing | Archive]:
    names: list[str] = []
    archives = []
    for folder, files in walk(root, IMAGE_SUFFIXES.union(ARCHIVE_SUFFIXES), ignored):
        below = os.path.relpath(folder, root)
        before = "" if below == os.curdir else f"{below}{os.sep}"
        for name in files:
            if name.lower().endswith(ARCHIVE_SUFFIXES):
                path = os.path.join(folder, name)  # noqa: PTH118
                archives.append(Archive(path=path, source=source_name(root, path)))
            else:
                names.append(before + name)
    return [Listing(root=str(root), names=names), *archives]


def _listing_of_manifest(manifest: Path, label_column: str) -> Listing:
    lines = list(read_manifest(manifest, ("id", label_column), [] if label_column == "label" else [label_column]))
    return Listing(
        root=str(manifest.parent),
        names=[line.path for line in lines],
        ids=[line.values["id"] for line in lines],
        labels=[line.values[label_column] for line in lines],
        places=[line.place for line in lines],
    )


def _file_runs(listing: Listing, sizes: Sequence[int], order: int, limit: int) -> Iterator[FileRun]:
    start = total = 0
    for at, size in enumerate(sizes):
        total += max(size, 0)
        if total >= limit or at + 1 - start == _MAX_UNIT_FILES or at + 1 == len(sizes):
            part = slice(start, at + 1)
            yield FileRun(
                order=order + start,
                size=total,
                root=listing.root,
                names=tuple(listing.names[part]),
                ids=None if listing.ids is None else tuple(listing.ids[part]),
                labels=None if listing.labels is None else tuple(listing.labels[part]),
            )
            start, total = at + 1, 0


def _archive_units(archive: Archive, parts: Sequence[Part], order: int) -> Iterator[TarRun | RowGroup]:
    first_row = 0
    for part in parts:
        if archive.path.lower().endswith(".parquet"):
            yield RowGroup(
                order=order, size=part.size, files=part.files, path=archive.path, source=archive.source,
                number=part.start, first_row=first_row,
            )  # fmt: skip
        else:
            yield TarRun(
                order=order, size=part.size, files=part.files, path=archive.path, source=archive.source,
                start=part.start, stop=part.stop,
            )  # fmt: skip
        first_row += part.files
        order += part.files
