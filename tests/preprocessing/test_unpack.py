"""Archives that a stranger made: each refusal leaves nothing outside the folder, and nothing in it."""

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
from preprocessing import unpack as module
from preprocessing.unpack import ArchiveError, folder_name, unpack


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
        tmp_path / f"a{suffix}", member("a", kind=tarfile.DIRTYPE), member("a/b/c.txt", b"c"), member("./d"), mode=mode
    )
    assert unpack(archive, tmp_path / "out", tmp_path / "temporary") == 2
    files = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*")}
    assert files.keys() == {"a", "a/b", "a/b/c.txt", "d"}
    assert files["a/b/c.txt"].read_bytes() == b"c"
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
    refused(archive, "damaged")


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
    refused(path, "damaged")


@pytest.mark.parametrize("suffix", [".zip", ".tar.xz"])
def test_a_flipped_byte_in_an_archive_is_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    zipped(path, a=NOISE) if suffix == ".zip" else tar(path, member("a", NOISE), mode="w:xz")
    path.write_bytes(flipped(path.read_bytes()))
    refused(path, "damaged")


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
