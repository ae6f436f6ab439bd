"""Ranges of files behind a URL: rules 1 to 5 of `transport.py`, kept against a server that may be broken or hostile."""

from __future__ import annotations

import re
import ssl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from urllib3 import exceptions
from urllib3.response import BaseHTTPResponse

from edge_ilseg.devices.update.connections import HEADERS, Watchdog, open_pool
from edge_ilseg.devices.update.transport import (
    PIECE_BYTES,
    WHOLE_PATIENCE,
    TransportError,
    check_path,
    collect,
    too_short,
)
from edge_ilseg.errors import UpdateError

MAX_SKIP_BYTES = 256 << 20
"""Thrown away at most, of one answer that ignores `Range`."""
MAX_REDIRECTS = 5
ADDRESS_HINT = "write it as https://host/folder"
RANGES_HINT = "use a server that knows ranges (any usual one does)"
MAX_RETRY_AFTER_S = 86_400.0
WAIT_STATUSES = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
CLOCK_HINT = "is the device's clock right, and does it know the authority of the certificate (SSL_CERT_FILE)?"


class HttpTransport:
    """A repository behind a URL."""

    def __init__(self, repository: str, *, timeout_s: float) -> None:
        self._base = _checked_base(repository)
        self._timeout_s = timeout_s
        self._pool = open_pool(timeout_s)
        self.has_ranges = True

    def read_range(self, path: str, start: int, end: int | None) -> Generator[bytes, None, None]:
        """See `Transport.read_range`."""
        check_path(path)
        if end is not None and end <= start:
            return
        url = self._base + quote(path)
        with as_transport_errors(url):
            response = self._request(url, start, end)
            try:
                try:
                    skip, left = self._check_answer(response, url, start, end)
                except TransportError as error:
                    if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT) and self._is_at_end(response):
                        raise _cut(url, f"in the head of the answer ({error.what})") from error
                    raise
                yield from self._body(response, url, skip, left)
            finally:
                response.close()  # a connection whose answer was read whole has gone back to the pool before

    def read_whole(self, path: str, max_bytes: int) -> bytes:
        """See `Transport.read_whole`."""
        deadline_s = WHOLE_PATIENCE * self._timeout_s
        return collect(self.read_range(path, 0, None), max_bytes, self._base + path, deadline_s=deadline_s)

    def _request(self, url: str, start: int, end: int | None) -> BaseHTTPResponse:
        """The answer, after redirections (rule 4)."""
        headers = dict(HEADERS)
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            response = self._pool.request(
                "GET", target, headers=headers, preload_content=False, decode_content=False, redirect=False
            )
            location = response.get_redirect_location()
            if not location:
                return response
            response.close()
            target = urljoin(target, location)
            scheme = urlsplit(target).scheme
            if scheme != urlsplit(url).scheme:
                raise TransportError(
                    "the server sends us to an address of another kind",
                    where=url,
                    found=f"{scheme[:20]}://",
                    expected=f"{urlsplit(url).scheme}://",
                    hint="give the address that it sends to as the repository, if you trust it",
                    status=response.status,
                )
        raise TransportError(
            "the server sends us in a circle",
            where=url,
            found=f"{MAX_REDIRECTS} redirections",
            hint="mend the redirections of the server",
        )

    def _check_answer(
        self, response: BaseHTTPResponse, url: str, start: int, end: int | None
    ) -> tuple[int, int | None]:
        """How many bytes of the body to throw away, and how many to take (`None`: all)."""
        if response.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            raise _status_error(response, url)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise TransportError(
                "the server compresses its answer, and nobody asked for it",
                where=url,
                found=f"Content-Encoding: {encoding[:40]}",
                hint="let the server send the files of the repository as they are",
            )
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            return 0, _check_part(response, url, start, end)
        length = _declared_bytes(response)
        if length is not None and length < (start if end is None else end):
            raise too_short(url, length, start if end is None else end)
        if start or (end is not None and end != length):
            self.has_ranges = False
        if start > MAX_SKIP_BYTES:
            raise TransportError(
                "the server cannot send a part of a file",
                where=url,
                found=f"it ignores Range, and {start} bytes stand before the part",
                expected=f"at most {MAX_SKIP_BYTES}",
                hint=RANGES_HINT,
            )
        if end is None:
            return start, None if length is None else length - start
        return start, end - start

    def _is_at_end(self, response: BaseHTTPResponse) -> bool:
        """Whether not a byte follows the head: to `http.client`, a head that was cut looks like one that is whole."""
        with Watchdog(response.shutdown, self._timeout_s):
            return not response.read1(1)

    def _body(self, response: BaseHTTPResponse, url: str, skip: int, left: int | None) -> Iterator[bytes]:
        """The body in pieces, without its first `skip` bytes and with no byte more than `left`."""
        is_empty = True
        with Watchdog(response.shutdown, self._timeout_s) as dog:
            while left is None or left > 0:
                piece = _next_piece(response, dog, url)
                if not piece:
                    break
                is_empty = False
                skipped = min(skip, len(piece))
                skip -= skipped
                piece = piece[skipped:] if left is None else piece[skipped : skipped + left]
                if left is not None:
                    left -= len(piece)
                if piece:
                    yield piece
        if left or skip:
            raise _cut(url, f"{left or skip} bytes are lacking")
        if is_empty and not response.headers.keys() & {"Content-Length", "Transfer-Encoding"}:
            raise _cut(url, "in the head of the answer")


def _next_piece(response: BaseHTTPResponse, dog: Watchdog, url: str) -> bytes:
    """What has arrived, as soon as there is something; empty at the end."""
    dog.feed()
    try:
        piece = response.read1(PIECE_BYTES)
    except exceptions.HTTPError:
        if not dog.has_bitten:
            raise
        piece = b""
    dog.rest()
    if dog.has_bitten:  # also where no length was declared, and a shut socket looks like the end of the file
        raise _slow(url)
    return piece


