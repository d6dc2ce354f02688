"""Downloads from a server on loopback that breaks off, lies and stalls, and archives that a stranger made."""

import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from preprocessing.download import command, fetch
from preprocessing.download.command import main
from preprocessing.download.corpora import CORPORA, archives_of
from preprocessing.download.fetch import WORK_NAME, Source, Transfer
from preprocessing.download.unpack import ArchiveError, unpack
from tests.preprocessing.helpers import clean_environment, noise, run_module
from tests.preprocessing.misbehaving_server import Fault, Server, serving

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs the program curl")

DATA = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.files["/a.bin"] = DATA
        yield server


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SILENCE_S": 2, "ATTEMPTS": 3, "FIRST_WAIT_S": 0.001, "LONGEST_WAIT_S": 0.01}.items():
        monkeypatch.setattr(fetch, name, value)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def packed(contents: dict[str, bytes]) -> bytes:
    """A tar.gz archive."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return archive.getvalue()


def librispeech_like(*parts: str) -> dict[str, bytes]:
    """Archives like those of LibriSpeech, with one chapter of two utterances each, and their list of checksums."""
    files = {}
    for number, part in enumerate(parts):
        stem = f"{84 + number}-121"
        chapter = f"LibriSpeech/{part}/{84 + number}/121"
        contents = {f"{chapter}/{stem}.trans.txt": f"{stem}-0000 ONE\n{stem}-0001 TWO WORDS\n".encode()}
        for utterance in range(2):
            sound = io.BytesIO()
            soundfile.write(sound, noise(0.5, number * 2 + utterance), 16000, format="FLAC")
            contents[f"{chapter}/{stem}-000{utterance}.flac"] = sound.getvalue()
        files[f"/{part}.tar.gz"] = packed(contents)
    sums = "".join(f"{hashlib.md5(data).hexdigest()}  {path[1:]}\n" for path, data in files.items())
    return files | {"/md5sum.txt": sums.encode()}


def librispeech(server: Server, folder: Path, parts: str, *options: str) -> int:
    return main(["librispeech", "--parts", parts, "--base-url", server.url, "--to", str(folder), *options])


def urls(folder: Path, *lines: str) -> int:
    """Fetch a list into ``folder/to``."""
    (folder / "list.tsv").write_text("\n".join(lines) + "\n")
    return main(["urls", "--list", str(folder / "list.tsv"), "--to", str(folder / "to")])


def one(server: Server, folder: Path, checksum: str = "") -> int:
    """Fetch ``/a.bin``."""
    return urls(folder, f"{server.url}/a.bin\t{checksum}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != WORK_NAME)


def part(folder: Path) -> Path:
    return folder / "to" / WORK_NAME / "a.bin.part"


# ------------------------------------------------------------------ corpora and lists


def test_librispeech_is_fetched_checked_unpacked_and_packed(server: Server, tmp_path: Path) -> None:
    server.files = librispeech_like("dev-clean", "test-clean")
    corpus, shards = tmp_path / "corpus", tmp_path / "shards"
    arguments = ("librispeech", "--parts", "dev-clean,test-clean", "--base-url", server.url, "--to", corpus)
    ran = run_module("preprocessing.download", *arguments)
    assert ran.returncode == 0, ran.stderr
    md5 = hashlib.md5(server.files["/dev-clean.tar.gz"]).hexdigest()
    assert f"dev-clean.tar.gz: md5 {md5}, as expected" in ran.stdout
    assert "CC BY 4.0" in ran.stdout and "downloading: 2 of 2 files" in ran.stderr
    assert names(corpus) == ["dev-clean", "md5sum.txt", "test-clean"]
    packing = run_module("preprocessing.pack_audio", "--input", corpus, "--output", shards, "--workers", 1)
    assert packing.returncode == 0, packing.stderr
    (shard,) = json.loads((shards / "index.json").read_text())["shards"]
    texts = pa.ipc.open_file(str(shards / shard["file"])).read_all().column("text").to_pylist()
    assert texts == ["ONE", "TWO WORDS"] * 2

    server.requests.clear()
    again = run_module("preprocessing.download", *arguments)
    assert again.returncode == 0 and again.stdout.count("complete already") == 2 and not server.requests


def test_parts_come_from_the_publisher_unless_a_mirror_is_named() -> None:
    (source,) = archives_of(CORPORA["librispeech"], ["train-clean-100"], None)
    assert source.url == "https://www.openslr.org/resources/12/train-clean-100.tar.gz"
    (source,) = archives_of(CORPORA["librilight"], ["small"], "http://host/data/")
    assert (source.url, source.checksum) == ("http://host/data/small.tar", CORPORA["librilight"].md5["small"])
    assert CORPORA["librilight"].md5.keys() == set(CORPORA["librilight"].parts)


def test_a_wrong_file_is_refused_with_both_sums_and_the_others_arrive(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = librispeech_like("dev-clean", "dev-other", "test-clean")
    expected = hashlib.md5(server.files["/dev-clean.tar.gz"]).hexdigest()
    server.files["/dev-clean.tar.gz"] += b"more"
    found = hashlib.md5(server.files["/dev-clean.tar.gz"]).hexdigest()
    assert librispeech(server, tmp_path, "dev-clean,dev-other,test-clean") == 4
    assert names(tmp_path) == ["dev-other", "md5sum.txt", "test-clean"]
    assert f"dev-clean.tar.gz: expected md5 {expected}, found {found}" in capsys.readouterr().err
    assert (tmp_path / WORK_NAME / "dev-clean.tar.gz.bad").exists()
    assert len(server.gets("/dev-clean.tar.gz")) == 1


def test_a_part_without_a_published_sum_is_not_fetched(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = librispeech_like("dev-clean") | {"/dev-other.tar.gz": b"unknown"}
    assert librispeech(server, tmp_path, "dev-clean,dev-other") == 4
    assert "expected an MD5 sum of dev-other.tar.gz, found those of dev-clean.tar.gz" in capsys.readouterr().err
    assert names(tmp_path) == ["md5sum.txt"]


def test_imagenet_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["imagenet"]) == 0
    assert "not fetched by programs" in capsys.readouterr().out


def test_archives_can_be_kept_and_left_alone(server: Server, tmp_path: Path) -> None:
    server.files = librispeech_like("dev-clean")
    assert librispeech(server, tmp_path, "dev-clean", "--no-extract") == 0
    assert names(tmp_path) == ["dev-clean.tar.gz", "md5sum.txt"]
    requests = len(server.gets("/dev-clean.tar.gz"))
    assert librispeech(server, tmp_path, "dev-clean", "--keep-archives") == 0
    assert names(tmp_path) == ["dev-clean", "dev-clean.tar.gz", "md5sum.txt"]
    assert len(server.gets("/dev-clean.tar.gz")) == requests == 1


def test_a_list_gives_addresses_sums_and_names(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = {"/x/a%20b[1].txt?v=1": b"a", "/b.zip": b"not unpacked", "/c": packed({"in/d.txt": b"d"})}
    code = urls(
        tmp_path,
        "# a comment",
        f"{server.url}/x/a%20b[1].txt?v=1\t{sha256(b'a')}",
        "",
        f"{server.url}/b.zip\t{hashlib.sha1(b'not unpacked').hexdigest().upper()}\tb.bin",
        f"{server.url}/c\t\tc.tgz",
    )
    assert code == 0, capsys.readouterr().err
    assert names(tmp_path / "to") == ["a b[1].txt", "b.bin", "c"]
    assert (tmp_path / "to" / "c" / "in" / "d.txt").read_bytes() == b"d"
    assert f"{sha256(server.files['/c'])}, not checked, for no checksum was given" in capsys.readouterr().out


def test_a_wrong_list_is_refused_before_the_first_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for lines, message in (
        (["file:///etc/passwd"], "line 1: expected an http or https URL"),
        (["http://host/a\t123"], "line 1: expected a checksum of 32 (md5), 40 (sha1)"),
        (["http://host/a", "http://host/..%2fa"], "line 2: expected a file name"),
        (["http://host/a.tar", "http://host/a.zip"], "to/a: expected one file for each path"),
        ([""], "expected one URL a line, found none"),
    ):
        assert urls(tmp_path, *lines) == 2
        assert message in capsys.readouterr().err


def test_an_unknown_part_and_a_missing_curl_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["librispeech", "--parts", "dev-clean,moon", "--to", str(tmp_path / "to")]
    assert main(arguments) == 2
    assert "--parts: expected some of dev-clean, " in capsys.readouterr().err and not (tmp_path / "to").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments) == 2
    assert "needs the program curl, found none on the PATH" in capsys.readouterr().err


# ------------------------------------------------------------------ broken connections and servers


@pytest.mark.parametrize("checksum", ["", sha256(DATA)], ids=["no checksum", "checksum"])
def test_broken_connections_are_resumed_at_the_last_byte(server: Server, tmp_path: Path, checksum: str) -> None:
    server.faults["/a.bin"] = [Fault(cut_after=70_000) for _ in range(4)]  # more than attempts, but each brings bytes
    assert one(server, tmp_path, checksum) == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == DATA
    assert server.gets("/a.bin") == [None, *(f"bytes={n * 69_999}-" for n in (1, 2, 3, 4))]


def start(server: Server, folder: Path) -> subprocess.Popen[bytes]:
    """Fetch ``/a.bin`` in a process of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "list.txt").write_text(f"{server.url}/a.bin\n")
    command = [sys.executable, "-m", "preprocessing.download", "urls", "--list", "list.txt", "--to", "to"]
    return subprocess.Popen(command, cwd=folder, env=clean_environment(), stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.005)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_download_continues(server: Server, tmp_path: Path, end: signal.Signals) -> None:
    server.files["/a.bin"] = DATA * 10
    server.pause_s = 0.01
    with start(server, tmp_path) as process:
        wait_for(lambda: server.sent > 500_000)
        process.send_signal(end)
        _, said = process.communicate(timeout=20)
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert end == signal.SIGKILL or b"interrupted; what has arrived is kept" in said
    there = part(tmp_path).stat().st_size
    assert 0 < there < len(DATA) * 10
    server.pause_s = 0.0
    with start(server, tmp_path) as process:
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == DATA * 10
    assert server.gets("/a.bin") == [None, f"bytes={there - 1}-"]


