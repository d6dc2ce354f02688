"""Files that appear whole or not at all, with a checksum computed on the way.

Shards are written past the page cache where the system allows it (``O_DIRECT``): a corpus is often larger than memory
and would push everything else out of it, and filling cache pages costs more processor time than the rest of writing.
"""

import fcntl
import io
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2v2ds.errors import MachineError
from d2v2ds.io import durable
from d2v2ds.io.crc import crc32
from d2v2ds.io.machine_faults import advice, is_machine_fault, is_unsupported, say_once

BUFFER_BYTES = 4 << 20
"""A multiple of every disk's block size, in memory that `mmap` aligns to pages: what ``O_DIRECT`` asks for."""
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_spare_buffers: list[memoryview] = []


def take_buffer() -> memoryview:
    """`BUFFER_BYTES` of page-aligned memory, not cleared.

    Buffers are kept for the next shard: page faults of fresh memory slow packing down.
    """
    return _spare_buffers.pop() if _spare_buffers else memoryview(mmap.mmap(-1, BUFFER_BYTES))


def give_buffer(buffer: memoryview) -> None:
    """Return a buffer that is not used any more."""
    _spare_buffers.append(buffer)


class ChecksumFile(io.RawIOBase):
    """A write-only file that knows its size and CRC-32. Two buffers: one is filled while the other is written."""

    def __init__(self, path: Path, background: ThreadPoolExecutor) -> None:
        super().__init__()
        self._path = path
        self._descriptor = _open(path)
        self._background = background
        self._filling, self._writing = take_buffer(), take_buffer()
        self._used = 0
        self._pending: Future[None] | None = None
        self._crc = 0
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        done = 0
        while done < len(view):
            count = min(len(view) - done, BUFFER_BYTES - self._used)
            self._filling[self._used : self._used + count] = view[done : done + count]
            self._used += count
            done += count
            if self._used == BUFFER_BYTES:
                self._wait()
                self._filling, self._writing = self._writing, self._filling
                self._used = 0
                self._pending = self._background.submit(self._put, self._writing)
        return len(view)

    def tell(self) -> int:
        return self.bytes

    @property
    def crc32(self) -> str:
        """Checksum in the form of `d2v2ds.data.schema.ShardEntry.crc32`; complete after `sync`."""
        return f"{self._crc:08x}"

    def sync(self) -> None:
        """Write what is left and return when everything is on the disk."""
        self._wait()
        _use_page_cache(self._descriptor)  # the last piece is no whole number of blocks
        self._put(self._filling[: self._used])
        self._used = 0
        durable.fsync(self._descriptor, self._path)

    def close(self) -> None:
        """Give the descriptor back; what was not synced is lost."""
        if not self.closed:
            try:
                self._wait()
            finally:
                os.close(self._descriptor)
                give_buffer(self._filling)
                give_buffer(self._writing)
                super().close()

    def _put(self, piece: memoryview) -> None:
        """Sum and write the next piece; in the background thread, in order, one at a time."""
        self._crc = crc32(piece, self._crc)
        _write_all(self._descriptor, piece, self._path)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


@contextmanager
def replacing(path: Path, temporary_folder: Path) -> Iterator[ChecksumFile]:
    """A file that appears under its name only when it is whole and on the disk; on any error nothing is left.

    Raises:
        MachineError: if the disk is full, the quota used up, or the file system failed.
    """
    temporary = temporary_folder / f"{path.name}.{os.getpid()}.tmp"
    try:
        with ThreadPoolExecutor(1) as background, ChecksumFile(temporary, background) as sink:
            yield sink
            sink.sync()
        durable.move_into_place(temporary, path)
    except OSError as error:
        if is_machine_fault(error):
            raise MachineError(
                f"{path}: {error.strerror} while writing; finished shards are intact: {advice(error)}; run the same "
                "command again to go on"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o644)
    except OSError as error:
        if not is_unsupported(error):
            raise
    return os.open(path, flags, 0o644)


def _use_page_cache(descriptor: int) -> None:
    if _DIRECT:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)


def _write_all(descriptor: int, data: memoryview, path: Path) -> None:
    while len(data):
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:  # some file systems open a file for direct writes and refuse the first of them
            if not (is_unsupported(error) and _is_direct(descriptor)):
                raise
            say_once("O_DIRECT", "%s: no direct writes here (%s); writing through the page cache", path, error.strerror)
            _use_page_cache(descriptor)


def _is_direct(descriptor: int) -> bool:
    return bool(_DIRECT and fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)
