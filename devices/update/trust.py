"""What a device believes of a repository: python-tuf decides; here are its files, its time, and words for its errors.

1. Trust begins with the root metadata that the device was given (`bootstrap`). Signatures, thresholds, versions,
   hashes, lengths and expiry are checked by python-tuf's client, and by nothing else.
2. Expiry is reckoned at the time that the caller gives: the later of the clock and the device's time floor, which
   comes from signed times alone. A clock of 1970 makes nothing old acceptable; one of 2040 makes everything expire
   until it is set right, and leaves no trace.
3. What was verified is never forgotten by a power cut or a refusal: after each attempt it is written, whole and
   synced, to `trusted.json` and then to `trusted.copy.json`; python-tuf works on a copy in `work/`, made from them
   each time. One damaged file is made good from the other; with both damaged, trust begins again with `bootstrap`.
4. A refused attempt changes nothing that a device acts on. What python-tuf had verified before it refused (a newer
   root, a newer timestamp) stays, as TUF demands.
5. A release is what its entry in the list of roll-outs says, or it is refused.
6. Expired metadata stops updating. It never stops the model.

On rule 2: python-tuf takes the time itself, when its client is made, as `TrustedMetadataSet.reference_time`; it has
no parameter for it. Of the ways to give it another one - changing `datetime` for the whole process, verifying by
hand, setting that attribute - the last is the smallest. It is set in one place, `_Client`, and `_check_expiry` checks
the result again by `is_expired`, which is public: should a later python-tuf ignore the attribute, nothing expired
gets by.

Nothing here loads numpy: a poll stays small.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata
from tuf.ngclient import Updater

from edge_ilseg.devices.update.release import (
    MAX_RECORD_BYTES,
    ROLLOUTS_TARGET,
    Release,
    RolloutEntry,
    Rollouts,
    parse_release,
    parse_rollouts,
)
from edge_ilseg.devices.update.transport import FORBIDDEN, MISSING, Transport, TransportError
from edge_ilseg.devices.update.tuf_fetcher import BASE_URL, DEADLINE_S, TufFetcher
from edge_ilseg.errors import ACCESS_HINT, EdgeIlsegError, UpdateError
from edge_ilseg.files import write_bytes
from edge_ilseg.records import parse_versioned

T = TypeVar("T")

TRUSTED_NAMES = ("trusted.json", "trusted.copy.json")
TRUSTED_FORMAT, TRUSTED_VERSION = "edge-ilseg-trusted", 1
ROLE_FILES = ("root.json", "timestamp.json", "snapshot.json", "targets.json")
TRUSTED_FILE = re.compile(r"(timestamp|snapshot|targets|root_history/[1-9][0-9]{0,9}\.root)\.json")
UPDATING_STOPS = "updating stops; the model goes on running"

ERRORS: tuple[tuple[type[Exception], str, str], ...] = (
    # from the special to the general: the first that fits is taken
    (
        ExpiredMetadataError,
        f"the repository's metadata has expired: {UPDATING_STOPS}",
        "is this device's clock right? Then the publisher has to sign anew: edge-ilseg publish refresh",
    ),
    (
        UnsignedMetadataError,
        f"the repository's metadata is not signed by the keys that this device trusts: {UPDATING_STOPS}",
        "is this the right repository? Else somebody has changed it",
    ),
    (
        BadVersionNumberError,
        f"the repository is older than what this device has seen, or mixed from several states: {UPDATING_STOPS}",
        "copy the newest state of the repository; if this is it, somebody puts old files in the place of new ones",
    ),
    (
        LengthOrHashMismatchError,
        f"a file of the repository is not the one that was signed: {UPDATING_STOPS}",
        "damaged or changed on its way, or copied in part: copy or publish it again",
    ),
    (
        DownloadLengthMismatchError,
        f"a file of the repository is longer than the one that was signed: {UPDATING_STOPS}",
        "damaged or changed on its way: copy or publish it again",
    ),
    (
        DownloadHTTPError,
        f"the repository lacks a file: {UPDATING_STOPS}",
        "is its address right? Else it was copied in part: copy it again",
    ),
    (DownloadError, "the repository cannot be reached", "try again later"),
    (
        RepositoryError,
        f"the repository's metadata is damaged: {UPDATING_STOPS}",
        "damaged or changed on its way: copy or publish it again",
    ),
)


class Trusted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The metadata that was verified, as python-tuf keeps it."""

    format: Literal["edge-ilseg-trusted"]
    format_version: int
    sha256: str
    """Of the files: a flipped bit would otherwise make python-tuf pass over a file, and forget its version."""
    files: dict[str, bytes]


