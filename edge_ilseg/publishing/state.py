"""The signed state of a repository, read and verified by the publisher before he signs anything on top of it.

1. Everything is verified from the root on: each new root by the one before it and by itself, each role by the newest
   root, each file by the hash that names it.
2. Beside his keys the publisher keeps the root and the timestamp that he signed last. A repository that does not
   descend from that root, or is older than that timestamp, is refused: somebody has exchanged it, or put an old copy
   back, and what is signed on top of it would bring back what was taken back.
3. What has expired is read all the same: `publish refresh` mends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from edge_ilseg.errors import UpdateError
from edge_ilseg.publishing.keys import KeyRing

METADATA, TARGETS, PACKS = "metadata", "targets", "packs"
TIMESTAMP_NAME = "timestamp.json"
KEPT_ROOT, KEPT_TIMESTAMP = "root.json", "timestamp.json"
"""Names beside the keys (rule 2)."""
ONLINE_ROLES = ("targets", "snapshot", "timestamp")
"""In the order in which they are signed: each is named by the next."""
ROLES = ("root", *ONLINE_ROLES)
DAYS_FIELD = "x-edge-ilseg-expiry-days"
"""Signed beside each role in the root, so that whoever renews a role later gives it as many days."""
NEAR_EXPIRY_SHARE = 1 / 3
"""Of a role's days: with less than that left it is renewed, or warned about."""


class ExpiryDays(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long each role's signatures hold."""

    root: int = 365
    targets: int = 90
    snapshot: int = 30
    timestamp: int = 7


class State(NamedTuple):
    """One consistent state of a repository, verified."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]


def read_state(folder: Path, ring: KeyRing) -> State:
    """Read the newest state (rules 1 to 3); no private key is opened.

    Raises:
        UpdateError: no repository, damaged, not signed by the keys that its root names, or not the publisher's newest.
    """
    check_is_repository(folder)
    state = read_roles(folder, read_root(folder, ring), TIMESTAMP_NAME)
    kept = ring.read_kept(KEPT_TIMESTAMP)
    if kept is not None:
        with _damaged(ring.folders[0] / KEPT_TIMESTAMP):
            last: Metadata[Timestamp] = Metadata[Timestamp].from_bytes(kept)
        if state.timestamp.signed.version < last.signed.version:
            raise UpdateError(
                "the repository is older than what was signed last",
                where=folder,
                found=f"timestamp {state.timestamp.signed.version}",
                expected=f"{last.signed.version} or newer",
                hint="bring the newest copy back; devices would refuse this one as an attack",
            )
    return state


def check_is_repository(folder: Path) -> None:
    """Raise `UpdateError` for a folder that has nothing of a repository."""
    if not (folder / METADATA).is_dir():
        raise UpdateError("this folder is no repository", where=folder, hint="make one: edge-ilseg publish init REPO")


def read_root(folder: Path, ring: KeyRing) -> Metadata[Root]:
    """The newest root that descends from the one kept beside the keys, or else from the first (rules 1 and 2)."""
    kept = ring.read_kept(KEPT_ROOT)
    first = folder / METADATA / "1.root.json"
    with _damaged(first):
        root: Metadata[Root] = Metadata[Root].from_bytes(first.read_bytes() if kept is None else kept)
        root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
    own = folder / METADATA / f"{root.signed.version}.root.json"
    if kept is not None and (not own.is_file() or own.read_bytes() != kept):
        raise UpdateError(
            "the repository does not descend from the root that is kept beside the keys",
            where=own,
            hint="was it exchanged, or an old copy put back? find out before anything is signed",
        )
    while (path := folder / METADATA / f"{root.signed.version + 1}.root.json").exists():
        with _damaged(path):
            new: Metadata[Root] = Metadata[Root].from_bytes(path.read_bytes())
            check_root(root, new, path)
        root = new
    return root


def read_roles(folder: Path, root: Metadata[Root], timestamp_name: str) -> State:
    """The roles below a root, from a timestamp on (rule 1).

    Raises:
        UpdateError: a file is missing, damaged, or not signed by the keys that the root names.
    """
    timestamp = _read_role(folder / METADATA / timestamp_name, root, Timestamp, None)
    meta = timestamp.signed.snapshot_meta
    snapshot = _read_role(folder / METADATA / f"{meta.version}.snapshot.json", root, Snapshot, meta)
    meta = snapshot.signed.meta["targets.json"]
    targets = _read_role(folder / METADATA / f"{meta.version}.targets.json", root, Targets, meta)
    return State(root, targets, snapshot, timestamp)


def read_target(folder: Path, state: State, name: str) -> bytes:
    """The bytes of a target, as they were signed.

    Raises:
        UpdateError: there is no such target, or its bytes are others.
    """
    info = state.targets.signed.targets.get(name)
    if info is None:
        raise UpdateError(
            "the repository has no such target",
            where=folder,
            found=name,
            hint="is this its folder? else restore it from a copy",
        )
    path = folder / TARGETS / info.get_prefixed_paths()[0]
    with _damaged(path):
        data = path.read_bytes()
        info.verify_length_and_hashes(data)
    return data


def check_root(old: Metadata[Root] | None, root: Metadata[Root], where: Path) -> None:
    """Raise `UpdateError` unless a root is signed by enough keys of its own and of the root before it."""
    previous = old.signed if old is not None else None
    if not root.signed.get_root_verification_result(previous, root.signed_bytes, root.signatures):
        raise UpdateError(
            "a root is not signed by enough keys of its own and of the root before it",
            where=where,
            found=f"version {root.signed.version}",
            hint="restore it from a copy that you trust, before anything is signed",
        )


def role_days(root: Metadata[Root], role: str) -> int:
    """How long a role's signatures hold when they are new."""
    days = root.signed.roles[role].unrecognized_fields.get(DAYS_FIELD)
    return days if isinstance(days, int) and days > 0 else int(getattr(ExpiryDays(), role))


def days_left(state: State, role: str, now: datetime) -> float:
    """Until the role expires; negative when it has."""
    expires: datetime = getattr(state, role).signed.expires
    return (expires - now) / timedelta(days=1)


def is_near_expiry(state: State, role: str, now: datetime) -> bool:
    """Whether a role should be signed anew by now."""
    return days_left(state, role, now) < NEAR_EXPIRY_SHARE * role_days(state.root, role)


def _read_role(path: Path, root: Metadata[Root], kind: type[Any], meta: MetaFile | None) -> Metadata[Any]:
    with _damaged(path):
        data = path.read_bytes()
        if meta is not None:
            meta.verify_length_and_hashes(data)
        metadata: Metadata[Any] = Metadata.from_bytes(data)
        root.signed.verify_delegate(kind.type, metadata.signed_bytes, metadata.signatures)
    if not isinstance(metadata.signed, kind) or (meta is not None and metadata.signed.version != meta.version):
        raise UpdateError(
            "a file holds the metadata of another role or version", where=path, hint="restore it from a copy"
        )
    return metadata


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Turn what python-tuf and the disk say about a file into an `UpdateError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise UpdateError(
            "the repository lacks a file", where=path, hint="is this its folder? else restore it from a copy"
        ) from error
    except (RepositoryError, ValueError, OSError) as error:
        raise UpdateError(
            "a file of the repository is not what was signed",
            where=path,
            found=str(error),
            hint="restore it from a copy",
        ) from error
