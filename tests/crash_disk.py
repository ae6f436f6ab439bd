"""A disk in memory that forgets, at a power cut, what was not synced; and all that a cut may leave of it.

What may be left, in the terms of POSIX, for any file system whose renames are atomic (ext4, xfs, btrfs, f2fs):

1. Bytes that were synced stay. Of a file with bytes that were not: the old ones, the new ones, none, a first half, a
   first half and zeros, zeros of the full length.
2. Names that were synced (their folder was) stay. Of the operations on the names of one folder since its last sync, any
   subset has happened, and those that have, in their order. Two folders know nothing of each other.
3. A rename gives the new name its new file, or leaves it the old one: never neither. The old name may stay beside it.
4. Syncing a file says nothing of its name, syncing a folder nothing of the bytes of its files, nor of its own name.
5. A link may lose its target until the folder that it is in is synced.

Order within a folder is assumed for operations that happened, because all of them are changes of one file (the folder),
written through one journal; that any of them may still be missing is more than such a journal does.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edge_ilseg.devices.update.disk import Kind, NewFile, parent

Image = tuple[str, Any]
"""What is durable: ("file", bytes), ("link", target) or ("folder", ((name, image), ...))."""
LOST_TARGET = ""


class File:
    def __init__(self, durable: bytes = b"") -> None:
        self.durable = self.cached = durable

    def images(self) -> set[Image]:
        old, new = self.durable, self.cached
        if old == new:
            return {("file", old)}
        half = new[: len(new) // 2]
        torn = {old, new, b"", half, half + bytes(len(new) - len(half)), bytes(len(new))}
        if old:
            torn.add(half + old[len(half) :])
        return {("file", data) for data in torn}


class Link:
    def __init__(self, target: str, *, is_durable: bool = False) -> None:
        self.target, self.is_durable = target, is_durable

    def images(self) -> set[Image]:
        return {("link", self.target)} if self.is_durable else {("link", self.target), ("link", LOST_TARGET)}


class Folder:
    def __init__(self) -> None:
        self.durable: dict[str, Node] = {}
        self.cached: dict[str, Node] = {}
        self.pending: list[tuple[str, ...]] = []
        self.added: dict[int, Node] = {}
        self.known: set[Image] | None = None
        """Of `images`, until something changes here or below."""

    def add(self, name: str, node: Node) -> None:
        self.cached[name] = node
        self.added[len(self.pending)] = node
        self.pending.append(("add", name))

    def remove(self, name: str) -> None:
        del self.cached[name]
        self.pending.append(("remove", name))

    def move(self, old: str, new: str) -> None:
        node = self.cached.pop(old)
        self.cached[new] = node
        self.added[len(self.pending)] = node
        self.pending.append(("move", old, new))

    def sync(self) -> None:
        self.durable = dict(self.cached)
        self.pending, self.added = [], {}
        for node in self.durable.values():
            if isinstance(node, Link):
                node.is_durable = True

    def images(self) -> set[Image]:
        """Rules 2 and 3, for this folder and all in it."""
        if self.known is None:
            self.known = self._images()
        return self.known

    def _images(self) -> set[Image]:
        seen: set[tuple[tuple[str, int], ...]] = set()
        found: set[Image] = set()
        choices = [("no", "yes", "both") if kind == "move" else ("no", "yes") for kind, *_ in self.pending]
        for choice in itertools.product(*choices):
            entries = self._after(choice)
            names = sorted(entries)
            key = tuple((name, id(entries[name])) for name in names)
            if key in seen:
                continue
            seen.add(key)
            for below in itertools.product(*(entries[name].images() for name in names)):
                found.add(("folder", tuple(zip(names, below, strict=True))))
        return found

    def _after(self, choice: tuple[str, ...]) -> dict[str, Node]:
        entries = dict(self.durable)
        for number, (what, (kind, *names)) in enumerate(zip(choice, self.pending, strict=True)):
            if what == "no":
                continue
            if kind == "add":
                entries[names[0]] = self.added[number]
            elif kind == "remove":
                entries.pop(names[0], None)
            else:
                if what == "yes":
                    entries.pop(names[0], None)
                entries[names[1]] = self.added[number]
        return entries


Node = File | Link | Folder


class CrashDisk:
    """`Disk` in memory. `before` is called before each operation that changes something, with its name."""

    def __init__(self, image: Image = ("folder", ())) -> None:
        root = _node(image)
        assert isinstance(root, Folder)
        self.root = root
        self.before: Callable[[str], None] | None = None
        self.is_held = False

    def images(self) -> set[Image]:
        """All that a power cut may leave now."""
        return self.root.images()

    def kept(self) -> Image:
        """What is there when nothing is lost."""
        return _cached(self.root)

    def killed(self) -> CrashDisk:
        """This disk after the process was killed: nothing is lost, and what was not synced is still not synced."""
        disk = type(self)()
        disk.root = _copied(self.root, {})  # type: ignore[assignment]
        return disk

    def kind(self, path: str) -> Kind | None:
        node = self._find(path)
        if node is None:
            return None
        return "folder" if isinstance(node, Folder) else "link" if isinstance(node, Link) else "file"

    def read(self, path: str, max_bytes: int) -> bytes:
        return self._file(path).cached[:max_bytes]

    def pieces(self, path: str) -> Iterator[bytes]:
        yield self._file(path).cached

    def names(self, path: str) -> tuple[str, ...]:
        return tuple(sorted(self._folder(path).cached))

    def read_link(self, path: str) -> str:
        node = self._find(path)
        if not isinstance(node, Link):
            raise _error(errno.EINVAL, path)
        return node.target

    @contextmanager
    def create(self, path: str) -> Iterator[NewFile]:
        self._begin("create", path)
        file = File()
        self._free(path).add(_name(path), file)
        yield _OpenFile(self, path, file)

    def make_folder(self, path: str) -> None:
        self._begin("make_folder", path)
        self._free(path).add(_name(path), Folder())

    def symlink(self, target: str, path: str) -> None:
        self._begin("symlink", path)
        self._free(path).add(_name(path), Link(target))

    def rename(self, old: str, new: str) -> None:
        self._begin("rename", old, new)
        node, there = self._find(old), self._find(new)
        if node is None:
            raise _error(errno.ENOENT, old)
        assert parent(old) == parent(new), "renames between folders are not part of the model"
        if isinstance(there, Folder) and there.cached:
            raise _error(errno.ENOTEMPTY, new)
        self._folder(parent(old)).move(_name(old), _name(new))

    def unlink(self, path: str) -> None:
        self._begin("unlink", path)
        if self._find(path) is None or self.kind(path) == "folder":
            raise _error(errno.ENOENT, path)
        self._folder(parent(path)).remove(_name(path))

    def remove_folder(self, path: str) -> None:
        self._begin("remove_folder", path)
        if self._folder(path).cached:
            raise _error(errno.ENOTEMPTY, path)
        self._folder(parent(path)).remove(_name(path))

    def sync_folder(self, path: str) -> None:
        self._begin("sync_folder", path)
        self._folder(path).sync()

    def overwrite(self, path: str, data: bytes) -> None:
        """What `Disk` does not offer, for the variants that do it wrong."""
        self._begin("overwrite", path)
        self._file(path).cached = data

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        assert not self.is_held, "the lock is taken twice by one process"
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False

    def _begin(self, *operation: str) -> None:
        """Tell of an operation, and forget the images of every folder that it may change."""
        if self.before is not None:
            self.before(" ".join(operation))
        folder: Node | None = self.root
        for name in (*operation[1].split("/"), ""):
            if isinstance(folder, Folder):
                folder.known = None
                folder = folder.cached.get(name)

    def _find(self, path: str) -> Node | None:
        node: Node | None = self.root
        for part in path.split("/") if path != "." else ():
            node = node.cached.get(part) if isinstance(node, Folder) else None
        return node

    def _file(self, path: str) -> File:
        node = self._find(path)
        if not isinstance(node, File):
            raise _error(errno.ENOENT if node is None else errno.EINVAL, path)
        return node

    def _folder(self, path: str) -> Folder:
        node = self._find(path)
        if not isinstance(node, Folder):
            raise _error(errno.ENOENT if node is None else errno.ENOTDIR, path)
        return node

    def _free(self, path: str) -> Folder:
        if self._find(path) is not None:
            raise _error(errno.EEXIST, path)
        return self._folder(parent(path))


class _OpenFile:
    def __init__(self, disk: CrashDisk, path: str, file: File) -> None:
        self.disk, self.path, self.file = disk, path, file

    def append(self, data: bytes) -> None:
        self.disk._begin("append", self.path)
        self.file.cached += data

    def sync(self) -> None:
        self.disk._begin("sync", self.path)
        self.file.durable = self.file.cached


def changed(image: Image, path: str, change: Callable[[bytes], bytes]) -> Image:
    """An image in which the bytes of one file are others."""
    if not path:
        return "file", change(image[1])
    name, _, rest = path.partition("/")
    return "folder", tuple((key, changed(below, rest, change) if key == name else below) for key, below in image[1])


def _node(image: Image) -> Node:
    kind, value = image
    if kind == "file":
        return File(value)
    if kind == "link":
        return Link(value, is_durable=True)
    folder = Folder()
    folder.durable = {name: _node(below) for name, below in value}
    folder.cached = dict(folder.durable)
    return folder


def _cached(node: Node) -> Image:
    if isinstance(node, File):
        return "file", node.cached
    if isinstance(node, Link):
        return "link", node.target
    return "folder", tuple((name, _cached(below)) for name, below in sorted(node.cached.items()))


def _copied(node: Node, known: dict[int, Node]) -> Node:
    if id(node) in known:
        return known[id(node)]
    new: Node
    if isinstance(node, File):
        new = File(node.durable)
        new.cached = node.cached
    elif isinstance(node, Link):
        new = Link(node.target, is_durable=node.is_durable)
    else:
        new = Folder()
        new.pending = list(node.pending)
        for mine, theirs in ((new.durable, node.durable), (new.cached, node.cached)):
            mine.update({name: _copied(below, known) for name, below in theirs.items()})
        new.added = {number: _copied(below, known) for number, below in node.added.items()}
    known[id(node)] = new
    return new


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)
