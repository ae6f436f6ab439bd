"""Releases, as a publisher sends them out, widens them and halts them. Format page: docs/release-format.md.

1. A bundle is checked whole before it is published; what a device would refuse to read is refused here.
2. A release never changes once it is published. How far it goes is in the list of roll-outs, which is signed anew.
3. Numbers only rise. A bundle that is out already is published a second time only on demand: a deliberate downgrade is
   a release with a higher number.
4. `published` never goes back, whatever this machine's clock says, and does not leap by more than a year: devices take
   it for a time that has certainly passed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from edge_ilseg.bundle import MANIFEST_NAME, Manifest, check_files, read_manifest
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.update.release import (
    FORMAT_VERSION,
    ROLLOUTS_TARGET,
    PackRef,
    Percent,
    Release,
    Rollout,
    RolloutEntry,
    Rollouts,
    WatchLimits,
    encode_record,
    parse_release,
    parse_rollouts,
)
from edge_ilseg.errors import UpdateError
from edge_ilseg.files import sha256_file
from edge_ilseg.publishing.keys import KeyRing
from edge_ilseg.publishing.packs import Fetch, add_pack, fetches, read_pack_index
from edge_ilseg.publishing.repository import create_repository, online_signers, opened, publish_targets
from edge_ilseg.publishing.state import (
    ROLES,
    ExpiryDays,
    State,
    days_left,
    is_near_expiry,
    read_state,
    read_target,
)

DEFAULT_LIMITS = Limits(max_old_miou_drop_pct=2.0, max_class_drop_pct=10.0)
"""A limit on the mean alone passes a model that lost one class whole."""
MAX_LEAP = timedelta(days=365)


class ReleaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a bundle is to be sent out."""

    percent: Percent = 100.0
    groups: tuple[str, ...] = ()
    not_before: str | None = None
    limits: Limits = DEFAULT_LIMITS
    watch: WatchLimits = WatchLimits()
    note: str = ""
    bases: int = 2
    """Differences are kept against so many of the latest earlier contents."""
    again: bool = False
    """Publish a bundle that is out already (rule 3)."""


class Published(msgspec.Struct, frozen=True):
    """A release that is out, and what it costs devices."""

    release: Release
    rollout: Rollout
    fetches: tuple[Fetch, ...]


class RoleStatus(msgspec.Struct, frozen=True):
    """One role of the repository."""

    role: str
    version: int
    expires: str
    days_left: float
    is_near_expiry: bool
    threshold: int
    key_ids: tuple[str, ...]


class RepositoryStatus(msgspec.Struct, frozen=True):
    """What `publish status` shows."""

    published: str
    roles: tuple[RoleStatus, ...]
    entries: tuple[RolloutEntry, ...]


def init_repository(folder: Path, ring: KeyRing, now: datetime, days: ExpiryDays | None = None) -> None:
    """Make keys, and a repository without a release.

    Raises:
        UpdateError: a folder is in the way, or the keys cannot be written.
    """
    empty = Rollouts("edge-ilseg-rollouts", FORMAT_VERSION, _iso(now), ())
    create_repository(folder, ring, now, days=days or ExpiryDays(), files={ROLLOUTS_TARGET: _signable(empty)})


