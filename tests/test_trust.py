"""The device's view of a repository: time, torn files, full disks. Attacks are in test_tuf_attacks.py.

Rules are those on top of `devices/update/trust.py`.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import msgspec
import pytest
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf_attacks import NOW, World, after, assert_refused, believed, build_world, target_file, versions

from edge_ilseg.devices.update.release import release_target
from edge_ilseg.devices.update.transport import FolderTransport, TransportError, open_transport
from edge_ilseg.devices.update.trust import TRUSTED_NAMES, Trusted, refresh
from edge_ilseg.errors import UpdateError
from edge_ilseg.publishing.releases import halt
from edge_ilseg.publishing.repository import refresh as refresh_repository
from edge_ilseg.publishing.repository import rotate_keys

ROOT = Path(__file__).parents[1]
PEAK_MIB = 40
DAMAGES = ("truncated", "zeroed", "empty", "missing", "one bit flipped")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("worlds") / "template")


@pytest.fixture
def world(template: World, tmp_path: Path) -> World:
    return template.copy(tmp_path / "world")


def test_a_fresh_device_sees_what_was_published(world: World) -> None:
    found = world.refresh()
    assert [(entry.release, entry.step_name) for entry in found.rollouts.entries] == [(1, "00-grass"), (2, "01-boat")]
    release = found.release(2)
    assert (release.release, release.content_id) == (2, found.rollouts.entries[1].content_id)
    assert found.expires == after(7)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_plain_web_server_is_enough(world: World) -> None:
    """It says 404 where a newer root would be; new keys are found behind it all the same."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(world.repository)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        transport = open_transport(f"http://127.0.0.1:{server.server_port}", timeout_s=10)
        assert world.refresh(transport=transport).release(2).release == 2
        rotate_keys(world.repository, world.ring, "root", NOW)
        assert len(world.refresh(transport=transport).rollouts.entries) == 2
        assert versions(world)["root"] == 2
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_release_that_is_not_in_the_list_is_refused(world: World) -> None:
    with pytest.raises(UpdateError, match="no such release"):
        world.refresh().release(3)


def test_a_release_that_is_here_needs_no_connection(world: World) -> None:
    found = world.refresh()
    known = found.release(2)
    shutil.rmtree(world.repository)
    assert found.release(2) == known


def test_a_second_refresh_of_the_same_writes_nothing_that_is_kept(world: World) -> None:
    world.refresh().release(2)
    before = {path: path.stat().st_mtime_ns for path in world.tuf.rglob("*.json") if "work" not in path.parts}
    world.refresh().release(2)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(before) == 4


@pytest.mark.parametrize("year", [2010, 2060])
def test_the_time_is_the_callers_and_not_this_machines(year: int, tmp_path: Path) -> None:
    """Rule 2, in both directions."""
    now = NOW.replace(year=year)
    world = build_world(tmp_path / "world", now=now)
    assert len(world.refresh(now).rollouts.entries) == 2
    assert_refused(world, "has expired", now.replace(year=year + 1))


def test_expired_metadata_is_refused_though_python_tuf_should_ignore_the_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version may take its time elsewhere: `_check_expiry` does not depend on that."""
    deaf = property(lambda _: NOW, lambda _, __: None)
    monkeypatch.setattr(TrustedMetadataSet, "reference_time", deaf, raising=False)
    assert len(world.refresh().rollouts.entries) == 2
    error = assert_refused(world, "has expired", after(8))
    assert "timestamp.json is expired" in str(error)


def test_a_repository_that_cannot_be_reached_is_a_matter_of_the_transport(world: World) -> None:
    world.refresh()
    before = believed(world)
    with pytest.raises(TransportError, match="the folder of the repository is not there"):
        refresh(FolderTransport(world.folder / "unplugged"), world.tuf, world.bootstrap, NOW)
    assert believed(world) == before


def test_a_folder_that_is_no_repository_lacks_files(world: World) -> None:
    (world.folder / "empty").mkdir()
    assert_refused(world, "lacks a file", transport=FolderTransport(world.folder / "empty"), newer=("root",))


@pytest.mark.parametrize("bootstrap", [b"", b"{}", b"not JSON"])
def test_a_bootstrap_that_is_no_root_is_named_as_such(world: World, bootstrap: bytes) -> None:
    with pytest.raises(UpdateError, match="root metadata that this device was given"):
        world.refresh(bootstrap=bootstrap)


def test_a_bootstrap_that_was_changed_is_refused(world: World) -> None:
    with pytest.raises(UpdateError, match="root metadata that this device was given"):
        world.refresh(bootstrap=world.bootstrap.replace(b'"threshold":2', b'"threshold":1'))


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_a_device_follows_keys_that_are_replaced(world: World, role: str) -> None:
    world.refresh()
    rotate_keys(world.repository, world.ring, role, NOW)
    rotate_keys(world.repository, world.ring, role, NOW)
    world.publish("parent", again=True)
    assert len(world.refresh().rollouts.entries) == 3
    assert versions(world)["root"] == 3
    later = world.repository / "metadata" / "3.root.json"
    assert (
        len(
            refresh(FolderTransport(world.repository), world.folder / "other", later.read_bytes(), NOW).rollouts.entries
        )
        == 3
    )


def test_a_newer_root_is_kept_though_the_repository_was_refused(world: World) -> None:
    """Rule 4."""
    world.refresh()
    rotate_keys(world.repository, world.ring, "timestamp", NOW)
    assert_refused(world, "has expired", after(7), newer=("root",))


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "one bit flipped":
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    else:
        path.write_bytes({"truncated": data[: len(data) // 2], "zeroed": bytes(len(data)), "empty": b""}[kind])


def device_files(world: World) -> list[Path]:
    return sorted(path.relative_to(world.tuf) for path in world.tuf.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def seen(template: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A device that has seen keys replaced and a halt; `old` is the repository as it was before the halt."""
    world = template.copy(tmp_path_factory.mktemp("worlds") / "seen")
    rotate_keys(world.repository, world.ring, "timestamp", NOW)
    world.refresh().release(2)
    world.keep_copy("old")
    halt(world.repository, world.ring, 2, "bad at night", NOW)
    world.refresh().release(2)
    return world


