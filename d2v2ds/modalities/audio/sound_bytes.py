"""Bytes of a sound file as libsndfile reads them: opened without its name, patched headers, errors of the machine kept.

libsndfile takes a failed read for the end of the file, cannot open names that are no UTF-8, and waits for ever at a
FIFO. Here the file is opened and read by this process. No torch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from d2v2ds.errors import D2V2Error
from d2v2ds.io.machine_faults import is_machine_fault, reading_error
from d2v2ds.io.read import open_regular


class BadAudioError(D2V2Error):
    """A file is no whole recording; the text is the reason, to stand behind its name."""


class SoundBytes:
    """File object for `soundfile.SoundFile`.

    Args:
        path: of the file, for messages.
        source: descriptor of the open file, or its content.
    """

    def __init__(self, path: str, source: int | bytes) -> None:
        self.path = path
        self.size = os.fstat(source).st_size if isinstance(source, int) else len(source)
        self._source = source
        self._position = 0
        self._patches: list[tuple[int, bytes]] = []
        self._fault: OSError | None = None
        self.furthest = 0
        """End of the last bytes that were read; may be set."""

    def patch(self, offset: int, data: bytes) -> None:
        """Let readers find other bytes at an offset."""
        self._patches.append((offset, data))

    def read_at(self, offset: int, count: int) -> bytes:
        """Read bytes of the file itself; fewer at its end, none before its beginning.

        Raises:
            OSError: the file cannot be read.
        """
        count = min(count, self.size - offset)
        if offset < 0 or count <= 0:
            return b""
        if isinstance(self._source, bytes):
            return self._source[offset : offset + count]
        return os.pread(self._source, count, offset)

    def check(self) -> None:
        """Raise the error of a read that failed while libsndfile called."""
        if self._fault is not None:
            raise self._fault

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start, done = self._position, 0
        try:
            while done < min(len(view), self.size - start) and (count := self._copy(view[done:], start + done)):
                done += count
        except OSError as error:
            self._fault = self._fault or error
        for offset, data in self._patches:
            first, last = max(offset, start), min(offset + len(data), start + done)
            if first < last:
                view[first - start : last - start] = data[first - offset : last - offset]
        self._position += done
        self.furthest = max(self.furthest, self._position)
        return done

    def _copy(self, out: memoryview, offset: int) -> int:
        if isinstance(self._source, int):
            return os.preadv(self._source, [out], offset)
        piece = self._source[offset : offset + len(out)]
        out[: len(piece)] = piece
        return len(piece)

    def read(self, count: int = -1) -> bytes:
        data = bytearray(max(0, self.size - self._position) if count < 0 else count)
        return bytes(data[: self.readinto(data)])

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def tell(self) -> int:
        return self._position


@contextmanager
def open_bytes(path: str | os.PathLike[str] | bytes) -> Iterator[SoundBytes]:
    """Open a sound file.

    Args:
        path: of the file, or its content.

    Raises:
        BadAudioError: it is absent, empty, no regular file, or cannot be read.
        MachineError: the machine is at fault.
    """
    if isinstance(path, bytes):
        yield _not_empty(SoundBytes(f"{len(path):,} bytes", path))
        return
    name = os.fspath(path)
    try:
        with open_regular(name, BadAudioError) as file:
            yield _not_empty(SoundBytes(name, file.fileno()))
    except OSError as error:
        if is_machine_fault(error):
            raise reading_error(name, error, BadAudioError) from error
        raise BadAudioError(f"unreadable: {error.strerror or error}") from error


def _not_empty(data: SoundBytes) -> SoundBytes:
    if not data.size:
        raise BadAudioError("empty file (0 bytes)")
    return data
