"""Small files that survive a power cut, and change in one step.

A file system that cannot sync a folder or a file (SMB, some FUSE) is used without, which is said once.
"""

import os
from pathlib import Path

from d2v2ds.io.machine_faults import is_unsupported, say_once


def fsync(descriptor: int, where: Path) -> None:
    """Make what was written to a descriptor durable.

    Args:
        descriptor: of a file or folder.
        where: its path, for the warning.

    Raises:
        OSError: it failed; not if the file system cannot do it at all.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_unsupported(error):
            raise
        say_once(
            f"fsync {os.fstat(descriptor).st_dev}",
            "%s: this file system cannot sync (%s); what was written may be lost in a power cut",
            where, error.strerror,
        )  # fmt: skip


def sync(path: Path) -> None:
    """Make a file's or folder's content durable.

    Raises:
        OSError: as `fsync`.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor, path)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file and make it durable."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def append_line(path: Path, line: str, *, synced: bool = True) -> None:
    """Append a line to a file and make it durable; one that a crash cut off before it stays a line of its own.

    Args:
        path: of the file.
        line: without its end.
        synced: False: it outlives the process, and a power cut only once `sync` was called.
    """
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        if synced:
            fsync(file.fileno(), path)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a synced file and sync its folder, so that the new name survives a power cut."""
    temporary.replace(path)
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Change a small file in one step: readers see the old text or the new one."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write_text(fresh, text)
        move_into_place(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
