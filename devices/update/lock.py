"""Locks between processes of one device: the kernel's, so that a killed holder leaves none behind.

1. A lock is `flock` on a file. It ends when its holder lets go, ends, or is killed: there is no stale lock to find.
2. Whoever waits has a deadline; when it passes, the error names the process that holds the lock.
3. The file is never removed: two processes could then hold "the" lock on two different files.
4. Programs that the holder starts do not inherit the lock.

Two locks are used below ROOT: `lock`, which one command holds for as long as it works (minutes, when it fetches), and
`state.lock`, held by whoever changes the state, for as long as that change takes (milliseconds; `RealDisk.exclusive`).
The application that runs the model takes the second one alone: a fetch does not delay its start.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_ilseg.errors import ACCESS_HINT, UpdateError

RETRY_S = 0.02
LOCK_MODE = 0o664
"""Another user of the device's group (the application) may take it; nobody else may write to the file."""


@contextmanager
def held(path: Path, *, deadline_s: float) -> Iterator[None]:
    """Hold the lock `path` in the block.

    Raises:
        UpdateError: another process still holds it after `deadline_s`, or the file cannot be opened.
    """
    try:
        descriptor = _open(path)
    except OSError as error:
        raise UpdateError("a lock cannot be opened", where=path, found=error.strerror, hint=ACCESS_HINT) from error
    try:
        _wait(descriptor, path, deadline_s)
        _write_holder(descriptor, str(os.getpid()))
        yield
        _write_holder(descriptor, "")
    finally:
        os.close(descriptor)  # and with it the lock, whatever happened


def _open(path: Path) -> int:
    """A descriptor that programs started from here do not get (rule 4: Python opens files so)."""
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, LOCK_MODE)
        if os.fstat(descriptor).st_uid == os.geteuid():
            os.fchmod(descriptor, LOCK_MODE)  # whatever the umask is
        return descriptor
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY)  # enough to lock; the holder's number is then not told


def _wait(descriptor: int, path: Path, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UpdateError(
                    "a lock cannot be taken", where=path, found=error.strerror, hint=ACCESS_HINT
                ) from error
        if time.monotonic() >= end:
            raise UpdateError(
                "another command is at work on this device",
                where=path,
                found=f"held by {_holder(descriptor)} for longer than the {deadline_s:g} s that were waited",
                hint="wait for it to end, and run the same command again",
            )
        time.sleep(min(RETRY_S, max(0.0, end - time.monotonic())))


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    return f"process {text}" if text.isdigit() else "another process"


def _write_holder(descriptor: int, text: str) -> None:
    """For the error of others alone: the lock is the kernel's, so a full or read-only disk does not matter."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EBADF, errno.EINVAL, errno.EIO):
            raise
