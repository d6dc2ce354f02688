"""One request over http or https; every way it can fail becomes one of two errors.

In: a URL, a method, headers. Out: a response of status 200 or 206. `PassingError` is what another attempt may not meet
(a cut connection, a busy server), `DownloadError` what it will. Other schemes cannot be reached, by redirects neither:
the opener has no handler for them. Proxies are taken from the environment, as Python's own downloads do.
"""

import datetime
import email.utils
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from d2v2ds import __version__
from d2v2ds.errors import ConfigError, D2V2Error

NETWORK_ERRORS = (OSError, http.client.HTTPException)
"""What opening or reading a connection raises."""
RANGE_REFUSED = 416
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_SCHEMES = ("http", "https")


class DownloadError(D2V2Error):
    """A file could not be fetched, checked or written."""


class PassingError(DownloadError):
    """An attempt failed; another one may not."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """How long the server asked to be left alone."""


class RangeRefusedError(PassingError):
    """The server has no bytes from there on: its file is shorter than what is on the disk."""


def check_url(url: str, place: str) -> None:
    """Raise a `ConfigError` unless `url` is http or https, has a host, and is ASCII without spaces.

    Args:
        url: as the user or a list wrote it.
        place: where a message should point.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{place}: expected a URL, found {url!r}: {error}") from error
    if parts.scheme not in _SCHEMES or not host:
        raise ConfigError(f"{place}: expected an http or https URL with a host, found {url!r}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"{place}: expected a URL with spaces and other characters percent-encoded, found {url!r}")


def open_url(url: str, method: str, headers: Mapping[str, str], timeout_s: float) -> http.client.HTTPResponse:
    """Send a request, follow redirects, return the answer; the caller closes it.

    Raises:
        PassingError: if another attempt may succeed.
        DownloadError: if it will not.
    """
    everything = {"User-Agent": f"d2v2ds/{__version__}", "Accept-Encoding": "identity", **headers}
    request = urllib.request.Request(url, method=method, headers=everything)
    try:
        response: http.client.HTTPResponse = _opener().open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(url, error) from error
    except NETWORK_ERRORS as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise DownloadError(f"{url}: the server's certificate is not valid: {error}") from error
        raise PassingError(f"{url}: no connection: {said(error)}") from error
    if response.status not in (200, 206):
        with response:
            raise DownloadError(f"{url}: expected status 200 or 206, found {response.status} {response.reason}")
    return response


def said(error: BaseException) -> str:
    """What a network error says; some say nothing but their name."""
    return str(error) or type(error).__name__


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, never from https to http, and keeps the method (urllib makes HEAD a GET)."""

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
                         ) -> urllib.request.Request | None:  # fmt: skip
        old, new = urlsplit(req.full_url).scheme, urlsplit(urljoin(req.full_url, newurl)).scheme
        if new not in _SCHEMES or (old, new) == ("https", "http"):
            raise DownloadError(
                f"{req.full_url}: redirected to {newurl}, expected http or https and never from https to http: give "
                "the address of a server that you trust"
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            request.method = req.get_method()
        return request


def _opener() -> urllib.request.OpenerDirector:
    """Not `build_opener`, which adds handlers for ``ftp:``, ``file:`` and ``data:``."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
        _SafeRedirects(),
    ):
        opener.add_handler(handler)
    return opener


def _refusal(url: str, error: urllib.error.HTTPError) -> DownloadError:
    message = f"{url}: the server answered {error.code} {error.reason}"
    if error.code == RANGE_REFUSED:
        return RangeRefusedError(message)
    if error.code in _BUSY:
        return PassingError(message, _seconds(error.headers.get("Retry-After", "")))
    return DownloadError(f"{message}: check the address")


def _seconds(retry_after: str) -> float:
    """The header ``Retry-After`` in seconds from now: it is a number or a date; 0 for anything else."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    now = datetime.datetime.now(datetime.UTC)
    return max(0.0, (date.replace(tzinfo=date.tzinfo or datetime.UTC) - now).total_seconds())
