"""Slots: one folder for each content, whole under its name, and one link that names the one in use.

    slots/<content id>/{index, bundle/..., validation/...}     current -> slots/<content id>

1. A slot gets its name last: files written and synced, folders synced, all of it read again and hashed, then renamed,
   and the parent synced. Under its name a slot never changes.
2. A slot proves itself: `index` holds the length of the pack (8 bytes, big-endian) and the pack's index, whose SHA-256
   is the slot's name, and which lists every file by its hash. A file more, less or different, or a link: damaged.
3. `current` is replaced by the rename of a new link, whose own bytes are durable by then: it is never missing.
4. A slot loses its name, durably, before anything in it is removed: nothing half removed is found under a slot's name.
5. A file that the disk refuses (EIO), or gives back with other bytes, is written anew, three times in all; one that
   it does not give back (EIO) is read anew as often, before its slot counts as damaged.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from edge_ilseg.devices.update.disk import (
    ATTEMPTS,
    ROOT,
    Disk,
    disk_errors,
    join,
    parent,
    part_path,
    remove_tree,
    repeat_on_eio,
    write_new,
)
from edge_ilseg.devices.update.release import MAX_INDEX_BYTES, MAX_PACK_BYTES
from edge_ilseg.errors import PackError, UpdateError

if TYPE_CHECKING:
    from edge_ilseg.pack_index import PackFile, PackIndex

SLOTS = "slots"
INCOMING = "incoming"
CURRENT = "current"
INDEX_NAME = "index"
FETCH_AGAIN = "edge-ilseg device run fetches it again"
WORN_OUT = "the flash or the card of this device may be worn out"
BUNDLE_NAME = "bundle"
SIZE_BYTES = 8
CONTENT_ID = re.compile(r"[0-9a-f]{64}")
RETIRED_SUFFIX = ".old"


def slot_path(content_id: str) -> str:
    """Folder of a slot, below ROOT."""
    return join(SLOTS, content_id)


def bundle_path(content_id: str) -> str:
    """Folder of the slot's bundle, below ROOT."""
    return join(slot_path(content_id), BUNDLE_NAME)


def slot_names(disk: Disk) -> tuple[str, ...]:
    """Contents that have a slot, whole or damaged."""
    return tuple(name for name in _names(disk, SLOTS) if CONTENT_ID.fullmatch(name))


def current_content(disk: Disk) -> str | None:
    """The content that `current` names; `None` where it is missing, or names no slot."""
    if disk.kind(CURRENT) != "link":
        return None
    folder, _, name = disk.read_link(CURRENT).rpartition("/")
    return name if folder == SLOTS and CONTENT_ID.fullmatch(name) else None


def prepare(disk: Disk) -> None:
    """Make the folders of ROOT that are not there yet."""
    for name in (SLOTS, INCOMING):
        if disk.kind(name) is None:
            disk.make_folder(name)
    disk.sync_folder(ROOT)


def stage(disk: Disk, content_id: str, index: PackIndex, chunk: Callable[[int], bytes]) -> None:
    """Make the slot of a content (rules 1, 2 and 5). One that is there and whole stays as it is.

    Args:
        disk: where.
        content_id: the name of the slot, and the SHA-256 of the index.
        index: of the pack.
        chunk: gives the bytes of a chunk by its number. A file's hash is checked after.

    Raises:
        UpdateError: the index is not the content's, a chunk has wrong bytes, the disk is full, or it gave back other
            bytes than were written three times. Nothing is left under the slot's name, or what was there before.
    """
    head = _checked_head(index, content_id)
    part = part_path(slot_path(content_id))
    with disk_errors("the content cannot be put on the disk"):
        try:
            prepare(disk)
            if is_whole(disk, content_id):
                disk.sync_folder(SLOTS)  # a process that was killed may have left its name unsynced
                return
            _write_whole(disk, part, content_id, head, index, chunk)
            if disk.kind(slot_path(content_id)) is not None:
                _retire(disk, content_id)
            disk.rename(part, slot_path(content_id))
            disk.sync_folder(SLOTS)
            if disk.kind(_retired_path(content_id)) is not None:
                remove_tree(disk, _retired_path(content_id))
                disk.sync_folder(SLOTS)
        except OSError:
            _remove_if_possible(disk, part)
            raise


