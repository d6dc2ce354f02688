"""One file over http, resumed where it was cut, checked as a whole, and only then given its name.

In: a `Source` (URL, file name, perhaps its checksum) and a folder. Out: ``FOLDER/NAME``. On the way, in
``FOLDER/.download/``: ``NAME.part`` holds the bytes so far, ``NAME.json`` a `Record` of the file they belong to, and
``NAME.bad`` bytes that failed the check. The record stays, so that a finished file is known again without reading it.

Bytes are added only to bytes of the same file: a resumed request asks for the old version (``If-Range``), and an answer
of another version, length or place begins anew. Without the old version's mark (ETag, Last-Modified) a file is resumed
only if its checksum is known, which the whole file must match at the end.
"""

import dataclasses
import errno
import hashlib
import http.client
import json
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v2ds.data.schema import move_into_place, write_json
from d2v2ds.errors import ConfigError
from preprocessing.download.web import (
    NETWORK_ERRORS,
    DownloadError,
    PassingError,
    RangeRefusedError,
    check_url,
    open_url,
    said,
)

WORK_NAME = ".download"
"""Beside the fetched files; hidden, so that the packers do not look into it."""
DIGEST_CHARACTERS = {"md5": 32, "sha256": 64}
_BLOCK_BYTES = 256 << 10
_LONGEST_NAME_BYTES = 200
"""What is left of a file system's 255 for the suffixes of unfinished files."""


