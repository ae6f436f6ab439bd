"""HTTP connections on which no wait is longer than allowed, whatever the other side does.

1. A connection, a whole head of an answer, and each next piece of a body come within the timeout, or the socket is
   shut: a socket's own timeout begins anew with every byte, and a head that drips would hold a device for ever.
2. Nothing is tried again, and no redirection followed, below the caller.
3. TLS certificates are checked against the system's authorities (or `SSL_CERT_FILE`).
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.response import HTTPResponse

from edge_ilseg import __version__

HEADERS = {"User-Agent": f"edge-ilseg/{__version__}", "Accept-Encoding": "identity"}


class Watchdog:
    """Calls `shut`, from a thread of its own, when it has not been fed for `limit_s`; a `with` block ends it."""

    def __init__(self, shut: Callable[[], object], limit_s: float) -> None:
        self._shut = shut
        self._limit_s = limit_s
        self._until = time.monotonic() + limit_s
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.has_bitten = False

    def feed(self) -> None:
        """Begin the limit anew."""
        self._until = time.monotonic() + self._limit_s

    def rest(self) -> None:
        """Nobody waits for the other side: no limit until it is fed again."""
        self._until = math.inf

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:  # after this, the socket may serve another request: it must not be shut any more
            self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(max(0.0, self._until - time.monotonic()), self._limit_s)):
            with self._lock:
                if self._ended.is_set():
                    return
                if time.monotonic() >= self._until:
                    self.has_bitten = True
                    with suppress(OSError, RuntimeError, ValueError):  # closed, or given back, in this very moment
                        self._shut()
                    return


def _get_response(connection: HTTPConnection, get: Callable[[], HTTPResponse]) -> HTTPResponse:
    """The head of an answer, within the connection's timeout (rule 1)."""
    opened: socket.socket = connection.sock
    limit_s = connection.timeout if isinstance(connection.timeout, (int, float)) else 60.0
    with Watchdog(lambda: opened.shutdown(socket.SHUT_RDWR), limit_s) as dog:
        try:
            return get()
        except Exception as error:
            if dog.has_bitten:
                raise TimeoutError("the head of the answer came too slowly") from error
            raise


class _Connection(HTTPConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        return _get_response(self, super().getresponse)


class _TlsConnection(HTTPSConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        return _get_response(self, super().getresponse)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def open_pool(timeout_s: float) -> urllib3.PoolManager:
    """Connections that keep the rules; each lives from request to request."""
    pool = urllib3.PoolManager(
        num_pools=4,
        maxsize=1,
        timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
        retries=False,
        headers=HEADERS,
    )
    pool.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return pool
