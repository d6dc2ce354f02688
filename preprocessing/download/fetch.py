"""Fetch one file with the program `curl`, resume it by byte range, and give it its name once its checksum is right.

In: a `Source` and a folder. Out: ``FOLDER/NAME``. The work folder ``FOLDER/.download`` holds for each file
``NAME.part`` (the bytes so far), ``NAME.headers`` (what the server said of them), ``NAME.bad`` (a file that failed its
check) and ``NAME.done`` (the file is complete, and which one it is).

curl writes to a pipe and this process writes the file: when this process is killed, curl ends with it.
"""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from d2v2ds.errors import ConfigError, D2V2Error
from d2v2ds.io import durable
from d2v2ds.io.read import read_text

WORK_NAME = ".download"
"""Folder beside the fetched files; hidden, so that the packers skip it."""
ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}
"""Checksum algorithms by their number of hexadecimal characters."""
SILENCE_S = 60
"""Longest time to connect, and longest time without a byte."""
ATTEMPTS = 8
"""Number of attempts in a row without a new byte."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""Pause before the second attempt, doubled before each later one up to the longest."""
_BLOCK_BYTES = 1 << 20
_RANGE_REFUSED = 33
"""curl's exit code if the server ignores the requested range or sends another one."""
_TRANSIENT = frozenset({5, 6, 7, 16, 18, 28, 35, 52, 55, 56, 92})
"""curl's exit codes for what a later attempt may not meet: name lookup, connection, silence, broken transfers."""
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that a later attempt may not meet."""


class DownloadError(D2V2Error):
    """A file could not be fetched, checked or written."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file on a server."""

    url: str
    name: str
    """File name to store it under."""
    checksum: str = ""
    """Expected checksum in lower-case hexadecimal, whose length tells the algorithm; empty if unknown."""

    @property
    def algorithm(self) -> str:
        """Checksum algorithm; SHA-256 if no checksum is known."""
        return ALGORITHMS[len(self.checksum)] if self.checksum else "sha256"