def check_address(address: str, what: str) -> SplitResult:
    """The parts of an http(s) address.

    Raises:
        UpdateError: it is none, or holds a password; `what` names it.
    """
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UpdateError(f"{what} is no URL", where=address, found=str(error), hint=ADDRESS_HINT) from error
    if parts.username is not None or parts.password is not None:
        raise UpdateError(
            f"{what} holds a password",
            where=f"{parts.scheme}://…@{host}",
            hint="leave it out: what is signed needs no secret to be fetched, and a device keeps none",
        )
    if not host:
        raise UpdateError(f"{what} names no host", where=address, expected="https://host/folder", hint=ADDRESS_HINT)
    return parts


def _checked_base(repository: str) -> str:
    parts = check_address(repository, "the address of the repository")
    if parts.query or parts.fragment:
        raise UpdateError(
            "the address of the repository is not plain",
            where=repository,
            expected="https://host/folder",
            hint=ADDRESS_HINT,
        )
    return repository.rstrip("/") + "/"


def _declared_bytes(response: BaseHTTPResponse) -> int | None:
    """Length of the body as the server declares it; what is no length says nothing."""
    text = response.headers.get("Content-Length", "")
    if "Transfer-Encoding" in response.headers or not re.fullmatch(r"[0-9]{1,18}", text):
        return None
    return int(text)


def _check_part(response: BaseHTTPResponse, url: str, start: int, end: int | None) -> int:
    """Length of the part, which must be the one that was asked for."""
    text = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", text.strip())
    if match is None:
        raise _wrong_part(url, text, start, end)
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if end is not None and total is not None and total < end:
        raise too_short(url, total, end)
    wanted_last = end - 1 if end is not None else total - 1 if total is not None else last
    if first != start or last != wanted_last or last < first or (start == 0 and end is None):
        raise _wrong_part(url, text, start, end)
    length = _declared_bytes(response)
    if length is not None and length != last - first + 1:
        raise TransportError(
            "the server contradicts itself about the length of a part",
            where=url,
            found=f"Content-Length: {length}",
            expected=f"{last - first + 1} bytes, as in Content-Range",
            hint=RANGES_HINT,
        )
    return last - first + 1


def _wrong_part(url: str, text: str, start: int, end: int | None) -> TransportError:
    return TransportError(
        "the server sends another part than was asked for",
        where=url,
        found=f"Content-Range: {text[:80] or 'none'}",
        expected=f"bytes {start}-{'' if end is None else end - 1}",
        hint=RANGES_HINT,
    )


def _status_error(response: BaseHTTPResponse, url: str) -> TransportError:
    status = response.status
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return too_short(url, None, 0)
    what = {
        401: "the server refuses a file of the repository",
        403: "the server refuses a file of the repository",
        404: "a file is not in the repository",
        410: "a file is not in the repository",
    }.get(status, "the server does not give a file")
    return refused(what, response, url)


def _hint_of(status: int, is_transient: bool) -> str | None:
    if status in (401, 403):
        return "let the server give it to everybody: what is signed needs no login, and a device keeps none"
    return None if is_transient else "correct the address, or publish or copy it again"


def refused(what: str, response: BaseHTTPResponse, url: str) -> TransportError:
    """The error of an answer with a status that says no."""
    is_transient = response.status >= 500 or response.status in WAIT_STATUSES
    return TransportError(
        what,
        where=url,
        found=f"HTTP status {response.status}",
        is_transient=is_transient,
        status=response.status,
        retry_after_s=_retry_after_s(response) if is_transient else None,
        hint=_hint_of(response.status, is_transient),
    )


def _retry_after_s(response: BaseHTTPResponse) -> float | None:
    """How long the server asks to be left alone, capped; a date is measured by the server's own clock."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(response.headers.get("Date", ""))
    except (ValueError, TypeError):  # no date, or one of them without a time zone
        return None
    return min(max(0.0, wait.total_seconds()), MAX_RETRY_AFTER_S)


@contextmanager
def as_transport_errors(url: str) -> Iterator[None]:
    """Let nothing but `TransportError` out of a conversation with a server."""
    try:
        yield
    except (exceptions.HTTPError, HTTPException, OSError, ValueError) as error:
        raise _as_transport_error(error, url) from error


def _as_transport_error(error: Exception, url: str) -> TransportError:
    found = str(error)[:300]
    if isinstance(error, exceptions.SSLError):
        if error.args and isinstance(error.args[0], ssl.SSLCertVerificationError):
            return TransportError(
                "the server does not prove who it is", where=url, found=error.args[0].verify_message, hint=CLOCK_HINT
            )
        return TransportError("the encrypted connection broke", where=url, found=found, is_transient=True)
    if isinstance(error, exceptions.NameResolutionError):
        return TransportError("the server's name is not known", where=url, found=found, is_transient=True)
    if isinstance(error, exceptions.NewConnectionError):
        return TransportError("the server cannot be reached", where=url, found=found, is_transient=True)
    if isinstance(error, (exceptions.TimeoutError, TimeoutError)):
        return _slow(url)
    if isinstance(error, (exceptions.ProtocolError, OSError)):
        return _cut(url, found)
    return TransportError(
        "the server's answer cannot be understood",
        where=url,
        found=found,
        hint="see whether a proxy answers in place of the server",
    )


def _slow(url: str) -> TransportError:
    return TransportError("the server does not answer in time", where=url, is_transient=True)


def _cut(url: str, found: str) -> TransportError:
    return TransportError("the connection was cut", where=url, found=found, is_transient=True)
