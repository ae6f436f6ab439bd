"""The publisher's repository, by the rules on top of `edge_ilseg/publishing/{repository,state,releases}.py`.

What it has made is looked at through a device's own client wherever that can tell.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from bundles import write_color_folder
from tuf.api.metadata import Metadata, Root
from tuf_attacks import NOW, ROLE_FILES, World, after, build_world, forge, target_file

from edge_ilseg.bundle import check_files, read_manifest, write_manifest
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.update.release import WatchLimits, parse_rollouts
from edge_ilseg.devices.update.transport import FolderTransport
from edge_ilseg.devices.update.trust import refresh as refresh_device
from edge_ilseg.errors import BundleError, UpdateError
from edge_ilseg.files import write_bytes
from edge_ilseg.publishing import keys as keys_module
from edge_ilseg.publishing import repository as repository_module
from edge_ilseg.publishing.keys import KeyRing
from edge_ilseg.publishing.packs import read_pack_index, unpack_bundle
from edge_ilseg.publishing.releases import (
    ReleaseRequest,
    halt,
    init_repository,
    publish_release,
    read_status,
    set_rollout,
)
from edge_ilseg.publishing.repository import NEXT_NAME, opened, refresh, rotate_keys
from edge_ilseg.publishing.state import ROLES, ExpiryDays


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("worlds") / "template", releases=1)


@pytest.fixture
def world(template: World, tmp_path: Path) -> World:
    """A repository with one release, of `parent`; `child` is still to come."""
    return template.copy(tmp_path / "world")


def served(world: World) -> dict[str, bytes]:
    return {
        path.relative_to(world.repository).as_posix(): path.read_bytes()
        for path in world.repository.rglob("*")
        if path.is_file()
    }


def entries(world: World, now: object = NOW) -> list[tuple[int, float, bool]]:
    """What a device sees: release, per cent, halted."""
    found = world.refresh(now)  # type: ignore[arg-type]
    return [(entry.release, entry.rollout.percent, entry.halted) for entry in found.rollouts.entries]


def test_a_new_repository_is_empty_and_whole(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", releases=0)
    assert entries(world) == []
    assert sorted(path.name for path in world.repository.iterdir()) == ["metadata", "packs", "targets"]


def test_two_of_three_keys_sign_a_root_and_one_each_other_role(world: World) -> None:
    roles = read_status(world.repository, world.ring, NOW).roles
    assert {role.role: (role.threshold, len(role.key_ids)) for role in roles} == {
        "root": (2, 3),
        "targets": (1, 1),
        "snapshot": (1, 1),
        "timestamp": (1, 1),
    }
    assert len({key_id for role in roles for key_id in role.key_ids}) == 6


def test_signatures_hold_as_long_as_was_asked_also_when_they_are_renewed(tmp_path: Path) -> None:
    days = ExpiryDays(root=100, targets=50, snapshot=20, timestamp=3)
    world = build_world(tmp_path / "world", days=days, releases=1)
    refresh(world.repository, world.ring, after(99))
    found = {role.role: role.days_left for role in read_status(world.repository, world.ring, after(99)).roles}
    assert found == {"root": 100, "targets": 50, "snapshot": 20, "timestamp": 3}


def test_a_day_is_the_least_that_signatures_hold(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="a day at least"):
        init_repository(tmp_path / "r", KeyRing([tmp_path / "k"], unencrypted=True), NOW, ExpiryDays(timestamp=0))


def test_a_repository_is_never_made_over_something_else(world: World, tmp_path: Path) -> None:
    before = served(world)
    with pytest.raises(UpdateError, match="something in the repository's place"):
        init_repository(world.repository, KeyRing([tmp_path / "k"], unencrypted=True), NOW)
    with pytest.raises(UpdateError, match="folder for the keys is not empty"):
        init_repository(tmp_path / "new", world.ring, NOW)
    with pytest.raises(UpdateError, match="must not lie in what is published"):
        init_repository(tmp_path / "new", KeyRing([tmp_path / "new" / "keys"], unencrypted=True), NOW)
    assert not (tmp_path / "new").exists()
    assert served(world) == before


def test_a_release_says_what_the_bundle_is_and_what_a_device_must_see_kept(world: World) -> None:
    number = world.publish("child", percent=10.0, groups=("harbour",), note="boats", watch=WatchLimits(min_frames=7))
    release, manifest = world.refresh().release(number), read_manifest(world.folder / "child")
    assert (release.release, release.bundle_id, release.note) == (2, manifest.bundle_id, "boats")
    assert (release.step_index, release.step_name) == (manifest.step.index, manifest.step.name)
    assert release.limits == Limits(max_old_miou_drop_pct=2.0, max_class_drop_pct=10.0)
    assert release.watch.min_frames == 7
    (entry,) = (item for item in world.refresh().rollouts.entries if item.release == number)
    assert (entry.rollout.percent, entry.rollout.groups) == (10.0, ("harbour",))
    assert entry.rollout.id != world.refresh().rollouts.entries[0].rollout.id


def test_the_pack_is_where_the_release_says_and_holds_the_bundle(world: World, tmp_path: Path) -> None:
    number = world.publish("child")
    pack = world.refresh().release(number).pack
    path = world.repository / pack.path
    assert path.stat().st_size == pack.bytes
    unpack_bundle(world.repository, pack, tmp_path)
    check_files(tmp_path / "bundle", read_manifest(world.folder / "child"))
    assert read_manifest(tmp_path / "bundle") == read_manifest(world.folder / "child")


def test_validation_data_is_shipped_in_the_pack(world: World, tmp_path: Path) -> None:
    images = write_color_folder(tmp_path / "colors")
    request = ReleaseRequest()
    found = publish_release(
        world.repository, world.folder / "child", world.ring, request, NOW, validation=images
    ).release
    names = {file.path for file in read_pack_index(world.repository, found.pack).files}
    assert {"validation/classes.txt", "validation/images/000.png", "bundle/manifest.json"} <= names


def test_what_each_device_fetches_is_told(world: World) -> None:
    found = publish_release(world.repository, world.folder / "child", world.ring, ReleaseRequest(), NOW)
    nothing, one = found.fetches
    assert (nothing.from_release, one.from_release, one.step_name) == (None, 1, "00-grass")
    assert one.bytes < nothing.bytes <= found.release.pack.bytes
    assert one.ranges >= 2


def test_an_earlier_pack_that_was_removed_is_passed_over(world: World) -> None:
    (pack,) = (world.repository / "packs").iterdir()
    pack.unlink()
    found = publish_release(world.repository, world.folder / "child", world.ring, ReleaseRequest(), NOW)
    assert [row.from_release for row in found.fetches] == [None]


def test_an_earlier_pack_that_is_damaged_is_named(world: World) -> None:
    (pack,) = (world.repository / "packs").iterdir()
    data = pack.read_bytes()
    before = served(world)
    for damaged in (data[:-1], bytes([data[0] ^ 1]) + data[1:], data[:-1] + bytes([data[-1] ^ 1])):
        pack.write_bytes(damaged)
        with pytest.raises(UpdateError):
            world.publish("child")
    pack.write_bytes(data)
    assert served(world) == before


def test_no_byte_of_a_pack_can_change_unseen(world: World, tmp_path: Path) -> None:
    (world.folder / "child" / "noise.bin").write_bytes(random.Random(0).randbytes(5000))  # stored as it is
    write_manifest(world.folder / "child", read_manifest(world.folder / "child"))
    number = world.publish("child", bases=0)
    pack = world.refresh().release(number).pack
    path = world.repository / pack.path
    data = path.read_bytes()
    for place in (*range(0, pack.index_bytes, 37), *range(pack.index_bytes, pack.bytes, 499)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UpdateError):
            unpack_bundle(world.repository, pack, tmp_path / "unpacked")


def test_a_damaged_bundle_is_not_published(world: World) -> None:
    before = served(world)
    path = world.folder / "child" / "fp32.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(BundleError, match="damaged"):
        world.publish("child")
    assert served(world) == before


def test_a_bundle_that_is_out_is_published_again_only_on_demand(world: World) -> None:
    """Rule 3 of releases: going back is a release with a higher number and the older bytes."""
    with pytest.raises(UpdateError, match="published already") as caught:
        world.publish("parent")
    assert "release 1" in str(caught.value)
    world.publish("child")
    number = world.publish("parent", again=True)
    found = world.refresh()
    assert number == 3
    assert found.release(3).content_id == found.release(1).content_id != found.release(2).content_id
    assert len(list((world.repository / "packs").iterdir())) == 2


@pytest.mark.parametrize(
    ("request_fields", "what"),
    [
        ({"limits": Limits(max_class_drop_pct=float("nan"))}, "not a number"),
        ({"watch": WatchLimits(max_latency_p95_ms=float("inf"))}, "not a number"),
        ({"percent": 101.0}, "list of roll-outs is damaged"),
        ({"not_before": "tomorrow"}, "not in ISO 8601"),
        ({"not_before": "2026-06-01T12:00:00"}, "no time zone"),
        ({"watch": WatchLimits(min_frames=0)}, "release is damaged"),
    ],
)
def test_what_a_device_would_not_read_is_not_signed(world: World, request_fields: dict[str, object], what: str) -> None:
    """Rule 1 of releases."""
    before = served(world)
    with pytest.raises(UpdateError, match=what):
        world.publish("child", **request_fields)
    assert served(world) == before


def test_a_roll_out_is_widened_and_never_narrowed(world: World) -> None:
    world.publish("child", percent=10.0, groups=("harbour",))
    set_rollout(world.repository, world.ring, 2, NOW, percent=50.0)
    assert entries(world)[1] == (2, 50.0, False)
    assert world.refresh().rollouts.entries[1].rollout.groups == ("harbour",)
    with pytest.raises(UpdateError, match="cannot be narrowed"):
        set_rollout(world.repository, world.ring, 2, NOW, percent=49.0)
    set_rollout(world.repository, world.ring, 2, NOW, percent=50.0, all_groups=True)
    assert world.refresh().rollouts.entries[1].rollout.groups == ()
    with pytest.raises(UpdateError, match="no such release"):
        set_rollout(world.repository, world.ring, 3, NOW, percent=50.0)


def test_a_device_that_was_chosen_stays_chosen_when_a_roll_out_is_widened(world: World) -> None:
    world.publish("child", percent=10.0)
    before = world.refresh().rollouts.entries[1].rollout
    set_rollout(world.repository, world.ring, 2, NOW, percent=60.0)
    assert world.refresh().rollouts.entries[1].rollout.id == before.id


def test_a_release_is_halted_for_a_reason_and_goes_on_only_on_demand(world: World) -> None:
    world.publish("child", percent=10.0)
    release_file = target_file(world, "releases/2.json").read_bytes()
    with pytest.raises(UpdateError, match="for a reason"):
        halt(world.repository, world.ring, 2, " ", NOW)
    halt(world.repository, world.ring, 2, "bad at night", NOW)
    found = world.refresh().rollouts.entries[1]
    assert (found.halted, found.reason) == (True, "bad at night")
    with pytest.raises(UpdateError, match="is halted") as caught:
        set_rollout(world.repository, world.ring, 2, NOW, percent=100.0)
    assert "bad at night" in str(caught.value)
    set_rollout(world.repository, world.ring, 2, NOW, percent=100.0, resume=True)
    assert entries(world)[1] == (2, 100.0, False)
    assert target_file(world, "releases/2.json").read_bytes() == release_file


def test_the_time_of_publication_never_goes_back(world: World) -> None:
    """Rule 4 of releases."""
    halt(world.repository, world.ring, 1, "bad at night", after(-10))
    assert world.refresh(after(-10)).rollouts.published == NOW.isoformat()


def test_a_clock_far_ahead_is_not_signed_unless_the_repository_was_refreshed_under_it(world: World) -> None:
    far = after(365 + 365 + 1)
    before = served(world)
    with pytest.raises(UpdateError, match="clock is more than a year later"):
        halt(world.repository, world.ring, 1, "bad at night", far)
    assert served(world) == before
    refresh(world.repository, world.ring, far)
    halt(world.repository, world.ring, 1, "bad at night", far)
    assert entries(world, far) == [(1, 100.0, True)]


def test_two_publishers_are_never_at_work_at_once(world: World) -> None:
    """Rule 2."""
    with opened(world.repository, world.ring):
        with pytest.raises(UpdateError, match="another publisher"):
            world.publish("child")
        with pytest.raises(UpdateError, match="another publisher"):
            refresh(world.repository, world.ring, NOW)
    assert world.publish("child") == 2


def test_a_folder_that_is_no_repository_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="no repository"):
        refresh(tmp_path / "none", world.ring, NOW)
    with pytest.raises(UpdateError, match="no repository"):
        read_status(tmp_path / "none", world.ring, NOW)


# What somebody may have done to the folder since it was signed.


def test_bytes_that_were_changed_since_are_not_signed_again(world: World) -> None:
    for name in ("timestamp.json", "2.snapshot.json", "2.targets.json", "1.root.json"):
        path = world.repository / "metadata" / name
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"version":', b'"version": '))
        if name not in ("timestamp.json", "1.root.json"):  # white space is not signed, but it is hashed
            with pytest.raises(UpdateError, match="not what was signed"):
                world.publish("child")
        path.write_bytes(data.replace(b'"expires":"2', b'"expires":"3'))
        with pytest.raises(UpdateError, match=r"not what was signed|does not descend"):
            world.publish("child")
        path.unlink()
        with pytest.raises(UpdateError, match=r"lacks a file|does not descend"):
            world.publish("child")
        path.write_bytes(data)
    assert world.publish("child") == 2


def test_a_list_that_was_changed_since_is_not_signed_again(world: World) -> None:
    path = target_file(world, "rollouts.json")
    path.write_bytes(path.read_bytes().replace(b"100.0", b"1.0"))
    with pytest.raises(UpdateError, match="not what was signed"):
        world.publish("child")


def test_a_root_that_names_a_strangers_keys_beside_ours_is_not_signed_under(world: World) -> None:
    """The stranger's root would accept our signatures, and devices ours on his list."""
    stranger = build_world(world.folder / "stranger")
    metadata = world.repository / "metadata"

    def usurp(root: Root) -> None:
        for role in ROLES:
            for signer in stranger.signers(role):
                root.add_key(signer.public_key, role)

    forge(metadata / "1.root.json", usurp, stranger.signers("root"))
    with pytest.raises(UpdateError, match="does not descend"):
        world.publish("child")