def say(line: str) -> None:
    """Print a line for the user, in place of the progress line of a terminal."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(line, flush=True)


class Transfer:
    """Transfer of one source into a folder with an existing work folder."""

    def __init__(self, source: Source, folder: Path) -> None:
        self.source = source
        self.path = folder / source.name
        self.work = folder / WORK_NAME
        self.report: Callable[[int], None] = lambda size: None
        """Called with the number of bytes of every block."""
        self._part, self._headers = (self.work / f"{source.name}.{suffix}" for suffix in ("part", "headers"))

    def is_done(self, place: Path) -> bool:
        """Return whether `place`, the file or a folder made from it, is complete and belongs to this source."""
        record = self.work / f"{place.name}.done"
        try:
            return place.exists() and read_text(record, ConfigError) == (self.source.checksum or self.source.url)
        except ConfigError:
            return False  # absent or damaged: fetched again

    def record(self, place: Path) -> None:
        """Note that `place` belongs to this source; to be called just before it appears complete, by a rename."""
        (self.work / f"{place.name}.done").write_text(self.source.checksum or self.source.url)

    def remaining_bytes(self) -> int:
        """Ask the server for the size of the file and return how much of it is missing; 0 if it does not answer."""
        answer = subprocess.run(
            self._command("--head", "--max-time", str(SILENCE_S)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        size = _fields(answer.stdout).get("content-length", "") if answer.returncode == 0 else ""
        return (
            max(int(size) - self._present(), 0) if size.isdecimal() and len(size) < 19 and not self.path.exists() else 0
        )

    def fetch(self) -> None:
        """Fetch the file, check it and move it into place; return at once if it is there.

        Raises:
            ConfigError: if another file has its name.
            DownloadError: if the server does not send it, or it has another checksum than expected.
        """
        source = self.source
        if self.is_done(self.path):
            return
        if self.path.exists():
            if not source.checksum or self._digest(self.path) != source.checksum:
                raise ConfigError(f"{self.path}: found another file than that of {source.url}: move it away")
            self.record(self.path)
            return
        for is_last in (False, True):
            is_resumed = self._fetch_bytes()
            found = self._digest(self._part)
            if found == (source.checksum or found):
                break
            bad = self._part.replace(self._part.with_suffix(".bad"))
            problem = f"{source.url}: expected {source.algorithm} {source.checksum}, found {found}"
            if is_last or not is_resumed:
                raise DownloadError(f"{problem}: the server has another file, kept as {bad}; check the checksum")
            say(f"{problem}, in a resumed file; fetching it again from its first byte")
        verdict = "as expected" if source.checksum else "not checked, for no checksum was given"
        say(f"{source.name}: {source.algorithm} {found}, {verdict}")
        self.record(self.path)
        durable.move_into_place(self._part, self.path)

    def _fetch_bytes(self) -> bool:
        """Request bytes until the partial file is complete; return whether it holds bytes of an earlier request."""
        furthest, failures = self._present(), 0
        while True:
            start = self._resume_position()
            problem = self._request(start)
            if problem is None:
                return start > 0
            present = self._present()
            failures = 0 if present > furthest else failures + 1
            furthest = max(furthest, present)  # a server that starts over and breaks off again makes no progress
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"{problem}; gave up after {failures} attempts without progress, {present:,} bytes are kept: run "
                    "the same command again to continue"
                )
            wait_s = min(FIRST_WAIT_S * 2 ** max(failures - 1, 0), LONGEST_WAIT_S)
            say(f"{problem}; next attempt in {wait_s:.0f} s")
            time.sleep(wait_s)

    def _resume_position(self) -> int:
        """Return the first byte to request: the last one present, so that a complete file has a byte to ask for."""
        return max(self._present() - 1, 0) if self.source.checksum or self._version() else 0

    def _request(self, start: int) -> str | None:
        """Write the bytes from `start` on into the partial file.

        Returns:
            None if that was all of them, else why another attempt is needed.

        Raises:
            DownloadError: if no attempt can succeed.
        """
        options = ["--dump-header", str(self._headers)]
        if start:
            options = ["--continue-at", str(start)]
            if not self.source.checksum:  # then only the version tells whether the bytes are of the same file
                options += ["--header", f"If-Range: {self._version()}"]
        self.report(start - self._present())
        with (
            self._part.open("r+b" if start else "wb") as part,
            subprocess.Popen(self._command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as curl,
        ):
            assert curl.stdout is not None and curl.stderr is not None
            part.seek(start)
            while block := os.read(curl.stdout.fileno(), _BLOCK_BYTES):
                part.write(block)
                self.report(len(block))
            part.flush()
            durable.fsync(part.fileno(), self._part)
            messages = curl.stderr.read().decode(errors="replace")
        return self._problem(curl.returncode, messages)

    def _problem(self, code: int, messages: str) -> str | None:
        """Judge the exit code of curl and its messages; return and raise like `_request`."""
        said = re.search(r"curl: \(\d+\).*", messages)
        problem = f"{self.source.url}: {said[0] if said else f'curl ended with exit code {code}'}"
        found = re.search(r"returned error: (\d{3})", problem)
        status = int(found[1]) if found else 0
        if code == _RANGE_REFUSED or status == 416:
            self.report(-self._present())
            self._part.unlink()
            return f"{problem}; the server cannot continue the partial file, which is removed"
        if code == 0:
            return None
        if code in _TRANSIENT or status in _BUSY:
            return problem
        raise DownloadError(f"{problem}: check the address and run the same command again")

    def _command(self, *options: str) -> list[str]:
        schemes = "=https" if self.source.url.startswith("https:") else "=http,https"  # never from https to http
        return [
            *("curl", "--silent", "--show-error", "--fail", "--globoff", "--location", "--max-redirs", "10"),
            *("--proto", schemes, "--proto-redir", schemes, "--connect-timeout", str(SILENCE_S)),
            *("--speed-limit", "1", "--speed-time", str(SILENCE_S), *options, "--url", self.source.url),
        ]

    def _version(self) -> str:
        """Return the server's strong ETag of the partial file, else its date; empty if there is neither."""
        fields = _fields(self._headers.read_bytes()) if self._headers.exists() else {}
        etag = fields.get("etag", "")
        return etag if etag.startswith('"') else fields.get("last-modified", "")

    def _present(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _digest(self, path: Path) -> str:
        with path.open("rb") as file:
            new = partial(hashlib.new, self.source.algorithm, usedforsecurity=False)
            return hashlib.file_digest(file, new).hexdigest()


def _fields(headers: bytes) -> dict[str, str]:
    """Return the header fields of the last answer; those of redirects and proxies come before it."""
    last = re.split(r"\r?\n\r?\n", headers.decode("latin-1").strip())[-1]
    lines = (line.partition(":") for line in last.splitlines())
    return {name.lower(): value.strip() for name, _, value in lines}
