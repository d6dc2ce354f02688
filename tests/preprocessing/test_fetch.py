"""One file over http from a server that cuts, lies, changes its mind and redirects."""

import datetime
import email.utils
import hashlib
import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from d2v2ds.errors import ConfigError
from preprocessing.download.fetch import WORK_NAME, Checksum, Patience, Source, Transfer
from preprocessing.download.web import DownloadError, _SafeRedirects, _seconds, check_url
from tests.preprocessing.misbehaving_server import Fault, Server, serving

HASTY = Patience(timeout_s=5, attempts=4, first_wait_s=0.001, longest_wait_s=0.01, longest_asked_s=0.3)
DATA = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.files["/a.bin"] = DATA
        yield server


def transfer(server: Server, folder: Path, checksum: Checksum | None = None, patience: Patience = HASTY) -> Transfer:
    (folder / WORK_NAME).mkdir(exist_ok=True)
    source = Source(url=f"{server.url}/a.bin", name="a.bin", checksum=checksum)
    return Transfer(source, folder, patience, lambda size: None, lambda line: None, threading.Event())


def sha256(data: bytes) -> Checksum:
    return Checksum("sha256", hashlib.sha256(data).hexdigest())


def md5(data: bytes) -> Checksum:
    return Checksum("md5", hashlib.md5(data).hexdigest())


def cut(server: Server, folder: Path, after: int, checksum: Checksum | None = None) -> None:
    """Leave a part of `after` bytes, as a process that was ended would."""
    once = Patience(timeout_s=5, attempts=1, first_wait_s=0.001)
    server.faults["/a.bin"] = [Fault(cut_after=after), Fault(status=503)]
    with pytest.raises(DownloadError, match="gave up after 1 attempts"):
        transfer(server, folder, checksum, once).fetch()
    server.requests.clear()
    server.sent.clear()
    assert (folder / WORK_NAME / "a.bin.part").read_bytes() == DATA[:after]


# ------------------------------------------------------------------ whole files


@pytest.mark.parametrize("checksum", [None, sha256(DATA), md5(DATA)], ids=str)
def test_a_file_arrives_whole_and_is_known_again_without_a_request(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksum: Checksum | None
) -> None:
    transfer(server, tmp_path, checksum).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert sorted(path.name for path in (tmp_path / WORK_NAME).iterdir()) == ["a.bin.json"]
    server.requests.clear()
    monkeypatch.delattr(Transfer, "_checksum_of")  # nor is it read
    again = transfer(server, tmp_path, checksum)
    again.fetch()
    assert again.is_finished and not server.requests


