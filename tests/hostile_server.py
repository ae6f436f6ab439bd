"""A real HTTP server on the loopback that serves bytes from memory, and misbehaves as it is told.

`faults` holds one fault for each of the next requests (`None`: answer well); `always` is for all that come after them.
A fault is a function that gets the `Exchange` and writes whatever it wants to the socket; those below are parts to
build scripts of. What was asked is in `requests`.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HANG_S = 60.0
"""Longer than any test waits: a server that hangs is given up, not waited for."""
PIECE_BYTES = 16 << 10


@dataclass(frozen=True)
class Request:
    """What was asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def range(self) -> tuple[int, int | None] | None:
        """First byte, and the end (exclusive) where one was named."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        return None if match is None else (int(match[1]), int(match[2]) + 1 if match[2] else None)


@dataclass
class Exchange:
    """One request, the file that it asks for, and the socket for the answer."""

    request: Request
    data: bytes | None
    handler: Handler
    server: HostileServer

    @property
    def bounds(self) -> tuple[int, int]:
        """First byte and end of the part that was asked for."""
        size = len(self.data or b"")
        start, end = self.request.range or (0, None)
        return start, size if end is None else min(end, size)

    def head(self, status: int, headers: Iterable[tuple[str, object]] = ()) -> None:
        """Status line and headers, exactly these."""
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers)]
        self.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def write(self, data: bytes) -> None:
        """Bytes as they are."""
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def hang(self, seconds: float = HANG_S) -> None:
        """Wait, until the server is stopped at the latest."""
        self.server.stopping.wait(seconds)

    def good_headers(self, **changes: object) -> tuple[int, list[tuple[str, object]]]:
        """Status and headers of a good answer; `changes` replace or (with `None`) leave out, `_` stands for `-`."""
        start, end = self.bounds
        headers: dict[str, object] = {"Content-Length": end - start}
        if self.request.range:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(self.data or b'')}"
        headers.update({name.replace("_", "-"): value for name, value in changes.items()})
        status = 206 if self.request.range else 200
        return status, [(name, value) for name, value in headers.items() if value is not None]

    def answer(self, body: bytes | None = None, **changes: object) -> None:
        """A good answer, or one with other headers or another body."""
        if self.data is None:
            self.head(404, [("Content-Length", 0)])
            return
        start, end = self.bounds
        if start >= len(self.data):
            self.head(416, [("Content-Length", 0)])
            return
        status, headers = self.good_headers(**changes)
        self.head(status, headers)
        self.write(self.data[start:end] if body is None else body)


Fault = Callable[[Exchange], None]


class Handler(BaseHTTPRequestHandler):
    """Hands every request to the script."""

    protocol_version = "HTTP/1.1"
    hostile: HostileServer

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self.rfile.read(length))
        with self.hostile.lock:
            self.hostile.requests.append(request)
            fault = self.hostile.faults.popleft() if self.hostile.faults else self.hostile.always
        exchange = Exchange(request, self.hostile.files.get(unquote(self.path.lstrip("/"))), self, self.hostile)
        try:
            (fault or well)(exchange)
        except OSError:  # the device has hung up, as it may
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@dataclass
class HostileServer:
    """What the server has, does, and was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: deque[Fault | None] = field(default_factory=deque)
    always: Fault | None = None
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)

    def reset(self, files: dict[str, bytes]) -> None:
        """Serve other files, and forget all else."""
        with self.lock:
            self.files, self.always = dict(files), None
            self.faults.clear()
            self.requests.clear()

    @property
    def ranges(self) -> list[tuple[int, int | None] | None]:
        """The parts that were asked for, in order."""
        return [request.range for request in self.requests]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what this server is for."""


@contextmanager
def hostile_server(
    files: dict[str, bytes] | None = None, *, certificate: Path | None = None
) -> Iterator[HostileServer]:
    """Run a server; with `certificate` (a PEM file with the key in it) behind TLS."""
    hostile = HostileServer(files=dict(files or {}))
    handler = type("BoundHandler", (Handler,), {"hostile": hostile})
    with _Server(("127.0.0.1", 0), handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scheme = "http" if certificate is None else "https"
        hostile.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hostile
        finally:
            hostile.stopping.set()
            server.shutdown()
            thread.join()


def well(exchange: Exchange) -> None:
    """A good answer."""
    exchange.answer()


def cut_after(count: int, *, reset: bool = False) -> Fault:
    """The connection ends `count` bytes into the body; with `reset`, by a TCP reset."""

    def fault(exchange: Exchange) -> None:
        start, end = exchange.bounds
        status, headers = exchange.good_headers()
        exchange.head(status, headers)
        exchange.write((exchange.data or b"")[start : min(end, start + count)])
        hang_up(exchange, reset=reset)

    return fault


def hang_up(exchange: Exchange, *, reset: bool = False) -> None:
    """End the connection, without an answer where there was none yet."""
    connection = exchange.handler.connection
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    else:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    exchange.handler.close_connection = True


def ignores_range(exchange: Exchange) -> None:
    """The whole file, whatever was asked."""
    data = exchange.data or b""
    exchange.head(200, [("Content-Length", len(data))])
    exchange.write(data)


def headers(**changes: object) -> Fault:
    """A good answer but for some headers; `None` leaves one out."""
    return lambda exchange: exchange.answer(**changes)


def status(code: int, *extra: tuple[str, object], body: bytes = b"no") -> Fault:
    """An answer with that status."""

    def fault(exchange: Exchange) -> None:
        exchange.head(code, [("Content-Length", len(body)), *extra])
        exchange.write(body)

    return fault


def redirect(to: str, code: int = 302) -> Fault:
    """Send the device elsewhere."""
    return status(code, ("Location", to), body=b"")


def flips(position: int) -> Fault:
    """One bit of the file is another, in whatever part holds it."""

    def fault(exchange: Exchange) -> None:
        data = bytearray(exchange.data or b"")
        data[position] ^= 1
        start, end = exchange.bounds
        exchange.answer(bytes(data[start:end]))

    return fault


def endless(exchange: Exchange) -> None:
    """A body without a length that never ends: the file, and then zeros."""
    start, _ = exchange.bounds
    code, _ = exchange.good_headers()
    extra = [(name, value) for name, value in exchange.good_headers()[1] if name != "Content-Length"]
    exchange.head(code, [*extra, ("Connection", "close")])
    exchange.write((exchange.data or b"")[start:])
    while not exchange.server.stopping.is_set():
        exchange.write(bytes(PIECE_BYTES))


def drip(data: bytes, every_s: float) -> Fault:
    """Exactly these bytes, one at a time, instead of an answer."""

    def fault(exchange: Exchange) -> None:
        for value in data:
            if exchange.server.stopping.wait(every_s):
                return
            exchange.write(bytes([value]))

    return fault


def drips_the_body(every_s: float) -> Fault:
    """A good head, and the body one byte at a time."""

    def fault(exchange: Exchange) -> None:
        code, extra = exchange.good_headers()
        exchange.head(code, extra)
        start, end = exchange.bounds
        drip((exchange.data or b"")[start:end], every_s)(exchange)

    return fault


def raw(data: bytes) -> Fault:
    """Exactly these bytes instead of an answer, and the end of the connection."""

    def fault(exchange: Exchange) -> None:
        exchange.write(data)
        hang_up(exchange)

    return fault


def hangs(exchange: Exchange) -> None:
    """No answer at all."""
    exchange.hang()
