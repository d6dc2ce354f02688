"""Unpack an archive that a stranger made: into the folder or not at all.

In: a tar file (also gz, bz2, xz) or a zip file. Out: a folder that appears whole, by one rename. Refused are absolute
names, ``..``, links of any kind, devices and pipes, and archives that grow beyond the free space or any corpus' ratio.
Refused are also tar files that end before their end mark, or whose compression's checksum is wrong: tarfile takes both,
and a cut or damaged file would look like a whole one with fewer files in it.

Links stay out even where they point inside: no corpus here has any, and tarfile's own filter for them had holes
(CVE-2025-4330, CVE-2025-4517). The filter is used beside these checks and takes ownership and odd permissions away.
"""

import bz2
import errno
import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from d2v2ds.data.schema import move_into_place
from d2v2ds.errors import ConfigError, D2V2Error

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ZIP_SUFFIXES = (".zip",)
_LARGEST_RATIO = 200
"""Bytes on the disk for one of the archive: sparse text reaches 20, a bomb 1000."""
_FREE_RATIO_BYTES = 64 << 20
"""So small an archive's content is not measured against its size."""
_ENTRY_BYTES = 4096
"""What a file costs beside its content: a million empty ones fill a disk too."""
_COPY_BYTES = 1 << 20
_HEADER_BYTES = 256 << 10
"""Most that is read for one member's headers; tarfile holds them in memory whatever size they claim."""
_DECOMPRESSORS = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\x00": lzma.LZMAFile}
"""By the first bytes of the file."""
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,  # numbers and names that are none
    OverflowError,  # a date that the system does not have
    RecursionError,  # tarfile calls itself for each header that announces another one
    NotImplementedError,  # compressed in a way that Python does not know
)
"""What reading a damaged archive raises."""


class ArchiveError(D2V2Error):
    """An archive is damaged, too large, or would write outside its folder."""


def folder_name(archive_name: str) -> str | None:
    """The name without the suffix of an archive; None if it is not the name of one."""
    for suffix in (*TAR_SUFFIXES, *ZIP_SUFFIXES):
        if archive_name.lower().endswith(suffix) and len(archive_name) > len(suffix):
            return archive_name[: -len(suffix)]
    return None


def check_tar_filter() -> None:
    """Raise a `ConfigError` if this Python cannot filter what a tar file holds (before 3.11.4)."""
    if not hasattr(tarfile, "data_filter"):
        raise ConfigError("unpacking needs Python 3.11.4 or later, whose tarfile has a filter; or give --no-extract")


def unpack(archive: Path, target: Path, temporary: Path) -> int:
    """Unpack into `target`, which must not exist; returns the number of files.

    Args:
        archive: its name says what it is, see `folder_name`.
        target: appears when everything is unpacked.
        temporary: a folder on the same file system, for what is not yet whole; what is there is removed.

    Raises:
        ConfigError: if this Python's tarfile is too old.
        ArchiveError: if the archive is refused or damaged, or the disk is full; nothing is left.
    """
    check_tar_filter()
    shutil.rmtree(temporary, ignore_errors=True)
    with _removing_on_errors(archive, temporary):
        temporary.mkdir()
        room = _Room(archive, temporary)
        is_zip = archive.name.lower().endswith(ZIP_SUFFIXES)
        files = _unpack_zip(archive, temporary, room) if is_zip else _unpack_tar(archive, temporary, room)
        move_into_place(temporary, target)
    return files


class _Room:
    """How much may still be written."""

    def __init__(self, archive: Path, folder: Path) -> None:
        self._archive = archive
        self._free = shutil.disk_usage(folder).free
        self._allowed = max(_FREE_RATIO_BYTES, _LARGEST_RATIO * archive.stat().st_size)
        self._taken = 0

    def take(self, name: str, size: int) -> None:
        """Raise an `ArchiveError` if a file of `size` bytes is too much."""
        self._taken += size + _ENTRY_BYTES
        if self._taken > self._free:
            raise ArchiveError(
                f"{self._archive}: {name!r} brings it to {self._taken:,} bytes, the disk had {self._free:,} free; the "
                "archive is kept: free space and run the same command again"
            )
        if self._taken > self._allowed:
            raise ArchiveError(
                f"{self._archive}: {name!r} brings it to {self._taken:,} bytes, expected at most {self._allowed:,} "
                "from an archive of this size: a decompression bomb; if you trust it, unpack it yourself"
            )