def test_an_empty_file_arrives(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = b""
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == b""


def test_a_chunked_file_arrives_and_a_cut_one_does_not(server: Server, tmp_path: Path) -> None:
    body = b"5\r\nhello\r\n0\r\n\r\n"
    server.files["/a.bin"] = body
    chunked = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    server.faults["/a.bin"] = [Fault(headers=chunked, cut_after=8), Fault(headers=chunked, ignore_range=True)]
    transfer(server, tmp_path, sha256(b"hello")).fetch()
    assert (tmp_path / "a.bin").read_bytes() == b"hello"
    assert len(server.gets("/a.bin")) == 2


def test_a_file_in_place_is_taken_if_its_checksum_is_right(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(DATA)
    transfer(server, tmp_path, sha256(DATA)).fetch()
    assert not server.requests


@pytest.mark.parametrize("checksum", [None, sha256(OTHER)], ids=["unknown", "another"])
def test_another_file_in_place_is_not_overwritten(server: Server, tmp_path: Path, checksum: Checksum | None) -> None:
    (tmp_path / "a.bin").write_bytes(DATA)
    with pytest.raises(ConfigError, match="found another file; move it away"):
        transfer(server, tmp_path, checksum).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA and not server.requests


# ------------------------------------------------------------------ cuts and ranges


def test_cut_connections_are_mended_without_fetching_a_byte_twice(server: Server, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [Fault(cut_after=70_000) for _ in range(4)]  # as many as attempts, but each brings bytes
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert server.gets("/a.bin") == [None, *(f"bytes={start}-" for start in (70_000, 140_000, 210_000, 280_000))]
    assert server.sent["/a.bin"] == len(DATA)


def test_a_part_of_an_earlier_process_is_resumed(server: Server, tmp_path: Path) -> None:
    cut(server, tmp_path, 100_000)
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert server.sent["/a.bin"] == 200_000


def test_a_server_that_ignores_ranges_is_taken_from_the_beginning(server: Server, tmp_path: Path) -> None:
    cut(server, tmp_path, 100_000)
    server.always["/a.bin"] = Fault(ignore_range=True)
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert server.gets("/a.bin") == ["bytes=100000-"]


def test_a_server_that_ignores_ranges_and_cuts_is_given_up(server: Server, tmp_path: Path) -> None:
    server.always["/a.bin"] = Fault(ignore_range=True, cut_after=100_000)
    with pytest.raises(DownloadError, match="cut after 100,000 of 300,000 bytes; gave up after 4 attempts"):
        transfer(server, tmp_path).fetch()
    assert len(server.gets("/a.bin")) == 5


@pytest.mark.parametrize("ignore_if_range", [False, True], ids=["heeds If-Range", "ignores If-Range"])
@pytest.mark.parametrize("length", [300_000, 250_000])
def test_a_changed_file_is_not_glued_to_the_old_one(
    server: Server, tmp_path: Path, ignore_if_range: bool, length: int
) -> None:
    cut(server, tmp_path, 100_000)
    server.files["/a.bin"] = OTHER[:length]
    server.always["/a.bin"] = Fault(ignore_if_range=ignore_if_range)
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == OTHER[:length]
    assert server.gets("/a.bin") == ["bytes=100000-", *([None] if ignore_if_range else [])]


def test_without_a_version_only_a_file_of_known_checksum_is_resumed(server: Server, tmp_path: Path) -> None:
    server.versions = False
    server.faults["/a.bin"] = [Fault(cut_after=100_000)]
    transfer(server, tmp_path).fetch()
    assert server.gets("/a.bin") == [None, None]
    assert (tmp_path / "a.bin").read_bytes() == DATA
    (tmp_path / "a.bin").unlink()
    cut(server, tmp_path, 100_000, sha256(DATA))
    transfer(server, tmp_path, sha256(DATA)).fetch()
    assert server.gets("/a.bin") == ["bytes=100000-"]
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_a_glued_file_is_found_by_its_checksum_and_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.versions = False
    cut(server, tmp_path, 100_000, sha256(OTHER))
    server.files["/a.bin"] = OTHER
    transfer(server, tmp_path, sha256(OTHER)).fetch()
    assert (tmp_path / "a.bin").read_bytes() == OTHER
    assert (tmp_path / WORK_NAME / "a.bin.bad").read_bytes() == DATA[:100_000] + OTHER[100_000:]
    assert server.gets("/a.bin") == ["bytes=100000-", None]


def test_a_mirror_goes_on_with_a_file_of_known_checksum(server: Server, tmp_path: Path) -> None:
    cut(server, tmp_path, 100_000, sha256(DATA))
    with serving() as mirror:
        mirror.files["/a.bin"] = DATA
        mirror.always["/a.bin"] = Fault(headers={"ETag": '"of the mirror"'})
        transfer(mirror, tmp_path, sha256(DATA)).fetch()
        assert mirror.sent["/a.bin"] == 200_000
    assert (tmp_path / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize("there", [100_000, 300_000])
def test_another_address_begins_anew_without_a_checksum(server: Server, tmp_path: Path, there: int) -> None:
    cut(server, tmp_path, 100_000)
    (tmp_path / WORK_NAME / "a.bin.part").write_bytes(DATA[:there])
    with serving() as other:
        other.files["/a.bin"] = DATA
        transfer(other, tmp_path).fetch()
        assert other.gets("/a.bin") == [None]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(shift_range=-50_000),
        Fault(shift_range=50_000),
        Fault(headers={"Content-Range": "bytes 100000-299999/400000"}),
        Fault(headers={"Content-Range": "bytes 100000-299999/*"}),
        Fault(headers={"Content-Range": ""}),
        Fault(headers={"Content-Length": "100000"}),
    ],
    ids=["before", "behind", "other total", "no total", "none", "other length"],
)
def test_a_wrong_range_begins_anew(server: Server, tmp_path: Path, fault: Fault) -> None:
    cut(server, tmp_path, 100_000)
    server.faults["/a.bin"] = [fault]
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert server.gets("/a.bin") == ["bytes=100000-", None]


def test_what_comes_behind_the_end_of_a_range_is_not_taken(server: Server, tmp_path: Path) -> None:
    cut(server, tmp_path, 100_000)
    server.faults["/a.bin"] = [Fault(headers={"Content-Length": ""}, surplus=bytes(100_000))]
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert server.gets("/a.bin") == ["bytes=100000-"]


def test_a_part_longer_than_the_file_begins_anew(server: Server, tmp_path: Path) -> None:
    cut(server, tmp_path, 100_000)
    part = tmp_path / WORK_NAME / "a.bin.part"
    part.write_bytes(DATA + b"more")
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA and server.gets("/a.bin") == [None]


def test_a_range_behind_a_shrunk_file_begins_anew(server: Server, tmp_path: Path) -> None:
    cut(server, tmp_path, 100_000)
    server.files["/a.bin"] = OTHER[:50_000]
    server.faults["/a.bin"] = [Fault(status=416)]
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == OTHER[:50_000]
    assert server.gets("/a.bin") == ["bytes=100000-", None]


def test_a_part_whose_record_is_lost_begins_anew(server: Server, tmp_path: Path) -> None:
    cut(server, tmp_path, 100_000)
    (tmp_path / WORK_NAME / "a.bin.json").write_text('{"url"')
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA and server.gets("/a.bin") == [None]


# ------------------------------------------------------------------ lies


def test_a_length_that_is_too_long_is_given_up(server: Server, tmp_path: Path) -> None:
    server.always["/a.bin"] = Fault(headers={"Content-Length": "400000"})
    with pytest.raises(DownloadError, match="gave up after 4 attempts"):
        transfer(server, tmp_path).fetch()
    assert not (tmp_path / "a.bin").exists()


def test_a_length_that_is_too_short_is_found_by_the_checksum(server: Server, tmp_path: Path) -> None:
    server.always["/a.bin"] = Fault(headers={"Content-Length": "200000"})
    wrong = sha256(DATA[:200_000])
    with pytest.raises(DownloadError, match=f"for the second time expected {sha256(DATA)}, found {wrong}"):
        transfer(server, tmp_path, sha256(DATA)).fetch()
    assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / WORK_NAME / "a.bin.bad").read_bytes() == DATA[:200_000]
    assert server.gets("/a.bin") == [None, None]


@pytest.mark.parametrize("lies", [1, 2])
def test_without_a_checksum_the_length_must_be_the_one_said_before(server: Server, tmp_path: Path, lies: int) -> None:
    server.faults["/a.bin"] = [Fault(headers={"Content-Length": "200000"}) for _ in range(lies)]
    one = transfer(server, tmp_path)
    assert one.size() == 300_000
    if lies == 1:
        one.fetch()
        assert (tmp_path / "a.bin").read_bytes() == DATA
    else:
        with pytest.raises(DownloadError, match="expected 300000 bytes, as the server said before, found 200000"):
            one.fetch()
        assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / WORK_NAME / "a.bin.bad").read_bytes() == DATA[:200_000]
    assert server.gets("/a.bin") == [None, None]


