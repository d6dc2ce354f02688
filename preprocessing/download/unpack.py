"""Unpack an archive from the web into a new folder, completely or not at all.

Tar files (also gz, bz2, xz) and zip files. Only plain files and folders below the new folder are accepted: tarfile's
`data` filter refuses paths outside it and drops owners and odd permissions, zipfile keeps its paths inside, and this
module refuses links of any kind, devices, pipes and sparse files, headers that would fill the memory, and zip files
that state more bytes than the disk has free.
"""

import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

from d2v2ds.errors import D2V2Error
from d2v2ds.io import durable

_HEADER_BYTES = 1 << 20
"""Largest extended header: a name, or the attributes of a member."""
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, OverflowError,
           RuntimeError, LookupError, struct.error)  # fmt: skip
"""Errors of tarfile and zipfile for damaged, encrypted or unsafe archives."""


class ArchiveError(D2V2Error):
    """An archive is damaged, or holds something else than files inside its folder."""


def folder_name(archive_name: str) -> str | None:
    """Return the name without the suffix of an archive; None for other files."""
    found = [suffix for suffix in _SUFFIXES if archive_name.lower().endswith(suffix)]
    return archive_name[: -len(found[0])] or None if found else None


def unpack(archive: Path, target: Path, temporary: Path) -> None:
    """Unpack `archive`, whose suffix tells its format, into `target`, which appears when everything is in it.

    Args:
        archive: file to read.
        target: must not exist.
        temporary: folder on the same file system for unfinished work; removed before and after.

    Raises:
        ArchiveError: if the archive is damaged or refused.
        OSError: if the disk refuses a file.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        (_unpack_zip if archive.suffix.lower() == ".zip" else _unpack_tar)(archive, temporary)
        durable.move_into_place(temporary, target)
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip and bz2 raise errors without a number
            raise
        raise ArchiveError(
            f"{archive}: expected a whole archive of plain files and folders, found: {error or type(error).__name__}; "
            "nothing is unpacked, the archive is kept: remove it to fetch it again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive, tarinfo=_Header) as tar:
        tar.extractall(folder, filter=_plain)
        assert tar.fileobj is not None
        # tarfile ends at one empty block, at a damaged header and at a cut; a complete file has two empty blocks
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark behind the last file")
        while tar.fileobj.read(1 << 20):  # up to the checksum of the compression
            pass


class _Header(tarfile.TarInfo):
    """Header of a member, checked before tarfile reads what it announces.

    tarfile reads a name or the attributes of a member into memory whatever their size, and follows the map of a sparse
    member beyond the end of the file. It calls `_proc_member` for each header.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        is_extended = self.type in _EXTENDED
        if self.size < 0 or (is_extended and self.size > _HEADER_BYTES) or self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{self.name[:200]!r} is a sparse file, or has a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _refuse(self, *_: Any) -> NoReturn:
        raise tarfile.ReadError(f"{self.name[:200]!r} is a sparse file")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


def _plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    # A negative size makes some versions of tarfile read one header for ever (CVE-2025-8194).
    if not (member.isreg() or member.isdir()) or member.issparse() or member.size < 0:
        raise tarfile.ReadError(f"{member.name!r} is a link, a device, a pipe or a sparse file")
    return tarfile.data_filter(member, folder)


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as whole:
        for member in whole.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 in archives that were not made on Unix
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise zipfile.BadZipFile(f"{member.filename!r} is a link, a device or a pipe")
        size, free = sum(member.file_size for member in whole.infolist()), shutil.disk_usage(folder).free
        if size > free:
            raise zipfile.BadZipFile(f"{size:,} bytes of files, {free:,} are free on the disk")
        whole.extractall(folder)
