"""The command from end to end: parts, lists, kills, disks, and a corpus that is fetched, unpacked and packed."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from preprocessing.download import command as download
from preprocessing.download.command import main
from preprocessing.download.corpora import LIBRILIGHT, LIBRISPEECH, read_url_list
from preprocessing.download.fetch import WORK_NAME, Patience
from tests.preprocessing.helpers import clean_environment, noise, run_module
from tests.preprocessing.misbehaving_server import Fault, Server, serving

HASTY = Patience(timeout_s=5, attempts=3, first_wait_s=0.001, longest_wait_s=0.01)
DATA = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def librispeech_like(*parts: str) -> dict[str, bytes]:
    """Archives as LibriSpeech's, with one chapter of two utterances each, and their list of sums."""
    files = {}
    for number, part in enumerate(parts):
        chapter = f"LibriSpeech/{part}/{84 + number}/121"
        stem = f"{84 + number}-121"
        contents = {f"{chapter}/{stem}.trans.txt": f"{stem}-0000 ONE\n{stem}-0001 TWO WORDS\n".encode()}
        for utterance in range(2):
            sound = io.BytesIO()
            soundfile.write(sound, noise(0.5, number * 2 + utterance), 16000, format="FLAC")
            contents[f"{chapter}/{stem}-000{utterance}.flac"] = sound.getvalue()
        files[f"/{part}.tar.gz"] = packed(contents)
    sums = "".join(f"{hashlib.md5(data).hexdigest()}  {path[1:]}\n" for path, data in files.items())
    return files | {"/md5sum.txt": sums.encode()}


def packed(contents: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return archive.getvalue()


def librispeech(server: Server, folder: Path, parts: str, *options: str) -> int:
    return main(
        ["librispeech", "--parts", parts, "--base-url", server.url, "--to", str(folder), *options], patience=HASTY
    )


def urls(folder: Path, *lines: str, options: tuple[str, ...] = ()) -> int:
    """Fetch a list."""
    path = folder / "list.tsv"
    path.write_text("\n".join(lines) + "\n")
    return main(["urls", "--list", str(path), "--to", str(folder / "to"), *options], patience=HASTY)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != WORK_NAME)


# ------------------------------------------------------------------ corpora