def check_slot(disk: Disk, content_id: str, *, bundle_only: bool = False) -> None:
    """Read a slot, or the part of it that is run, and compare every byte with what its name stands for (rule 2).

    Raises:
        UpdateError: it is not there, damaged, or cannot be read.
    """
    _check_folder(disk, slot_path(content_id), content_id, bundle_only=bundle_only)


def is_whole(disk: Disk, content_id: str, *, bundle_only: bool = False) -> bool:
    """Whether `check_slot` finds nothing."""
    try:
        check_slot(disk, content_id, bundle_only=bundle_only)
    except UpdateError:
        return False
    return True


def flip(disk: Disk, content_id: str) -> None:
    """Let `current` name a slot (rule 3). Durable when it returns."""

    def replace_link() -> None:
        part = part_path(CURRENT)
        remove_tree(disk, part)
        disk.symlink(slot_path(content_id), part)
        disk.sync_folder(ROOT)
        disk.rename(part, CURRENT)
        disk.sync_folder(ROOT)

    repeat_on_eio(replace_link)


def collect(disk: Disk, keep: Collection[str], *, incoming: Collection[str] = ()) -> tuple[str, ...]:
    """Remove the slots that are neither kept nor in use, what a power cut left half made, and old downloads.

    Args:
        disk: where.
        keep: contents whose slots stay.
        incoming: contents whose downloads stay.

    Returns:
        The names of what was removed, below `slots` (`.<content id>.old`: it was a slot) and `incoming`.
    """
    kept = {*keep, current_content(disk)}
    with disk_errors("what is not needed cannot be removed"):
        for name in slot_names(disk):
            if name not in kept:
                _retire(disk, name)
        rest = [name for name in _names(disk, SLOTS) if not CONTENT_ID.fullmatch(name)]
        if rest:
            disk.sync_folder(SLOTS)
            for name in rest:
                remove_tree(disk, join(SLOTS, name))
            disk.sync_folder(SLOTS)
        for name in _names(disk, INCOMING):
            if name[:64] not in incoming:
                remove_tree(disk, join(INCOMING, name))
                rest.append(name)
    return tuple(rest)


def _checked_head(index: PackIndex, content_id: str) -> bytes:
    """What the slot's `index` file holds."""
    from edge_ilseg.pack_index import encode_index, parse_index

    head = encode_index(index)
    if hashlib.sha256(head).hexdigest() != content_id:
        raise PackError(
            "the index is not that of the content", found=hashlib.sha256(head).hexdigest(), expected=content_id
        )
    stored_bytes = [item.stored_bytes for item in index.chunks] + [item.stored_bytes for item in index.differences]
    pack_bytes = len(head) + sum(stored_bytes)
    parse_index(head, pack_bytes=pack_bytes)
    return pack_bytes.to_bytes(SIZE_BYTES, "big") + head


def _write_whole(
    disk: Disk, part: str, content_id: str, head: bytes, index: PackIndex, chunk: Callable[[int], bytes]
) -> None:
    """Write a slot under a name that nobody reads, and read it again; anew where the disk errs (rule 5)."""
    problem: UpdateError | None = None
    for _ in range(ATTEMPTS):
        _remove_if_possible(disk, part)
        try:
            _write_slot(disk, part, head, index, chunk)
            _check_folder(disk, part, content_id, bundle_only=False)
            return
        except _WrongChunkError:
            _remove_if_possible(disk, part)
            raise
        except UpdateError as error:
            problem = error
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            problem = UpdateError(
                "the disk refuses the content", where=error.filename, found=error.strerror, hint=WORN_OUT
            )
    _remove_if_possible(disk, part)
    raise UpdateError(
        f"the disk did not keep what was written, {ATTEMPTS} times",
        where=slot_path(content_id),
        found=problem.one_line() if problem is not None else None,
        hint=WORN_OUT,
    ) from problem


class _WrongChunkError(PackError):
    """What was to be written is wrong already: to repeat it is no use."""


def _write_slot(disk: Disk, part: str, head: bytes, index: PackIndex, chunk: Callable[[int], bytes]) -> None:
    folders = sorted({part, *(folder for file in index.files for folder in _folders(join(part, file.path), part))})
    for folder in folders:  # a folder comes before those in it
        disk.make_folder(folder)
    for file in index.files:
        _write_file(disk, join(part, file.path), file, chunk)
    write_new(disk, join(part, INDEX_NAME), lambda: (head,))
    for folder in reversed(folders):
        disk.sync_folder(folder)