class TrustedRepository:
    """A repository whose metadata was verified just now."""

    def __init__(self, client: Updater, folder: Path, now: datetime, *, expires: datetime, rollouts: Rollouts) -> None:
        self._client = client
        self._folder = folder
        self._now = now
        self.expires = expires
        """When the first of the signatures ends: without a newer one, updating stops then."""
        self.rollouts = rollouts

    def release(self, number: int) -> Release:
        """A release of the list, downloaded and verified; one that is here already needs no connection.

        Raises:
            TransportError: it does not come.
            UpdateError: it is not in the list, or is not what its entry says (rule 5).
        """
        for entry in self.rollouts.entries:
            if entry.release == number:
                with _as_update_errors(self._now, entry.target):
                    return _read_target(self._client, self._folder, entry.target, partial(_parse_release, entry=entry))
        numbers = ", ".join(str(entry.release) for entry in self.rollouts.entries[-10:])
        raise UpdateError(
            "the repository has no such release",
            found=number,
            expected=numbers or "it has none",
            hint="see what there is now: edge-ilseg device check",
        )


class _Client(Updater):
    """python-tuf's client, at a given time (rule 2)."""

    def __init__(self, transport: Transport, folder: Path, bootstrap: bytes, now: datetime, deadline_s: float) -> None:
        super().__init__(
            str(folder / "work"),
            BASE_URL + "metadata/",
            str(folder / "targets"),
            BASE_URL + "targets/",
            fetcher=TufFetcher(transport, deadline_s=deadline_s),
            bootstrap=bootstrap,
        )
        self._trusted_set.reference_time = now


def refresh(
    transport: Transport, root: Path, bootstrap: bytes, now: datetime, *, deadline_s: float = DEADLINE_S
) -> TrustedRepository:
    """Bring a device's view of a repository up to date.

    Args:
        transport: the way to the repository.
        root: folder for what is trusted; made if it is not there. Nobody else uses it meanwhile.
        bootstrap: the root metadata that the device was given, of any version.
        now: the later of the clock and the time floor, with its time zone.
        deadline_s: for each file of the repository, with all tries.

    Raises:
        TransportError: the repository cannot be reached.
        UpdateError: it is refused; the error says why.
    """
    now = now.astimezone(UTC)
    with _as_update_errors(now, "the repository"):
        work = root / "work"
        _fill(work, _read_trusted(root))
        (root / "targets").mkdir(exist_ok=True)
        try:
            client = _make_client(transport, root, bootstrap, now, deadline_s)
            client.refresh()
        finally:
            _keep(root, work)
        expires = _check_expiry(work, now)
        rollouts = _read_target(client, root, ROLLOUTS_TARGET, partial(parse_rollouts, where=ROLLOUTS_TARGET))
        return TrustedRepository(client, root, now, expires=expires, rollouts=rollouts)


def _make_client(transport: Transport, root: Path, bootstrap: bytes, now: datetime, deadline_s: float) -> _Client:
    try:
        return _Client(transport, root, bootstrap, now, deadline_s)
    except RepositoryError as error:
        raise UpdateError(
            "the root metadata that this device was given is none",
            found=str(error),
            hint="give it the publisher's: metadata/1.root.json, or a later one",
        ) from error


def _check_expiry(work: Path, now: datetime) -> datetime:
    """When the first of the final metadata expires (rule 2).

    Raises:
        ExpiredMetadataError: one has.
    """
    expiries: list[datetime] = []
    for name in ROLE_FILES:
        metadata: Metadata[Any] = Metadata.from_file(str(work / name))
        if metadata.signed.is_expired(now):
            raise ExpiredMetadataError(f"{name} is expired")
        expiries.append(metadata.signed.expires)
    return min(expiries)


