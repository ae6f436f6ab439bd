"""Whoever controls the server, the wire or some of the keys, against the real client (`devices/update/trust.py`)."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tuf.api.metadata import MetaFile
from tuf_attacks import (
    NOW,
    ROLE_FILES,
    EndlessTransport,
    World,
    after,
    assert_refused,
    build_world,
    forge,
    forge_chain,
    target_file,
    versions,
)

from edge_ilseg.devices.update.release import (
    MAX_RECORD_BYTES,
    ROLLOUTS_TARGET,
    encode_record,
    parse_release,
    parse_rollouts,
    release_target,
)
from edge_ilseg.devices.update.trust import UPDATING_STOPS
from edge_ilseg.publishing.keys import generate_key
from edge_ilseg.publishing.releases import halt
from edge_ilseg.publishing.repository import refresh as refresh_repository
from edge_ilseg.publishing.repository import rotate_keys
from edge_ilseg.publishing.state import ExpiryDays, read_target

EXPIRED, UNSIGNED, OLDER = "has expired", "not signed by the keys", "older than what this device has seen"
OTHER, LONGER, LACKS, DAMAGED = "not the one that was signed", "longer than the one", "lacks a file", "is damaged"
LONG = ExpiryDays(root=4000, targets=4000, snapshot=4000, timestamp=4000)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("worlds") / "template")


@pytest.fixture
def world(template: World, tmp_path: Path) -> World:
    """A repository with two releases, and a device that has seen it."""
    world = template.copy(tmp_path / "world")
    world.refresh()
    return world


@pytest.fixture
def fresh(template: World, tmp_path: Path) -> World:
    """A repository with two releases, and a device that has seen nothing."""
    return template.copy(tmp_path / "world")


def serve(world: World, copy: Path) -> None:
    """Put a copy of the served folder into its place."""
    shutil.rmtree(world.repository)
    shutil.copytree(copy, world.repository)


def assert_goes_on(world: World, honest: Path, *, releases: int = 2) -> None:
    """The attack has left nothing behind: the honest repository is believed as before."""
    serve(world, honest)
    assert len(world.refresh().rollouts.entries) == releases


@pytest.mark.parametrize("release", [None, 2])
@pytest.mark.parametrize("kind", ["tampered", "truncated", "empty"])
def test_a_target_that_is_not_what_was_signed_is_refused(fresh: World, kind: str, release: int | None) -> None:
    honest = fresh.keep_copy("honest")
    path = target_file(fresh, ROLLOUTS_TARGET if release is None else release_target(release))
    data = path.read_bytes()
    changed = {"tampered": data.replace(b'"release": 2', b'"release": 3'), "truncated": data[:-1], "empty": b""}[kind]
    assert changed != data
    path.write_bytes(changed)
    error = assert_refused(fresh, OTHER, release=release, newer=() if release else ("root", *ROLE_FILES))
    assert UPDATING_STOPS in str(error)
    assert_goes_on(fresh, honest)


@pytest.mark.parametrize("role", [*ROLE_FILES, "2.root"])
def test_metadata_that_never_ends_is_cut_off(fresh: World, role: str) -> None:
    version = {"snapshot": "3.", "targets": "3."}.get(role, "")
    name = f"metadata/{version}{role}.json"
    (fresh.repository / name).touch()
    transport = EndlessTransport(fresh.repository, name)
    newer = {"2.root": ("root",), "timestamp": ("root",), "snapshot": ("root", "timestamp")}.get(
        role, ("root", "timestamp", "snapshot")
    )
    assert_refused(fresh, LONGER, transport=transport, newer=newer)
    assert transport.given_bytes < 1 << 20


def test_a_target_that_never_ends_is_cut_off(fresh: World) -> None:
    name = target_file(fresh, release_target(2)).relative_to(fresh.repository).as_posix()
    transport = EndlessTransport(fresh.repository, name)
    assert_refused(fresh, LONGER, transport=transport, release=2, newer=())
    assert transport.given_bytes < 1 << 20


def test_a_target_that_was_signed_too_large_is_not_even_asked_for(world: World) -> None:
    world.sign_targets({ROLLOUTS_TARGET: b" " * (MAX_RECORD_BYTES + 1)})
    target_file(world, ROLLOUTS_TARGET).unlink()
    assert_refused(world, "too large", newer=tuple(ROLE_FILES))


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_metadata_that_has_expired_stops_updating(role: str, tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", days=msgspec.structs.replace(LONG, **{role: 10}))
    world.refresh(after(9.9))
    error = assert_refused(world, EXPIRED, after(10))
    assert role in str(error.found).lower()
    assert UPDATING_STOPS in str(error)


def test_a_frozen_repository_is_believed_until_its_timestamp_expires(world: World) -> None:
    frozen = world.keep_copy("frozen")
    halt(world.repository, world.ring, 2, "bad at night", NOW)
    serve(world, frozen)
    assert not world.refresh(after(6.9)).rollouts.entries[-1].halted
    assert_refused(world, EXPIRED, after(7))


def test_an_old_timestamp_does_not_take_back_a_halt(world: World) -> None:
    old = world.keep_copy("old")
    halt(world.repository, world.ring, 2, "bad at night", NOW)
    assert world.refresh().rollouts.entries[-1].halted
    serve(world, old)
    assert_refused(world, OLDER)


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_an_old_snapshot_or_targets_under_a_new_timestamp_is_refused(world: World, role: str) -> None:
    """The attacker has stolen the keys of the timestamp and the snapshot."""
    stolen = {name: world.signers(name) for name in ROLE_FILES}
    metadata = world.repository / "metadata"
    old = 2
    meta = MetaFile.from_data(old, (metadata / f"{old}.{role}.json").read_bytes(), ["sha256"])

    def point_back(signed: Any) -> None:
        if role == "snapshot":
            signed.snapshot_meta = meta
        else:
            signed.meta["targets.json"] = meta

    forge_chain(world, {"snapshot": "timestamp", "targets": "snapshot"}[role], point_back, stolen)
    assert_refused(world, OLDER, newer=() if role == "snapshot" else ("timestamp",))


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_metadata_mixed_from_two_states_is_refused(fresh: World, role: str) -> None:
    honest = fresh.keep_copy("honest")
    metadata = fresh.repository / "metadata"
    shutil.copy(metadata / f"2.{role}.json", metadata / f"3.{role}.json")
    newer = ("root", "timestamp") if role == "snapshot" else ("root", "timestamp", "snapshot")
    assert_refused(fresh, OTHER, newer=newer)
    assert_goes_on(fresh, honest)


@pytest.mark.parametrize("role", ROLE_FILES)
def test_metadata_signed_by_an_unknown_key_is_refused(world: World, role: str) -> None:
    """Whoever holds the keys of all roles but one cannot do without that one."""
    signers = {name: world.signers(name) for name in ROLE_FILES}
    names = list(ROLE_FILES)
    newer = tuple(names[: names.index(role)])
    forge_chain(world, role, lambda _: None, {**signers, role: (generate_key(),)})
    assert_refused(world, UNSIGNED, newer=newer)


@pytest.mark.parametrize("role", ROLE_FILES)
def test_metadata_with_no_signature_is_refused(world: World, role: str) -> None:
    signers = {name: world.signers(name) for name in ROLE_FILES}
    names = list(ROLE_FILES)
    forge_chain(world, role, lambda _: None, {**signers, role: ()})
    assert_refused(world, UNSIGNED, newer=tuple(names[: names.index(role)]))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\x00" * 100, b'{"signed": {}, "signatures": []}'])
@pytest.mark.parametrize("name", ["timestamp.json", "3.snapshot.json", "3.targets.json", "2.root.json"])
def test_bytes_that_are_no_metadata_are_refused(fresh: World, name: str, data: bytes) -> None:
    (fresh.repository / "metadata" / name).write_bytes(data)
    roles = {"2.root.json": 1, "timestamp.json": 1, "3.snapshot.json": 2, "3.targets.json": 3}[name]
    assert_refused(fresh, f"{DAMAGED}|{OTHER}", newer=("root", *ROLE_FILES)[:roles])


def new_root(world: World, signers: tuple[Any, ...], *, keys: tuple[Any, ...] = (), version: int = 2) -> None:
    """A next root, its own keys replaced by `keys` if there are some."""

    def change(root: Any) -> None:
        root.version = version
        if keys:
            for key_id in tuple(root.roles["root"].keyids):
                root.revoke_key(key_id, "root")
            for key in keys:
                root.add_key(key.public_key, "root")

    metadata = world.repository / "metadata"
    forge(metadata / "1.root.json", change, signers, metadata / "2.root.json")


def test_a_root_below_its_threshold_is_refused(world: World) -> None:
    new_root(world, world.signers("root")[:1])
    assert_refused(world, UNSIGNED)


def test_one_key_that_signs_twice_is_not_two(world: World) -> None:
    key = world.signers("root")[0]
    new_root(world, (key, key))
    assert_refused(world, UNSIGNED)


def test_a_root_signed_by_its_new_keys_alone_is_refused(world: World) -> None:
    own = tuple(generate_key() for _ in range(3))
    new_root(world, own, keys=own)
    assert_refused(world, UNSIGNED)


def test_a_root_signed_by_the_old_keys_alone_is_refused(world: World) -> None:
    new_root(world, world.signers("root"), keys=tuple(generate_key() for _ in range(3)))
    assert_refused(world, UNSIGNED)


def test_a_root_signed_by_the_keys_of_another_role_is_refused(world: World) -> None:
    new_root(world, tuple(signer for role in ROLE_FILES for signer in world.signers(role)))
    assert_refused(world, UNSIGNED)


def test_a_root_that_skips_a_version_is_refused(world: World) -> None:
    new_root(world, world.signers("root"), version=3)
    assert_refused(world, OLDER)


def test_a_root_whose_predecessor_is_withheld_brings_nothing_new(world: World) -> None:
    rotate_keys(world.repository, world.ring, "timestamp", NOW)
    rotate_keys(world.repository, world.ring, "timestamp", NOW)
    (world.repository / "metadata" / "2.root.json").unlink()
    assert_refused(world, UNSIGNED)


def test_a_withheld_root_does_not_bring_back_a_key_that_was_replaced(world: World) -> None:
    """A device that has seen the new root never believes the old key again, power cut or not."""
    thief = world.signers("timestamp")
    rotate_keys(world.repository, world.ring, "timestamp", NOW)
    world.refresh()
    (world.repository / "metadata" / "2.root.json").unlink()
    forge(world.repository / "metadata" / "timestamp.json", lambda signed: _raise_version(signed, 1), thief)
    assert_refused(world, UNSIGNED)


def test_an_old_repository_is_not_believed_by_a_fresh_device(fresh: World) -> None:
    old = fresh.keep_copy("old")
    refresh_repository(fresh.repository, fresh.ring, after(6))
    serve(fresh, old)
    assert_refused(fresh, EXPIRED, after(8), newer=("root",))
    assert not (fresh.tuf / "targets" / "rollouts.json").exists()


def test_another_publishers_repository_is_refused(world: World, tmp_path: Path) -> None:
    other = build_world(tmp_path / "other")
    honest = world.keep_copy("honest")
    serve(world, other.repository)
    assert_refused(world, UNSIGNED)
    assert_goes_on(world, honest)


def test_a_release_file_that_is_another_releases_is_refused(world: World) -> None:
    other = read_target(world.repository, world.state, release_target(1))
    world.sign_targets({release_target(2): other})
    assert_refused(world, "another one than the list", release=2)


@pytest.mark.parametrize("field", ["bundle_id", "step_index", "step_name"])
def test_a_release_that_its_entry_does_not_describe_is_refused(world: World, field: str) -> None:
    release = parse_release(read_target(world.repository, world.state, release_target(2)))
    changed = {"bundle_id": "f" * 64, "step_index": 7, "step_name": "other"}[field]
    world.sign_targets({release_target(2): encode_record(msgspec.structs.replace(release, **{field: changed}))})
    assert_refused(world, "another one than the list", release=2)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "packs/../../x.pack", "packs/other.pack"])
def test_a_release_whose_pack_is_elsewhere_is_refused(world: World, path: str) -> None:
    release = parse_release(read_target(world.repository, world.state, release_target(2)))
    pack = msgspec.structs.replace(release.pack, path=path)
    world.sign_targets({release_target(2): encode_record(msgspec.structs.replace(release, pack=pack))})
    assert_refused(world, "a pack that cannot be its own", release=2)


def test_a_list_whose_numbers_do_not_rise_is_refused(world: World) -> None:
    rollouts = parse_rollouts(read_target(world.repository, world.state, ROLLOUTS_TARGET))
    doubled = msgspec.structs.replace(rollouts, entries=rollouts.entries + rollouts.entries)
    world.sign_targets({ROLLOUTS_TARGET: encode_record(doubled)})
    assert_refused(world, "do not rise", newer=tuple(ROLE_FILES))


def test_a_fast_forward_with_stolen_keys_ends_when_the_keys_are_replaced(world: World) -> None:
    stolen = {name: world.signers(name) for name in ROLE_FILES}
    honest = world.keep_copy("honest")
    forge_chain(world, "snapshot", lambda signed: _raise_version(signed, 2**31), stolen)
    world.refresh()
    assert versions(world)["snapshot"] > 2**31
    serve(world, honest)
    assert_refused(world, OLDER)
    rotate_keys(world.repository, world.ring, "snapshot", NOW)
    rotate_keys(world.repository, world.ring, "timestamp", NOW)
    assert len(world.refresh().rollouts.entries) == 2
    assert versions(world)["snapshot"] < 2**31


def test_a_clock_of_1970_accepts_nothing_that_the_time_floor_has_seen_expire(world: World) -> None:
    """The caller gives the later of clock and floor; here the floor is what counts (rule 2)."""
    floor = after(30)
    clock = NOW.replace(year=1970)
    assert_refused(world, EXPIRED, max(clock, floor))


def test_a_clock_of_2040_stops_updating_until_it_is_set_right(world: World) -> None:
    for _ in range(2):
        error = assert_refused(world, EXPIRED, NOW.replace(year=2040))
        assert "2040" in str(error)
        assert "clock" in str(error)
    world.publish("parent", NOW, again=True)
    assert len(world.refresh(NOW + timedelta(hours=1)).rollouts.entries) == 3


def _raise_version(signed: Any, by: int) -> None:
    signed.version += by