def test_librispeech_is_fetched_checked_unpacked_and_packed(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.files = librispeech_like("dev-clean", "test-clean")
    corpus, shards = tmp_path / "corpus", tmp_path / "shards"
    arguments = ("librispeech", "--parts", "dev-clean,test-clean", "--base-url", server.url, "--to", corpus)
    ran = run_module("preprocessing.download", *arguments)
    assert ran.returncode == 0, ran.stderr
    md5 = hashlib.md5(server.files["/dev-clean.tar.gz"]).hexdigest()
    assert f"{corpus / 'dev-clean'}: 3 files of dev-clean.tar.gz, md5 {md5} as it should be" in ran.stdout
    assert "CC BY 4.0" in ran.stdout and "downloading: 2 of 2 files" in ran.stderr
    assert names(corpus) == ["dev-clean", "md5sum.txt", "test-clean"]
    packing = run_module("preprocessing.pack_audio", "--input", corpus, "--output", shards, "--workers", 1)
    assert packing.returncode == 0, packing.stderr
    index = json.loads((shards / "index.json").read_text())
    (shard,) = index["shards"]
    texts = pa.ipc.open_file(str(shards / shard["file"])).read_all().column("text").to_pylist()
    assert index["rows"] == 4 and texts == ["ONE", "TWO WORDS"] * 2

    server.requests.clear()  # all of it again: not one request
    again = run_module("preprocessing.download", *arguments)
    assert again.returncode == 0 and again.stdout.count("there already") == 2 and not server.requests


def test_parts_come_from_the_publisher_unless_a_mirror_is_named() -> None:
    (source,) = download.archives_of(LIBRISPEECH, ["train-clean-100"], None)
    assert source.url == "https://www.openslr.org/resources/12/train-clean-100.tar.gz"
    (source,) = download.archives_of(LIBRILIGHT, ["small"], "http://host/data/")
    assert source.url == "http://host/data/small.tar" and str(source.checksum) == f"md5 {LIBRILIGHT.md5['small']}"
    assert LIBRILIGHT.md5.keys() == set(LIBRILIGHT.parts)


def test_librilight_is_checked_against_its_published_sums(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = {"/small.tar": b"another file"}
    arguments = ["librilight", "--parts", "small", "--base-url", server.url, "--to", str(tmp_path)]
    assert main(arguments, patience=HASTY) == 4
    found = hashlib.md5(b"another file").hexdigest()
    assert f"expected md5 {LIBRILIGHT.md5['small']}, found md5 {found}" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_a_wrong_sum_in_one_part_does_not_stop_the_others(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = librispeech_like("dev-clean", "dev-other", "test-clean")
    server.files["/dev-clean.tar.gz"] += b"more"
    assert librispeech(server, tmp_path, "dev-clean,dev-other,test-clean") == 4
    assert names(tmp_path) == ["dev-other", "md5sum.txt", "test-clean"]
    assert "dev-clean.tar.gz: for the second time expected md5 " in capsys.readouterr().err


def test_a_part_without_a_published_sum_is_not_fetched(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = librispeech_like("dev-clean") | {"/dev-other.tar.gz": b"unknown"}
    assert librispeech(server, tmp_path, "dev-clean,dev-other") == 4
    assert "expected an MD5 sum of dev-other.tar.gz, found those of dev-clean.tar.gz" in capsys.readouterr().err
    assert names(tmp_path) == ["md5sum.txt"]


def test_imagenet_is_explained_without_network_and_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["imagenet"]) == 0
    assert "not fetched by programs" in capsys.readouterr().out


def test_archives_can_be_kept_and_left_alone(server: Server, tmp_path: Path) -> None:
    server.files = librispeech_like("dev-clean")
    assert librispeech(server, tmp_path, "dev-clean", "--no-extract") == 0
    assert names(tmp_path) == ["dev-clean.tar.gz", "md5sum.txt"]
    server.requests.clear()
    assert librispeech(server, tmp_path, "dev-clean", "--keep-archives") == 0
    assert names(tmp_path) == ["dev-clean", "dev-clean.tar.gz", "md5sum.txt"]
    assert not server.requests
    assert (tmp_path / "dev-clean.tar.gz").read_bytes() == server.files["/dev-clean.tar.gz"]


# ------------------------------------------------------------------ lists


def test_a_list_gives_addresses_sums_and_names(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = {"/x/a%20b.txt?v=1": b"a", "/b.zip": b"not unpacked", "/c": packed({"in/d.txt": b"d"})}
    sha256, md5 = hashlib.sha256(b"a").hexdigest(), hashlib.md5(b"not unpacked").hexdigest().upper()
    code = urls(
        tmp_path,
        "# a comment",
        f"{server.url}/x/a%20b.txt?v=1\t{sha256}",
        "",
        f"{server.url}/b.zip\t{md5}\tb.bin",
        f"{server.url}/c\t\tc.tgz",
    )
    assert code == 0, capsys.readouterr().err
    assert names(tmp_path / "to") == ["a b.txt", "b.bin", "c"]
    assert (tmp_path / "to" / "c" / "in" / "d.txt").read_bytes() == b"d"
    out = capsys.readouterr().out
    assert f"a b.txt: sha256 {sha256} as it should be" in out
    assert f"sha256 {hashlib.sha256(server.files['/c']).hexdigest()}; not checked, for no checksum was given" in out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file:///etc/passwd"], "line 1: expected an http or https URL"),
        (["http://host/a", "http://host/"], "line 2: expected a file name"),
        (["http://host/a\t123"], "line 1: expected 64 (SHA-256) or 32 (MD5) hexadecimal characters, found '123'"),
        (["http://host/a\t\t../b"], "line 1: expected a file name without folders"),
        (["http://host/%2e%2e"], "line 1: expected a file name without folders"),
        (["http://host/..%2fa"], "line 1: expected a file name without folders"),
        (["http://host/a\t\t.download"], "line 1: expected a file name without folders and without a leading dot"),
        (["http://host/a\t\tb\tc"], "line 1: expected a URL, a checksum and a name between tabs, found 4"),
        (["http://host/a", "http://else/a"], "'a': lines 1 and 2"),
        (["http://host/a.tar", "http://host/a.zip"], "a: both a.tar and a.zip would be there"),
        (["http://host/a.tar", "http://host/a"], "a: both a.tar and a would be there"),
        ([""], "expected a URL a line, found none"),
    ],
)
def test_a_wrong_list_is_refused_before_the_first_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], message: str
) -> None:
    assert urls(tmp_path, *lines) == 2
    assert message in capsys.readouterr().err


def test_a_missing_list_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["urls", "--list", str(tmp_path / "none"), "--to", str(tmp_path / "to")]) == 2
    assert "expected UTF-8 text with a URL a line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "dev-clean,moon"], "expected some of dev-clean, "),
        (["--parts", "dev-clean,dev-clean"], "expected each part once"),
        (["--parts", "dev-clean", "--base-url", "file:///srv"], "--base-url: expected an http or https URL"),
        (["--parts", "dev-clean", "--jobs", "0"], "--jobs: expected 1 or more"),
    ],
)
def test_wrong_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["librispeech", *arguments, "--to", str(tmp_path / "to")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "to").exists()


def test_a_list_of_plain_addresses_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("https://host/a.txt\r\nhttps://host/b.txt\r\n")
    assert [source.name for source in read_url_list(tmp_path / "list.txt")] == ["a.txt", "b.txt"]