def test_an_old_copy_of_the_repository_is_not_signed_on(world: World) -> None:
    """It would take back the halt."""
    old = world.keep_copy("old")
    halt(world.repository, world.ring, 1, "bad at night", NOW)
    shutil.rmtree(world.repository)
    shutil.copytree(old, world.repository)
    with pytest.raises(UpdateError, match="older than what was signed last"):
        world.publish("child")


def test_devices_follow_an_old_copy_whose_keys_were_replaced(world: World) -> None:
    """What docs/release-format.md tells to do when the newest copy is lost."""
    old = world.keep_copy("old")
    world.publish("child")
    refresh(world.repository, world.ring, NOW)
    world.refresh()
    shutil.rmtree(world.repository)
    shutil.copytree(old, world.repository)
    (world.folder / "keys" / "timestamp.json").unlink()
    rotate_keys(world.repository, world.ring, "snapshot", NOW)
    with pytest.raises(UpdateError, match="older than what this device has seen"):
        world.refresh()
    rotate_keys(world.repository, world.ring, "timestamp", NOW)
    assert entries(world) == [(1, 100.0, False)]


# Expiry.


def test_a_refresh_signs_the_timestamp_and_what_is_near_its_expiry(world: World) -> None:
    assert refresh(world.repository, world.ring, after(5)) == (("timestamp",), ())
    assert refresh(world.repository, world.ring, after(20.5)) == (("snapshot", "timestamp"), ())
    assert refresh(world.repository, world.ring, after(60.5)).renewed == ("targets", "snapshot", "timestamp")
    assert refresh(world.repository, world.ring, after(300)).renewed == ROLES
    assert entries(world, after(301)) == [(1, 100.0, False)]