def test_a_second_download_and_a_silent_server_do_not_block(server: Server, tmp_path: Path) -> None:
    server.always["/a.bin"] = Fault(stall=True)
    with start(server, tmp_path) as process:
        wait_for(lambda: server.gets("/a.bin"))
        with start(server, tmp_path) as second:
            _, said = second.communicate(timeout=60)
        assert second.returncode == 2 and b"another download is at work in it" in said
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130  # less than the longest silence of a server


@pytest.mark.parametrize("status", [404, 503])
def test_a_refusal_is_final_and_a_busy_server_is_asked_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    server.always["/a.bin"] = Fault(status=status)
    assert one(server, tmp_path) == 4
    assert f"/a.bin: curl: (22) The requested URL returned error: {status}" in capsys.readouterr().err
    assert len(server.gets("/a.bin")) == {404: 1, 503: 3}[status]


def test_a_silent_server_is_left_and_asked_again(server: Server, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [Fault(stall=True)]
    assert one(server, tmp_path) == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == DATA and len(server.gets("/a.bin")) == 2


def test_a_dead_server_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        pass
    assert one(server, tmp_path) == 4
    assert "gave up after 3 attempts without progress" in capsys.readouterr().err


def test_a_server_that_ignores_ranges_is_asked_from_the_beginning(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults["/a.bin"] = [Fault(cut_after=100_000)]
    server.always["/a.bin"] = Fault(ignore_range=True)
    assert one(server, tmp_path) == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == DATA
    assert server.gets("/a.bin") == [None, "bytes=99999-", None]
    (tmp_path / "to" / "a.bin").unlink()
    server.always["/a.bin"] = Fault(ignore_range=True, cut_after=100_000)  # for ever
    assert one(server, tmp_path) == 4
    assert "gave up after 3 attempts without progress" in capsys.readouterr().err


@pytest.mark.parametrize(("versions", "length"), [(True, 300_000), (True, 50_000), (False, 300_000)])
def test_without_a_checksum_a_changed_file_is_not_joined_to_the_old_one(
    server: Server, tmp_path: Path, versions: bool, length: int
) -> None:
    server.versions = versions
    server.faults["/a.bin"] = [Fault(cut_after=100_000), Fault(status=404)]
    assert one(server, tmp_path) == 4
    assert part(tmp_path).stat().st_size == (100_000 if versions else 0)
    server.files["/a.bin"] = OTHER[:length]
    assert one(server, tmp_path) == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == OTHER[:length]


@pytest.mark.parametrize("there", [DATA[:100_000], DATA + b"more"], ids=["shorter", "longer"])
def test_a_partial_file_of_other_bytes_is_fetched_again(server: Server, tmp_path: Path, there: bytes) -> None:
    server.files["/a.bin"] = OTHER
    part(tmp_path).parent.mkdir(parents=True)
    part(tmp_path).write_bytes(there)
    assert one(server, tmp_path, sha256(OTHER)) == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == OTHER
    assert server.gets("/a.bin") == [f"bytes={len(there) - 1}-", None]


def test_a_wrong_file_behind_a_bad_connection_is_fetched_twice_at_most(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults["/a.bin"] = [Fault(cut_after=100_000), Fault()] * 5
    assert one(server, tmp_path, sha256(OTHER)) == 4
    assert f"expected sha256 {sha256(OTHER)}, found {sha256(DATA)}" in capsys.readouterr().err
    assert len(server.gets("/a.bin")) == 4


def test_redirects_lead_to_http_only(server: Server, tmp_path: Path) -> None:
    server.files["/b.bin"] = DATA
    for where, code in {"file:///etc/hostname": 4, "ftp://127.0.0.1/a.bin": 4, "/b.bin": 0}.items():
        server.always["/a.bin"] = Fault(status=302, location=where)
        assert one(server, tmp_path) == code
        assert (tmp_path / "to" / "a.bin").exists() == (code == 0)
    command = Transfer(Source(url="https://host/a", name="a"), tmp_path)._command()
    assert command[command.index("--proto-redir") + 1] == "=https"  # never from https to http


# ------------------------------------------------------------------ files and disks


def test_a_file_in_place_is_taken_only_if_its_checksum_is_right(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "a.bin").write_bytes(DATA)
    assert one(server, tmp_path) == one(server, tmp_path, sha256(OTHER)) == 2
    assert capsys.readouterr().err.count("found another file than that of") == 2
    assert one(server, tmp_path, sha256(DATA)) == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == DATA and not server.gets("/a.bin")


def test_a_folder_in_place_is_left_alone(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.files = librispeech_like("dev-clean")
    (tmp_path / "dev-clean").mkdir()
    assert librispeech(server, tmp_path, "dev-clean") == 2
    assert "expected no folder or one unpacked from dev-clean.tar.gz, found another" in capsys.readouterr().err
    assert names(tmp_path) == ["dev-clean", "md5sum.txt"]


def test_a_killed_extraction_is_done_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = librispeech_like("dev-clean")

    def killed(tar: tarfile.TarFile, folder: Path, **named: object) -> None:
        (folder / "half").write_text("")
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(tarfile.TarFile, "extractall", killed)
        librispeech(server, tmp_path, "dev-clean")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert names(tmp_path) == ["dev-clean.tar.gz", "md5sum.txt"]
    assert (tmp_path / WORK_NAME / "dev-clean.unpacking" / "half").exists()
    assert librispeech(server, tmp_path, "dev-clean") == 0
    assert names(tmp_path) == ["dev-clean", "md5sum.txt"] and names(tmp_path / "dev-clean") == ["LibriSpeech"]
    assert len(server.gets("/dev-clean.tar.gz")) == 1


def test_too_little_space_is_seen_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=len(DATA) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert one(server, tmp_path) == 4 and not server.gets("/a.bin")
    assert "expected 300,000 free bytes or more, found 299,999" in capsys.readouterr().err


def test_a_full_disk_keeps_what_arrived(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.files["/b.bin"] = b"small"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert urls(tmp_path, f"{server.url}/a.bin", f"{server.url}/b.bin") == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large; what has arrived is kept: repair this" in capsys.readouterr().err
    assert names(tmp_path / "to") == ["b.bin"]
    assert one(server, tmp_path) == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == DATA
    assert server.gets("/a.bin") == [None, "bytes=99999-"]


# ------------------------------------------------------------------ archives


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.uid = kind, link, 0o6777, 12345
    return info


def tar(path: Path, *members: tarfile.TarInfo, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info in members:
            data = b"text" * 1000 if info.isreg() else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def refused(archive: Path, match: str) -> None:
    """Unpacking raises and leaves nothing but the archive."""
    with pytest.raises(ArchiveError, match=match):
        unpack(archive, archive.parent / "out", archive.parent / "temporary")
    assert [path.name for path in archive.parent.rglob("*")] == [archive.name]


def test_an_archive_appears_whole_and_inside_its_folder(tmp_path: Path) -> None:
    files = {"a/b.txt", "absolute", "above"}
    for suffix, mode in {".tar": "w:", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz", ".zip": ""}.items():
        archive, out = tmp_path / f"a{suffix}", tmp_path / "out"
        if mode:
            tar(
                archive,
                member("/absolute"),
                member("a", tarfile.DIRTYPE),
                member("a/b.txt"),
                member("above"),
                mode=mode,
            )
        else:
            with zipfile.ZipFile(archive, "w") as whole:
                for name in ("/absolute", "a/b.txt", "../above"):
                    whole.writestr(name, b"text" * 1000)
        unpack(archive, out, tmp_path / "temporary")
        assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == files
        assert {path.name for path in tmp_path.iterdir()} == {archive.name, "out"}
        status = (out / "a" / "b.txt").stat()
        assert (status.st_size, status.st_mode & 0o7022) == (4000, 0) and status.st_uid != 12345
        archive.unlink()
        shutil.rmtree(out)


def test_a_tar_file_with_more_than_plain_files_is_refused(tmp_path: Path) -> None:
    for bad, match in (
        (member("a/../../outside"), "outside the destination"),
        (member("a", tarfile.SYMTYPE, "/etc"), "'a' is a link"),
        (member("a", tarfile.LNKTYPE, "good"), "'a' is a link"),
        (member("a", tarfile.CHRTYPE), "'a' is a link, a device"),
        (member("a", tarfile.FIFOTYPE), "'a' is a link, a device, a pipe"),
        (member("a", tarfile.GNUTYPE_SPARSE), "a sparse file"),
    ):
        refused(tar(tmp_path / "a.tar.gz", member("good"), bad), match)


def test_a_zip_file_with_a_link_a_password_or_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    link = zipfile.ZipInfo("a")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    for info, match, position, change in (
        (link, "'a' is a link", None, 0),
        (zipfile.ZipInfo("a"), "Bad CRC-32", 1000, 0xFF),
        (zipfile.ZipInfo("a"), "encrypted", -46 - 1 - 22 + 8, 1),  # the flags in the table behind the file
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, DATA)
        data = bytearray(path.read_bytes())
        if position is not None:
            data[position] ^= change
        path.write_bytes(data)
        refused(path, match)


def test_a_cut_or_damaged_tar_file_is_not_taken_for_a_smaller_one(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar", member("a"), member("b"), mode="w:").read_bytes()
    second = 512 + 4096  # the header of b
    damaged = bytearray(whole)
    damaged[second + 10] ^= 0xFF
    for data in (whole[:second], whole[: second + 100], whole[: 2 * second], bytes(damaged)):
        for packed_data in (data, gzip.compress(data)):
            (tmp_path / "a.tar").write_bytes(packed_data)
            refused(tmp_path / "a.tar", "no end mark behind the last file")
    for data in (b"<html>not found</html>", b"", gzip.compress(whole)[:-50], gzip.compress(whole)[:-8] + bytes(8)):
        (tmp_path / "a.tar").write_bytes(data)
        refused(tmp_path / "a.tar", "expected a whole archive")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("a")
    header.type, header.size = kind, 8 << 30
    with gzip.open(tmp_path / "a.tar", "wb", 1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(200):
            file.write(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "a.tar", "has a header of 8,589,934,592 bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_zip_file_that_states_more_bytes_than_are_free_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"x")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.index(b"PK\1\2")
    extra = b"\x01\0\x08\0" + (1 << 60).to_bytes(8, "little")  # the size in 64 bits
    data[at + 24 : at + 28] = b"\xff" * 4
    data[at + 30 : at + 32] = len(extra).to_bytes(2, "little")
    data[at + 47 : at + 47] = extra
    end = data.index(b"PK\5\6")
    data[end + 12 : end + 16] = (end - at).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    refused(tmp_path / "a.zip", "1,152,921,504,606,846,976 bytes of files")


def test_a_list_that_is_a_fifo_or_not_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "list")
    assert main(["urls", "--list", str(tmp_path / "list"), "--to", str(tmp_path / "to")]) == 2
    (tmp_path / "other").write_bytes(b"\xff")
    assert main(["urls", "--list", str(tmp_path / "other"), "--to", str(tmp_path / "to")]) == 2
    said = capsys.readouterr().err
    assert "expected a file, found a FIFO" in said and "expected UTF-8, found byte 0xff" in said


def test_files_of_a_stranger_beside_a_download_are_not_trusted(server: Server, tmp_path: Path) -> None:
    """A note that is no text counts as none; a lock that is a link or a FIFO is not opened."""
    transfer = Transfer(Source(url=f"{server.url}/a.bin", name="a.bin", checksum=sha256(DATA)), tmp_path)
    transfer.path.write_bytes(DATA)
    transfer.work.mkdir()
    (transfer.work / "a.bin.done").write_bytes(b"\xff\xfe")
    assert not transfer.is_done(transfer.path)
    precious, lock = tmp_path / "precious", transfer.work / "lock"
    precious.write_text("own")
    lock.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), command._locked(tmp_path):
        pass
    assert precious.read_text() == "own"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(OSError, match="No such device"), command._locked(tmp_path):
        pass
