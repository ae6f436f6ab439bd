"""Bytes of files in a repository: behind a URL, or in a folder (a USB stick, a network drive).

1. A transport believes nothing and proves nothing: what it gives is hashed by whoever asked. It promises a form only:
   the range that was asked for, no byte more, in pieces of at most `PIECE_BYTES`.
2. Whatever the other side does, a call ends: in the bytes, or in `TransportError`, which says whether trying again may
   help.
3. A name is relative to the repository and never leaves it; in a folder, a link does not lead out either.
4. https stays https, http stays http, through every redirection. Compressed answers are refused: nobody asked for one.
5. A server that ignores `Range` is read from the start, up to a cap, and the front thrown away.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from edge_ilseg.errors import ACCESS_HINT, PUBLISH_AGAIN, UpdateError

PIECE_BYTES = 64 << 10
WHOLE_PATIENCE = 10
"""`read_whole` takes at most so many times the timeout of one wait."""
COPY_HINT = "the repository is damaged, or was copied in part: publish or copy it again"
MISSING = 404
FORBIDDEN = 403
NEVER_AGAIN = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG)


class TransportError(UpdateError):
    """Bytes did not come.

    Attributes:
        is_transient: whether the same request may succeed later.
        status: of HTTP; 404 and 403 of a folder mean the like. `None` where there was no answer.
        retry_after_s: how long the server asks to be left alone.
    """

    default_hint = "look at the network and at the server; the next run goes on where this one stopped"

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
        is_transient: bool = False,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(what, where=where, found=found, expected=expected, hint=hint)
        self.is_transient = is_transient
        self.status = status
        self.retry_after_s = retry_after_s


class Transport(Protocol):
    """How a device gets at a repository."""

    @property
    def has_ranges(self) -> bool:
        """`False` once the other side has ignored a range: every later part costs all that stands before it."""

    def read_range(self, path: str, start: int, end: int | None) -> Generator[bytes, None, None]:
        """Bytes `start` to `end` (exclusive; `None`: to the end of the file), in pieces of at most `PIECE_BYTES`.

        Raises:
            TransportError: the bytes did not come; those given before it are the right ones of the range.
        """

    def read_whole(self, path: str, max_bytes: int) -> bytes:
        """A small file.

        Raises:
            TransportError: it did not come, or is larger than `max_bytes`.
        """


def open_transport(repository: str, *, timeout_s: float) -> Transport:
    """The way to a repository; nothing is read yet.

    Args:
        repository: `https://…`, `http://…`, `file://…` or the path of a folder.
        timeout_s: longest wait for a connection, the head of an answer, or the next piece.

    Raises:
        UpdateError: no address of a repository.
    """
    folder = as_folder(repository, "the address of the repository")
    if folder is not None:
        return FolderTransport(folder)
    from edge_ilseg.devices.update.http_transport import HttpTransport  # a folder needs no HTTP

    return HttpTransport(repository, timeout_s=timeout_s)


def as_folder(address: str, what: str) -> Path | None:
    """The folder that an address means, or `None` where it is one of http(s).

    Raises:
        UpdateError: it is of another kind; `what` names it.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    if scheme is None:
        return Path(address)
    if scheme[1].lower() in ("http", "https"):
        return None
    if scheme[1].lower() != "file":
        raise UpdateError(
            f"{what} is of an unknown kind",
            where=address,
            found=f"{scheme[1]}://",
            expected="https://, http://, file:// or the path of a folder",
            hint="write the address in one of these ways",
        )
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise UpdateError(
            f"{what} is on another machine",
            where=address,
            expected="file:///path",
            hint="mount the folder here, and name its path",
        )
    return Path(unquote(parts.path))


