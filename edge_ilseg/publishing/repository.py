"""The publisher's repository: static files under TUF's signed metadata. Format page: docs/release-format.md.

1. Nothing is signed on top of a state that `read_state` has not verified: nobody who can write to the folder gets his
   own content signed.
2. Files of a new state have new names; `timestamp.json`, which names them, is replaced last and in one step. A crash at
   any moment leaves the old state whole. One publisher at a time.
3. Keys that a command needs are looked for before it writes anything.
4. A new root is signed by enough of the old root's keys and of its own. When a key is replaced, what it signs carries
   the signatures of both keys before the new root appears, so that every moment has a valid state. Where the old key is
   lost, the new timestamp waits as `.timestamp.next` for its root; the next command finishes that after a crash.
5. All metadata is made, signed and verified by python-tuf.
"""

from __future__ import annotations

import copy
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from edge_ilseg.errors import EdgeIlsegError, UpdateError
from edge_ilseg.files import new_folder, sync_folder, write_bytes
from edge_ilseg.publishing.keys import KeyRing, as_update_error, generate_key
from edge_ilseg.publishing.state import (
    DAYS_FIELD,
    KEPT_ROOT,
    KEPT_TIMESTAMP,
    METADATA,
    ONLINE_ROLES,
    PACKS,
    ROLES,
    TARGETS,
    TIMESTAMP_NAME,
    ExpiryDays,
    State,
    check_is_repository,
    check_root,
    is_near_expiry,
    read_roles,
    read_root,
    read_state,
    role_days,
)

ROOT_KEYS, ROOT_THRESHOLD = 3, 2
NEXT_NAME = ".timestamp.next"
"""A timestamp that only the next root accepts (rule 4)."""

Signers = Mapping[str, Sequence[CryptoSigner]]


class Refreshed(NamedTuple):
    """What `refresh` has done."""

    renewed: tuple[str, ...]
    lacking: tuple[str, ...]
    """Roles that are near their expiry and whose keys are not at hand."""


@contextmanager
def opened(folder: Path, ring: KeyRing) -> Iterator[State]:
    """Keep other publishers away, finish what a crash has left, and give the verified state (rules 1, 2 and 4).

    Raises:
        UpdateError: another publisher is at work, or `read_state` refuses the repository.
    """
    with _locked(folder), _as_update_errors():
        _finish_rotation(folder, ring)
        yield read_state(folder, ring)


def create_repository(
    folder: Path, ring: KeyRing, now: datetime, *, days: ExpiryDays, files: Mapping[str, bytes]
) -> State:
    """Make keys, and a repository with its first targets.

    Raises:
        UpdateError: a folder is in the way, a number of days is not positive, or the keys cannot be written.
    """
    lengths = msgspec.structs.asdict(days)
    if min(lengths.values()) < 1:
        raise UpdateError(
            "metadata must hold for a day at least",
            found=str(lengths),
            hint="give 1 or more: --root-days, --targets-days, --snapshot-days, --timestamp-days",
        )
    _check_places(folder, ring)
    signers = {role: tuple(generate_key() for _ in range(ROOT_KEYS if role == "root" else 1)) for role in ROLES}
    root = Root(version=1, expires=_expiry(now, days.root), consistent_snapshot=True)
    for role in ROLES:
        for signer in signers[role]:
            ring.add(role, signer)
            root.add_key(signer.public_key, role)
        root.roles[role].unrecognized_fields[DAYS_FIELD] = lengths[role]
    root.roles["root"].threshold = ROOT_THRESHOLD
    state = State(Metadata(root), Metadata(Targets(1)), Metadata(Snapshot(1)), Metadata(Timestamp(1)))
    with _as_update_errors():
        with new_folder(folder) as part:
            for name in (METADATA, TARGETS, f"{TARGETS}/releases", PACKS):
                (part / name).mkdir()
            _write_root(part, None, state.root, signers["root"])
            state = _write_state(part, state, signers, now, files=files, first="targets", is_first=True)
        ring.write_kept(KEPT_ROOT, state.root.to_bytes())
        ring.write_kept(KEPT_TIMESTAMP, state.timestamp.to_bytes())
    return state


