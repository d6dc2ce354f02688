"""A web server on loopback that can be told to misbehave, and counts what it sent."""

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PIECE_BYTES = 16 << 10


@dataclass(kw_only=True)
class Fault:
    """What one answer does otherwise than it should."""

    status: int | None = None
    """Answer this and nothing else."""
    headers: dict[str, str] = field(default_factory=dict)
    """Added or changed; an empty value takes one away."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    ignore_range: bool = False
    ignore_if_range: bool = False
    shift_range: int = 0
    """Send bytes from another place than asked for, and say so."""
    surplus: bytes = b""
    """Sent behind the body, whatever the length says."""
    stall: bool = False
    """Send the header and nothing more until the server ends."""


@dataclass
class Request:
    """What a client asked."""

    method: str
    path: str
    range: str | None


@dataclass
class Server:
    """Files by path, and faults for the next GETs of a path."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    """For every GET of a path that has no fault left."""
    heads: bool = True
    """HEAD is answered."""
    versions: bool = True
    """Send ETag and Last-Modified."""
    pause_s: float = 0.0
    """After each 16 KiB."""
    requests: list[Request] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies by path."""
    url: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def gets(self, path: str) -> list[str | None]:
        """The ranges of all GETs of a path."""
        return [request.range for request in self.requests if (request.method, request.path) == ("GET", path)]


@contextmanager
def serving() -> Iterator[Server]:
    """A server that runs until the block ends."""
    server = Server()

    class Handler(_Handler):
        told = server

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            http.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: Server

    def do_HEAD(self) -> None:
        self._note("HEAD")
        if (fault := self.told.always.get(self.path)) and fault.headers.get("Location"):
            return self._status(302, fault.headers)
        if not self.told.heads:
            return self._status(405, {})
        if (data := self.told.files.get(self.path)) is None:
            return self._status(404, {})
        return self._head(200, {"Content-Length": str(len(data))})

    def do_GET(self) -> None:
        self._note("GET")
        faults = self.told.faults.get(self.path)
        fault = faults.pop(0) if faults else self.told.always.get(self.path, Fault())
        if fault.status:
            return self._status(fault.status, fault.headers)
        if (data := self.told.files.get(self.path)) is None:
            return self._status(404, {})
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"ETag": etag, "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"} if self.told.versions else {}
        start, status = 0, 200
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        current = fault.ignore_if_range or self.headers.get("If-Range", etag) in headers.values() or not headers
        if match and current and not fault.ignore_range:
            start, status = int(match[1]) + fault.shift_range, 206
            if start >= len(data):
                return self._status(416, {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        headers["Content-Length"] = str(len(body))
        self._head(status, {name: value for name, value in (headers | fault.headers).items() if value})
        if fault.stall:
            self.told.ended.wait()
        return self._send((body if fault.cut_after is None else body[: fault.cut_after]) + fault.surplus)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _note(self, method: str) -> None:
        self.told.requests.append(Request(method, self.path, self.headers.get("Range")))

    def _status(self, status: int, headers: dict[str, str]) -> None:
        self._head(status, headers | {"Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True

    def _send(self, body: bytes) -> None:
        for start in range(0, len(body), _PIECE_BYTES):
            piece = body[start : start + _PIECE_BYTES]
            try:
                self.wfile.write(piece)
            except OSError:  # the client went away
                return
            self.told.sent[self.path] += len(piece)
            time.sleep(self.told.pause_s)