def test_everything_that_has_expired_is_mended_by_a_refresh(world: World) -> None:
    refresh(world.repository, world.ring, after(5000))
    assert entries(world, after(5001)) == [(1, 100.0, False)]


def without(world: World, *roles: str) -> KeyRing:
    """The publisher's keys without those of some roles."""
    folder = world.folder / "some-keys"
    shutil.copytree(world.folder / "keys", folder, dirs_exist_ok=True)
    for path in folder.glob("*.pem"):
        if path.name.partition("-")[0] in roles:
            path.unlink()
    return KeyRing([folder], environment={})


def test_a_refresh_with_the_timestamps_key_alone_does_what_it_can(world: World) -> None:
    ring = without(world, "root", "targets", "snapshot")
    assert refresh(world.repository, ring, after(5)) == (("timestamp",), ())
    assert refresh(world.repository, ring, after(300)) == (("timestamp",), ("root", "targets", "snapshot"))
    without(world, "timestamp")
    with pytest.raises(UpdateError, match="not enough keys are at hand to sign timestamp"):
        refresh(world.repository, without(world, "timestamp"), after(5))


def test_releases_need_no_root_key(world: World) -> None:
    ring = without(world, "root")
    publish_release(world.repository, world.folder / "child", ring, ReleaseRequest(), NOW)
    halt(world.repository, ring, 2, "bad at night", NOW)
    assert entries(world)[1] == (2, 100.0, True)