def _read_target(client: Updater, folder: Path, name: str, parse: Callable[[bytes], T]) -> T:
    """The value of a target. Its file is hashed each time it is read: one that a power cut has torn comes again."""
    info = client.get_targetinfo(name)
    if info is None:
        raise UpdateError("the repository lacks a target", found=name, hint="is this the right repository?")
    if info.length > MAX_RECORD_BYTES:
        raise UpdateError(
            "a target of the repository is too large",
            where=name,
            found=f"{info.length} bytes",
            expected=f"at most {MAX_RECORD_BYTES} bytes",
            hint="the publisher has to publish it again",
        )
    path = folder / "targets" / name.replace("/", "-")
    if client.find_cached_target(info, str(path)) is not None:
        return parse(path.read_bytes())
    part = path.with_name(f".{path.name}.part")
    try:
        client.download_target(info, str(part))
        value = parse(part.read_bytes())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return value


def _parse_release(data: bytes, entry: RolloutEntry) -> Release:
    """A release that is what its entry says (rule 5)."""
    release = parse_release(data, where=entry.target)
    says = (entry.release, entry.bundle_id, entry.content_id, entry.step_index, entry.step_name)
    found = (release.release, release.bundle_id, release.content_id, release.step_index, release.step_name)
    if found != says:
        raise UpdateError(
            "the release is another one than the list of roll-outs names",
            where=entry.target,
            found=f"release {found[0]}, bundle {found[1][:12]}, content {found[2][:12]}, step {found[4]}",
            expected=f"release {says[0]}, bundle {says[1][:12]}, content {says[2][:12]}, step {says[4]}",
            hint="the publisher has to publish it again",
        )
    return release


def _read_trusted(root: Path) -> dict[str, bytes]:
    """The newest whole record of what is trusted; empty: trust begins with the bootstrap (rule 3)."""
    for name in TRUSTED_NAMES:
        try:
            record = parse_versioned(
                (root / name).read_bytes(),
                Trusted,
                format=TRUSTED_FORMAT,
                version=TRUSTED_VERSION,
                error=UpdateError,
                what="the record of what is trusted",
                where=root / name,
                hint="nothing to do: trust goes on from the copy of the record",
            )
        except (UpdateError, OSError):  # never written, or damaged: there is the other one
            continue
        if record.sha256 == _digest(record.files) and all(map(TRUSTED_FILE.fullmatch, record.files)):
            return record.files
    return {}


def _fill(work: Path, files: dict[str, bytes]) -> None:
    """Make python-tuf's folder anew from what is trusted."""
    if work.exists():
        shutil.rmtree(work)
    (work / "root_history").mkdir(parents=True)
    for name, data in files.items():
        (work / name).write_bytes(data)


def _keep(root: Path, work: Path) -> None:
    """Write what python-tuf has verified, in full, one record after the other (rule 3)."""
    names = (path.relative_to(work).as_posix() for path in sorted(work.rglob("*.json")) if not path.is_symlink())
    files = {name: (work / name).read_bytes() for name in names if TRUSTED_FILE.fullmatch(name)}
    data = msgspec.json.encode(Trusted("edge-ilseg-trusted", TRUSTED_VERSION, _digest(files), files))
    for name in TRUSTED_NAMES:
        path = root / name
        if not path.is_file() or path.read_bytes() != data:
            write_bytes(path, data)


def _digest(files: dict[str, bytes]) -> str:
    return hashlib.sha256(msgspec.json.encode(sorted(files.items()))).hexdigest()


@contextmanager
def _as_update_errors(now: datetime, where: str) -> Iterator[None]:
    """Say in a device's words what python-tuf, the transport or the disk have said."""
    try:
        yield
    except UpdateError:
        raise
    except EdgeIlsegError as error:
        raise UpdateError(
            error.what, where=error.where, found=error.found, expected=error.expected, hint=error.hint
        ) from error
    except (RepositoryError, DownloadError) as error:
        cause = error.__cause__
        if isinstance(cause, TransportError) and cause.status not in (MISSING, FORBIDDEN):
            raise cause from None
        what, hint = next((what, hint) for kind, what, hint in ERRORS if isinstance(error, kind))
        found = f"{error} (now: {now.isoformat(timespec='seconds')})" if "expired" in what else str(error)
        raise UpdateError(what, where=where, found=found, hint=hint) from error
    except OSError as error:
        raise UpdateError(
            "what is trusted cannot be read or written",
            where=error.filename or where,
            found=error.strerror or str(error),
            hint=ACCESS_HINT,
        ) from error
