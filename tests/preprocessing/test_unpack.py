"""Archives that a stranger made: each refusal leaves nothing outside the folder, and nothing in it."""

import gzip
import io
import random
import shutil
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
from preprocessing.download import unpack as module
from preprocessing.download.unpack import ArchiveError, folder_name, unpack

LONG = b"0123456789" * 50_000
"""More than a header may be."""


def member(
    name: str, data: bytes = b"text", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    return info, data


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, data in members:
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def zipped(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def refused(archive: Path, match: str) -> None:
    """Unpacking says so, and leaves no folder and no file anywhere but the archive."""
    folder = archive.parent
    with pytest.raises(ArchiveError, match=match):
        unpack(archive, folder / "out", folder / "temporary")
    assert [path.name for path in folder.rglob("*")] == [archive.name]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_a_tar_file_appears_whole(tmp_path: Path, suffix: str) -> None:
    mode = {".tar": "w", ".tgz": "w:gz"}.get(suffix, f"w:{suffix[5:]}")
    archive = tar(
        tmp_path / f"a{suffix}", member("a", kind=tarfile.DIRTYPE), member("a/b/c.txt", LONG), member("./d"), mode=mode
    )
    assert unpack(archive, tmp_path / "out", tmp_path / "temporary") == 2
    files = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*")}
    assert files.keys() == {"a", "a/b", "a/b/c.txt", "d"}
    assert files["a/b/c.txt"].read_bytes() == LONG
    assert archive.exists() and not (tmp_path / "temporary").exists()


def test_a_zip_file_appears_whole(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", **{"a/": b"", "a/b/c.txt": b"c", "d": b"d"})
    assert unpack(archive, tmp_path / "out", tmp_path / "temporary") == 2
    assert (tmp_path / "out" / "a" / "b" / "c.txt").read_bytes() == b"c"


def test_owners_and_odd_permissions_are_not_taken(tmp_path: Path) -> None:
    info, data = member("a")
    info.mode, info.uid = 0o6777, 12345
    unpack(tar(tmp_path / "a.tar.gz", (info, data)), tmp_path / "out", tmp_path / "temporary")
    status = (tmp_path / "out" / "a").stat()
    assert status.st_mode & 0o7022 == 0 and status.st_uid != 12345


OUTSIDE = {
    "absolute": (member("/tmp/outside"), "an absolute path"),
    "above": (member("../outside"), "a path with '..'"),
    "above later": (member("a/b/../../../outside"), "a path with '..'"),
    "symlink out": (member("a", kind=tarfile.SYMTYPE, link="/etc"), "a link"),
    "symlink above": (member("a", kind=tarfile.SYMTYPE, link="../.."), "a link"),
    "hard link out": (member("a", kind=tarfile.LNKTYPE, link="/etc/passwd"), "a link"),
    "hard link above": (member("a", kind=tarfile.LNKTYPE, link="../a.tar.gz"), "a link"),
    "device": (member("a", kind=tarfile.CHRTYPE), "a device or pipe"),
    "block device": (member("a", kind=tarfile.BLKTYPE), "a device or pipe"),
    "pipe": (member("a", kind=tarfile.FIFOTYPE), "a device or pipe"),
}


@pytest.mark.parametrize(("bad", "what"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_a_tar_file_stays_in_its_folder(tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes], what: str) -> None:
    refused(tar(tmp_path / "a.tar.gz", member("good"), bad), what)


def test_a_file_cannot_be_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    link = member("a", kind=tarfile.SYMTYPE, link=str(outside))
    refused(tar(tmp_path / "a.tar.gz", link, member("a/written")), "'a' is a link")
    assert not list(outside.iterdir())


@pytest.mark.parametrize(("name", "what"), [("/tmp/outside", "an absolute path"), ("a/../../outside", "'..'")])
def test_a_zip_file_stays_in_its_folder(tmp_path: Path, name: str, what: str) -> None:
    refused(zipped(tmp_path / "a.zip", good=b"", **{name: b"text"}), what)


@pytest.mark.parametrize("kind", [0o120777, 0o020666, 0o010666])
def test_a_zip_file_makes_no_links_and_devices(tmp_path: Path, kind: int) -> None:
    info = zipfile.ZipInfo("a")
    info.create_system, info.external_attr = 3, kind << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    refused(tmp_path / "a.zip", "a link, device or pipe")


def test_an_encrypted_zip_file_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", a=b"text")
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    refused(archive, "encrypted")


# ------------------------------------------------------------------ bombs


def test_a_tar_bomb_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FREE_RATIO_BYTES", 1 << 20)
    archive = tar(tmp_path / "a.tar.gz", member("good"), member("zeros", bytes(4 << 20)))
    refused(archive, "a decompression bomb")


def test_a_zip_bomb_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FREE_RATIO_BYTES", 1 << 20)
    refused(zipped(tmp_path / "a.zip", zeros=bytes(4 << 20)), "a decompression bomb")


def test_what_follows_the_end_is_part_of_the_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FREE_RATIO_BYTES", 1 << 20)
    archive = tar(tmp_path / "a.tar", member("a"), mode="w:")
    archive.write_bytes(gzip.compress(archive.read_bytes() + bytes(4 << 20)))
    refused(archive, "'what follows the end'.*a decompression bomb")


def test_pieces_of_a_sparse_file_are_not_written_over_one_another(tmp_path: Path) -> None:
    info, data = member("a", bytes(100_000))
    info.pax_headers = {"GNU.sparse.map": "0,50000,0,50000", "GNU.sparse.size": "1", "GNU.sparse.numblocks": "2"}
    refused(tar(tmp_path / "a.tar", (info, data)), "'a' is a sparse file")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [8 << 20, -512], ids=["large", "negative"])
def test_a_header_is_not_read_whatever_size_it_claims(tmp_path: Path, kind: bytes, size: int) -> None:
    info, _ = member("a", kind=kind)
    info.size = size
    archive = tmp_path / "a.tar"
    archive.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(16 << 20)))
    refused(archive, "a header at byte 512 claims")


def test_headers_before_one_file_are_limited_together(tmp_path: Path) -> None:
    info, _ = member("a", kind=tarfile.XHDTYPE)
    info.size = 200 << 10
    header = info.tobuf(tarfile.USTAR_FORMAT) + b"30 comment=".ljust(29, b"x") + b"\n"
    (tmp_path / "a.tar").write_bytes(header.ljust(512 + info.size, b"\0") * 2)
    refused(tmp_path / "a.tar", "a header at byte 205,824 claims")


def test_headers_of_headers_do_not_exhaust_the_stack(tmp_path: Path) -> None:
    info, _ = member("a", kind=tarfile.XHDTYPE)
    (tmp_path / "a.tar").write_bytes(bytes(info.tobuf(tarfile.USTAR_FORMAT)) * 500)
    refused(tmp_path / "a.tar", ": damaged, or not what its name says: maximum recursion depth")


def test_a_file_of_negative_size_is_refused_at_once(tmp_path: Path) -> None:
    info, _ = member("a")
    info.size = -2048
    (tmp_path / "a.tar").write_bytes(bytes(info.tobuf(tarfile.GNU_FORMAT)) + bytes(10_240))
    refused(tmp_path / "a.tar", "'a' is of a negative size")


def test_many_small_files_are_a_bomb_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FREE_RATIO_BYTES", 1 << 20)
    refused(
        tar(tmp_path / "a.tar.xz", *(member(f"{n}", b"") for n in range(3000)), mode="w:xz"), "a decompression bomb"
    )


def test_an_archive_larger_than_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(tar(tmp_path / "a.tar.gz", member("a", bytes(60_000))), "the disk had 50,000 free")


def test_a_zip_file_that_lies_about_a_size_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", a=b"0123456789" * 100)
    data = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(mark) + offset
        data[at : at + 4] = (10).to_bytes(4, "little")
    archive.write_bytes(data)
    refused(archive, ": damaged")


# ------------------------------------------------------------------ damage and ends


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


NOISE = bytes(range(256)) * 40


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip"])
@pytest.mark.parametrize(
    "spoil", [cut, lambda data: b"<html>not found</html>", lambda data: b""], ids=["cut", "html", "empty"]
)
def test_a_damaged_archive_leaves_nothing(tmp_path: Path, suffix: str, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".zip":
        zipped(path, a=NOISE, b=NOISE)
    else:
        tar(path, member("a", NOISE), member("b", NOISE), mode=f"w:{suffix[5:]}")
    path.write_bytes(spoil(path.read_bytes()))
    refused(path, ": damaged")


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_a_flipped_byte_in_an_archive_is_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    zipped(path, a=NOISE) if suffix == ".zip" else tar(path, member("a", NOISE), mode=f"w:{suffix[5:]}")
    path.write_bytes(flipped(path.read_bytes()))
    refused(path, ": damaged")


def test_the_checksum_of_the_compression_is_looked_at(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", member("a", NOISE), mode="w:")
    data = bytearray(gzip.compress(path.read_bytes(), compresslevel=0))  # as it is, so that a flipped byte decompresses
    data[data.index(NOISE) + 100] ^= 0xFF
    path.write_bytes(data)
    refused(path, ": damaged, or not what its name says: CRC check failed")


HEADER = tarfile.BLOCKSIZE
BEHIND_A = HEADER + len(NOISE)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "gz"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:BEHIND_A],
        lambda data: data[: BEHIND_A + 100],
        lambda data: data[: 2 * BEHIND_A],
        lambda data: data[:BEHIND_A] + flipped(data[BEHIND_A : BEHIND_A + HEADER]) + data[BEHIND_A + HEADER :],
    ],
    ids=["cut between files", "cut in a header", "cut before the end mark", "damaged header"],
)
def test_a_tar_file_that_ends_early_is_not_taken_for_a_whole_one(
    tmp_path: Path, spoil: Callable[[bytes], bytes], pack: Callable[[bytes], bytes]
) -> None:
    path = tar(tmp_path / "a.tar", member("a", NOISE), member("b", NOISE), mode="w:")
    path.write_bytes(pack(spoil(path.read_bytes())))
    refused(path, "expected the end mark")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_random_damage_gives_one_error_or_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        zipped(path, **{"a/b": NOISE[:500], "\u00e9": b"x"})
    else:
        long = member("\u00e9" * 80, b"x")  # has a header before its header
        tar(path, member("a/b", NOISE[:500]), long, mode="w:gz" if kind == "tar.gz" else "w:")
    whole = path.read_bytes()
    rng = random.Random(0)
    outcomes = Counter[str]()
    for number in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            unpack(path, tmp_path / f"{number}", tmp_path / "temporary")
            outcomes["taken"] += 1
        except ArchiveError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100