@pytest.mark.parametrize("role", ROLE_FILES)
def test_a_key_that_lacks_is_missed_before_anything_is_written(world: World, role: str) -> None:
    """Rule 3."""
    before = served(world)
    with pytest.raises(UpdateError, match=f"not enough keys are at hand to sign {role}"):
        publish_release(world.repository, world.folder / "child", without(world, role), ReleaseRequest(), NOW)
    assert served(world) == before


def test_the_status_tells_expiry_and_keys_without_a_private_key(world: World) -> None:
    ring = without(world, *ROLES)
    found = read_status(world.repository, ring, after(5.5))
    near = {role.role: role.is_near_expiry for role in found.roles}
    assert near == {"root": False, "targets": False, "snapshot": False, "timestamp": True}
    assert [(entry.release, entry.halted) for entry in found.entries] == [(1, False)]
    assert next(role.days_left for role in found.roles if role.role == "timestamp") == 1.5


# A crash at any moment.


class Crash(BaseException):
    """Nothing in the program may catch this one."""


@contextmanager
def crash_before_write(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[list[Path]]:
    """Writes number 0, 1, ... happen; the one before which the program dies does not."""
    written: list[Path] = []

    def write(path: Path, data: bytes) -> None:
        if len(written) == number:
            raise Crash
        write_bytes(path, data)
        written.append(path)

    with monkeypatch.context() as patched:
        patched.setattr(repository_module, "write_bytes", write)
        patched.setattr(keys_module, "write_bytes", write)
        yield written


def crashes(monkeypatch: pytest.MonkeyPatch, action: object) -> Iterator[int]:
    """Run `action` with a crash before write 0, 1, ... until it ends; yields after each crash."""
    for number in range(40):
        try:
            with crash_before_write(monkeypatch, number):
                action()  # type: ignore[operator]
        except Crash:
            yield number
        else:
            return
    raise AssertionError("it writes more often than that")


@pytest.mark.slow
def test_a_crash_while_publishing_leaves_the_old_state_or_the_new(
    template: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 2. Five files and what is kept beside the keys: six moments."""
    seen = set()
    for number in range(6):
        world = template.copy(tmp_path / str(number))
        with crash_before_write(monkeypatch, number), pytest.raises(Crash):
            world.publish("child")
        found = [release for release, _, _ in entries(world)]
        seen.add(tuple(found))
        assert found in ([1], [1, 2])
        if found == [1]:
            assert world.publish("child") == 2
        assert world.publish("parent", again=True) == 3
        assert [release for release, _, _ in entries(world)] == [1, 2, 3]
        assert world.refresh().release(3).release == 3
    assert seen == {(1,), (1, 2)}


def test_what_a_crash_has_left_of_a_pack_is_cleared_away(world: World) -> None:
    for name in (".new.pack", "..new.pack.x1"):
        (world.repository / "packs" / name).write_bytes(b"half")
    world.publish("child")
    assert all(path.suffix == ".pack" and len(path.stem) == 64 for path in (world.repository / "packs").iterdir())


@pytest.mark.parametrize("role", ROLES)
def test_a_crash_while_a_key_is_replaced_leaves_every_device_a_valid_state(
    world: World, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 4."""
    world.refresh()
    count = 0
    for number in crashes(monkeypatch, lambda: rotate_keys(world.repository, world.ring, role, NOW)):
        assert entries(world) == [(1, 100.0, False)]
        fresh = refresh_device(
            FolderTransport(world.repository), world.folder / f"fresh-{number}", world.bootstrap, NOW
        )
        assert len(fresh.rollouts.entries) == 1
        count += 1
    assert count >= {"root": 3, "timestamp": 4, "snapshot": 5, "targets": 6}[role]
    assert world.publish("child") == 2
    assert len(entries(world)) == 2


@pytest.mark.parametrize("role", ROLE_FILES)
def test_a_crash_while_a_lost_key_is_replaced_is_mended_by_the_next_command(
    world: World, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 4: no device is ever led astray, and none is lost; in one moment it has to wait for that command."""
    world.refresh()
    waited = False
    for path in (world.folder / "keys").glob(f"{role}-*.pem"):
        path.unlink()
    for _ in crashes(monkeypatch, lambda: rotate_keys(world.repository, world.ring, role, NOW)):
        waited |= (world.repository / "metadata" / NEXT_NAME).exists()
        for path in (world.folder / "keys").glob(f"{role}-*.pem"):
            path.unlink()
    assert waited
    assert not (world.repository / "metadata" / NEXT_NAME).exists()
    assert world.publish("child") == 2
    assert len(entries(world)) == 2


def test_devices_wait_when_a_lost_key_was_replaced_up_to_the_last_step(world: World) -> None:
    """The new root is there, and the timestamp that it accepts is still beside its place."""
    world.refresh()
    metadata = world.repository / "metadata"
    for path in (world.folder / "keys").glob("timestamp-*.pem"):
        path.unlink()
    before = (metadata / "timestamp.json").read_bytes()
    rotate_keys(world.repository, world.ring, "timestamp", NOW)
    (metadata / "timestamp.json").rename(metadata / NEXT_NAME)
    (metadata / "timestamp.json").write_bytes(before)
    with pytest.raises(UpdateError, match="not signed by the keys"):
        world.refresh()
    assert world.publish("child") == 2
    assert len(entries(world)) == 2


# Keys that are replaced.


@pytest.mark.parametrize("role", ROLES)
def test_a_replaced_key_signs_nothing_any_more(world: World, role: str) -> None:
    before = next(item.key_ids for item in read_status(world.repository, world.ring, NOW).roles if item.role == role)
    paths = rotate_keys(world.repository, world.ring, role, NOW)
    after_ids = next(item.key_ids for item in read_status(world.repository, world.ring, NOW).roles if item.role == role)
    assert len(after_ids) == len(before) == len(paths)
    assert not set(before) & set(after_ids)
    for path in (world.folder / "keys").glob(f"{role}-*.pem"):
        if path not in paths:
            path.unlink()
    assert world.publish("child") == 2
    assert len(entries(world)) == 2


def test_a_key_is_replaced_only_with_enough_root_keys(world: World) -> None:
    before = served(world)
    with pytest.raises(UpdateError, match="not enough keys are at hand to sign root"):
        rotate_keys(world.repository, without(world, "root"), "targets", NOW)
    with pytest.raises(UpdateError, match="no such role"):
        rotate_keys(world.repository, world.ring, "mirror", NOW)
    assert served(world) == before


def test_two_root_keys_are_enough_to_replace_a_third_that_is_lost(world: World) -> None:
    lost = sorted((world.folder / "keys").glob("root-*.pem"))[0]
    lost.unlink()
    rotate_keys(world.repository, world.ring, "root", NOW)
    root: Metadata[Root] = Metadata.from_bytes((world.repository / "metadata" / "2.root.json").read_bytes())
    assert len(root.signatures) == 2 + 3
    assert entries(world) == [(1, 100.0, False)]


def test_a_repository_is_followed_from_the_root_that_the_publisher_has_seen_last(world: World) -> None:
    rotate_keys(world.repository, world.ring, "root", NOW)
    assert (world.folder / "keys" / "root.json").read_bytes() == (
        world.repository / "metadata" / "2.root.json"
    ).read_bytes()
    (world.repository / "metadata" / "2.root.json").unlink()
    with pytest.raises(UpdateError, match="does not descend"):
        world.publish("child")


def test_keys_from_the_environment_alone_are_enough(world: World) -> None:
    variables = {
        f"EDGE_ILSEG_KEY_{role.upper()}": next((world.folder / "keys").glob(f"{role}-*.pem")).read_text()
        for role in ROLE_FILES
    }
    publish_release(
        world.repository, world.folder / "child", KeyRing(environment=variables), ReleaseRequest(), NOW + timedelta(1)
    )
    assert len(entries(world, after(2))) == 2


def test_metadata_names_what_it_covers_by_length_and_hash(world: World) -> None:
    """Without them a stolen timestamp key alone could serve any snapshot that was ever signed."""
    metadata = world.repository / "metadata"
    timestamp = json.loads((metadata / "timestamp.json").read_bytes())["signed"]["meta"]["snapshot.json"]
    snapshot = json.loads((metadata / "2.snapshot.json").read_bytes())["signed"]["meta"]["targets.json"]
    for meta in (timestamp, snapshot):
        assert set(meta) == {"version", "length", "hashes"}
    rollouts = parse_rollouts(target_file(world, "rollouts.json").read_bytes())
    assert [entry.release for entry in rollouts.entries] == [1]