@dataclass(frozen=True)
class Checksum:
    """What a file's bytes must give."""

    algorithm: str
    """A key of `DIGEST_CHARACTERS`."""
    value: str
    """Hexadecimal, lower case."""

    def __str__(self) -> str:
        return f"{self.algorithm} {self.value}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file to be fetched."""

    url: str
    name: str
    """Under which it is stored."""
    checksum: Checksum | None = None

    def check(self, place: str) -> None:
        """Raise a `ConfigError` if the URL or the name cannot be used; `place` is where a message should point."""
        check_url(self.url, place)
        if not self.name or self.name.startswith(".") or not self.name.isprintable() or set(self.name) & set("/\\"):
            raise ConfigError(
                f"{place}: expected a file name without folders and without a leading dot, found {self.name!r}"
            )
        if len(os.fsencode(self.name)) > _LONGEST_NAME_BYTES:
            raise ConfigError(f"{place}: expected a name of at most {_LONGEST_NAME_BYTES} bytes, found {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long and how often a server is asked."""

    timeout_s: float = 60.0
    """Without a single byte."""
    attempts: int = 8
    """In a row that bring nothing new."""
    first_wait_s: float = 1.0
    """Before the second attempt; doubled with every further one."""
    longest_wait_s: float = 60.0
    longest_asked_s: float = 600.0
    """Of a wait that the server asks for."""

    def wait_s(self, failures: int, asked_s: float) -> float:
        """Seconds before the next attempt: a random part of the doubled wait, so that many do not come at once."""
        wait = min(self.first_wait_s * 2.0 ** max(0, failures - 1), self.longest_wait_s) * random.uniform(0.5, 1.0)
        return max(wait, min(asked_s, self.longest_asked_s))


@dataclass(kw_only=True)
class Record:
    """What is known of a file that is being fetched, or was."""

    url: str
    bytes: int | None = None
    """Of the whole file, if the server says it."""
    etag: str | None = None
    last_modified: str | None = None
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """By algorithm, once the whole file was checked."""
    unpacked: bool = False

    @property
    def version(self) -> str | None:
        """What ``If-Range`` may name: an ETag that promises equal bytes, else the date."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


class Transfer:
    """One file on its way from its source into a folder.

    Args:
        source: checked by `Source.check`.
        folder: exists.
        patience: with the server.
        report: told of every block that arrives, in bytes.
        say: told in words what is being waited for.
        stop: set from another thread, ends the transfer at its next block or wait.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        patience: Patience,
        report: Callable[[int], None],
        say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self.source = source
        self.path = folder / source.name
        work = folder / WORK_NAME
        self.part, self.bad = work / f"{source.name}.part", work / f"{source.name}.bad"
        self._record_path = work / f"{source.name}.json"
        self._patience = patience
        self._report = report
        self._say = say
        self._stop = stop
        self._announced: int | None = None
        self.record = self._read_record()

    @property
    def is_checked(self) -> bool:
        """The record is of the very file that the source means, and that was whole; where it is now is not asked."""
        known = self.source.checksum
        if known is None:
            return bool(self.record.digests) and self.record.url == self.source.url
        return self.record.digests.get(known.algorithm) == known.value

    @property
    def is_finished(self) -> bool:
        """The whole, checked file is in its place."""
        return self.is_checked and self.path.is_file() and self.path.stat().st_size == self.record.bytes

    @property
    def bytes_there(self) -> int:
        """Bytes of the unfinished file."""
        return self.part.stat().st_size if self.part.exists() else 0

    def size(self) -> int | None:
        """Ask the server how long the file is; None if it does not say. Without a checksum it must be as long then."""
        try:
            with open_url(self.source.url, "HEAD", {}, self._patience.timeout_s) as response:
                length = response.headers.get("Content-Length", "")
        except DownloadError:
            return None  # fetching says what is wrong
        self._announced = int(length) if length.isascii() and length.isdigit() else None
        return self._announced

    def fetch(self) -> None:
        """Bring the whole, checked file into its place; at once if it is there.

        Raises:
            ConfigError: if another file is there.
            DownloadError: if the server does not give it, it is wrong twice, or the disk refuses it.
        """
        with _saying_what_the_disk_says(self.part):
            if self.is_finished or self._adopt():
                return
            if self.record.url != self.source.url and self.source.checksum is None:
                self._forget()  # nothing says that both addresses hold the same file
            self._fetch_bytes()
            if self._finish():
                self._fetch_bytes()  # from zero: a cut may have been mended wrongly
                if fault := self._finish():
                    raise DownloadError(
                        f"{self.source.url}: for the second time {fault}; the file is kept as {self.bad}"
                    )

    def save(self, **changes: Any) -> None:
        """Change the record, on the disk too."""
        self.record = dataclasses.replace(self.record, **changes)
        write_json(self._record_path, dataclasses.asdict(self.record))

    def _finish(self) -> str | None:
        """Check the part and give it its name; if it is wrong, set it aside and return what was expected and found."""
        self._say(f"{self.path.name}: has arrived, checking")
        found, size = self._checksum_of(self.part), self.bytes_there
        if self.source.checksum:
            wrong = found != self.source.checksum
            fault = f"expected {self.source.checksum}, found {found}: the server holds another file"
        else:
            wrong = self._announced not in (None, size)
            fault = f"expected {self._announced} bytes, as the server said before, found {size}: give its checksum"
        if wrong:
            self.part.replace(self.bad)
            self._forget()
            return fault
        self.save(digests={found.algorithm: found.value})
        move_into_place(self.part, self.path)
        return None

    def _adopt(self) -> bool:
        """Take a file that is already in place, if its checksum says that it is the right one."""
        if not self.path.exists():
            return False
        expected = self.source.checksum
        if expected is None or self._checksum_of(self.path) != expected:
            raise ConfigError(
                f"{self.path}: expected nothing or {expected or 'the file'} of {self.source.url}, found another file; "
                "move it away or take another --to"
            )
        self.record = Record(url=self.source.url)
        self.save(bytes=self.path.stat().st_size, digests={expected.algorithm: expected.value})
        return True

    def _fetch_bytes(self) -> None:
        """Make attempts until the part is as long as the server says, as long as they bring something new."""
        failures, furthest = 0, self.bytes_there
        while not self._is_whole():
            self._heed_stop()
            problem = PassingError(f"{self.source.url}: the server sent less than was asked for")
            try:
                self._attempt()
            except PassingError as error:
                problem = error
            if self._is_whole():
                return
            # Only new ground counts: a server that starts over and cuts at the same place is not asked for ever.
            there = self.bytes_there
            failures = 0 if there > furthest else failures + 1
            furthest = max(furthest, there)
            if failures >= self._patience.attempts:
                raise DownloadError(
                    f"{problem}; gave up after {failures} attempts without progress, {there:,} bytes are kept: the "
                    "same command goes on from there"
                )
            wait_s = self._patience.wait_s(failures, problem.retry_after_s)
            self._say(f"{problem}; again in {wait_s:.0f} s")
            self._stop.wait(wait_s)

    def _is_whole(self) -> bool:
        return self.part.exists() and self.record.bytes == self.bytes_there

    def _attempt(self) -> None:
        """One request: the rest of the part if it can be resumed, else the file from its beginning."""
        start, version = self._where_to_resume()
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and version:
            headers["If-Range"] = version
        try:
            with open_url(self.source.url, "GET", headers, self._patience.timeout_s) as response:
                is_rest = response.status == 206
                self._copy(response, self._check_range(response, start, version) if is_rest else self._begin(response))
        except RangeRefusedError:
            self._forget()
            raise

    def _where_to_resume(self) -> tuple[int, str | None]:
        """The first byte that is wanted, and the version of the file that the bytes before it are of."""
        start = self.bytes_there
        version = self.record.version if self.record.url == self.source.url else None
        too_long = self.record.bytes is not None and start > self.record.bytes
        if start and (too_long or not (version or self.source.checksum)):
            self._forget()
            return 0, None
        return start, version

    def _begin(self, response: http.client.HTTPResponse) -> int | None:
        """Forget what was there, and note what the server says of the file that now comes; returns its length."""
        length = response.length
        if length is None and not response.chunked and self.source.checksum is None:
            raise DownloadError(
                f"{self.source.url}: the server does not say how long the file is, so a cut one looks whole; give its "
                "checksum"
            )
        self._forget()
        self.record = Record(url=self.source.url)
        self.save(bytes=length, etag=response.headers.get("ETag"), last_modified=response.headers.get("Last-Modified"))
        return length

    def _check_range(self, response: http.client.HTTPResponse, start: int, version: str | None) -> int:
        """Is this the rest of the same file? Returns how many bytes of it will come, and begins anew if it is not."""
        said_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", said_range, re.ASCII)
        first, last, total = (int(number) for number in match.groups()) if match else (-1, -1, -1)
        known = self.record.bytes
        same = not version or all(
            response.headers.get(header, ours) == ours
            for header, ours in (("ETag", self.record.etag), ("Last-Modified", self.record.last_modified))
            if ours
        )
        in_place = first == start > 0 and start <= last < total and known in (None, total)
        if not in_place or not same or response.length not in (None, last - first + 1):
            self._forget()
            raise PassingError(
                f"{self.source.url}: expected bytes {start}- of {known} of version {version}, found Content-Range "
                f"{said_range!r}, ETag {response.headers.get('ETag')}, Last-Modified "
                f"{response.headers.get('Last-Modified')}, Content-Length {response.length}"
            )
        if known is None:
            self.save(bytes=total)
        return last - first + 1

    def _copy(self, response: http.client.HTTPResponse, expected: int | None) -> None:
        """Append what arrives to the part; `expected` bytes, or until the end if the length is not known."""
        received = 0
        with self.part.open("ab", buffering=0) as part:
            while expected is None or received < expected:
                self._heed_stop()
                wanted = _BLOCK_BYTES if expected is None else min(_BLOCK_BYTES, expected - received)
                try:
                    block = response.read1(wanted)
                except NETWORK_ERRORS as error:
                    raise PassingError(f"{self.source.url}: cut after {received:,} bytes: {said(error)}") from error
                if not block:
                    break
                view = memoryview(block)
                while view:
                    view = view[part.write(view) :]
                received += len(block)
                self._report(len(block))
            os.fsync(part.fileno())
        if expected is None:
            self.save(bytes=self.bytes_there)
        elif received < expected:
            raise PassingError(f"{self.source.url}: cut after {received:,} of {expected:,} bytes")

    def _heed_stop(self) -> None:
        if self._stop.is_set():
            raise DownloadError(f"{self.source.url}: stopped")

    def _checksum_of(self, path: Path) -> Checksum:
        """By the algorithm of the source's checksum, or by SHA-256 if it has none."""
        algorithm = self.source.checksum.algorithm if self.source.checksum else "sha256"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
        return Checksum(algorithm, digest.hexdigest())

    def _forget(self) -> None:
        """Begin anew: no bytes, no version."""
        self.part.unlink(missing_ok=True)
        self._record_path.unlink(missing_ok=True)
        self.record = Record(url=self.source.url)

    def _read_record(self) -> Record:
        try:
            return Record(**json.loads(self._record_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none yet, or not ours: begin anew
            return Record(url=self.source.url)


@contextmanager
def _saying_what_the_disk_says(path: Path) -> Iterator[None]:
    """Turn errors of the file system (those of the network are others by now) into a `DownloadError`."""
    try:
        yield
    except OSError as error:
        advice = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "repair this"
        raise DownloadError(
            f"{error.filename or path}: {error.strerror}; what has arrived is kept: {advice} and run the same command "
            "again to go on"
        ) from error
