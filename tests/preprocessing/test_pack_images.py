"""The image packer from end to end: layouts, bad input, re-encoding, restarts, verify and inspect."""

import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from d2v2ds.data.schema import file_crc32
from d2v2ds.modalities.image.shards import ImageShards
from preprocessing import inspect
from preprocessing.driver.writer import PACKING_NAME
from preprocessing.formats import open_shards
from preprocessing.image.rows import LABEL_BYTES
from preprocessing.pack_images import main
from preprocessing.verify import main as verify_main
from preprocessing.verify import verify
from tests.preprocessing.driver.test_parallel import mpirun, needs_mpi
from tests.preprocessing.helpers import clean_environment, contents
from tests.preprocessing.pictures import class_folders, encoded, picture, with_orientation, write_tar


def pack(source: Path, output: Path, *options: object) -> int:
    return main(["--input", str(source), "--output", str(output), "--workers", "1", *map(str, options)])


def table_of(folder: Path) -> pa.Table:
    shards = json.loads((folder / "index.json").read_text())["shards"]
    return pa.concat_tables(pa.ipc.open_file(str(folder / shard["file"])).read_all() for shard in shards)


def skipped(folder: Path) -> dict[str, str]:
    return dict(line.split("\t") for line in (folder / "skipped.tsv").read_text().splitlines()[1:])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "photos")


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_class_folders_keep_bytes_and_order_and_give_labels(photos: Path, tmp_path: Path) -> None:
    assert pack(photos, tmp_path / "out") == 0
    rows = table_of(tmp_path / "out").to_pylist()
    paths = sorted(path.relative_to(photos) for path in photos.rglob("*.*"))
    assert [row["source"] for row in rows] == [row["id"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths, strict=True):
        assert row["image"] == (photos / path).read_bytes()
        assert row["label"] == path.parent.name and row["orientation"] == 1
        assert row["format"] == ("png" if path.suffix == ".png" else "jpeg")
        assert (row["width"], row["height"]) == (40 + int(path.stem), 60)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["totals"] == {
        "pixels": sum(row["width"] * row["height"] for row in rows),
        "bytes": sum(len(row["image"]) for row in rows),
    }
    assert index["format"] == {"shorter_side": None, "quality": None, "alpha_over": [255, 255, 255]}


def test_shards_open_with_the_reader(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out", "--shard-bytes", "8K")
    shards = open_shards(tmp_path / "out")
    assert isinstance(shards, ImageShards) and len(shards.index.shards) > 2
    for number, row in enumerate(table_of(tmp_path / "out").to_pylist()):
        image = shards.read_image(number)
        assert bytes(image.data) == row["image"] and image.data.readonly
        assert (image.width, image.height, image.orientation) == (row["width"], row["height"], 1)
        assert shards.sizes[number] == row["width"] * row["height"]
        assert (shards.read_labels(number).id, shards.read_labels(number).label) == (row["id"], row["label"])


def test_a_flat_folder_has_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.JPG").write_bytes(encoded(picture(20, 10), "JPEG"))
    (tmp_path / "flat" / "notes.txt").write_text("not an image, and not named as one")
    assert pack(tmp_path / "flat", tmp_path / "out") == 0
    assert "; 1 files ignored: 1 .txt" in capsys.readouterr().out
    (row,) = table_of(tmp_path / "out").to_pylist()
    assert (row["id"], row["label"]) == ("a.JPG", None)


def test_manifest_gives_ids_and_labels(photos: Path, tmp_path: Path) -> None:
    manifest = photos / "m.tsv"
    absolute = photos / "cow" / "002.jpg"
    manifest.write_text(f"path\tid\tkind\nbee/001.jpg\tfirst\tinsect\nape/000.jpg\t\t\n{absolute}\tthird\t\n")
    assert pack(manifest, tmp_path / "out", "--label-column", "kind") == 0
    rows = table_of(tmp_path / "out").to_pylist()
    assert [(row["id"], row["label"], row["source"]) for row in rows] == [
        ("first", "insect", "bee/001.jpg"), ("ape/000.jpg", None, "ape/000.jpg"),
        ("third", None, str(absolute)),
    ]  # fmt: skip


def test_tar_members_of_one_key_share_the_label(tmp_path: Path) -> None:
    image = encoded(picture(20, 10), "JPEG")
    archive = write_tar(
        tmp_path / "part.tar",
        {
            "a/0.jpg": image, "a/0.cls": b"7\n",
            "a/1.json": b'{"label": "owl", "caption": "x"}', "a/1.jpg": image,
            "a/2.jpg": image, "a/2.txt": "ein Käuzchen".encode(),
            "a/3.jpg": image,
            "a/4.jpg": image, "a/4.json": b'{"caption": "x"}',
            "5.jpg": image,
            "a/._6.jpg": b"resource fork", "README": b"read me",
        },
    )  # fmt: skip
    assert pack(archive, tmp_path / "out") == 0
    rows = table_of(tmp_path / "out").to_pylist()
    assert [(row["id"], row["label"]) for row in rows] == [
        ("part.tar/a/0.jpg", "7"), ("part.tar/a/1.jpg", "owl"), ("part.tar/a/2.jpg", "ein Käuzchen"),
        ("part.tar/a/3.jpg", "a"), ("part.tar/a/4.jpg", None), ("part.tar/5.jpg", None),
    ]  # fmt: skip
    assert all(row["image"] == image for row in rows)


def test_parts_of_a_tar_hold_every_member_once_whatever_its_header(tmp_path: Path) -> None:
    members = {}
    for number in range(60):
        key = f"{'long-folder-name' * 12}/{number:03d}" if number % 7 == 0 else f"ä{number:03d}"
        members[f"{key}.jpg"] = encoded(picture(20 + number, 30, seed=number), "JPEG")
        members[f"{key}.cls"] = str(number).encode()
    pack(write_tar(tmp_path / "all.tar", members), tmp_path / "out", "--shard-bytes", "8K")
    rows = table_of(tmp_path / "out").to_pylist()
    assert [row["id"] for row in rows] == [f"all.tar/{name}" for name in members if name.endswith(".jpg")]
    assert [row["label"] for row in rows] == [str(number) for number in range(60)]
    assert [row["image"] for row in rows] == [data for name, data in members.items() if name.endswith(".jpg")]
    assert len(list((tmp_path / "out").glob("*.arrow"))) > 3


@pytest.mark.parametrize(
    "kind", ["struct", "binary", "large_binary", "binary_view", "dictionary", "struct of a dictionary"]
)
def test_parquet_columns_of_either_kind(tmp_path: Path, kind: str) -> None:
    images = [encoded(picture(20 + number, 30), "JPEG") for number in range(10)]
    column = {
        "struct": pa.array([{"bytes": data, "path": None} for data in images]),
        "binary": pa.array(images, pa.binary()),
        "large_binary": pa.array(images, pa.large_binary()),
        "binary_view": pa.array(images, pa.binary_view()),
        "dictionary": pa.array(images).dictionary_encode(),
        "struct of a dictionary": pa.StructArray.from_arrays([pa.array(images).dictionary_encode()], ["bytes"]),
    }[kind]
    table = pa.table({"image": column, "label": [number % 3 for number in range(10)]})
    if kind == "struct":
        features = {"info": {"features": {"label": {"names": ["ape", "bee", "cow"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "t.parquet", row_group_size=4)
    assert pack(tmp_path / "in", tmp_path / "out", "--shard-bytes", "2K") == 0
    rows = table_of(tmp_path / "out").to_pylist()
    assert [row["image"] for row in rows] == images
    assert [row["id"] for row in rows] == [f"t.parquet#{number}" for number in range(10)]
    labels = ("ape", "bee", "cow") if kind == "struct" else ("0", "1", "2")
    assert [row["label"] for row in rows] == [labels[number % 3] for number in range(10)]
    assert len(list((tmp_path / "out").glob("*.arrow"))) > 1


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_labels_of_a_table_may_be_texts_of_every_kind(tmp_path: Path, kind: pa.DataType) -> None:
    image = encoded(picture(9, 9), "PNG")
    table = pa.table({"image": [image] * 3, "label": pa.array(["ape", None, "bee"]).cast(kind)})
    pq.write_table(table, tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 0
    assert table_of(tmp_path / "out")["label"].to_pylist() == ["ape", None, "bee"]


def test_a_table_that_is_damaged_behind_its_header_loses_only_the_rows_behind_the_damage(tmp_path: Path) -> None:
    images = [encoded(picture(40 + number, 40, seed=number), "JPEG") for number in range(12)]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", row_group_size=4, compression="none",
                   use_dictionary=False)  # fmt: skip
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    data[data.index(images[4]) - 30 : data.index(images[4])] = b"\xff" * 30  # the header of a page
    (tmp_path / "t.parquet").write_bytes(data)
    assert pack(tmp_path / "t.parquet", tmp_path / "out", "--max-skipped", "0.5") == 0
    assert table_of(tmp_path / "out")["image"].to_pylist() == images[:4] + images[8:]
    reasons = skipped(tmp_path / "out")
    assert list(reasons) == [f"t.parquet#{row}" for row in range(4, 8)]
    assert all(reason.startswith("cannot be read: damaged: ") for reason in reasons.values())


def test_a_table_of_more_rows_than_its_bytes_can_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"image": pa.array([None] * 500_000, pa.binary())}), tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 2
    assert "t.parquet: expected images in every row, found 500,000 in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "features", [b"[" * 100_000, b'{"info": []}', b'{"info": {"features": {"label": {"names": [1]}}}}']
)
def test_odd_metadata_of_a_table_are_no_class_names(tmp_path: Path, features: bytes) -> None:
    table = pa.table({"image": [encoded(picture(9, 9), "PNG")], "label": [0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": features}), tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 0
    assert table_of(tmp_path / "out")["label"].to_pylist() == ["0"]


def test_parquet_rows_without_bytes_are_skipped_and_labels_are_optional(tmp_path: Path) -> None:
    images = [{"bytes": encoded(picture(9, 9), "PNG"), "path": "a"}, {"bytes": None, "path": "b.png"}, None]
    pq.write_table(pa.table({"picture": images}), tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out", "--image-column", "picture") == 3
    assert table_of(tmp_path / "out")["label"].to_pylist() == [None]
    assert skipped(tmp_path / "out") == {"t.parquet#1": "no bytes in this row", "t.parquet#2": "no bytes in this row"}


def test_files_and_archives_of_one_folder_are_packed_together(photos: Path, tmp_path: Path) -> None:
    write_tar(photos / "more.tar", {"x.jpg": encoded(picture(9, 9), "JPEG")})
    pq.write_table(pa.table({"image": [encoded(picture(9, 9), "PNG")]}), photos / "ape" / "more.parquet")
    assert pack(photos, tmp_path / "out") == 0
    ids = table_of(tmp_path / "out")["id"].to_pylist()
    assert len(ids) == 38 and {"more.tar/x.jpg", "ape/more.parquet#0"} < set(ids)


# --- tar files -------------------------------------------------------------------------------------------------------


def test_names_with_dots_keep_their_labels_and_the_archive_is_divided(tmp_path: Path) -> None:
    members = {}
    for number in range(40):
        members[f"set/photo.{number:04d}.jpg"] = encoded(picture(40, 30, seed=number), "JPEG")
        members[f"set/photo.{number:04d}.json"] = b'{"label": "c%d"}' % number
    assert pack(write_tar(tmp_path / "a.tar", members), tmp_path / "out", "--shard-bytes", "8K") == 0
    rows = table_of(tmp_path / "out").to_pylist()
    assert [row["label"] for row in rows] == [f"c{number}" for number in range(40)]
    assert len(list((tmp_path / "out").glob("*.arrow"))) > 2


def test_labels_that_belong_to_no_image_are_an_error_beyond_a_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = encoded(picture(20, 10), "JPEG")
    members = {f"a/{number}.jpg": image for number in range(5)} | {f"a/{number}.cls": b"1" for number in range(5)}
    write_tar(tmp_path / "a.tar", {"0.jpg": image, "0.cls": b"1", **members})
    assert pack(tmp_path / "a.tar", tmp_path / "out") == 3
    said = capsys.readouterr()
    assert "without label 83.33%" in said.err and "5 labels without image" in said.out
    notes = (tmp_path / "out" / "notes.tsv").read_text().splitlines()
    assert "a.tar\tarchives with other members\t5 labels without image\t0" in notes and len(notes) == 7
    assert pack(tmp_path / "a.tar", tmp_path / "out", "--max-noted", "1") == 0


def test_members_that_are_no_plain_files_are_skipped_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": encoded(picture(20, 10), "JPEG"), "0.npy": b"x"})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name, kind in (("1.jpg", tarfile.SYMTYPE), ("2.jpg", tarfile.FIFOTYPE), ("3", tarfile.BLKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.jpg"
            archive.addfile(member)
    assert pack(tmp_path / "a.tar", tmp_path / "out") == 3
    assert skipped(tmp_path / "out") == {
        "a.tar/1.jpg": "expected an image file, found symbolic link; unpack the archive",
        "a.tar/2.jpg": "expected an image file, found FIFO; unpack the archive",
    }
    assert "2 files ignored: 1 .npy, 1 devices" in capsys.readouterr().out


def test_labels_of_absurd_size_or_depth_and_images_larger_than_their_pixels_are_skipped(tmp_path: Path) -> None:
    image = encoded(picture(20, 10), "JPEG")
    members = {
        "0.jpg": image, "0.json": b"[" * 100_000, "1.jpg": image, "1.cls": bytes(LABEL_BYTES + 1), "2.jpg": image,
        "3.jpg": image + bytes(65 << 20), "4.jpg": image, "4.json": b'{"label": %s}' % (b"9" * 5000),
    }  # fmt: skip
    options = ("--max-pixels", "1000", "--max-skipped", "1")
    assert pack(write_tar(tmp_path / "a.tar", members), tmp_path / "out", *options) == 0
    assert table_of(tmp_path / "out")["id"].to_pylist() == ["a.tar/2.jpg"]
    reasons = skipped(tmp_path / "out")
    assert "values nested too deeply" in reasons["a.tar/0.jpg"]
    assert "found 1,048,577" in reasons["a.tar/1.jpg"] and "for 1,000 pixels" in reasons["a.tar/3.jpg"]
    assert "its label is unreadable: Exceeds the limit" in reasons["a.tar/4.jpg"]


# --- special files and the machine's faults --------------------------------------------------------------------------


def test_special_files_in_a_folder_are_skipped_and_as_input_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(photos / "ape" / "pipe.jpg")
    (photos / "ape" / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(photos / "ape" / "s.jpg"))
        assert pack(photos, tmp_path / "out", "--max-skipped", "0.1") == 0
    reasons = skipped(tmp_path / "out")
    assert reasons == dict.fromkeys(
        ("ape/pipe.jpg", "ape/s.jpg"), "expected an image file, found a folder, FIFO, socket or device"
    )
    for name in ("a.tar", "a.parquet", "a.tsv"):
        os.mkfifo(tmp_path / name)
        assert pack(tmp_path / name, tmp_path / "other") == 2
        assert (
            f"{name}: expected a folder, manifest, tar file or parquet table, found a FIFO" in capsys.readouterr().err
        )
    os.mkfifo(photos / "a.tar")
    os.mkfifo(photos / "a.parquet")
    assert pack(photos, tmp_path / "other") == 2
    assert capsys.readouterr().err.count("expected a file, found a FIFO") == 2


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v2ds.io.machine_faults.time.sleep", lambda seconds: None)


def failing(monkeypatch: pytest.MonkeyPatch, call: str, code: int, name: str, times: int) -> None:
    """Let a call of `os` fail for files of this name the first `times` times."""
    real, left = getattr(os, call), [times]

    def fail(path: Any, *rest: Any, **named: Any) -> Any:
        is_wanted = str(Path(f"/proc/self/fd/{path}").readlink()) if isinstance(path, int) else os.fspath(path)
        if is_wanted.endswith(name) and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), is_wanted)
        return real(path, *rest, **named)

    monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    ("call", "name"), [("open", "000.jpg"), ("stat", "000.jpg"), ("pread", "a.tar"), ("open", "a.tar")]
)
def test_a_fault_of_the_machine_is_no_damaged_image(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    no_waiting: None, code: int, call: str, name: str,
) -> None:  # fmt: skip
    write_tar(photos / "a.tar", {"x.jpg": encoded(picture(9, 9), "JPEG")})
    with monkeypatch.context() as patched:
        failing(patched, call, code, name, 99)
        assert pack(photos, tmp_path / "out") == 4
    message = capsys.readouterr().err
    assert name in message and os.strerror(code) in message
    assert not (tmp_path / "out" / "index.json").exists()
    with monkeypatch.context() as patched:
        failing(patched, call, code, name, 1 if code in (errno.EIO, errno.ESTALE) else 0)
        assert pack(photos, tmp_path / "out") == 0, "what is over a moment later is tried again"
    assert skipped(tmp_path / "out") == {}


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_images_are_skipped_with_their_reason(photos: Path, tmp_path: Path) -> None:
    whole = {
        suffix: encoded(picture(80, 60), kind) for suffix, kind in (("jpg", "JPEG"), ("png", "PNG"), ("bmp", "BMP"))
    }
    bad = {f"ape/cut.{suffix}": data[: len(data) * 2 // 3] for suffix, data in whole.items()}
    bad |= {"ape/empty.jpg": b"", "ape/page.jpg": b"<!doctype html>", "bee/text.png": b"hello"}
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    (photos / "bee" / "huge.png").write_bytes(encoded(Image.new("1", (5000, 5000)), "PNG"))
    (photos / "bee" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert pack(photos, tmp_path / "out", "--max-pixels", 4_000_000) == 3
    reasons = skipped(tmp_path / "out")
    words = {"ape/cut.jpg": "cut off", "ape/cut.png": "cut off", "ape/cut.bmp": "truncated",
             "ape/empty.jpg": "0 bytes", "ape/page.jpg": "not an image", "bee/text.png": "not an image",
             "bee/huge.png": "decompression bomb",
             "bee/gone.jpg": f"a link to {tmp_path}/nowhere, where nothing is"}  # fmt: skip
    assert list(reasons) == sorted(words)
    for name, word in words.items():
        assert word in reasons[name], reasons[name]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["files"], index["files_skipped"], index["rows"]) == (44, 8, 36)
    assert pack(photos, tmp_path / "out", "--max-pixels", 4_000_000, "--max-skipped", 0.5) == 0


def test_bad_images_in_archives_are_skipped_in_order(tmp_path: Path) -> None:
    good = encoded(picture(20, 10), "JPEG")
    write_tar(tmp_path / "a.tar", {"0.jpg": good[:-20], "1.jpg": good, "2.jpg": b"", "2.cls": b"\xff", "3.jpg": good,
                                   "3.json": b"[1]"})  # fmt: skip
    assert pack(tmp_path / "a.tar", tmp_path / "out") == 3
    assert table_of(tmp_path / "out")["id"].to_pylist() == ["a.tar/1.jpg"]
    assert [(name, reason.split(":")[0]) for name, reason in skipped(tmp_path / "out").items()] == [
        ("a.tar/0.jpg", "cut off"), ("a.tar/2.jpg", "its label is unreadable"),
        ("a.tar/3.jpg", "its label is unreadable"),
    ]  # fmt: skip


def test_archives_that_cannot_be_read_to_their_end_stop_before_packing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {f"{number}.jpg": encoded(picture(40, 40, seed=number), "JPEG") for number in range(20)}
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.tar").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    at = whole.index(b"10.jpg")
    damaged[at : at + 512] = b"x" * 512
    (tmp_path / "in" / "damaged.tar").write_bytes(damaged)
    (tmp_path / "in" / "no.tar").write_bytes(b"this is no archive" * 100)
    (tmp_path / "in" / "no.parquet").write_bytes(b"PAR1 nor is this")
    pq.write_table(pa.table({"picture": ["text"]}), tmp_path / "in" / "other.parquet")
    assert pack(tmp_path / "in", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "5 archives" in message and "damaged header at byte" in message and "expected a column 'image'" in message
    assert not (tmp_path / "out").exists()


def test_archives_without_images_stop_before_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a.tar", {"0.txt": b"a label of nothing"})
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "in" / "b.parquet")
    assert pack(tmp_path / "in", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "in/a.tar" in message and "in/b.parquet" in message and "expected images" in message
    assert not (tmp_path / "out").exists()
    write_tar(tmp_path / "in" / "c.tar", {"0.jpg": encoded(picture(9, 9), "JPEG")})
    assert pack(tmp_path / "in", tmp_path / "out") == 0, "one of many may be empty"


@pytest.mark.parametrize("left", [0, 1, 511])
def test_a_tar_file_cut_between_two_members_is_no_shorter_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], left: int
) -> None:
    members = {f"{number}.jpg": encoded(picture(40, 40, seed=number), "JPEG") for number in range(20)}
    archive = write_tar(tmp_path / "a.tar", members)
    data = archive.read_bytes()
    end = len(data.rstrip(b"\0")) + 511 & ~511  # of the last member, the end mark follows
    archive.write_bytes(data[: end + left])
    assert pack(archive, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert f"a.tar: cut off: expected the end mark at byte {end}, found {left} bytes" in message
    archive.write_bytes(data[: end + 512])
    assert pack(archive, tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.tsv", "path\nape/000.jpg\ngone.jpg\n", "m.tsv line 3: gone.jpg"),
        ("m.tsv", "path\tid\nape/000.jpg\tx\nbee/001.jpg\tx\n", "'x'"),
        ("m.tsv", "file\na.jpg\n", "'path'"),
        ("a.tar.gz", "", "unpack them"),
        ("empty/readme.md", "", "found none"),
    ],
)
def test_wrong_inputs_stop_before_packing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (photos / name).parent.mkdir(exist_ok=True)
    (photos / name).write_text(text)
    source = photos / "empty" if name.startswith("empty") else photos / name
    assert pack(source, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_impossible_settings_are_named_at_once(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(photos, tmp_path / "out", "--shorter-side", 0, "--quality", 101, "--max-pixels", 0) == 2
    message = capsys.readouterr().err
    assert all(option in message for option in ("--shorter-side 0", "--quality 101", "--max-pixels 0"))


def test_the_same_id_in_two_inputs_is_an_error(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "again")
    arguments = ["--input", str(photos), str(tmp_path / "again"), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "36 ids occur more than once" in message and "the folder above them" in message
    assert f"'ape/000.jpg': {photos}/ape/000.jpg and {tmp_path}/again/ape/000.jpg" in message


# --- re-encoding -----------------------------------------------------------------------------------------------------


def test_only_larger_images_are_reencoded(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    small = encoded(picture(300, 64), "PNG")
    (tmp_path / "in" / "small.png").write_bytes(small)
    (tmp_path / "in" / "large.jpg").write_bytes(encoded(picture(300, 200), "JPEG", exif=with_orientation(6)))
    assert pack(tmp_path / "in", tmp_path / "out", "--shorter-side", 64, "--quality", 80) == 0
    large, kept = table_of(tmp_path / "out").to_pylist()
    assert kept["image"] == small and (kept["format"], kept["width"]) == ("png", 300)
    assert (large["width"], large["height"], large["orientation"], large["format"]) == (64, 96, 1, "jpeg")
    with Image.open(io.BytesIO(large["image"])) as image:
        assert image.size == (64, 96) and image.mode == "RGB"
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["format"]["shorter_side"], index["format"]["quality"]) == (64, 80)
    assert verify(tmp_path / "out") == []


# --- determinism and interruptions -----------------------------------------------------------------------------------


@pytest.fixture
def mixed(photos: Path) -> Path:
    """Class folders, a tar file and a table in one folder, with a few bad files."""
    members = {f"{number}.jpg": encoded(picture(60, 50, seed=number), "JPEG") for number in range(30)}
    write_tar(photos / "a.tar", members | {"9.jpg": b"bad"})
    images = [encoded(picture(50, 40, seed=number), "JPEG") for number in range(20)]
    pq.write_table(pa.table({"image": images}), photos / "b.parquet", row_group_size=6)
    (photos / "ape" / "empty.jpg").write_bytes(b"")
    return photos


@pytest.mark.distributed
def test_bytes_do_not_depend_on_the_number_of_workers(mixed: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        options = ("--workers", workers, "--shard-bytes", "12K", "--max-skipped", 0.1, "--shorter-side", 48)
        assert pack(mixed, tmp_path / f"{workers}", *options) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert len(list((tmp_path / "1").glob("*.arrow"))) > 4
    assert list(skipped(tmp_path / "1")) == ["ape/empty.jpg", "a.tar/9.jpg"]


@needs_mpi
@pytest.mark.distributed
def test_mpi_ranks_write_the_same_bytes_as_one_worker(mixed: Path, tmp_path: Path) -> None:
    options = ("--shard-bytes", "12K", "--max-skipped", 0.1)
    assert pack(mixed, tmp_path / "one", *options) == 0
    result = mpirun(2, "--input", mixed, "--output", tmp_path / "mpi", *options, module="preprocessing.pack_images")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "mpi") == contents(tmp_path / "one")


@pytest.mark.run
@pytest.mark.distributed
def test_killed_and_started_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", 200)
    for path in list(source.rglob("*.jpg"))[:100]:
        path.write_bytes(encoded(picture(900, 700), "JPEG"))
    options = ["--shard-bytes", "256K", "--shorter-side", "300"]
    assert main(["--input", str(source), "--output", str(tmp_path / "whole"), *options, "--workers", "1"]) == 0
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "preprocessing.pack_images", "--input", source, "--output", output, *options]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2"], env=clean_environment(), stderr=subprocess.DEVNULL
    )
    while len(list(output.glob("*.arrow"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "index.json").exists()
    kept = [output / Path(note.stem).name for note in (output / PACKING_NAME).glob("*.arrow.json")]
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert main(["--input", str(source), "--output", str(output), *options, "--workers", "1"]) == 0
    assert contents(output) == contents(tmp_path / "whole")
    assert times and {path: path.stat().st_mtime_ns for path in times} == times, "finished shards are kept"


def test_a_folder_of_another_modality_or_other_settings_is_never_mixed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(photos, tmp_path / "out") == 0
    assert pack(photos, tmp_path / "out") == 0
    assert pack(photos, tmp_path / "out", "--shorter-side", 20) == 2
    assert "shorter_side: the folder has None, this command 20" in capsys.readouterr().err
    (photos / "ape" / "000.jpg").write_bytes(encoded(picture(9, 9), "JPEG"))
    assert pack(photos, tmp_path / "out") == 2
    assert "plan_sha256" in capsys.readouterr().err


# --- verify and inspect ----------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_by_its_checksum(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(photos, tmp_path / "out", "--shard-bytes", "16K")
    assert verify_main([str(tmp_path / "out"), "--workers", "1"]) == 0
    path = tmp_path / "out" / "image-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert verify_main([str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "image-00001.arrow: crc32: expected" in capsys.readouterr().out


def test_damage_under_a_forged_checksum_is_found_in_the_image(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    path = tmp_path / "out" / "image-00000.arrow"
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc4")  # a table of codes of the first JPEG
    data[at + 5 : at + 21] = b"\xfe" * 16
    path.write_bytes(data)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    index["shards"][0]["crc32"] = file_crc32(path)
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    changed, damaged = verify(tmp_path / "out")
    assert changed.startswith("image-00000.arrow row 0: expected image of CRC-32")
    assert damaged.startswith("image-00000.arrow row 0: image: expected a whole jpeg file, found does not decode")


def test_inspect_prints_totals_and_draws_a_contact_sheet(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(photos, tmp_path / "out")
    assert inspect.main([str(tmp_path / "out"), "--plot", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr().out
    assert "36 in 1 shards" in printed and "labels    3" in printed and "ape 12" in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(np.unique(np.asarray(sheet.convert("L")))) > 50


def test_inspect_and_verify_of_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    assert pack(tmp_path / "in", tmp_path / "out") == 3
    assert inspect.main([str(tmp_path / "out"), "--plot", str(tmp_path / "sheet.png")]) == 0
    assert verify(tmp_path / "out") == []
