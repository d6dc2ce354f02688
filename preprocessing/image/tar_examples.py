"""Examples of a tar file: images with the labels beside them, and parts that processes read separately.

Members whose names are equal up to the first dot have one key and are one example, as in webdataset: `KEY.jpg`,
`KEY.cls`. If two of them have the same suffix (`photo.0000.jpg`, `photo.0001.jpg`), the key is no example: then a
label belongs to the images whose names equal its own up to the last dot, or, if it is named by the key alone, to all
that have none of their own. Members of one example must follow one another.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise, takewhile

from d2v2ds.modalities.image.shards import IMAGE_SUFFIXES
from preprocessing.image.tar_members import ArchiveError, TarFile, TarMember
from preprocessing.image.units import ArchiveFacts, Part, TarRun

LABEL_SUFFIXES = ("cls", "json", "txt")
"""Members that may hold the label of an image, best first."""
_MOST_IN_PART = 1 << 14
"""Members of one key after which a part may end."""
_MOST_SHARING = 1 << 17
"""Most members of a key that has a label for all: their headers are in memory together."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """Place where a part ends, with the sums of all members before it."""

    offset: int = 0
    files: int = 0
    size: int = 0
    members: int = 0
    is_inside: bool = False
    """It lies between members of one key."""


@dataclass(slots=True)
class _Key:
    """Counts of consecutive members of one key."""

    name: str
    first_cut: int
    """Number of cuts before it."""
    members: int = 0
    images: int = 0
    labels: int = 0
    suffixes: set[str] = field(default_factory=set)
    repeats: bool = False
    """Two images, or two labels, have the same suffix."""
    label_of_all: str = ""
    """Label that is named by the key alone."""
    stray: int = 0
    """Labels without an image of their name, if names are compared up to the last dot."""
    stem: str = ""
    stem_images: int = 0
    stem_labels: set[str] = field(default_factory=set)

    def add(self, member: TarMember) -> None:
        """Count a member.

        Raises:
            ArchiveError: it is a second label of the same name.
        """
        stem = member_stem(member.name)
        if stem != self.stem:
            self._end_stem()
            self.stem, self.stem_images = stem, 0
        self.members += 1
        if not (is_image(member) or is_label(member)):
            return
        suffix = _suffix(member.name)
        self.repeats |= suffix in self.suffixes
        self.suffixes.add(suffix)
        if is_image(member):
            self.images += 1
            self.stem_images += 1
            return
        if suffix in self.stem_labels:
            raise ArchiveError(f"member {member.name[:200]!r} occurs more than once")
        self.labels += 1
        self.stem_labels.add(suffix)
        if stem == self.name:
            self.label_of_all = member.name

    def _end_stem(self) -> None:
        if not self.stem_images and self.stem != self.name:
            self.stray += len(self.stem_labels)
        self.stem_labels.clear()

    def end(self) -> int:
        """Return the number of labels that belong to no image.

        Raises:
            ArchiveError: too many members share a label.
        """
        self._end_stem()
        if self.repeats and self.label_of_all and self.members > _MOST_SHARING:
            raise ArchiveError(
                f"expected at most {_MOST_SHARING:,} members that share {self.label_of_all[:200]!r}, found "
                f"{self.members:,}"
            )
        if not self.images:
            return self.labels
        return self.stray if self.repeats else 0


def scan_tar(archive: TarFile, part_bytes: int) -> ArchiveFacts:
    """Divide a tar file into parts of `part_bytes` of images, and count what is not read. No image is read.

    Raises:
        ArchiveError: it is damaged, or two images have one name.
        MachineError: the machine is at fault.
    """
    cuts, key, names = [_Cut()], _Key("", 1), set[int]()
    left_out: Counter[str] = Counter()
    stray = files = size = members = 0
    for member in archive.members():
        if _is_hidden(member):
            left_out["hidden"] += 1
            continue
        last = cuts[-1]
        is_large = files > last.files and size - last.size >= part_bytes
        if member_key(member.name) != key.name:
            stray += key.end()
            if key.label_of_all:
                del cuts[key.first_cut :]
                last = cuts[-1]
                is_large = files > last.files and size - last.size >= part_bytes
            if is_large:
                cuts.append(_Cut(member.offset, files, size, members))
            key = _Key(member_key(member.name), len(cuts))
        elif (
            (is_large or members - last.members >= _MOST_IN_PART)
            and key.repeats
            and not key.label_of_all
            and member_stem(member.name) != key.stem
        ):
            cuts.append(_Cut(member.offset, files, size, members, is_inside=True))
        key.add(member)
        members += 1
        if is_image(member):
            if hash(member.name) in names:
                raise ArchiveError(f"member {member.name[:200]!r} occurs more than once")
            names.add(hash(member.name))  # of 64 bits: names of millions of members would take gigabytes
            files += 1
            size += member.size if not member.kind else 0
        elif not is_label(member):
            left_out[f"{member.kind}s" if member.kind else os.path.splitext(member.name)[1].lower()] += 1  # noqa: PTH122
    stray += key.end()
    if key.label_of_all:
        del cuts[key.first_cut :]
    if stray:
        left_out["labels without image"] += stray
    cuts.append(_Cut(archive.bytes, files, size, members))
    parts = [
        Part(
            files=stop.files - start.files, size=stop.size - start.size, start=start.offset, stop=stop.offset,
            begins_inside=start.is_inside, ends_inside=stop.is_inside,
        )
        for start, stop in pairwise(cuts)
        if stop.files > start.files
    ]  # fmt: skip
    return ArchiveFacts(bytes=archive.bytes, parts=tuple(parts), left_out=dict(left_out), stray_labels=stray)


def tar_examples(archive: TarFile, run: TarRun) -> Iterator[tuple[TarMember, Mapping[str, TarMember]]]:
    """Yield the images of a part with the members that may hold their label, by suffix.

    Raises:
        ArchiveError, MachineError: as `scan_tar`.
    """
    members = takewhile(lambda member: member.offset < run.stop, archive.members(run.start))
    keys = groupby((member for member in members if not _is_hidden(member)), key=lambda one: member_key(one.name))
    waiting: tuple[str, list[TarMember]] | None = None
    is_divided = run.begins_inside
    for name, group in keys:
        if waiting is not None:
            yield from _examples_of_key(*waiting, is_divided)
            is_divided = False
        waiting = name, [member for member in group if is_image(member) or is_label(member)]
    if waiting is not None:
        yield from _examples_of_key(*waiting, is_divided or run.ends_inside)


def _examples_of_key(
    name: str, members: Sequence[TarMember], is_divided: bool
) -> Iterator[tuple[TarMember, Mapping[str, TarMember]]]:
    """Yield the images of one key; of a divided one these are not all members, and two suffixes are known to repeat."""
    if not is_divided and len({_suffix(member.name) for member in members}) == len(members):
        labels = _labels(members)
        yield from ((member, labels) for member in members if is_image(member))
        return
    of_all = _labels(member for member in members if member_stem(member.name) == name)
    for _, group in groupby(members, key=lambda one: member_stem(one.name)):
        same_name = list(group)
        labels = _labels(same_name) or of_all
        yield from ((member, labels) for member in same_name if is_image(member))


def _labels(members: Iterable[TarMember]) -> dict[str, TarMember]:
    return {_suffix(member.name): member for member in members if is_label(member)}


def member_key(name: str) -> str:
    """Name up to the first dot behind the folders."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def member_stem(name: str) -> str:
    """Name up to its last dot."""
    return os.path.splitext(name)[0]  # noqa: PTH122


def is_image(member: TarMember) -> bool:
    """Return True if a member is named as an image, whatever it is."""
    return os.path.splitext(member.name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def is_label(member: TarMember) -> bool:
    """Return True for a plain file that may hold a label."""
    return not member.kind and _suffix(member.name) in LABEL_SUFFIXES


def _is_hidden(member: TarMember) -> bool:
    return os.path.basename(member.name).startswith(".")  # noqa: PTH119


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()  # noqa: PTH122
