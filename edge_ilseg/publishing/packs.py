"""The packs of a repository: written under the name of their content, read back as bundles, weighed for devices."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from edge_ilseg.codecs import decompress
from edge_ilseg.devices.update.release import PackRef, pack_path
from edge_ilseg.errors import ACCESS_HINT, UpdateError
from edge_ilseg.fetch_plan import fetch_plan
from edge_ilseg.files import sync_folder
from edge_ilseg.pack import write_pack
from edge_ilseg.pack_index import PackIndex, parse_index
from edge_ilseg.publishing.state import PACKS

NEW_NAME = ".new.pack"


class Fetch(msgspec.Struct, frozen=True):
    """What a device fetches for a release."""

    from_release: int | None
    """The release that it has; `None`: nothing at all."""
    step_name: str | None
    bytes: int
    """Index and chunks."""
    ranges: int
    """Requests, the one for the index included."""


def add_pack(repository: Path, bundle: Path, validation: Path | None, bases: Sequence[PackRef]) -> PackRef:
    """Write the pack of a bundle into a repository.

    Args:
        repository: nobody else writes to it.
        bundle: its folder.
        validation: data set that is shipped beside it.
        bases: packs of earlier bundles, to keep differences against; one that has been removed is passed over.

    Raises:
        EdgeIlsegError: as `edge_ilseg.pack.write_pack`, or an earlier pack is damaged.
    """
    folder = repository / PACKS
    for left in folder.glob(f".{NEW_NAME}.*"):  # by a crash
        left.unlink()
    with ExitStack() as stack:
        unpacked = []
        for base in bases:
            if (repository / base.path).is_file():
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-ilseg-base-")))
                unpack_bundle(repository, base, place)
                unpacked.append(place / "bundle")
        facts = write_pack(folder / NEW_NAME, bundle, validation=validation, bases=unpacked)
    path = pack_path(facts.content_id)
    (folder / NEW_NAME).replace(repository / path)
    sync_folder(folder)
    return PackRef(path, facts.pack_bytes, facts.index_bytes, facts.content_id)


def read_pack_index(repository: Path, pack: PackRef) -> PackIndex:
    """The index at the front of a pack, checked against the hash that was signed.

    Raises:
        UpdateError: the pack is missing or damaged.
    """
    path = repository / pack.path
    try:
        with path.open("rb") as file:
            data = file.read(pack.index_bytes)
    except OSError as error:
        raise UpdateError(
            "a pack of the repository cannot be read", where=path, found=error.strerror, hint=ACCESS_HINT
        ) from error
    if hashlib.sha256(data).hexdigest() != pack.index_sha256 or path.stat().st_size != pack.bytes:
        raise UpdateError("a pack of the repository is damaged", where=path, hint="restore it from a copy")
    return parse_index(data, pack_bytes=pack.bytes)


def fetches(repository: Path, pack: PackRef, earlier: Sequence[tuple[int, str, PackRef]]) -> tuple[Fetch, ...]:
    """What devices fetch of a pack: one that has nothing, and one on each earlier release whose pack is still there.

    Args:
        repository: its folder.
        pack: the new one.
        earlier: number, name of the step and pack of each earlier release.
    """
    index = read_pack_index(repository, pack)
    rows = [_fetch(index, pack, None, None, frozenset())]
    for number, step_name, known in earlier:
        if (repository / known.path).is_file():
            has = frozenset(chunk.sha256 for chunk in read_pack_index(repository, known).chunks)
            rows.append(_fetch(index, pack, number, step_name, has))
    return tuple(rows)


def unpack_bundle(repository: Path, pack: PackRef, out: Path) -> None:
    """Write the bundle of a pack into `out/bundle`; chunks are checked against their hashes, names by `parse_index`.

    Raises:
        UpdateError: the pack is missing or damaged.
    """
    index = read_pack_index(repository, pack)
    with (repository / pack.path).open("rb") as file:
        for entry in index.files:
            if not entry.path.startswith("bundle/"):
                continue
            path = out / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as target:
                for number in entry.chunks:
                    chunk = index.chunks[number]
                    file.seek(chunk.offset)
                    data = decompress(chunk.codec, file.read(chunk.stored_bytes), chunk.length)
                    if hashlib.sha256(data).digest() != chunk.sha256:
                        raise UpdateError(
                            "a pack of the repository is damaged",
                            where=repository / pack.path,
                            hint="restore it from a copy",
                        )
                    target.write(data)


def _fetch(index: PackIndex, pack: PackRef, number: int | None, step_name: str | None, has: frozenset[bytes]) -> Fetch:
    plan = fetch_plan(index, has.__contains__)
    return Fetch(number, step_name, pack.index_bytes + plan.bytes, 1 + len(plan.ranges))
