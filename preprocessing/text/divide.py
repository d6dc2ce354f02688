"""Division of large files at document boundaries, so that several processes share them.

The boundaries depend on the files alone.
"""

import re
from collections.abc import Sequence
from typing import Any

from preprocessing.text.documents import DocumentOptions, TextFile
from preprocessing.text.stream import open_text

_SCAN_BYTES = 64 << 10
_BOUNDARIES = {"line": re.compile(rb"\n"), "paragraph": re.compile(rb"\n[ \t\r\f\v]*\n")}


def can_be_divided(file: TextFile, options: DocumentOptions) -> bool:
    """Return True if several processes can read the file, each from a byte of its own."""
    return file.compression is None and (file.form != "text" or options.document != "file")


def document_boundaries(file: TextFile, offsets: Sequence[int], options: DocumentOptions) -> list[int]:
    """Find for each offset the first document that begins behind it.

    Args:
        file: one that can be divided.
        offsets: bytes, ascending.
        options: what a document is.

    Returns:
        Ascending byte positions right behind the end of a line (or a blank line); the file's size where no document
        follows. A stretch of the file without boundary is scanned once, however many offsets lie in it.
    """
    pattern = _BOUNDARIES[options.document if file.form == "text" else "line"]
    found, reached = [], 0
    with open_text(file) as stream:
        for offset in offsets:
            if offset > reached:
                reached = _next_boundary(stream, offset, pattern, file.bytes)
            found.append(reached)
    return found


def _next_boundary(stream: Any, offset: int, pattern: re.Pattern[bytes], size: int) -> int:
    stream.seek(offset)
    data = b""
    while chunk := stream.read(_SCAN_BYTES):
        data += chunk
        if match := pattern.search(data):
            return offset + match.end()
        last = data.rfind(
            b"\n"
        )  # a blank line may have begun there; of its white space nothing is kept, it may be long
        kept = b"\n" if last >= 0 and not data[last:].strip() else b""
        offset += len(data) - len(kept)
        data = kept
    return size