def online_signers(ring: KeyRing, state: State, first: str = "targets") -> Signers:
    """The keys that a new state needs, from the role `first` on (rule 3).

    Raises:
        UpdateError: one is not at hand.
    """
    return {role: _signers(ring, state, role) for role in ONLINE_ROLES[ONLINE_ROLES.index(first) :]}


def publish_targets(
    folder: Path, state: State, ring: KeyRing, signers: Signers, now: datetime, files: Mapping[str, bytes]
) -> State:
    """A new state in which some targets are new or have new bytes.

    Args:
        folder: of the repository.
        state: from `opened`.
        ring: where the new timestamp is remembered.
        signers: from `online_signers`.
        now: the time from which signatures hold.
        files: the bytes of targets, by name.

    Raises:
        UpdateError: the disk refuses; the old state is whole.
    """
    state = _write_state(folder, state, signers, now, files=files, first="targets")
    ring.write_kept(KEPT_TIMESTAMP, state.timestamp.to_bytes())
    return state


def refresh(folder: Path, ring: KeyRing, now: datetime) -> Refreshed:
    """A new timestamp, and new signatures for every other role that is near its expiry and whose keys are at hand.

    Raises:
        UpdateError: the timestamp's key is not at hand, or `read_state` refuses the repository.
    """
    with opened(folder, ring) as state:
        near = [role for role in ROLES if is_near_expiry(state, role, now)]
        signers = dict(online_signers(ring, state, "timestamp"))
        for role in ("root", "snapshot", "targets"):
            known = state.root.signed.roles[role]
            if role in near or (role == "snapshot" and "targets" in near):
                found = ring.at_hand(role, known.keyids)
                if len(found) >= known.threshold and (role != "targets" or "snapshot" in signers):
                    signers[role] = found
        if "root" in signers:
            root = _next_root(state.root, now)
            _write_root(folder, state.root, root, signers["root"])
            ring.write_kept(KEPT_ROOT, root.to_bytes())
            state = state._replace(root=root)
        first = next(role for role in ONLINE_ROLES if role in signers)
        state = _write_state(folder, state, signers, now, files={}, first=first)
        ring.write_kept(KEPT_TIMESTAMP, state.timestamp.to_bytes())
        return Refreshed(
            tuple(role for role in ROLES if role in signers), tuple(role for role in near if role not in signers)
        )


def rotate_keys(folder: Path, ring: KeyRing, role: str, now: datetime) -> tuple[Path, ...]:
    """Replace all keys of a role by new ones (rule 4); the files of the new keys.

    Devices follow from the root that they trust. Needs the root's keys, and those of the roles that name this one; the
    role's own old keys only where they are left.

    Raises:
        UpdateError: a key is not at hand, or the disk refuses.
    """
    if role not in ROLES:
        raise UpdateError(
            "there is no such role", found=role, expected=", ".join(ROLES), hint="name one of these roles"
        )
    with opened(folder, ring) as state:
        known = state.root.signed.roles[role]
        root_signers = _signers(ring, state, "root")
        later = {
            name: _signers(ring, state, name)
            for name in (ONLINE_ROLES[ONLINE_ROLES.index(role) + 1 :] if role != "root" else ())
        }
        old = ring.at_hand(role, known.keyids)
        new = tuple(generate_key() for _ in known.keyids)
        paths = tuple(ring.add(role, signer) for signer in new)
        root = _next_root(state.root, now)
        for key_id in known.keyids:
            root.signed.revoke_key(key_id, role)
        for signer in new:
            root.signed.add_key(signer.public_key, role)
        if role == "root":
            _write_root(folder, state.root, root, (*root_signers, *new))
        elif len(old) >= known.threshold:
            _write_state(folder, state, {**later, role: (*old, *new)}, now, files={}, first=role)
            _write_root(folder, state.root, root, root_signers)
        else:
            after = state._replace(root=root)
            _write_state(folder, after, {**later, role: new}, now, files={}, first=role, timestamp_name=NEXT_NAME)
            _write_root(folder, state.root, root, root_signers)
            _finish_rotation(folder, ring)
        ring.write_kept(KEPT_ROOT, root.to_bytes())
        ring.write_kept(KEPT_TIMESTAMP, read_state(folder, ring).timestamp.to_bytes())
        return paths