class _TarStream:
    """The bytes of a tar file, for tarfile: how many a header takes is limited, and the last ones read are kept."""

    def __init__(self, archive: Path, source: BinaryIO) -> None:
        self._archive = archive
        self._source = source
        self._left: int | None = None
        self.last = b""

    def limit(self, size: int | None) -> None:
        """Allow `size` bytes to be read from now on; None allows all."""
        self._left = size

    def read(self, size: int) -> bytes:
        if self._left is not None:
            if not 0 <= size <= self._left:  # a negative size would read everything
                raise ArchiveError(
                    f"{self._archive}: damaged, or made to harm: a header at byte {self.tell():,} claims {size:,} "
                    f"bytes, expected at most {_HEADER_BYTES:,}; the archive is kept"
                )
            self._left -= size
        self.last = self._source.read(size)
        return self.last

    def seek(self, position: int) -> int:
        return self._source.seek(position)

    def tell(self) -> int:
        return self._source.tell()


def _unpack_tar(archive: Path, folder: Path, room: _Room) -> int:
    files = 0
    with _decompressed(archive) as source:
        stream = _TarStream(archive, source)
        stream.limit(_HEADER_BYTES)
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # type: ignore[call-overload]  # no more is asked of it
            while (member := tar.next()) is not None:
                _check_member(archive, member)
                room.take(member.name, member.size)
                stream.limit(None)
                tar.extract(member, folder, filter="data")
                files += member.isreg()
                stream.limit(_HEADER_BYTES)
        if stream.last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(
                f"expected the end mark after {files:,} files, found {len(stream.last)} other bytes"
            )
        while rest := source.read(_COPY_BYTES):  # up to the checksum of the compression
            room.take("what follows the end", len(rest))
    return files


def _decompressed(archive: Path) -> BinaryIO:
    with archive.open("rb") as file:
        start = file.read(6)
    for magic, decompressor in _DECOMPRESSORS.items():
        if start.startswith(magic):
            return cast(BinaryIO, decompressor(archive, "rb"))
    return archive.open("rb")


def _check_member(archive: Path, member: tarfile.TarInfo) -> None:
    _check_name(archive, member.name)
    if not (member.isreg() or member.isdir()):
        kind = "link" if member.issym() or member.islnk() else "device or pipe"
        raise _refused(archive, member.name, f"a {kind}")
    if member.issparse():  # its pieces may lie over one another, and are written before its size counts
        raise _refused(archive, member.name, "a sparse file")
    if member.size < 0:  # tarfile would go backwards, for ever (CVE-2025-8194)
        raise _refused(archive, member.name, "of a negative size")


def _unpack_zip(archive: Path, folder: Path, room: _Room) -> int:
    files = 0
    with zipfile.ZipFile(archive) as whole:
        for member in whole.infolist():
            _check_name(archive, member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was not made on Unix
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(archive, member.filename, "a link, device or pipe")
            if member.flag_bits & 1:
                raise _refused(archive, member.filename, "encrypted")
            room.take(member.filename, member.file_size)
            path = folder / member.filename
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole.open(member) as source, path.open("wb") as sink:  # ends at the declared size, checks the CRC
                shutil.copyfileobj(source, sink, _COPY_BYTES)
            files += 1
    return files


def _check_name(archive: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute():
        raise _refused(archive, name, "an absolute path")
    if ".." in path.parts:
        raise _refused(archive, name, "a path with '..'")


def _refused(archive: Path, name: str, what: str) -> ArchiveError:
    return ArchiveError(
        f"{archive}: {name!r} is {what}, expected plain files and folders below the archive's own; nothing was "
        "unpacked, the archive is kept"
    )


def _damaged(archive: Path, error: Exception) -> ArchiveError:
    return ArchiveError(
        f"{archive}: damaged, or not what its name says: {error or type(error).__name__}; remove it and run the same "
        "command again to fetch it anew"
    )


@contextmanager
def _removing_on_errors(archive: Path, temporary: Path) -> Iterator[None]:
    """Leave nothing half unpacked, and say what was wrong."""
    try:
        yield
    except _DAMAGE as error:
        raise _damaged(archive, error) from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2 have no errors of their own that say more
            raise _damaged(archive, error) from error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free space" if full else "repair this"
        raise ArchiveError(
            f"{error.filename or archive}: {error.strerror} while unpacking; the archive is kept: {advice} "
            "and run the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