class FolderTransport:
    """A repository in a folder."""

    has_ranges = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read_range(self, path: str, start: int, end: int | None) -> Generator[bytes, None, None]:
        """See `Transport.read_range`."""
        check_path(path)
        where = self._folder / path
        try:
            descriptor = self._open(where)
            try:
                yield from _pieces(descriptor, start, end, where)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._error(error, where) from error

    def read_whole(self, path: str, max_bytes: int) -> bytes:
        """See `Transport.read_whole`."""
        return collect(self.read_range(path, 0, None), max_bytes, self._folder / path)

    def _open(self, where: Path) -> int:
        """Open a plain file of the folder: a pipe would make us wait, and a link may lead out (rule 3)."""
        resolved = Path(os.path.realpath(where, strict=True))  # Path.resolve has an error of its own for a loop
        if not resolved.is_relative_to(os.path.realpath(self._folder, strict=True)):
            raise TransportError(
                "a link leads out of the repository",
                where=where,
                found=f"it leads to {resolved}",
                status=FORBIDDEN,
                hint="copy the repository again, with plain files alone",
            )
        descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise TransportError(
                "this is no plain file",
                where=where,
                status=FORBIDDEN,
                hint="copy the repository again, with plain files alone",
            )
        return descriptor

    def _error(self, error: OSError, where: Path) -> TransportError:
        if not self._folder.is_dir():
            return TransportError(
                "the folder of the repository is not there",
                where=self._folder,
                found=error.strerror,
                hint="plug it in, or mount it, and run the same command again: what has arrived is kept",
            )
        if error.errno in NEVER_AGAIN:
            status = MISSING if error.errno in (errno.ENOENT, errno.ENOTDIR) else FORBIDDEN
            return TransportError(
                "a file of the repository cannot be read",
                where=where,
                found=error.strerror,
                status=status,
                hint=COPY_HINT if status == MISSING else ACCESS_HINT,
            )
        return TransportError(
            "reading a file of the repository failed",
            where=where,
            found=error.strerror or str(error),
            is_transient=True,
            hint="plug it in again, or copy the repository again; what has arrived is kept",
        )


def _pieces(descriptor: int, start: int, end: int | None, where: Path) -> Iterator[bytes]:
    position = start
    while end is None or position < end:
        limit = PIECE_BYTES if end is None else min(PIECE_BYTES, end - position)
        piece = os.pread(descriptor, limit, position)
        if not piece:
            break
        position += len(piece)
        yield piece
    if end is not None and position < end:
        raise too_short(where, max(position, os.fstat(descriptor).st_size), end)


def collect(pieces: Iterator[bytes], max_bytes: int, where: object, *, deadline_s: float | None = None) -> bytes:
    """Put pieces together, up to `max_bytes` and for at most `deadline_s`.

    Raises:
        TransportError: they are more, or come too slowly.
    """
    end = None if deadline_s is None else time.monotonic() + deadline_s
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > max_bytes:
            raise TransportError(
                "a file of the repository is larger than it may be",
                where=where,
                found=f"more than {len(data)} bytes",
                expected=f"at most {max_bytes}",
                hint=COPY_HINT,
            )
        if end is not None and time.monotonic() > end:
            raise TransportError(
                "a file of the repository comes too slowly",
                where=where,
                found=f"{len(data)} bytes in {deadline_s:g} s",
                is_transient=True,
            )
    return bytes(data)


def check_path(path: str) -> None:
    """Raise `TransportError` unless `path` is a plain relative one (rule 3)."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or any(ord(sign) < 32 or sign in "\\\x7f" for sign in part) for part in parts):
        raise TransportError(
            "a name leads out of the repository, or is none", found=repr(path)[:200], hint=PUBLISH_AGAIN
        )


def too_short(where: object, found_bytes: int | None, end: int) -> TransportError:
    """The error of a file that ends before the range that was asked for."""
    return TransportError(
        "a file of the repository is shorter than it should be",
        where=where,
        found="it ends earlier" if found_bytes is None else f"{found_bytes} bytes",
        expected=f"at least {end} bytes",
        hint=COPY_HINT,
    )