def _check_places(folder: Path, ring: KeyRing) -> None:
    if os.path.lexists(folder):
        raise UpdateError("there is something in the repository's place", where=folder, hint="choose a new folder")
    for place in ring.folders[:1]:
        if place.is_dir() and any(place.iterdir()):
            raise UpdateError("the folder for the keys is not empty", where=place, hint="choose another: --keys")
        if place.resolve().is_relative_to(folder.resolve()):
            raise UpdateError(
                "private keys must not lie in what is published",
                where=place,
                hint="choose a folder outside of the repository: --keys",
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    check_is_repository(folder)
    descriptor = os.open(folder / METADATA, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UpdateError(
                "another publisher is at work on this repository", where=folder, hint="wait for it, and try again"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _as_update_errors() -> Iterator[None]:
    try:
        yield
    except UpdateError:
        raise
    except EdgeIlsegError as error:
        raise as_update_error(error) from error


def _signers(ring: KeyRing, state: State, role: str) -> tuple[CryptoSigner, ...]:
    known = state.root.signed.roles[role]
    return ring.signers(role, known.keyids, known.threshold)


def _expiry(now: datetime, days: int) -> datetime:
    return now.astimezone(UTC) + timedelta(days=days)


def _next_root(root: Metadata[Root], now: datetime) -> Metadata[Root]:
    """A copy with the next version and a new expiry, still to be signed."""
    following = copy.deepcopy(root)
    following.signed.version += 1
    following.signed.expires = _expiry(now, role_days(root, "root"))
    return following


def _write_root(
    folder: Path, old: Metadata[Root] | None, root: Metadata[Root], signers: Sequence[CryptoSigner]
) -> None:
    root.signatures.clear()
    for signer in signers:
        root.sign(signer, append=True)
    path = folder / METADATA / f"{root.signed.version}.root.json"
    check_root(old, root, path)
    write_bytes(path, root.to_bytes())


def _write_state(
    folder: Path,
    state: State,
    signers: Signers,
    now: datetime,
    *,
    files: Mapping[str, bytes],
    first: str,
    is_first: bool = False,
    timestamp_name: str = TIMESTAMP_NAME,
) -> State:
    """Write targets, then new versions of the roles from `first` on, the timestamp last (rule 2)."""
    state = copy.deepcopy(state)
    for name, data in files.items():
        info = TargetFile.from_data(name, data, ["sha256"])
        state.targets.signed.targets[name] = info
        write_bytes(folder / TARGETS / info.get_prefixed_paths()[0], data)
    for role in ONLINE_ROLES[ONLINE_ROLES.index(first) :]:
        metadata: Metadata[Any] = getattr(state, role)
        metadata.signed.version += 0 if is_first else 1
        metadata.signed.expires = _expiry(now, role_days(state.root, role))
        metadata.signatures.clear()
        for signer in signers[role]:
            metadata.sign(signer, append=True)
        state.root.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        data, version = metadata.to_bytes(), metadata.signed.version
        name = timestamp_name if role == "timestamp" else f"{version}.{role}.json"
        write_bytes(folder / METADATA / name, data)
        if role == "targets":
            state.snapshot.signed.meta["targets.json"] = MetaFile.from_data(version, data, ["sha256"])
        elif role == "snapshot":
            state.timestamp.signed.snapshot_meta = MetaFile.from_data(version, data, ["sha256"])
    return state


def _finish_rotation(folder: Path, ring: KeyRing) -> None:
    """Put the timestamp that waited for a new root into its place; without that root it is thrown away (rule 4)."""
    path = folder / METADATA / NEXT_NAME
    if not path.exists():
        return
    root = read_root(folder, ring)
    try:
        read_roles(folder, root, NEXT_NAME)
    except UpdateError:  # its root was never written: the old state holds
        path.unlink()
    else:
        path.replace(folder / METADATA / TIMESTAMP_NAME)
    sync_folder(folder / METADATA)
