"""Files that are either whole or not there.

1. A file is written beside its place, synced, renamed into it, and its folder synced: a reader sees the old bytes or
   the new.
2. A folder is written the same way, whole: it appears under its name only when everything in it is on the disk.
3. A failure (a full disk, Ctrl-C) removes what was half-written and leaves what was there before untouched.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_ilseg.errors import EdgeIlsegError

CHUNK_BYTES = 1 << 20


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
    """Write `data` to `path` so that it is there whole or not at all (rule 1)."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path`, whole, when the block ends without an error (rules 2 and 3).

    With `replace`, a folder that is there already is exchanged for the new one only after the new one is complete.

    Raises:
        EdgeIlsegError: the disk is full or refuses the write; nothing of the new folder is left.
        FileExistsError: `path` exists and `replace` is not set.
    """
    if path.exists() and not replace:
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield part
        part.chmod(0o755)
        for item in sorted(part.rglob("*")):
            (sync_folder if item.is_dir() else sync_file)(item)
        sync_folder(part)
        if path.exists():
            _exchange(part, path)
        else:
            part.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`; on failure `old` is back in its place."""
    aside = old.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


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
        "a file could not be read or written", where=error.filename or path, found=error.strerror or str(error)
    )
