"""Images to pack: folders, TSV manifests, tar files and parquet tables become one list of units, in a fixed order.

A unit is what one process reads in one go: files that follow one another, members of a tar file from one offset to
another, or one row group of a parquet table. So even one single archive is spread over all processes, and only names
and sizes are in memory.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from d2v2ds.errors import ConfigError
from d2v2ds.io.machine_faults import is_machine_fault, reading_error, retried
from d2v2ds.io.read import irregular
from d2v2ds.io.walk import walk
from d2v2ds.modalities.image.shards import IMAGE_SUFFIXES
from preprocessing.driver.input_files import listed, read_manifest, source_name, utf8
from preprocessing.driver.progress import Report
from preprocessing.image.tables import open_table, table_parts
from preprocessing.image.tar_examples import scan_tar
from preprocessing.image.tar_members import ArchiveError, TarFile
from preprocessing.image.units import (
    ARCHIVE_SUFFIXES,
    MANIFEST_SUFFIXES,
    MISSING,
    Archive,
    ArchiveFacts,
    FileRun,
    ImageUnit,
    Listing,
    RowGroup,
    TarRun,
)

_UNITS_PER_SHARD = 64
_MAX_UNIT_FILES = 1024


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
            found_there = irregular(root.stat().st_mode) if root.exists() else "nothing"
            raise ConfigError(
                f"--input {root}: expected a folder, manifest, tar file or parquet table, found {found_there}"
            )
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
    """Bytes of every file; `MISSING` where there is none.

    Raises:
        MachineError: the machine is at fault.
    """
    sizes = []
    for path in paths:
        sizes.append(retried(partial(_file_size, path)))
        report(1, 0)
    return sizes


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116  (a Path per file costs a tenth of the scan)
    except OSError as error:
        if is_machine_fault(error):
            raise reading_error(path, error, ConfigError) from error
        return MISSING


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
                if archive.path.lower().endswith(".parquet"):
                    with open_table(archive.path) as table:
                        size = os.stat(archive.path).st_size  # noqa: PTH116
                        parts = table_parts(table, size, self.image_column, self.label_column)
                        facts.append(ArchiveFacts(bytes=size, parts=parts))
                else:
                    with TarFile(archive.path) as tar:
                        facts.append(scan_tar(tar, self.part_bytes))
            except (ArchiveError, ConfigError) as error:
                facts.append(ArchiveFacts(fault=str(error).splitlines()[0]))
            report(1, 0)
        return facts


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
            f"{len(bad)} archives cannot be packed for these reasons; mend them, or take them out of the input:\n"
            f"{listed(bad, len(bad))}"
        )
    units: list[ImageUnit] = []
    order, first = 0, 0
    remaining = iter(facts)
    for one in found:
        inside: list[FileRun] | list[TarRun | RowGroup]
        if isinstance(one, Archive):
            inside = list(_archive_units(one, next(remaining), order))
        else:
            inside = list(_file_runs(one, sizes[first : first + len(one.names)], order, part_bytes(shard_bytes)))
            first += len(one.names)
        units.extend(inside)
        order += sum(unit.files for unit in inside)
    return units


def part_bytes(shard_bytes: int) -> int:
    """Bytes after which a unit ends."""
    return max(1, shard_bytes // _UNITS_PER_SHARD)


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


def _archive_units(archive: Archive, facts: ArchiveFacts, order: int) -> Iterator[TarRun | RowGroup]:
    first_row = 0
    for part in facts.parts:
        if archive.path.lower().endswith(".parquet"):
            yield RowGroup(
                order=order, size=part.size, files=part.files, path=archive.path, source=archive.source,
                number=part.start, first_row=first_row,
            )  # fmt: skip
        else:
            yield TarRun(
                order=order, size=part.size, files=part.files, path=archive.path, source=archive.source,
                start=part.start, stop=part.stop, begins_inside=part.begins_inside, ends_inside=part.ends_inside,
                has_stray_labels=facts.stray_labels > 0,
            )  # fmt: skip
        first_row += part.files
        order += part.files
