"""A real repository, a device that follows it, and what an attacker can do to the folder that is served."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bundles import write_family
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from edge_ilseg.devices.update.transport import FolderTransport, Transport
from edge_ilseg.devices.update.trust import Trusted, TrustedRepository, refresh
from edge_ilseg.errors import UpdateError
from edge_ilseg.publishing.keys import KeyRing
from edge_ilseg.publishing.releases import ReleaseRequest, init_repository, publish_release
from edge_ilseg.publishing.repository import online_signers, opened, publish_targets
from edge_ilseg.publishing.state import ExpiryDays, State, read_state

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
"""When the tests' first repository was signed; nothing here looks at this machine's clock."""
ROLE_FILES = {"timestamp": "timestamp.json", "snapshot": "snapshot.json", "targets": "targets.json"}
Signer = CryptoSigner


def after(days: float) -> datetime:
    """So long after `NOW`."""
    return NOW + timedelta(days=days)


class World:
    """A publisher with his folders, and a device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repo"
        self.ring = KeyRing([folder / "keys"], environment={}, unencrypted=True)
        self.tuf = folder / "tuf"

    @property
    def bootstrap(self) -> bytes:
        """The root that the device was given, before anybody could change the served folder."""
        return (self.folder / "bootstrap.json").read_bytes()

    @property
    def state(self) -> State:
        return read_state(self.repository, self.ring)

    def copy(self, folder: Path) -> World:
        """The same world in another folder."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return World(folder)

    def keep_copy(self, name: str) -> Path:
        """Put a copy of the served folder aside, as somebody would who means to serve it later."""
        return Path(shutil.copytree(self.repository, self.folder / name))

    def publish(self, bundle: str, now: datetime = NOW, **request: Any) -> int:
        """The next release."""
        wanted = ReleaseRequest(**request)
        return publish_release(self.repository, self.folder / bundle, self.ring, wanted, now).release.release

    def sign_targets(self, files: Mapping[str, bytes], now: datetime = NOW) -> None:
        """Publish bytes as targets with the right keys, whatever they are."""
        with opened(self.repository, self.ring) as state:
            publish_targets(self.repository, state, self.ring, online_signers(self.ring, state), now, files)

    def refresh(
        self, now: datetime = NOW, *, transport: Transport | None = None, bootstrap: bytes | None = None
    ) -> TrustedRepository:
        """What the device believes now."""
        given = self.bootstrap if bootstrap is None else bootstrap
        return refresh(transport or FolderTransport(self.repository), self.tuf, given, now)

    def signers(self, role: str) -> tuple[Signer, ...]:
        """The keys of a role, right or stolen."""
        return self.ring.at_hand(role, self.state.root.signed.roles[role].keyids)


def build_world(folder: Path, *, days: ExpiryDays | None = None, now: datetime = NOW, releases: int = 2) -> World:
    """A repository with releases of `parent` and `child`, as `World.publish` knows the bundles."""
    folder.mkdir(parents=True)
    write_family(folder)
    world = World(folder)
    init_repository(world.repository, world.ring, now, days)
    shutil.copy(world.repository / "metadata" / "1.root.json", folder / "bootstrap.json")
    for bundle in ("parent", "child")[:releases]:
        world.publish(bundle, now)
    return world


def versions(world: World) -> dict[str, int]:
    """The version of each role that the device trusts, as far as it trusts any."""
    path = world.tuf / "trusted.json"
    if not path.exists():
        return {}
    import msgspec

    found: dict[str, int] = {}
    for data in msgspec.json.decode(path.read_bytes(), type=Trusted).files.values():
        signed = json.loads(data)["signed"]
        found[signed["_type"]] = max(signed["version"], found.get(signed["_type"], 0))
    return found


def believed(world: World) -> dict[str, bytes]:
    """Every byte that the device keeps of what it believes."""
    return {
        path.relative_to(world.tuf).as_posix(): path.read_bytes()
        for path in sorted(world.tuf.rglob("*"))
        if path.is_file() and "work" not in path.parts
    }


def assert_refused(
    world: World,
    what: str,
    now: datetime = NOW,
    *,
    transport: Transport | None = None,
    release: int | None = None,
    newer: Sequence[str] = (),
) -> UpdateError:
    """The device refuses, says `what`, and believes afterwards what it believed before.

    Args:
        release: refuse this one; the repository itself is believed.
        newer: roles of which it may have verified, and then keeps, a newer version before it refused.
    """
    attempt: Callable[[], object] = partial(world.refresh, now, transport=transport)
    if release is not None:
        attempt = partial(world.refresh(now, transport=transport).release, release)
    before, before_versions = believed(world), versions(world)
    with pytest.raises(UpdateError, match=what) as caught:
        attempt()
    after_versions = versions(world)
    assert {role for role in after_versions if after_versions[role] != before_versions.get(role)} == set(newer)
    assert all(after_versions[role] >= version for role, version in before_versions.items())
    is_metadata = ("trusted.json", "trusted.copy.json") if newer or not before else ()
    kept = {name: data for name, data in believed(world).items() if name not in is_metadata}
    assert kept == {name: data for name, data in before.items() if name not in is_metadata}
    return caught.value


def forge(path: Path, change: Callable[[Any], None], signers: Sequence[Signer], to: Path | None = None) -> Path:
    """Change signed metadata and sign it, with whatever keys the attacker has."""
    metadata: Metadata[Any] = Metadata.from_bytes(path.read_bytes())
    change(metadata.signed)
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    (to or path).write_bytes(metadata.to_bytes())
    return to or path


def forge_chain(
    world: World, role: str, change: Callable[[Any], None], signers: Mapping[str, Sequence[Signer]]
) -> None:
    """A new version of a role, changed, and of the roles that name it, each signed by the attacker's choice of keys."""
    metadata_folder = world.repository / "metadata"
    state = copy.deepcopy(world.state)
    names = list(ROLE_FILES)[::-1]
    for name in names[names.index(role) :]:
        metadata: Metadata[Any] = getattr(state, name)
        metadata.signed.version += 1
        if name == role:
            change(metadata.signed)
        metadata.signatures.clear()
        for signer in signers[name]:
            metadata.sign(signer, append=True)
        data, version = metadata.to_bytes(), metadata.signed.version
        file = "timestamp.json" if name == "timestamp" else f"{version}.{name}.json"
        (metadata_folder / file).write_bytes(data)
        meta = MetaFile.from_data(version, data, ["sha256"])
        if name == "targets":
            state.snapshot.signed.meta["targets.json"] = meta
        elif name == "snapshot":
            state.timestamp.signed.snapshot_meta = meta


def target_file(world: World, name: str) -> Path:
    """Where the served folder keeps a target."""
    info: TargetFile = world.state.targets.signed.targets[name]
    return world.repository / "targets" / info.get_prefixed_paths()[0]


class EndlessTransport(FolderTransport):
    """Serves a folder; one of its files never ends."""

    def __init__(self, folder: Path, endless: str) -> None:
        super().__init__(folder)
        self._endless = endless
        self.given_bytes = 0

    def read_range(self, path: str, start: int, end: int | None) -> Iterator[bytes]:
        yield from super().read_range(path, start, end)
        while path == self._endless and end is None:
            self.given_bytes += 1 << 16
            yield bytes(1 << 16)