@pytest.mark.parametrize(
    "pax",
    [{"path": "a\0b"}, {"GNU.sparse.map": "no,number", "GNU.sparse.size": "1"}, {"mtime": "1e300"}],
    ids=["name", "number", "date"],
)
def test_names_numbers_and_dates_that_are_none_are_damage(tmp_path: Path, pax: dict[str, str]) -> None:
    info, data = member("a")
    info.pax_headers = pax
    refused(tar(tmp_path / "a.tar", (info, data)), ": damaged")


def test_a_place_that_no_file_has_is_damage(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as whole:
        info = zipfile.ZipInfo("a")
        info.extra = struct.pack("<HHQ", 1, 8, 1 << 63)  # ZIP64: where the file begins
        whole.writestr(info, b"text")
    data = bytearray(archive.read_bytes())
    at = data.index(b"PK\x01\x02") + 42
    data[at : at + 4] = b"\xff" * 4  # look there
    archive.write_bytes(data)
    refused(archive, ": damaged")


def test_what_a_killed_extraction_left_is_removed(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar.gz", member("a"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / "half").write_text("")
    unpack(archive, tmp_path / "out", tmp_path / "temporary")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_a_full_disk_leaves_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device", "a")

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    refused(tar(tmp_path / "a.tar.gz", member("a")), "No space left .*the archive is kept: free space")


def test_a_python_without_the_filter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(ConfigError, match="Python 3.11.4"):
        unpack(tar(tmp_path / "a.tar.gz", member("a")), tmp_path / "out", tmp_path / "temporary")


def test_names_of_archives() -> None:
    names = ("a.tar.gz", "a.b.TGZ", "a.zip", "a.tar", ".tar", "a.gz", "a.txt", "tar")
    assert [folder_name(name) for name in names] == ["a", "a.b", "a", "a", None, None, None, None]
