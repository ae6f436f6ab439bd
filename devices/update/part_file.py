"""The file into which a pack arrives: sparse, every byte at its place in the pack; and the disk's errors in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from edge_ilseg.errors import ACCESS_HINT, UpdateError
from edge_ilseg.files import sync_folder

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KEPT_HINT = "then run the same command again: what has arrived is kept"


class PartFile:
    """Opened by `with`: to read and write up to `max_bytes`, or, with `None`, to read.

    What lies behind `max_bytes`, from something else of that name, is cut off.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._descriptor = -1

    def __enter__(self) -> PartFile:
        with disk_errors(self.path):
            flags = os.O_RDONLY if self._max_bytes is None else os.O_RDWR | os.O_CREAT
            self._descriptor = os.open(self.path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            if self._max_bytes is not None:
                if os.fstat(self._descriptor).st_size > self._max_bytes:
                    os.ftruncate(self._descriptor, self._max_bytes)
                sync_folder(self.path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; fewer where it ends, none where the disk does not give them."""
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError:
            return b""  # a bad sector: its chunk is fetched, and written again

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes to their place."""
        with disk_errors(self.path):
            while data:
                written = os.pwrite(self._descriptor, data, offset)
                data, offset = data[written:], offset + written

    def sync(self) -> None:
        """Make what was written durable; where that fails, remove it."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            cure = "free some space" if error.errno in FULL else "where this happens again, replace the disk or card"
            raise UpdateError(
                "the disk has lost what was written to it",
                where=self.path,
                found=error.strerror,
                hint=f"the part was removed, and is fetched anew by the next run; {cure}",
            ) from error


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise `UpdateError` when the disk has less than that free for this user."""
    with disk_errors(folder):
        facts = os.statvfs(folder)
    free_bytes = facts.f_bavail * facts.f_frsize
    if free_bytes < needed_bytes:
        raise UpdateError(
            "the disk has no room for the update",
            where=folder,
            found=f"{free_bytes / (1 << 20):.1f} MiB free",
            expected=f"{needed_bytes / (1 << 20):.1f} MiB, for what is fetched and for the new slot",
            hint=f"free some space, {KEPT_HINT}",
        )


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn an `OSError` into an `UpdateError` that says what to do."""
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        if error.errno in FULL:
            raise UpdateError(
                "the disk is full", where=where, found=found, hint=f"free some space, {KEPT_HINT}"
            ) from error
        raise UpdateError(
            "a file of the update cannot be written or read",
            where=error.filename or where,
            found=found,
            hint=ACCESS_HINT,
        ) from error
