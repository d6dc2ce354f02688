"""Search for input files: folders, TSV manifests, unique ids, and names of places for messages."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2v2ds.errors import ConfigError, MachineError
from d2v2ds.io.machine_faults import is_machine_fault, reading_error
from d2v2ds.io.read import irregular, read_text

MAX_LISTED = 5
"""Files or lines named in one error message."""
_MANIFEST_BYTES = 4 << 30
"""Largest manifest: of some ten million files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestLine:
    """One file named by a TSV manifest."""

    path: str
    """Path relative to the manifest, as the manifest writes it."""
    place: str
    """Place for a message: manifest, line and path."""
    values: dict[str, str | None]
    """The optional columns by name; None where the column is absent or empty."""


def utf8(text: str) -> str:
    """Text with whatever cannot be stored as UTF-8 (a file name in an old encoding) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def listed(places: Iterable[str], total: int) -> str:
    """The first few places of a message, one per line, and how many more there are."""
    lines = [f"  {place}" for _, place in zip(range(MAX_LISTED), places, strict=False)]
    if total > MAX_LISTED:
        lines.append(f"  ... and {total - MAX_LISTED} more")
    return "\n".join(lines)


def unreadable(path: str, error: OSError) -> str:
    """Return why an input file cannot be read, to stand behind its name.

    Raises:
        MachineError: the machine is at fault, not the file; also if the file's folder is gone.
    """
    if is_machine_fault(error):
        raise reading_error(path, error, ConfigError) from error
    if not isinstance(error, FileNotFoundError):
        return f"unreadable: {error.strerror}"
    if os.path.islink(path):  # noqa: PTH114
        return f"a link to {utf8(os.readlink(path))}, where nothing is"  # noqa: PTH115
    if not os.path.isdir(os.path.dirname(path) or "."):  # noqa: PTH112, PTH120
        raise MachineError(f"{path}: its folder was moved, removed or unmounted since the input was listed")
    return "no such file: it was there when the input was listed"


def check_unique(named: Iterable[tuple[str, str]]) -> None:
    """Raise a `ConfigError` if an id of the (id, place) pairs occurs twice."""
    first: dict[str, str] = {}
    doubled = []
    for id, place in named:
        if id in first:
            doubled.append(f"{id!r}: {first[id]} and {place}")
        first.setdefault(id, place)
    if doubled:
        raise ConfigError(
            f"{len(doubled)} ids occur more than once; give each file once, and of folders with equal names the folder "
            f"above them, or a manifest with an 'id' column:\n{listed(doubled, len(doubled))}"
        )


def check_present(missing: Sequence[str]) -> None:
    """Raise a `ConfigError` if a manifest names files that do not exist, given their places."""
    if missing:
        raise ConfigError(
            f"{len(missing)} files do not exist; correct the paths (relative to the manifest) or remove the lines:\n"
            f"{listed(missing, len(missing))}"
        )


def said_ignored(ignored: Mapping[str, int]) -> str:
    """``12 files ignored: 10 .txt, 2 .jpg``, from counts by suffix; empty if there are none."""
    if not ignored:
        return ""
    counts = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {utf8(suffix) or 'without suffix'}" for suffix, count in counts[:MAX_LISTED]]
    if others := sum(count for _, count in counts[MAX_LISTED:]):
        parts.append(f"{others:,} others")
    return f"{sum(ignored.values()):,} files ignored: {', '.join(parts)}"


def not_there(root: Path) -> str:
    """Return what an input is that is neither folder nor file."""
    try:
        return irregular(root.stat().st_mode) or "a file"
    except FileNotFoundError:
        return "a link to nowhere" if root.is_symlink() else "nothing there"
    except OSError as error:
        return unreadable(str(root), error)


def source_name(root: Path, path: str) -> str:
    """Return the name of an input file in the shards: its path below the input folder."""
    return utf8(os.path.relpath(path, root).replace(os.sep, "/"))


def text_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 text. `str.splitlines` ends them at U+2028 and others too, which texts contain.

    Raises:
        ConfigError: it is absent, no file, or no UTF-8.
        MachineError: the machine is at fault.
    """
    text = read_text(path, ConfigError, _MANIFEST_BYTES).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def manifest_lines(manifest: Path) -> list[str]:
    """Read the lines of a manifest, as `text_lines`, without a byte order mark."""
    lines = text_lines(manifest)
    return [lines[0].removeprefix("\ufeff"), *lines[1:]] if lines else []


def read_manifest(manifest: Path, optional: Sequence[str], required: Sequence[str] = ()) -> Iterator[ManifestLine]:
    """The lines of a TSV manifest with the column `path` and perhaps others.

    Args:
        manifest: UTF-8 with a header line.
        optional: columns that `ManifestLine.values` shall have.
        required: those of them that must be there.

    Raises:
        ConfigError: if it is malformed; lines are named.
        MachineError: the machine is at fault.
    """
    lines = manifest_lines(manifest)
    columns = lines[0].split("\t") if lines else []
    if absent := [name for name in ("path", *required) if name not in columns]:
        raise ConfigError(
            f"{manifest} line 1: expected tab-separated column names with {', '.join(map(repr, absent))}, "
            f"found {columns}; optional: {', '.join(map(repr, optional))}"
        )
    fields = [(number, line.split("\t")) for number, line in enumerate(lines[1:], start=2) if line.strip()]
    if wrong := [f"line {number}: {len(values)} fields" for number, values in fields if len(values) != len(columns)]:
        raise ConfigError(f"{manifest}: expected {len(columns)} tab-separated fields:\n{listed(wrong, len(wrong))}")
    at = {name: columns.index(name) for name in ("path", *optional) if name in columns}
    if empty := [f"line {number}" for number, values in fields if not values[at["path"]]]:
        raise ConfigError(f"{manifest}: column 'path' is empty:\n{listed(empty, len(empty))}")
    for number, values in fields:
        path = values[at["path"]]
        yield ManifestLine(
            path=path,
            place=f"{manifest} line {number}: {path}",
            values={name: values[at[name]] or None if name in at else None for name in optional},
        )
