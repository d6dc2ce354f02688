"""Write files and folders that are whole or not there, one process at a time.

What is written beside an output until it is whole has a hidden name of its own. A link of that name is removed, never
followed, and an output that is a link of its owner stays one.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from d2v2ds.errors import D2V2Error
from d2v2ds.io.durable import sync

logger = logging.getLogger(__name__)

_LOCK_TEXT = "d2v2ds: process"
_TRIES = 100


def beside(path: Path, kind: str) -> Path:
    """Return the hidden name of what is written for an output, such as `.model.partial`."""
    return path.with_name(f".{path.name}.{kind}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when the block ends well; else nothing of it stays to fill the disk.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    partial = beside(path, "partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:  # x: a link that comes meanwhile is not followed
            yield file
        sync(partial)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()  # there no more when all went well
    sync(path.parent)


@contextlib.contextmanager
def sole_writer(path: Path, kind: type[D2V2Error]) -> Iterator[None]:
    """Hold a lock beside an output while it is written; where the file system has no locks, warn and do without.

    A record lock (`lockf`), which the kernel lets go of however the process ends. The file is removed at the end.

    Raises:
        kind: another process writes it, or a file of somebody else has the lock's name.
        OSError: the lock's file cannot be written.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    place = beside(path, "lock")
    descriptor = _locked(path, place, kind)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            place.unlink()
        os.close(descriptor)


def _locked(path: Path, place: Path, kind: type[D2V2Error]) -> int:
    for _ in range(_TRIES):
        if place.is_symlink():
            place.unlink()
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(place.lstat().st_mode):
                raise kind(_not_ours(place))
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                continue  # a link that came meanwhile
            raise
        try:
            if _took(descriptor, path, place, kind):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one before removed the file between open and lock
    raise kind(f"{place}: cannot be locked: it is replaced again and again")


def _took(descriptor: int, path: Path, place: Path, kind: type[D2V2Error]) -> bool:
    """Lock a file and write who holds it; False if its name leads to another one by now."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # it depends on the file system how a held lock shows
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip().removeprefix("d2v2ds: ") or "unknown"
        fault = f"{path}: another process is at work on it ({holder})"
        raise kind(f"{fault}; let it end, or give another name") from None
    except OSError as error:
        logger.warning("%s: no lock (%s); a second process that writes it would not be noticed", place, error)
    try:
        if not os.path.samestat(place.lstat(), os.fstat(descriptor)):
            return False
    except FileNotFoundError:
        return False
    if os.pread(descriptor, len(_LOCK_TEXT), 0) not in (b"", _LOCK_TEXT.encode()):
        raise kind(_not_ours(place))
    os.ftruncate(descriptor, 0)
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    os.pwrite(descriptor, f"{_LOCK_TEXT} {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
    return True


def _not_ours(place: Path) -> str:
    return f"{place}: expected nothing, or the lock of another process, found a file of somebody else; move it"