def _write_file(disk: Disk, path: str, file: PackFile, chunk: Callable[[int], bytes]) -> None:
    def pieces() -> Iterator[bytes]:
        digest = hashlib.sha256()
        for number in file.chunks:
            data = chunk(number)
            digest.update(data)
            yield data
        if digest.digest() != file.sha256:
            raise _WrongChunkError(
                "the chunks do not make the file", where=file.path, found=digest.hexdigest(), expected=file.sha256.hex()
            )

    write_new(disk, path, pieces)


def _folders(path: str, top: str) -> Iterator[str]:
    """Folders of a file, up to `top`."""
    while path != top:
        path = parent(path)
        yield path


def _check_folder(disk: Disk, folder: str, content_id: str, *, bundle_only: bool) -> None:
    def check() -> None:
        files = _listed_files(disk, folder, content_id)
        if bundle_only:
            files = {path: file for path, file in files.items() if path.startswith(f"{BUNDLE_NAME}/")}
        found = _walk(disk, join(folder, BUNDLE_NAME) if bundle_only else folder)
        names = {path.removeprefix(f"{folder}/") for path in found} - {INDEX_NAME}
        if names != set(files):
            raise UpdateError(
                "a slot has other files than its content", where=folder, found=min(names ^ set(files)), hint=FETCH_AGAIN
            )
        for path, file in files.items():
            _check_file(disk, join(folder, path), file)

    try:
        repeat_on_eio(check)
    except OSError as error:
        raise UpdateError(
            "a slot cannot be read", where=error.filename or folder, found=error.strerror, hint=FETCH_AGAIN
        ) from error


def _check_file(disk: Disk, path: str, file: PackFile) -> None:
    digest = hashlib.sha256()
    for piece in disk.pieces(path):
        digest.update(piece)
    if digest.digest() != file.sha256:
        raise UpdateError(
            "a file of a slot is damaged",
            where=path,
            found=f"sha256 {digest.hexdigest()[:12]}",
            expected=f"sha256 {file.sha256.hex()[:12]}",
            hint=FETCH_AGAIN,
        )


def _listed_files(disk: Disk, folder: str, content_id: str) -> dict[str, PackFile]:
    from edge_ilseg.pack_index import parse_index

    path = join(folder, INDEX_NAME)
    if disk.kind(path) != "file":
        raise UpdateError("there is no slot of this content", where=folder, hint=FETCH_AGAIN)
    data = disk.read(path, SIZE_BYTES + MAX_INDEX_BYTES + 1)
    if hashlib.sha256(data[SIZE_BYTES:]).hexdigest() != content_id:
        raise UpdateError(
            "the index of a slot is damaged", where=path, expected=f"sha256 {content_id}", hint=FETCH_AGAIN
        )
    pack_bytes = min(int.from_bytes(data[:SIZE_BYTES], "big"), MAX_PACK_BYTES)
    index = parse_index(data[SIZE_BYTES:], pack_bytes=pack_bytes, where=path)
    return {file.path: file for file in index.files}


def _walk(disk: Disk, folder: str) -> Iterator[str]:
    """Files in a folder and below.

    Raises:
        UpdateError: there is a link, or something that is neither a file nor a folder.
    """
    for name in disk.names(folder):
        path = join(folder, name)
        kind = disk.kind(path)
        if kind == "folder":
            yield from _walk(disk, path)
        elif kind == "file":
            yield path
        else:
            raise UpdateError("a slot holds something that is no plain file", where=path, found=kind, hint=FETCH_AGAIN)


def _names(disk: Disk, folder: str) -> tuple[str, ...]:
    return disk.names(folder) if disk.kind(folder) == "folder" else ()


def _retired_path(content_id: str) -> str:
    return join(SLOTS, f".{content_id}{RETIRED_SUFFIX}")


def _retire(disk: Disk, content_id: str) -> None:
    """Take a slot's name away, durably (rule 4)."""
    if disk.kind(_retired_path(content_id)) is not None:
        disk.sync_folder(SLOTS)
        remove_tree(disk, _retired_path(content_id))
    disk.rename(slot_path(content_id), _retired_path(content_id))
    disk.sync_folder(SLOTS)


def _remove_if_possible(disk: Disk, path: str) -> None:
    """Make room; where the disk refuses even that, the next `collect` does it."""
    try:
        remove_tree(disk, path)
    except OSError:
        return
