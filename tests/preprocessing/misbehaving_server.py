"""A web server on loopback that misbehaves when a test asks for it, and notes what it was asked."""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PIECE_BYTES = 16 << 10


@dataclass(kw_only=True)
class Fault:
    """What one answer does wrong."""

    status: int | None = None
    """Status of an answer without the file."""
    location: str = ""
    """Address of a redirect."""
    cut_after: int | None = None
    """Number of bytes of the body after which the connection breaks."""
    ignore_range: bool = False
    stall: bool = False
    """Send the header and nothing more."""


@dataclass
class Server:
    """Files by path, and faults for the GETs of a path."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    """Faults of the next GETs."""
    always: dict[str, Fault] = field(default_factory=dict)
    """Fault of every later GET."""
    versions: bool = True
    """Send an ETag and honour If-Range."""
    pause_s: float = 0.0
    """Pause after each 16 KiB."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and range of each request."""
    sent: int = 0
    """Bytes of all bodies."""
    url: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def gets(self, path: str) -> list[str | None]:
        """Return the ranges of all GETs of a path."""
        return [range for method, asked, range in self.requests if (method, asked) == ("GET", path)]


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server until the block ends."""
    server = Server()
    handler = type("Handler", (_Handler,), {"server_state": server})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
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
    server_state: Server

    def do_HEAD(self) -> None:
        self._answer("HEAD", Fault())

    def do_GET(self) -> None:
        faults = self.server_state.faults.get(self.path)
        self._answer("GET", faults.pop(0) if faults else self.server_state.always.get(self.path, Fault()))

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _answer(self, method: str, fault: Fault) -> None:
        state, data, wanted = self.server_state, self.server_state.files.get(self.path), self.headers.get("Range")
        state.requests.append((method, self.path, wanted))
        if fault.status or data is None:
            return self._head(fault.status or 404, 0, {"Location": fault.location} if fault.location else {})
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"ETag": etag} if state.versions else {}
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        if not match or fault.ignore_range or self.headers.get("If-Range", etag) != etag:
            body = data
            self._head(200, len(body), headers)
        elif (start := int(match[1])) >= len(data):
            return self._head(416, 0, {"Content-Range": f"bytes */{len(data)}"})
        else:
            body = data[start:]
            self._head(206, len(body), headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})
        if fault.stall:
            state.ended.wait()
        return None if method == "HEAD" else self._send(body[: fault.cut_after])

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True

    def _send(self, body: bytes) -> None:
        for start in range(0, len(body), _PIECE_BYTES):
            try:
                self.wfile.write(body[start : start + _PIECE_BYTES])
            except OSError:  # the client went away
                return
            self.server_state.sent += len(body[start : start + _PIECE_BYTES])
            time.sleep(self.server_state.pause_s)