def test_a_flipped_byte_is_found_and_the_file_fetched_anew(server: Server, tmp_path: Path) -> None:
    cut(server, tmp_path, 100_000, sha256(DATA))
    part = tmp_path / WORK_NAME / "a.bin.part"
    part.write_bytes(bytes([DATA[0] ^ 1]) + DATA[1:100_000])
    transfer(server, tmp_path, sha256(DATA)).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert (tmp_path / WORK_NAME / "a.bin.bad").exists()


def test_without_length_and_checksum_nothing_is_believed(server: Server, tmp_path: Path) -> None:
    server.always["/a.bin"] = Fault(headers={"Content-Length": ""})
    with pytest.raises(DownloadError, match="does not say how long the file is"):
        transfer(server, tmp_path).fetch()
    server.always["/a.bin"] = Fault(headers={"Content-Length": ""})
    server.faults["/a.bin"] = [Fault(headers={"Content-Length": ""}, cut_after=1000)]
    transfer(server, tmp_path, sha256(DATA)).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA


# ------------------------------------------------------------------ refusals and waits


def test_a_busy_server_is_asked_again_when_it_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1))
    server.faults["/a.bin"] = [
        Fault(status=503, headers={"Retry-After": "0.2"}),
        Fault(status=429, headers={"Retry-After": "1"}),
        Fault(status=500, headers={"Retry-After": later}),
    ]
    waits: list[float] = []
    one = transfer(server, tmp_path)
    monkeypatch.setattr(one._stop, "wait", waits.append)
    one.fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert waits[0] <= 0.01 and waits[1:] == [0.3, 0.3]  # what cannot be read is no wish; wishes have their limit


def test_waits_double_up_to_a_limit_and_are_spread() -> None:
    patience = Patience(first_wait_s=1, longest_wait_s=8)
    for failures, longest in ((0, 1), (1, 1), (2, 2), (3, 4), (4, 8), (50, 8)):
        waits = {patience.wait_s(failures, 0) for _ in range(50)}
        assert longest / 2 <= min(waits) < max(waits) <= longest