def assert_heals(world: World, damaged: tuple[Path, ...], kind: str) -> None:
    """Rule 3: what was halted stays halted where one record is whole; in any case the device goes on."""
    for path in damaged:
        if (world.tuf / path).exists():
            damage(world.tuf / path, kind)
    old = FolderTransport(world.folder / "old")
    if not set(TRUSTED_NAMES) <= {path.name for path in damaged}:
        with pytest.raises(UpdateError, match="older than what this device has seen"):
            world.refresh(transport=old)
    found = world.refresh()
    assert found.rollouts.entries[-1].halted
    assert found.release(2).release == 2
    with pytest.raises(UpdateError, match="older than what this device has seen"):
        world.refresh(transport=old)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_any_file_that_was_damaged_is_made_good(seen: World, kind: str, tmp_path: Path) -> None:
    assert len(device_files(seen)) == 10
    for number, path in enumerate(device_files(seen)):
        assert_heals(seen.copy(tmp_path / str(number)), (path,), kind)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", DAMAGES)
def test_any_two_files_that_were_damaged_are_made_good(seen: World, kind: str, tmp_path: Path) -> None:
    for number, pair in enumerate(itertools.combinations(device_files(seen), 2)):
        assert_heals(seen.copy(tmp_path / str(number)), pair, kind)
        shutil.rmtree(tmp_path / str(number))


def test_a_record_in_which_a_bit_has_flipped_gives_way_to_its_copy(world: World) -> None:
    """It is whole JSON, and python-tuf would pass over the file that the bit is in, and forget its version."""
    before = world.keep_copy("before")
    refresh_repository(world.repository, world.ring, NOW)
    world.refresh()
    path = world.tuf / TRUSTED_NAMES[0]
    record = msgspec.json.decode(path.read_bytes(), type=Trusted)
    flipped = {**record.files, "timestamp.json": record.files["timestamp.json"].replace(b"version", b"versioo")}
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, files=flipped)))
    with pytest.raises(UpdateError, match="older than what this device has seen"):
        world.refresh(transport=FolderTransport(before))


def test_all_files_damaged_at_once_are_made_good(seen: World, tmp_path: Path) -> None:
    world = seen.copy(tmp_path / "world")
    for path in device_files(world):
        damage(world.tuf / path, "zeroed")
    assert world.refresh().release(2).release == 2


def test_an_interrupted_refresh_leaves_the_newer_record_or_the_older(world: World) -> None:
    """A power cut between the two records: the first is newer, and is what is believed."""
    world.refresh()
    first, copy = (world.tuf / name for name in TRUSTED_NAMES)
    older = copy.read_bytes()
    before = world.keep_copy("before")
    refresh_repository(world.repository, world.ring, NOW)
    world.refresh()
    copy.write_bytes(older)
    with pytest.raises(UpdateError, match="older than what this device has seen"):
        world.refresh(transport=FolderTransport(before))
    assert first.read_bytes() == copy.read_bytes() != older


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "edge-ilseg-test", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` command: a real full disk cannot be made here")
    if mounted.returncode:
        pytest.skip(f"a real full disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def test_a_full_disk_is_named_and_forgets_nothing(world: World, small_disk: Path) -> None:
    tuf = small_disk / "tuf"
    transport = FolderTransport(world.repository)
    refresh(transport, tuf, world.bootstrap, NOW).release(2)
    kept = {name: (tuf / name).read_bytes() for name in TRUSTED_NAMES}
    refresh_repository(world.repository, world.ring, NOW)
    filler = small_disk / "filler"
    fill(filler)
    with pytest.raises(UpdateError) as caught:
        refresh(transport, tuf, world.bootstrap, NOW)
    assert "space" in str(caught.value) or "full" in str(caught.value)
    assert kept == {name: (tuf / name).read_bytes() for name in TRUSTED_NAMES}
    filler.unlink()
    assert refresh(transport, tuf, world.bootstrap, NOW).release(2).release == 2


POLL = f"""
import sys
for name in ("cryptography", "torch", "onnx"): sys.modules[name] = None
from datetime import datetime
from pathlib import Path
from edge_ilseg.devices.update.transport import open_transport
from edge_ilseg.devices.update.trust import refresh
repository, tuf, now = sys.argv[1:]
bootstrap = Path(repository, "metadata/1.root.json").read_bytes()
found = refresh(open_transport(repository, timeout_s=5), Path(tuf), bootstrap, datetime.fromisoformat(now))
assert found.release(2).release == 2
assert "numpy" not in sys.modules
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak_mib = int(status["VmHWM"].split()[0]) / 1024
assert peak_mib < {PEAK_MIB}, peak_mib
"""


def test_a_poll_is_small_and_needs_neither_numpy_nor_cryptography(world: World) -> None:
    arguments = [str(world.repository), str(world.tuf), NOW.isoformat()]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", POLL, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_the_file_of_a_release_is_its_target(world: World) -> None:
    world.refresh().release(2)
    kept = world.tuf / "targets" / "releases-2.json"
    assert kept.read_bytes() == target_file(world, release_target(2)).read_bytes()
