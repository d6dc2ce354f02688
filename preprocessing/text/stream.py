"""Bytes, characters and lines of text files, read in chunks, also from gzip and zstandard; errors name the place."""

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from d2v2ds.errors import ConfigError, D2V2Error, ShardError
from d2v2ds.io.machine_faults import is_machine_fault, reading_error, retried
from d2v2ds.io.read import open_regular
from preprocessing.text.documents import Errors, TextFile, TextSpan

CHUNK_BYTES = 512 << 10
"""Bytes of one read; a batch of documents has about this size."""
MAX_LINE_BYTES = 64 << 20
"""Bytes of the longest JSON or TSV line, which has to fit in memory."""

_OPENERS: dict[str | None, Callable[[str], Any]] = {
    None: io.FileIO,
    "gzip": gzip.GzipFile,  # accepts zeros behind the end, as the program gzip does; Arrow refuses them
    "zstd": lambda path: pa.CompressedInputStream(pa.OSFile(path, "rb"), "zstd"),
}


@contextlib.contextmanager
def open_text(file: TextFile) -> Iterator[Any]:
    """Open a stream of the file's text, decompressed.

    Raises:
        ConfigError: the file cannot be read, or is no regular one.
        MachineError: the machine is at fault.
    """
    with retried(partial(_open, file)) as stream:
        yield stream


def _open(file: TextFile) -> Any:
    open_regular(file.path, ConfigError).close()  # a FIFO would block for ever
    try:
        return _OPENERS[file.compression](file.path)
    except OSError as error:
        raise _reading_error(file, error, "expected a readable file, found") from error


def _reading_error(file: TextFile, error: Exception, what: str) -> D2V2Error:
    """Make the error of a failed read: the machine's, or one of the file that begins with `what`."""
    if isinstance(error, OSError) and is_machine_fault(error):
        return reading_error(file.path, error, ConfigError)
    return ConfigError(f"{file.source}: {what} {getattr(error, 'strerror', None) or error}")


def read_bytes(stream: Any, size: int, file: TextFile, done: int) -> bytes:
    """Read the next bytes of a stream after `done` bytes.

    Raises:
        ConfigError: the data is damaged.
        MachineError: the machine is at fault.
    """
    again = retried if file.compression is None else _once  # a decompressor has moved on
    return again(partial(_read, stream, size, file, done))


def _once(read: Callable[[], bytes]) -> bytes:
    return read()


def _read(stream: Any, size: int, file: TextFile, done: int) -> bytes:
    try:
        data: bytes = stream.read(size)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        what = f"expected {file.compression or 'readable'} data, found it damaged behind {done} bytes of text:"
        raise _reading_error(file, error, what) from error
    return data


def read_chunks(span: TextSpan) -> Iterator[bytes]:
    """Yield the bytes of a span; the last chunk is empty.

    Raises:
        ShardError: the file is shorter than planned.
    """
    left = None if span.stop is None else span.stop - span.start
    done = 0
    with open_text(span.file) as stream:
        if span.start:
            stream.seek(span.start)
        while left is None or left > 0:
            data = read_bytes(stream, CHUNK_BYTES if left is None else min(CHUNK_BYTES, left), span.file, done)
            if not data:
                break
            done += len(data)
            yield data
            if left is not None:
                left -= len(data)
    if left:
        raise ShardError(
            f"{span.file.source}: expected {span.file.bytes} bytes, found an end at byte {span.start + done}; the file "
            "changed while it was packed: begin again in another folder"
        )
    yield b""


def decoded_text(span: TextSpan, errors: Errors) -> Iterator[str]:
    """Yield the text of a span in pieces; a piece can end between any two characters."""
    rest = b""
    position = span.start
    for data in read_chunks(span):
        rest += data
        try:
            text, used = codecs.utf_8_decode(rest, errors, not data)
        except UnicodeDecodeError as error:
            raise _utf8_error(error, span, position, rest) from error
        yield text.removeprefix("\ufeff") if position == 0 else text
        position += used
        rest = rest[used:]


def whole_lines(span: TextSpan) -> Iterator[tuple[int, int, bytes]]:
    """Yield many lines at a time: number of the first one in the span, its byte in the text, and the lines."""
    first, position = 0, span.start
    rest: list[bytes] = []
    unfinished = 0  # bytes of the line that goes on in the next chunk
    for data in read_chunks(span):
        end = data.rfind(b"\n")
        unfinished += len(data) if end < 0 else data.find(b"\n")
        if unfinished > MAX_LINE_BYTES:
            raise ConfigError(f"{place_of(span, first)}: expected a line, found more than {MAX_LINE_BYTES} bytes")
        if end < 0:
            rest.append(data)
            continue
        lines = b"".join([*rest, memoryview(data)[:end]])
        yield first, position, lines
        first += int(np.count_nonzero(np.frombuffer(lines, dtype=np.uint8) == ord("\n"))) + 1
        position += len(lines) + 1
        rest = [data[end + 1 :]]
        unfinished = len(rest[0])
    yield first, position, b"".join(rest)


def decode_lines(data: bytes, position: int, span: TextSpan, errors: Errors) -> list[str]:
    """Split and decode whole lines, of which the first begins at byte `position` of the text."""
    try:
        text = data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise _utf8_error(error, span, position, data) from error
    return (text.removeprefix("\ufeff") if position == 0 else text).split("\n")


def _utf8_error(error: UnicodeDecodeError, span: TextSpan, position: int, data: bytes) -> ConfigError:
    """Return the error about `data`, which begins at byte `position` of the text."""
    return ConfigError(
        f"{span.file.source}: expected UTF-8 text, found {error.reason} at byte {position + error.start}"
        f"{' of the decompressed text' if span.file.compression else ''} "
        f"({data[error.start : error.start + 4].hex(' ')}); convert the file, or --errors replace"
    )


def place_of(span: TextSpan, number: int) -> str:
    """Return file and line for a message; counts the lines in front of the span."""
    if span.start:
        before = TextSpan(file=span.file, stop=span.start)
        number += sum(chunk.count(b"\n") for chunk in read_chunks(before))
    return f"{span.file.source} line {number + 1}"
