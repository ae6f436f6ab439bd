"""The only way by which the update parts write what they decide from: few operations, each of which a test can stop at.

1. All names are relative to ROOT and stay below it.
2. A file is new when it is written, and never changed after: there is no operation that overwrites one.
3. Bytes are durable after `NewFile.sync`, names after `sync_folder` of their folder, and nothing is before that.
4. A file that others read is written beside its place, synced, renamed into it, and its folder synced.
5. When the disk refuses to sync (EIO), the bytes in memory are no longer trusted: a new file is written from the start.
6. The operations raise `OSError`; `disk_errors` turns it into the user's form.

`RealDisk` is the device's. `tests/crash_disk.py` has one that forgets, at a power cut, what was not synced.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from edge_ilseg.devices.update.lock import held
from edge_ilseg.errors import ACCESS_HINT, PUBLISH_AGAIN, UpdateError

ROOT = "."
PIECE_BYTES = 256 << 10
ATTEMPTS = 3
"""How often something is written anew after the disk has refused it with EIO (rule 5)."""
STATE_LOCK = "state.lock"
STATE_DEADLINE_S = 20.0
FILE_MODE, FOLDER_MODE = 0o644, 0o755

Kind = Literal["file", "folder", "link", "other"]
T = TypeVar("T")


class NewFile(Protocol):
    """A file that is being written."""

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""

    def sync(self) -> None:
        """Make the bytes durable: not the name."""


class Disk(Protocol):
    """What the update parts do to ROOT. Paths are relative, with `/`; `.` is ROOT."""

    def kind(self, path: str) -> Kind | None:
        """What lies at `path` (a link is not followed), or `None`."""

    def read(self, path: str, max_bytes: int) -> bytes:
        """At most the first `max_bytes` of a file."""

    def pieces(self, path: str) -> Iterator[bytes]:
        """A file in pieces, from the disk itself where the system allows it, rather than from memory."""

    def names(self, path: str) -> tuple[str, ...]:
        """What is in a folder, sorted."""

    def read_link(self, path: str) -> str:
        """What a link says."""

    def create(self, path: str) -> AbstractContextManager[NewFile]:
        """A new file; an error if the name is taken (rule 2)."""

    def make_folder(self, path: str) -> None:
        """A new folder in one that is there."""

    def symlink(self, target: str, path: str) -> None:
        """A new link; an error if the name is taken."""

    def rename(self, old: str, new: str) -> None:
        """Give something another name, in one step; a file or a link that has the name goes."""

    def unlink(self, path: str) -> None:
        """Remove a file or a link."""

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder."""

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Nobody else changes the state in the block."""


class RealDisk:
    """The folder `root` of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def kind(self, path: str) -> Kind | None:
        try:
            mode = self._path(path).lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISLNK(mode):
            return "link"
        return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"

    def read(self, path: str, max_bytes: int) -> bytes:
        with self._path(path).open("rb") as file:
            return file.read(max_bytes)

    def pieces(self, path: str) -> Iterator[bytes]:
        with self._path(path).open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # what is clean in memory is dropped: the disk has to give it back
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while piece := file.read(PIECE_BYTES):
                yield piece

    def names(self, path: str) -> tuple[str, ...]:
        return tuple(sorted(os.listdir(self._path(path))))

    def read_link(self, path: str) -> str:
        return os.readlink(self._path(path))

    @contextmanager
    def create(self, path: str) -> Iterator[NewFile]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        file = _RealFile(os.open(self._path(path), flags, FILE_MODE))
        try:
            yield file
        finally:
            os.close(file.descriptor)

    def make_folder(self, path: str) -> None:
        self._path(path).mkdir(FOLDER_MODE)

    def symlink(self, target: str, path: str) -> None:
        self._path(path).symlink_to(target)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._path(old), self._path(new))

    def unlink(self, path: str) -> None:
        self._path(path).unlink()

    def remove_folder(self, path: str) -> None:
        self._path(path).rmdir()

    def sync_folder(self, path: str) -> None:
        descriptor = os.open(self._path(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def exclusive(self) -> AbstractContextManager[None]:
        return held(self.root / STATE_LOCK, deadline_s=STATE_DEADLINE_S)

    def _path(self, path: str) -> Path:
        parts = path.split("/")
        if path != ROOT and any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise UpdateError(
                "a name leaves the device's folder", where=self.root, found=repr(path), hint=PUBLISH_AGAIN
            )
        return self.root / path


class _RealFile:
    """One descriptor from the first byte to the sync: an error of the disk is told to the descriptor that wrote."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]

    def sync(self) -> None:
        os.fsync(self.descriptor)


def join(folder: str, name: str) -> str:
    """Path of `name` in `folder`."""
    return name if folder == ROOT else f"{folder}/{name}"


def parent(path: str) -> str:
    """Path of the folder that `path` is in."""
    return path.rpartition("/")[0] or ROOT


def part_path(path: str) -> str:
    """Where something is written before it is renamed to `path`: the same name each time, so that none piles up."""
    return join(parent(path), f".{path.rpartition('/')[2]}.part")


def write_new(disk: Disk, path: str, pieces: Callable[[], Iterable[bytes]]) -> None:
    """Write a file under a name that nobody reads yet, and sync its bytes. The name is not durable yet.

    Args:
        disk: where.
        path: what lies there is removed.
        pieces: gives the bytes, from the start, each time that it is called (rule 5).
    """

    def write() -> None:
        remove_tree(disk, path)
        with disk.create(path) as file:
            for piece in pieces():
                file.append(piece)
            file.sync()

    repeat_on_eio(write)


def replace_file(disk: Disk, path: str, data: bytes) -> None:
    """Put `data` in the place of the file `path`: after a power cut there are the old bytes or the new (rule 4)."""

    def replace() -> None:
        write_new(disk, part_path(path), lambda: (data,))
        disk.rename(part_path(path), path)
        disk.sync_folder(parent(path))

    repeat_on_eio(replace)


def remove_tree(disk: Disk, path: str) -> None:
    """Remove a file, a link or a folder with all that is in it; nothing if it is not there."""
    kind = disk.kind(path)
    if kind is None:
        return
    if kind != "folder":
        disk.unlink(path)
        return
    for name in disk.names(path):
        remove_tree(disk, join(path, name))
    disk.remove_folder(path)


def repeat_on_eio(work: Callable[[], T]) -> T:
    """Do `work`, from its start again when the disk has refused something with EIO (rule 5)."""
    for _ in range(ATTEMPTS - 1):
        try:
            return work()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
    return work()


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an `OSError` in the block into an `UpdateError` (rule 6). `what` failed."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UpdateError(
            what,
            where=error.filename,
            found=error.strerror or str(error),
            hint="free some space and run the same command again; the model in use goes on running"
            if full
            else ACCESS_HINT,
        ) from error
