"""The operations by which the update parts write: the real disk, the one of the tests, and what is built of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from crash_disk import CrashDisk

from edge_ilseg.devices.update.disk import (
    ATTEMPTS,
    Disk,
    RealDisk,
    disk_errors,
    part_path,
    remove_tree,
    repeat_on_eio,
    replace_file,
    write_new,
)
from edge_ilseg.errors import UpdateError


@pytest.fixture(params=["real", "in memory"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    return RealDisk(tmp_path) if request.param == "real" else CrashDisk()


def write(disk: Disk, path: str, *pieces: bytes) -> None:
    with disk.create(path) as file:
        for piece in pieces:
            file.append(piece)
        file.sync()


def error_of(do: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        do()
    return caught.value.errno


def test_what_is_written_is_read_again(disk: Disk) -> None:
    disk.make_folder("slots")
    write(disk, "slots/a", b"one ", b"two")
    disk.symlink("slots/a", "current")
    assert disk.read("slots/a", 100) == b"one two"
    assert disk.read("slots/a", 3) == b"one"
    assert b"".join(disk.pieces("slots/a")) == b"one two"
    assert (disk.names("."), disk.names("slots")) == (("current", "slots"), ("a",))
    assert [disk.kind(path) for path in ("slots", "slots/a", "current", "none", "slots/a/b")] == [
        "folder",
        "file",
        "link",
        None,
        None,
    ]
    assert disk.read_link("current") == "slots/a"


def test_the_disk_of_the_tests_refuses_what_the_real_one_refuses(disk: Disk) -> None:
    disk.make_folder("folder")
    write(disk, "folder/file")
    write(disk, "file")
    disk.symlink("nowhere", "link")
    for path in ("file", "folder", "link"):
        assert error_of(lambda path=path: write(disk, path)) == errno.EEXIST
        assert error_of(lambda path=path: disk.symlink("x", path)) == errno.EEXIST
        assert error_of(lambda path=path: disk.make_folder(path)) == errno.EEXIST
    assert error_of(lambda: disk.rename("none", "other")) == errno.ENOENT
    assert error_of(lambda: disk.unlink("none")) == errno.ENOENT
    assert error_of(lambda: disk.read("none", 1)) == errno.ENOENT
    assert error_of(lambda: disk.remove_folder("folder")) == errno.ENOTEMPTY
    assert error_of(lambda: write(disk, "none/file")) == errno.ENOENT
    assert error_of(lambda: disk.read_link("file")) == errno.EINVAL


def test_a_rename_takes_the_place_of_a_file_and_of_a_link(disk: Disk) -> None:
    for name in ("old", "new"):
        write(disk, name, name.encode())
        disk.symlink(name, f"link-{name}")
    disk.rename("new", "old")
    disk.rename("link-new", "link-old")
    assert disk.names(".") == ("link-old", "old")
    assert (disk.read("old", 9), disk.read_link("link-old")) == (b"new", "new")


def test_a_tree_is_removed_and_a_link_in_it_is_not_followed(disk: Disk) -> None:
    disk.make_folder("kept")
    write(disk, "kept/file", b"stays")
    disk.make_folder("tree")
    disk.make_folder("tree/below")
    write(disk, "tree/below/file")
    disk.symlink("../kept", "tree/link")
    remove_tree(disk, "tree")
    remove_tree(disk, "not there")
    assert disk.names(".") == ("kept",)
    assert disk.names("kept") == ("file",)


def test_a_file_is_replaced_whole_and_its_part_is_gone(disk: Disk) -> None:
    write(disk, part_path("state.json"), b"left by a cut")
    replace_file(disk, "state.json", b"one")
    replace_file(disk, "state.json", b"two")
    assert disk.names(".") == ("state.json",)
    assert disk.read("state.json", 100) == b"two"


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a//b", "a/../b", "", "a/./b", "a\0b"])
def test_a_name_that_leaves_the_root_is_refused(path: str, tmp_path: Path) -> None:
    disk = RealDisk(tmp_path / "root")
    (tmp_path / "root").mkdir()
    for do in (disk.kind, disk.names, disk.unlink, disk.make_folder, disk.sync_folder, disk.read_link):
        with pytest.raises(UpdateError, match="leaves the device's folder"):
            do(path)
    with pytest.raises(UpdateError, match="leaves the device's folder"):
        write(disk, path)


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"stays")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").symlink_to("../outside")
    with pytest.raises(FileExistsError):
        write(RealDisk(tmp_path / "root"), "file", b"x")
    write_new(RealDisk(tmp_path / "root"), "file", lambda: [b"x"])
    assert (tmp_path / "outside").read_bytes() == b"stays"


class Refusing(CrashDisk):
    """Refuses the first operations whose name begins with `what`."""

    def __init__(self, what: str = "", code: int = errno.EIO, times: int = 1) -> None:
        super().__init__()
        self.what, self.code, self.times = what, code, times
        self.before = self.refuse

    def refuse(self, operation: str) -> None:
        if operation.startswith(self.what) and self.times > 0:
            self.times -= 1
            raise OSError(self.code, os.strerror(self.code), operation)


def test_after_an_io_error_of_a_sync_the_file_is_written_from_its_start() -> None:
    disk = Refusing("sync file", times=ATTEMPTS - 1)
    calls = []

    def pieces() -> Iterable[bytes]:
        calls.append("from the start")
        return (b"one ", b"two")

    write_new(disk, "file", pieces)
    assert calls == ["from the start"] * ATTEMPTS
    disk.sync_folder(".")
    assert disk.images() == {("folder", (("file", ("file", b"one two")),))}


@pytest.mark.parametrize("operation", ["sync .file.part", "rename .file.part file", "sync_folder ."])
def test_a_file_is_replaced_in_spite_of_an_io_error(operation: str) -> None:
    disk = Refusing(operation, times=1)
    replace_file(disk, "file", b"data")
    assert disk.images() == {("folder", (("file", ("file", b"data")),))}
    assert disk.times == 0


def test_other_errors_and_too_many_of_one_kind_are_not_repeated() -> None:
    disk = Refusing("sync", code=errno.ENOSPC, times=1)
    assert error_of(lambda: replace_file(disk, "file", b"x")) == errno.ENOSPC
    calls = []

    def work() -> None:
        calls.append(1)
        raise OSError(errno.EIO, "no")

    assert error_of(lambda: repeat_on_eio(work)) == errno.EIO
    assert len(calls) == ATTEMPTS


def test_a_full_disk_is_told_with_what_to_do_about_it() -> None:
    with (
        pytest.raises(UpdateError, match="the state cannot be written") as caught,
        disk_errors("the state cannot be written"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state.json")
    assert caught.value.where == "state.json"
    assert "free some space" in str(caught.value.hint)
    with pytest.raises(UpdateError) as other, disk_errors("x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert "the disk is sound" in str(other.value.hint)


def test_what_is_written_may_be_read_by_other_users_and_written_by_none(tmp_path: Path) -> None:
    former = os.umask(0o022)
    try:
        disk = RealDisk(tmp_path)
        replace_file(disk, "state.json", b"x")
        disk.make_folder("slots")
    finally:
        os.umask(former)
    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "slots").stat().st_mode & 0o777 == 0o755


def test_only_one_changes_the_state_at_a_time(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    with disk.exclusive():
        assert (tmp_path / "state.lock").read_text() == str(os.getpid())


def test_a_cut_may_lose_what_was_not_synced_and_nothing_else() -> None:
    """Of the disk of the tests: rules 1 to 3 of its page, one at a time."""
    disk = CrashDisk()
    with disk.create("a") as file:
        file.append(b"abcd")
        disk.sync_folder(".")
        assert bytes_left(disk) == {b"", b"ab", b"ab\0\0", b"\0\0\0\0", b"abcd"}
        file.sync()
        assert bytes_left(disk) == {b"abcd"}
    disk.rename("a", "b")
    assert names_left(disk) == {("a",), ("b",), ("a", "b")}
    disk.sync_folder(".")
    assert names_left(disk) == {("b",)}
    disk.unlink("b")
    disk.make_folder("c")
    assert names_left(disk) == {("b",), ("b", "c"), ("c",), ()}


def test_a_link_may_lose_its_target_until_its_folder_is_synced() -> None:
    disk = CrashDisk()
    disk.symlink("slots/a", "current")
    links = {dict(image[1]).get("current") for image in disk.images()}
    assert links == {None, ("link", "slots/a"), ("link", "")}
    disk.sync_folder(".")
    assert disk.images() == {("folder", (("current", ("link", "slots/a")),))}


def bytes_left(disk: CrashDisk) -> set[bytes]:
    return {dict(image[1])["a"][1] for image in disk.images()}


def names_left(disk: CrashDisk) -> set[tuple[str, ...]]:
    return {tuple(name for name, _ in image[1]) for image in disk.images()}