@pytest.mark.parametrize(("text", "seconds"), [("", 0), ("soon", 0), ("7", 7), ("Wed, 01 Jan 2020 00:00:00 GMT", 0)])
def test_retry_after_is_a_number_or_a_date(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds


def test_a_server_that_stays_busy_is_given_up(server: Server, tmp_path: Path) -> None:
    server.always["/a.bin"] = Fault(status=503)
    with pytest.raises(DownloadError, match="answered 503 .*; gave up after 4 attempts"):
        transfer(server, tmp_path).fetch()
    assert len(server.gets("/a.bin")) == 4


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_will_not_change_is_asked_once(server: Server, tmp_path: Path, status: int) -> None:
    server.always["/a.bin"] = Fault(status=status)
    with pytest.raises(DownloadError, match=f"answered {status} .*check the address"):
        transfer(server, tmp_path).fetch()
    assert len(server.gets("/a.bin")) == 1


def test_a_server_that_falls_silent_is_left_after_the_timeout(server: Server, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [Fault(stall=True)]
    transfer(server, tmp_path, patience=Patience(timeout_s=0.3, first_wait_s=0.001)).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_no_server_is_given_up(tmp_path: Path) -> None:
    with serving() as server:
        pass
    with pytest.raises(DownloadError, match="no connection.*gave up after 4 attempts"):
        transfer(server, tmp_path).fetch()


def test_a_stop_ends_a_transfer_and_keeps_what_came(server: Server, tmp_path: Path) -> None:
    one = transfer(server, tmp_path)
    one._report = lambda size: one._stop.set()
    with pytest.raises(DownloadError, match="stopped"):
        one.fetch()
    assert 0 < one.bytes_there < len(DATA) and len(server.gets("/a.bin")) == 1
    transfer(server, tmp_path).fetch()
    assert (tmp_path / "a.bin").read_bytes() == DATA


# ------------------------------------------------------------------ addresses


def test_a_redirect_to_http_is_followed_and_keeps_range_and_method(server: Server, tmp_path: Path) -> None:
    cut(server, tmp_path, 100_000, sha256(DATA))
    server.files["/b.bin"] = DATA
    server.always["/a.bin"] = Fault(status=302, headers={"Location": "/b.bin"})
    one = transfer(server, tmp_path, sha256(DATA))
    assert one.size() == len(DATA)
    assert [(request.method, request.path) for request in server.requests] == [("HEAD", "/a.bin"), ("HEAD", "/b.bin")]
    one.fetch()
    assert server.gets("/b.bin") == ["bytes=100000-"]


def test_a_redirect_from_https_to_http_is_refused() -> None:
    request = urllib.request.Request("https://host/a")
    with pytest.raises(DownloadError, match="redirected to http://else/a, expected .*never from https to http"):
        _SafeRedirects().redirect_request(request, None, 302, "Found", {}, "http://else/a")
    followed = _SafeRedirects().redirect_request(request, None, 302, "Found", {}, "https://else/a")
    assert followed is not None and followed.full_url == "https://else/a"


@pytest.mark.parametrize("where", ["file:///etc/hostname", "ftp://127.0.0.1/a.bin", "data:text/plain,x"])
def test_a_redirect_to_another_scheme_is_refused(server: Server, tmp_path: Path, where: str) -> None:
    server.always["/a.bin"] = Fault(status=302, headers={"Location": where})
    with pytest.raises(DownloadError, match="(?i)redirect"):
        transfer(server, tmp_path).fetch()
    assert len(server.gets("/a.bin")) == 1 and not (tmp_path / "a.bin").exists()


def test_a_redirect_in_a_circle_is_refused(server: Server, tmp_path: Path) -> None:
    server.always["/a.bin"] = Fault(status=301, headers={"Location": "/a.bin"})
    with pytest.raises(DownloadError, match="answered 301"):
        transfer(server, tmp_path).fetch()


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/a", "a.tar", "//host/a", "https:///a", "http://host/a b", "http://host/ä",
     "http://host:port/a", "http://host/a\n", "HTTP:a", ""],
)  # fmt: skip
def test_only_whole_http_addresses_are_taken(url: str) -> None:
    with pytest.raises(ConfigError, match=r"list line 3: expected .* URL"):
        check_url(url, "list line 3")


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "a\\b", "/a", ".a", "a\nb", "a\x00b", "n" * 201])
def test_a_name_stays_in_the_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"list line 3: expected a "):
        Source(url="http://host/a", name=name).check("list line 3")


def test_the_record_names_the_file(server: Server, tmp_path: Path) -> None:
    transfer(server, tmp_path).fetch()
    record = json.loads((tmp_path / WORK_NAME / "a.bin.json").read_text())
    assert record["url"] == f"{server.url}/a.bin" and record["bytes"] == len(DATA)
    assert record["digests"] == {"sha256": hashlib.sha256(DATA).hexdigest()}
