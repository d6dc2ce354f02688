"""Tar files of images: labels of members whose names have dots, parts, and archives that a stranger made."""

import io
import os
import resource
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from preprocessing.image import tar_examples as examples
from preprocessing.image.tar_examples import scan_tar, tar_examples
from preprocessing.image.tar_members import HEADER_BYTES, ArchiveError, TarFile
from preprocessing.image.units import ArchiveFacts, TarRun

PLAIN = tarfile.REGTYPE
Given = tuple[str, bytes] | tuple[str, bytes, bytes]


def write(path: Path, members: Sequence[Given], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file of (name, content, type) in order; names may occur again."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, content, *kind in members:
            member = tarfile.TarInfo(name)
            member.type = kind[0] if kind else PLAIN
            member.linkname = "0.jpg" if kind else ""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def scan(path: Path, part_bytes: int = 1 << 20) -> ArchiveFacts:
    with TarFile(str(path)) as archive:
        return scan_tar(archive, part_bytes)


def labels(path: Path, part_bytes: int = 1 << 20) -> dict[str, str]:
    """Image -> contents of the best label beside it, read part by part."""
    facts, found = scan(path, part_bytes), {}
    for part in facts.parts:
        run = TarRun(
            order=0, size=part.size, files=part.files, path=str(path), source="", start=part.start, stop=part.stop,
            begins_inside=part.begins_inside, ends_inside=part.ends_inside, has_stray_labels=False,
        )  # fmt: skip
        with TarFile(str(path)) as archive:
            count = 0
            for image, beside in tar_examples(archive, run):
                best = next((beside[suffix] for suffix in ("cls", "json", "txt") if suffix in beside), None)
                found[image.name] = archive.read(best.data, best.size).decode() if best else ""
                count += 1
        assert count == part.files
    assert len(found) == sum(part.files for part in facts.parts)
    return found


# --- names with dots --------------------------------------------------------------------------------------------------

NUMBERED = [
    (f"photo.{number:04d}.{suffix}", content)
    for number in range(40)
    for suffix, content in (("jpg", b"x" * 1000), ("cls", str(number).encode()))
]


@pytest.mark.parametrize("part_bytes", [1, 2500, 1 << 20])
def test_names_with_dots_keep_their_own_labels_in_any_part(tmp_path: Path, part_bytes: int) -> None:
    path = write(tmp_path / "a.tar", NUMBERED)
    assert labels(path, part_bytes) == {f"photo.{number:04d}.jpg": str(number) for number in range(40)}
    assert scan(path).stray_labels == 0


@pytest.mark.parametrize("part_bytes", [1, 2500])
def test_an_image_without_a_label_of_its_own_does_not_get_another_ones(tmp_path: Path, part_bytes: int) -> None:
    members = [one for one in NUMBERED if one[0] not in ("photo.0007.cls", "photo.0011.jpg")]
    found = labels(write(tmp_path / "a.tar", members), part_bytes)
    assert found["photo.0007.jpg"] == "" and found["photo.0010.jpg"] == "10" and found["photo.0012.jpg"] == "12"
    assert scan(tmp_path / "a.tar", part_bytes).left_out == {"labels without image": 1}


def test_parts_end_between_members_of_one_key_if_that_is_no_example(tmp_path: Path) -> None:
    parts = scan(write(tmp_path / "a.tar", NUMBERED), 10_000).parts
    assert [part.files for part in parts] == [10, 10, 10, 10]
    assert [(part.begins_inside, part.ends_inside) for part in parts] == [
        (False, True), (True, True), (True, True), (True, False),
    ]  # fmt: skip
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["0.jpg", "0.seg.png", "0.json"], {"0.jpg": "0.json", "0.seg.png": "0.json"}),  # one example of webdataset
        (["0.left.jpg", "0.right.jpg", "0.cls"], {"0.left.jpg": "0.cls", "0.right.jpg": "0.cls"}),
        (["0.cls", "0.left.jpg", "0.left.cls", "0.right.jpg"], {"0.left.jpg": "0.left.cls", "0.right.jpg": "0.cls"}),
        (["0.jpg", "0.meta.json"], {"0.jpg": "0.meta.json"}),
        (["0.jpg", "0.JPG", "0.cls"], {"0.jpg": "0.cls", "0.JPG": "0.cls"}),
        (["a/v1.5_0.jpg", "a/v1.5_0.txt", "b/v1.5_0.jpg"], {"a/v1.5_0.jpg": "a/v1.5_0.txt", "b/v1.5_0.jpg": ""}),
        (["0.jpg", "1.jpg", "0.cls"], {"0.jpg": "", "1.jpg": ""}),  # labels behind all images belong to none
        (["x.0.jpg", "x.1.jpg", "x.0.cls", "x.1.cls"], {"x.0.jpg": "", "x.1.jpg": ""}),
        (["noext", "0.jpg", "noext.cls"], {"0.jpg": ""}),
    ],
)
def test_labels_by_name(tmp_path: Path, part_bytes: int, members: list[str], expected: dict[str, str]) -> None:
    path = write(tmp_path / "a.tar", [(name, name.encode()) for name in members])
    assert labels(path, part_bytes) == expected
    used = set(expected.values()) - {""}
    strays = [name for name in members if name.endswith(("cls", "json", "txt")) and name not in used]
    assert scan(path).stray_labels == len(strays)