def publish_release(
    folder: Path,
    bundle: Path,
    ring: KeyRing,
    request: ReleaseRequest,
    now: datetime,
    *,
    validation: Path | None = None,
) -> Published:
    """Publish a bundle.

    Args:
        folder: of the repository.
        bundle: folder that `edge-ilseg export` has written.
        ring: holds the keys of targets, snapshot and timestamp.
        request: how far it goes, and what a device must see kept.
        now: the time from which signatures hold.
        validation: a `folder` data set that is shipped for the gate.

    Raises:
        BundleError: the bundle is damaged.
        UpdateError: it is out already, a key is not at hand, or a value cannot be signed; the old state is whole.
        EdgeIlsegError: a file cannot be read, or the disk is full.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    with opened(folder, ring) as state:
        signers = online_signers(ring, state)
        rollouts = _read_rollouts(folder, state)
        known = [(entry, _read_release(folder, state, entry)) for entry in rollouts.entries]
        same = [release.pack for entry, release in known if entry.bundle_id == manifest.bundle_id]
        if same and not request.again:
            number = next(entry.release for entry, _ in known if entry.bundle_id == manifest.bundle_id)
            raise UpdateError(
                "this bundle is published already",
                where=bundle,
                found=f"release {number}",
                hint="to send devices back to it, publish it as a new release: --again",
            )
        published = _next_time(state, rollouts, now)
        number = rollouts.entries[-1].release + 1 if known else 1
        _check_request(number, manifest, request, published, rollouts)
        if same and validation is None and (folder / same[-1].path).is_file():
            read_pack_index(folder, same[-1])
            pack = same[-1]
        else:
            pack = _add_pack(folder, bundle, validation, [release.pack for _, release in known], request.bases)
        release, entry = _records(number, manifest, request, published, pack)
        listed = msgspec.structs.replace(rollouts, published=published, entries=(*rollouts.entries, entry))
        files = {entry.target: _signable(release), ROLLOUTS_TARGET: _signable(listed)}
        publish_targets(folder, state, ring, signers, now, files)
        earlier = [(item.release, item.step_name, item.pack) for _, item in known]
        return Published(release, entry.rollout, fetches(folder, pack, earlier))


def set_rollout(
    folder: Path,
    ring: KeyRing,
    number: int,
    now: datetime,
    *,
    percent: float,
    all_groups: bool = False,
    resume: bool = False,
) -> RolloutEntry:
    """Widen a roll-out.

    Args:
        folder: of the repository.
        ring: holds the keys of targets, snapshot and timestamp.
        number: of the release.
        now: the time from which signatures hold.
        percent: of the devices, not less than now: those that have the release would not give it back.
        all_groups: no group is left out any more.
        resume: go on with a release that was halted.

    Raises:
        UpdateError: there is no such release, it is halted, or it has gone further already.
    """

    def widened(entry: RolloutEntry) -> RolloutEntry:
        if entry.halted and not resume:
            raise UpdateError(
                "the release is halted", found=f"release {number}: {entry.reason}", hint="to go on with it: --resume"
            )
        if percent < entry.rollout.percent:
            raise UpdateError(
                "a roll-out cannot be narrowed: devices that have the release keep it",
                found=f"{percent:g} %",
                expected=f"{entry.rollout.percent:g} % or more",
                hint="to stop it: edge-ilseg publish halt; to send devices back: publish the old bundle with --again",
            )
        groups = () if all_groups else entry.rollout.groups
        rollout = msgspec.structs.replace(entry.rollout, percent=percent, groups=groups)
        return msgspec.structs.replace(entry, rollout=rollout, halted=False, reason=None)

    return _change(folder, ring, number, now, widened)


def halt(folder: Path, ring: KeyRing, number: int, reason: str, now: datetime) -> RolloutEntry:
    """Halt a release: no device takes it any more. Those that have confirmed it keep it.

    Raises:
        UpdateError: there is no such release, or no reason.
    """
    if not reason.strip():
        raise UpdateError("a release is halted for a reason, and none is given", hint="--reason TEXT")
    return _change(
        folder, ring, number, now, lambda entry: msgspec.structs.replace(entry, halted=True, reason=reason.strip())
    )


def read_status(folder: Path, ring: KeyRing, now: datetime) -> RepositoryStatus:
    """Releases, roll-outs, expiry and keys; verified, and without a private key.

    Raises:
        UpdateError: no repository, damaged, or not what the publisher has signed last.
    """
    state = read_state(folder, ring)
    rollouts = _read_rollouts(folder, state)
    roles = []
    for role in ROLES:
        known, signed = state.root.signed.roles[role], getattr(state, role).signed
        left = days_left(state, role, now)
        near = is_near_expiry(state, role, now)
        ids = tuple(known.keyids)
        roles.append(RoleStatus(role, signed.version, _iso(signed.expires), round(left, 2), near, known.threshold, ids))
    return RepositoryStatus(rollouts.published, tuple(roles), rollouts.entries)


def _change(
    folder: Path, ring: KeyRing, number: int, now: datetime, change: Callable[[RolloutEntry], RolloutEntry]
) -> RolloutEntry:
    """Sign the list of roll-outs with one entry changed (rule 2)."""
    with opened(folder, ring) as state:
        signers = online_signers(ring, state)
        rollouts = _read_rollouts(folder, state)
        found = [entry for entry in rollouts.entries if entry.release == number]
        if not found:
            numbers = ", ".join(str(entry.release) for entry in rollouts.entries[-10:])
            raise UpdateError(
                "there is no such release",
                found=number,
                expected=numbers or "none is published",
                hint="see the releases: edge-ilseg publish status REPO",
            )
        changed = change(found[0])
        entries = tuple(changed if entry.release == number else entry for entry in rollouts.entries)
        listed = msgspec.structs.replace(rollouts, published=_next_time(state, rollouts, now), entries=entries)
        publish_targets(folder, state, ring, signers, now, {ROLLOUTS_TARGET: _signable(listed)})
        return changed


def _records(
    number: int, manifest: Manifest, request: ReleaseRequest, published: str, pack: PackRef
) -> tuple[Release, RolloutEntry]:
    step = manifest.step
    rollout = Rollout(
        id=f"{number}-{manifest.bundle_id[:12]}",
        percent=request.percent,
        groups=request.groups,
        not_before=request.not_before,
    )
    release = Release(
        format="edge-ilseg-release",
        format_version=FORMAT_VERSION,
        release=number,
        published=published,
        bundle_id=manifest.bundle_id,
        step_index=step.index,
        step_name=step.name,
        pack=pack,
        limits=request.limits,
        watch=request.watch,
        note=request.note,
    )
    return release, RolloutEntry(number, manifest.bundle_id, pack.index_sha256, step.index, step.name, rollout)


def _check_request(
    number: int, manifest: Manifest, request: ReleaseRequest, published: str, rollouts: Rollouts
) -> None:
    """Raise `UpdateError` for values that cannot be signed, before the pack is made (rule 1)."""
    stand_in = "0" * 64
    pack = PackRef(f"packs/{stand_in}.pack", 1, 1, stand_in)
    release, entry = _records(number, manifest, request, published, pack)
    _signable(release)
    _signable(msgspec.structs.replace(rollouts, entries=(*rollouts.entries, entry)))


def _signable(record: Rollouts | Release) -> bytes:
    """The bytes of a record, if a device reads from them what is meant: not a number, for one, would be no limit."""
    data = encode_record(record)
    found = parse_rollouts(data) if isinstance(record, Rollouts) else parse_release(data)
    if found != record:
        raise UpdateError(
            "a limit of the release is not a number", hint="give each limit a number: edge-ilseg publish add --help"
        )
    return data


def _add_pack(folder: Path, bundle: Path, validation: Path | None, packs: list[PackRef], bases: int) -> PackRef:
    latest = list(dict.fromkeys(reversed(packs)))[:bases]
    manifest_sha256 = sha256_file(bundle / MANIFEST_NAME)
    pack = add_pack(folder, bundle, validation, latest)
    files = {item.path: item.sha256.hex() for item in read_pack_index(folder, pack).files}
    if files[f"bundle/{MANIFEST_NAME}"] != manifest_sha256:
        raise UpdateError("the bundle has changed while it was packed", where=bundle, hint="publish it again")
    return pack


def _read_rollouts(folder: Path, state: State) -> Rollouts:
    return parse_rollouts(read_target(folder, state, ROLLOUTS_TARGET), where=ROLLOUTS_TARGET)


def _read_release(folder: Path, state: State, entry: RolloutEntry) -> Release:
    return parse_release(read_target(folder, state, entry.target), where=entry.target)


def _next_time(state: State, rollouts: Rollouts, now: datetime) -> str:
    """The time of publication (rule 4).

    Raises:
        UpdateError: the clock is more than a year later than all that was ever signed here.
    """
    last = datetime.fromisoformat(rollouts.published)
    latest = max(last, *(getattr(state, role).signed.expires for role in ROLES))
    if now > latest + MAX_LEAP:
        raise UpdateError(
            "this machine's clock is more than a year later than everything in the repository",
            found=_iso(now),
            expected=f"about {_iso(latest)}",
            hint="devices would never again believe an earlier time. If the clock is right: edge-ilseg publish refresh",
        )
    return _iso(max(now, last))


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