def test_waits_and_checks_are_said(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.files["/a.bin"] = b"a"
    server.faults["/a.bin"] = [Fault(status=503)]
    assert urls(tmp_path, f"{server.url}/a.bin") == 0
    said = capsys.readouterr().err
    assert (
        "the server answered 503 Service Unavailable; again in 0 s" in said and "a.bin: has arrived, checking" in said
    )


# ------------------------------------------------------------------ kills, locks, disks


def start(server: Server, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own, on a list with one file."""
    folder.mkdir(exist_ok=True)
    (folder / "list.txt").write_text(f"{server.url}/a.bin\n")
    command = [sys.executable, "-m", "preprocessing.download", "urls", "--list", "list.txt", "--to", "to", *options]
    return subprocess.Popen(command, cwd=folder, env=clean_environment(), stderr=subprocess.PIPE)


def wait_until_sent(server: Server, path: str, size: int) -> None:
    deadline = time.monotonic() + 60
    while server.sent[path] < size:
        assert time.monotonic() < deadline, f"{server.sent[path]} of {size} bytes were fetched in a minute"
        time.sleep(0.005)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_download_goes_on_without_the_first_bytes(server: Server, tmp_path: Path, end: signal.Signals) -> None:
    server.files["/a.bin"] = DATA
    server.pause_s = 0.01
    with start(server, tmp_path) as process:
        wait_until_sent(server, "/a.bin", 500_000)
        process.send_signal(end)
        _, said = process.communicate(timeout=20)
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert end == signal.SIGKILL or b"interrupted; what has arrived is kept" in said
    there = (tmp_path / "to" / WORK_NAME / "a.bin.part").stat().st_size
    assert 0 < there < len(DATA)
    server.ended.wait(0.1)  # the server may have sent more than was read
    server.pause_s = 0.0
    server.sent.clear()
    with start(server, tmp_path) as process:
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == DATA
    assert server.sent["/a.bin"] == len(DATA) - there
    assert server.gets("/a.bin") == [None, f"bytes={there}-"]


def test_an_interrupt_does_not_wait_for_a_silent_server(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = DATA
    server.always["/a.bin"] = Fault(stall=True)
    with start(server, tmp_path) as process:
        deadline = time.monotonic() + 60
        while not server.gets("/a.bin"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130  # the timeout of a silent server is a minute


def test_a_second_download_into_the_folder_is_refused(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = DATA
    server.pause_s = 0.01
    with start(server, tmp_path) as process:
        wait_until_sent(server, "/a.bin", 100_000)
        with start(server, tmp_path) as second:
            _, said = second.communicate(timeout=60)
        assert second.returncode == 2 and b"another download is at work in it" in said
        server.pause_s = 0.0
        assert process.wait(timeout=60) == 0


def test_a_killed_extraction_is_not_taken_for_a_finished_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = librispeech_like("dev-clean")

    def killed(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, **named: object) -> None:
        (folder / "half").write_text("")
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(tarfile.TarFile, "extract", killed)
        librispeech(server, tmp_path, "dev-clean")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert names(tmp_path) == ["dev-clean.tar.gz", "md5sum.txt"]
    assert (tmp_path / WORK_NAME / "dev-clean.tar.gz.unpacking" / "half").exists()
    server.sent.clear()
    assert librispeech(server, tmp_path, "dev-clean") == 0
    assert names(tmp_path) == ["dev-clean", "md5sum.txt"] and not server.sent
    assert names(tmp_path / "dev-clean") == ["LibriSpeech"]


def test_a_folder_that_is_not_ours_is_left_alone(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = librispeech_like("dev-clean")
    (tmp_path / "dev-clean").mkdir()
    assert librispeech(server, tmp_path, "dev-clean") == 2
    assert "found one that this archive was not unpacked into" in capsys.readouterr().err
    assert names(tmp_path) == ["dev-clean", "md5sum.txt"]


def test_a_refused_archive_is_kept_and_named(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["/a.tgz"] = packed({"../outside": b"text"})
    assert urls(tmp_path, f"{server.url}/a.tgz") == 4
    assert "'../outside' is a path with '..'" in capsys.readouterr().err
    assert names(tmp_path / "to") == ["a.tgz"] and not (tmp_path / "outside").exists()


@pytest.mark.parametrize(("free", "code"), [(2_500_000, 4), (3_100_000, 0)])
def test_space_is_looked_at_before_the_first_byte(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    code: int,
) -> None:
    server.files["/a.bin"] = DATA
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert urls(tmp_path, f"{server.url}/a.bin") == code
    assert bool(server.gets("/a.bin")) == (code == 0)
    assert code == 0 or "needs 3,000,000 bytes or more, 2,500,000 are free" in capsys.readouterr().err


def test_a_server_that_knows_no_head_is_downloaded_from(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = DATA
    server.heads = False
    assert urls(tmp_path, f"{server.url}/a.bin") == 0
    assert (tmp_path / "to" / "a.bin").read_bytes() == DATA


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_says_so_and_keeps_what_came(
    server: Server, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["/a.bin"] = DATA
    server.heads = False  # so that it is not seen before
    assert urls(small_disk, f"{server.url}/a.bin") == 4
    said = capsys.readouterr().err
    assert "No space left on device; what has arrived is kept: free space and run the same command again" in said
    there = (small_disk / "to" / WORK_NAME / "a.bin.part").stat().st_size
    assert there > 1_000_000
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert urls(small_disk, f"{server.url}/a.bin") == 0
    assert (small_disk / "to" / "a.bin").read_bytes() == DATA
    assert server.gets("/a.bin")[-1] == f"bytes={there}-"