@pytest.mark.parametrize("name", ["0.jpg", "0.cls", "0.CLS"])
def test_two_members_of_one_name_are_an_error(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.cls", b"1"), (name, b"2")])
    with pytest.raises(ArchiveError, match=f"member '{name}' occurs more than once"):
        scan(path)


def test_a_label_of_more_members_than_memory_holds_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_MOST_SHARING", 50)
    path = write(tmp_path / "a.tar", [*NUMBERED, ("photo.cls", b"1")])
    with pytest.raises(ArchiveError, match="expected at most 50 members that share 'photo.cls', found 81"):
        scan(path)


# --- members that are no plain files ----------------------------------------------------------------------------------


def test_members_that_are_not_read_are_counted_by_suffix_and_kind(tmp_path: Path) -> None:
    members: list[Given] = [
        ("0.jpg", b"x"), ("0.npy", b"y"), ("README", b"z"), ("._0.jpg", b"hidden"), ("1.cls", b"a label of nothing"),
        ("link.cls", b"", tarfile.SYMTYPE), ("pipe", b"", tarfile.FIFOTYPE), ("null", b"", tarfile.CHRTYPE),
        ("folder", b"", tarfile.DIRTYPE), ("hard.jpg", b"", tarfile.LNKTYPE),
    ]  # fmt: skip
    facts = scan(write(tmp_path / "a.tar", members))
    assert facts.left_out == {
        ".npy": 1, "": 1, "hidden": 1, "labels without image": 1, "symbolic links": 1, "FIFOs": 1, "devices": 1,
    }  # fmt: skip
    assert sum(part.files for part in facts.parts) == 2, "a link that is named as an image is a file that is skipped"


def sparse_member(name: str, content: bytes, extensions: int = 0) -> bytes:
    """A member of GNU's old sparse format whose map goes on in `extensions` blocks."""
    member = tarfile.TarInfo(name)
    member.type, member.size = tarfile.GNUTYPE_SPARSE, len(content)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[482] = extensions > 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    blocks = b"".join(bytes(504) + bytes([at + 1 < extensions]) + bytes(7) for at in range(extensions))
    return bytes(header) + blocks + content.ljust(-(-len(content) // 512) * 512, b"\0")


def pax(records: bytes, size: int | None = None, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header, perhaps of another size than its records have."""
    member = tarfile.TarInfo("header")
    member.type, member.size = kind, len(records) if size is None else size
    return member.tobuf(tarfile.GNU_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0")


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def plain(name: str = "0.jpg", content: bytes = b"x") -> bytes:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member.tobuf(tarfile.USTAR_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


END = bytes(1024)


@pytest.mark.parametrize("extensions", [0, 1, 3])
def test_sparse_members_are_named_and_those_behind_them_are_read(tmp_path: Path, extensions: int) -> None:
    new = pax(record("GNU.sparse.major", "1") + record("GNU.sparse.name", "new.jpg")) + plain("GNUSparseFile.0/x")
    (tmp_path / "a.tar").write_bytes(sparse_member("old.jpg", b"y" * 700, extensions) + new + plain() + END)
    with TarFile(str(tmp_path / "a.tar")) as archive:
        found = {member.name: (member.kind, archive.read(member.data, member.size)) for member in archive.members()}
    assert found["old.jpg"] == ("sparse file", b"y" * 700) and found["new.jpg"][0] == "sparse file"
    assert found["0.jpg"] == ("", b"x")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_format_are_those_of_tarfile(tmp_path: Path, format: int) -> None:
    long = "ordner/" * 13 if format == tarfile.USTAR_FORMAT else "größer/" * 40
    names = ["0.jpg", f"{long}bild 日本.jpg", f"{long}1.jpg", "caf\udce9.jpg"]
    path = write(tmp_path / "a.tar", [(name, name.encode("utf-8", "surrogateescape")) for name in names], format)
    with TarFile(str(path)) as archive:
        members = list(archive.members())
        assert [member.name for member in members] == names
        contents = [archive.read(member.data, member.size).decode("utf-8", "surrogateescape") for member in members]
        assert contents == names
        again = next(archive.members(members[2].offset))
    assert again == members[2], "from the middle"


def with_size(size: int) -> bytes:
    """A header whose size is written in base 256, as GNU does, negative ones too."""
    header = bytearray(plain()[:512])
    header[124:136] = (
        (size % (1 << 95) | 1 << 95).to_bytes(12, "big") if size >= 0 else size.to_bytes(12, "big", signed=True)
    )
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


HOSTILE: dict[str, Callable[[], tuple[bytes, str]]] = {
    "negative size": lambda: (with_size(-1024) + END, "expected a size inside the file of .* found -1,024"),
    "negative pax size": lambda: (pax(record("size", "-512")) + plain() + END, "expected a size inside the file"),
    "size of digits": lambda: (pax(record("size", "9" * 5000)) + plain() + END, "expected a size inside the file"),
    "size beyond the file": lambda: (with_size(1 << 62) + END, "found 4,611,686,018,427,387,904"),
    "pax header of 8 GiB": lambda: (pax(b"", 8 << 30)[:512] + END, "extended headers of 1,048,576 bytes"),
    "negative pax header": lambda: (
        with_size(-512)[:156] + tarfile.XHDTYPE + with_size(-512)[157:] + END, "damaged header at byte 0"
    ),
    "long name of 1 GiB": lambda: (pax(b"", 1 << 30, tarfile.GNUTYPE_LONGNAME)[:512] + END, "extended headers"),
    "chain of long names": lambda: (pax(b"n", kind=tarfile.GNUTYPE_LONGNAME) * 5000 + plain() + END, "at most 16"),
    "pax records of length 0": lambda: (pax(b"0 path=x\n") + plain() + END, "damaged pax header at byte 0"),
    "pax records without end": lambda: (pax(b"99999999 path=x") + plain() + END, "damaged pax header"),
    "nothing behind a header": lambda: (pax(record("path", "x")) + END, "cut off: expected a member"),
    "end inside a header": lambda: (pax(b"", 4096)[:700], "cut off: expected 4,096 bytes of a header"),
    "end inside a sparse map": lambda: (sparse_member("0.jpg", b"", 2)[:1024], "expected the end mark|inside the file"),
    "end inside a member": lambda: (plain(content=b"x" * 5000)[:3000], "expected a size inside the file of 3,000"),
    "joined archives": lambda: (plain() + END + plain("1.jpg") + END, "another behind the end mark, at byte 2048"),
    "nothing at all": lambda: (b"", "cut off: expected the end mark at byte 0"),
    "gzip": lambda: (b"\x1f\x8b\x08" + bytes(600), "expected an uncompressed tar file, found gzip"),
    "zstandard": lambda: (b"\x28\xb5\x2f\xfd" + bytes(600), "found zstd"),
    "text": lambda: (b"<!doctype html>" * 100, "damaged header at byte 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_archives_that_are_damaged_or_hostile_are_named(tmp_path: Path, name: str) -> None:
    data, expected = HOSTILE[name]()
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ArchiveError, match=expected):
        scan(tmp_path / "a.tar")


def test_a_large_header_of_a_large_file_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(pax(b"", 8 << 30)[:512])
        file.truncate(9 << 30)  # no block of it is on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArchiveError, match="found more or one of 8,589,934,592 bytes"):
        scan(tmp_path / "a.tar")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_every_flipped_byte_of_an_archive_gives_members_or_an_error_that_names_it(tmp_path: Path) -> None:
    members: list[Given] = [("a/0.jpg", b"x" * 600), ("0.jpg", b"", tarfile.SYMTYPE), ("n" * 150 + ".jpg", b"y")]
    data = write(tmp_path / "a.tar", members, tarfile.PAX_FORMAT).read_bytes().rstrip(b"\0") + END
    path = tmp_path / "b.tar"
    for at in range(0, len(data), 19):
        for flipped in (data[at] ^ 0xFF, data[at] ^ 0x01):
            path.write_bytes(data[:at] + bytes([flipped]) + data[at + 1 :])
            try:
                scan(path)
            except ArchiveError as error:
                assert str(error)


def test_trailing_bytes_that_are_no_archive_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(plain() + END + bytes(3000) + b"signature of a backup program" * 40)
    assert [part.files for part in scan(tmp_path / "a.tar").parts] == [1]


def test_a_fifo_named_as_an_archive_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ArchiveError, match="expected a file, found a FIFO"):
        scan(tmp_path / "a.tar")


def test_headers_of_an_extended_header_may_have_their_limit(tmp_path: Path) -> None:
    text = record("comment", "c" * (HEADER_BYTES - 60))
    (tmp_path / "a.tar").write_bytes(pax(text + record("path", "b.jpg")) + plain() + END)
    assert [part.files for part in scan(tmp_path / "a.tar").parts] == [1]
