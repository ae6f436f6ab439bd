"""Files that are either whole or not there.

1. A file is written beside its place, synced, renamed into it, and its folder synced: a reader sees the old bytes or
   the new.
2. A folder is written the same way, whole: it appears under its name only when everything in it is on the disk.
3. A failure (a full disk, Ctrl-C) removes what was half-written and leaves what was there before untouched.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_ilseg.errors import ACCESS_HINT, EdgeIlsegError

CHUNK_BYTES = 1 << 20
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that it is there whole or not at all (rule 1).

    Raises:
        EdgeIlsegError: the disk is full, or refuses the write.
    """
    part: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        part = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path`, whole, when the block ends without an error (rules 2 and 3).

    With `replace`, a folder that is there already is exchanged for the new one only after the new one is complete.
    Whether it may go is for the caller to decide; a file or a link is never replaced.

    Raises:
        EdgeIlsegError: the disk is full or refuses the write, or `path` is a file or a link; nothing of the new folder
            is left.
        FileExistsError: `path` exists and `replace` is not set.
    """
    if os.path.lexists(path) and not replace:
        raise FileExistsError(path)
    _check_replaceable(path)
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        yield part
        part.chmod(0o755)
        for item in sorted(part.rglob("*")):
            (sync_folder if item.is_dir() else sync_file)(item)
        sync_folder(part)
        _check_replaceable(path)
        if path.exists() and replace:
            _exchange(part, path)
        else:
            part.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _check_replaceable(path: Path) -> None:
    """Raise `EdgeIlsegError` when `path` is there and is no folder."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise EdgeIlsegError(
            "only a folder can be replaced by a folder",
            where=path,
            found="a link" if path.is_symlink() else "a file",
            hint="choose another place, or remove it yourself",
        )


def _exchange(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`, and `old` where `new` was.

    In one step where the system can (rule 2 holds even when the power fails); in two elsewhere, where a failure between
    them puts `old` back and a power cut leaves it beside its place, whole, as `.<name>.old`.
    """
    if _exchange_at_once(new, old):
        return
    aside = old.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        if not old.exists():
            aside.rename(old)
        raise
    aside.rename(new)


def _exchange_at_once(new: Path, old: Path) -> bool:
    """Exchange two names by `renameat2(2)`; `False` where the system or the file system has no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(old))


def disk_error(error: OSError, path: Path) -> EdgeIlsegError:
    """The user's form of an `OSError` met while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EdgeIlsegError(
            "the disk is full; nothing that was there before has changed",
            where=path,
            found=error.strerror,
            hint="free some space and run the same command again",
        )
    return EdgeIlsegError(
        "a file could not be read or written",
        where=error.filename or path,
        found=error.strerror or str(error),
        hint=ACCESS_HINT,
    )
