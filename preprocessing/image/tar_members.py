"""Members of a tar file by their headers alone, from any header on, also of files that a stranger made.

`tarfile` reads names of any length into memory, follows chains of headers by recursion, loops on damaged sparse members
and takes damage for the end. Here headers are parsed by `tarfile.TarInfo.frombuf`, one after another; every size is
checked against the file before it is used. Formats: ustar, GNU and pax; what is no plain file is yielded with a reason.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from d2v2ds.errors import D2V2Error
from d2v2ds.io.machine_faults import reading_error, retried
from d2v2ds.io.read import open_regular

HEADER_BYTES = 1 << 20
"""Largest extended header: a name, or the attributes of a member."""
_MOST_HEADERS = 16
"""Most extended headers in front of one member."""
_BLOCK = tarfile.BLOCKSIZE
_SCAN_BYTES = 1 << 20
_GNU_SPARSE_CONTINUES, _SPARSE_BLOCK_CONTINUES = 482, 504
"""Bytes that tell whether another block of a sparse member's map follows the header, and the block."""
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "FIFO",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03": "zip"}


class ArchiveError(D2V2Error):
    """A tar file is damaged, cut off, or of another format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """One member that is no folder."""

    name: str
    offset: int
    """Offset of its first header."""
    data: int
    """Offset of its bytes."""
    size: int
    kind: str
    """Kind of a member that is no plain file, such as ``symbolic link``; empty for a plain one."""


class TarFile:
    """An uncompressed tar file, open for reading.

    Raises:
        ArchiveError: it is absent or no regular file.
        MachineError: the machine is at fault.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = retried(partial(open_regular, path, ArchiveError))
        self.bytes = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> "TarFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes; fewer at the end of the file.

        Raises:
            MachineError: the machine is at fault.
            ArchiveError: they cannot be read for another reason.
        """
        return retried(partial(self._read, offset, size))

    def _read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise reading_error(self.path, error, ArchiveError) from error

    def members(self, start: int = 0) -> Iterator[TarMember]:
        """Yield the members but folders from the header at offset `start` on.

        Raises:
            ArchiveError: this is no uncompressed tar file, it was cut off, or something follows its end.
            MachineError: the machine is at fault.
        """
        at = start
        while (head := self._header(at)) is not None:
            offset, extended, headers = at, dict[str, str](), 0
            while head.type in _EXTENDED:
                if headers == _MOST_HEADERS or not 0 <= head.size <= HEADER_BYTES:
                    raise ArchiveError(
                        f"expected at most {_MOST_HEADERS} extended headers of {HEADER_BYTES:,} bytes in front of a "
                        f"member, found more or one of {head.size:,} bytes at byte {at}"
                    )
                extended |= _extension(head.type, self._content(at, head.size), at)
                headers += 1
                at += _BLOCK + _padded(head.size)
                head = self._header(at)
                if head is None:
                    raise ArchiveError(f"cut off: expected a member at byte {at}, found the end mark")
            member = self._member(offset, at, head, extended)
            if not head.isdir():
                yield member
            at = member.data + _padded(member.size)
        self._check_end(at)

    def _header(self, at: int) -> tarfile.TarInfo | None:
        """Parse the header at an offset; None for the end mark."""
        block = self.read(at, _BLOCK)
        if len(block) < _BLOCK:
            raise ArchiveError(f"cut off: expected the end mark at byte {at}, found {len(block)} bytes")
        if not any(block):
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            found = next((name for magic, name in _COMPRESSIONS.items() if block.startswith(magic)), None)
            if at == 0 and found:
                raise ArchiveError(f"expected an uncompressed tar file, found {found}: unpack it first") from None
            raise ArchiveError(f"damaged header at byte {at}") from None

    def _content(self, at: int, size: int) -> bytes:
        content = self.read(at + _BLOCK, size)
        if len(content) < size:
            raise ArchiveError(f"cut off: expected {size:,} bytes of a header behind byte {at}, found {len(content):,}")
        return content

    def _member(self, offset: int, at: int, head: tarfile.TarInfo, extended: dict[str, str]) -> TarMember:
        """Make a member of its header at byte `at` and the extended ones in front of it."""
        name = (extended.get("GNU.sparse.name") or extended.get("path") or head.name).rstrip("/")
        kind = _KINDS.get(head.type, "" if head.type in tarfile.REGULAR_TYPES else "special member")
        if any(key.startswith("GNU.sparse.") for key in extended):
            kind = _KINDS[tarfile.GNUTYPE_SPARSE]
        size = head.size
        if "size" in extended:
            size = int(extended["size"]) if extended["size"].isdecimal() and len(extended["size"]) < 20 else -1
        data = at + _BLOCK
        if head.type == tarfile.GNUTYPE_SPARSE:
            data += self._sparse_map(at)
        if head.type in _KINDS and head.type != tarfile.GNUTYPE_SPARSE or head.isdir():
            size = 0  # as tar takes it: links and folders have no bytes, whatever their size says
        if size < 0 or data + size > self.bytes:
            raise ArchiveError(
                f"member {name[:200]!r} at byte {offset}: expected a size inside the file of {self.bytes:,} bytes, "
                f"found {size:,}: damaged or cut off"
            )
        return TarMember(name=name, offset=offset, data=data, size=size, kind=kind)

    def _sparse_map(self, at: int) -> int:
        """Return the bytes of a sparse member's map behind its header."""
        size, block, flag = 0, self.read(at, _BLOCK), _GNU_SPARSE_CONTINUES
        while len(block) == _BLOCK and block[flag]:
            size += _BLOCK
            block, flag = self.read(at + size, _BLOCK), _SPARSE_BLOCK_CONTINUES
        return size

    def _check_end(self, at: int) -> None:
        """Raise an `ArchiveError` if another archive follows the end mark at byte `at`, as after joining two files."""
        while block := self.read(at, _SCAN_BYTES):
            if any(block):
                first = len(block) - len(block.lstrip(b"\0"))
                at += first // _BLOCK * _BLOCK
                try:
                    tarfile.TarInfo.frombuf(self.read(at, _BLOCK), "utf-8", "surrogateescape")
                except tarfile.HeaderError:
                    return
                raise ArchiveError(
                    f"expected one archive, found another behind the end mark, at byte {at}: joined files lose all but "
                    "the first; give them one by one, or unpack them by tar --ignore-zeros"
                )
            at += len(block)


def _extension(kind: bytes, content: bytes, at: int) -> dict[str, str]:
    """Return what an extended header says of the next member; of global ones and names of links nothing is used."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    return _pax_records(content, at) if kind in _PAX else {}


def _pax_records(content: bytes, at: int) -> dict[str, str]:
    """Parse the records ``LENGTH KEY=VALUE`` of a pax header (POSIX.1-2001, pax, "Extended Header").

    Raises:
        ArchiveError: one of them is malformed.
    """
    records, start = {}, 0
    while start < len(content) and content[start]:
        digits, _, _ = content[start : start + 8].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[start + len(digits) + 1 : start + length]
        key, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise ArchiveError(f"damaged pax header at byte {at}")
        records[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        start += length
    return records


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
