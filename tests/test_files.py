"""Files and folders that are whole or not there; numbers are the rules on top of `edge_ilseg/files.py`."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_ilseg import files
from edge_ilseg.errors import EdgeIlsegError
from edge_ilseg.files import disk_error, new_folder, sha256_bytes, sha256_file, write_bytes

FULL_DISK_BYTES = 256 << 10


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={FULL_DISK_BYTES}", "edge-ilseg-test", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` command: a real full disk cannot be made here")
    if mounted.returncode:
        pytest.skip(f"a real full disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def broken_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk says that it is full when the bytes have to go out, as a delayed allocation does."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("data", [b"", b"abc", bytes(range(256)) * 10_000])
def test_a_files_hash_is_that_of_its_bytes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_written_bytes_are_there_alone_and_readable_by_others(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert names_in(tmp_path) == ["file"]


def test_a_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a longer old content")
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_an_open_reader_keeps_the_old_bytes(tmp_path: Path) -> None:
    """Rule 1: the new file is another file under the same name."""
    (tmp_path / "file").write_bytes(b"old")
    with (tmp_path / "file").open("rb") as reader:
        write_bytes(tmp_path / "file", b"new")
        assert reader.read() == b"old"


@pytest.mark.usefixtures("broken_fsync")
def test_a_disk_that_is_full_when_bytes_go_out_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(EdgeIlsegError, match="the disk is full; nothing that was there before has changed") as raised:
        write_bytes(tmp_path / "file", b"new")
    assert raised.value.where == tmp_path / "file"
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_a_disk_that_is_full_leaves_the_old_file(small_disk: Path) -> None:
    write_bytes(small_disk / "file", b"old")
    with pytest.raises(EdgeIlsegError, match="the disk is full"):
        write_bytes(small_disk / "file", bytes(2 * FULL_DISK_BYTES))
    assert (small_disk / "file").read_bytes() == b"old"
    assert names_in(small_disk) == ["file"]


def test_a_file_in_a_folder_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(EdgeIlsegError, match="could not be read or written"):
        write_bytes(tmp_path / "nowhere" / "file", b"new")


def test_a_new_folder_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "step"
    with new_folder(path) as part:
        (part / "sub").mkdir()
        (part / "sub" / "weights").write_bytes(b"1")
        assert not path.exists()
        assert part.parent == path.parent  # on the same disk: the last move is a rename
    assert (path / "sub" / "weights").read_bytes() == b"1"
    assert path.stat().st_mode & 0o777 == 0o755
    assert names_in(path.parent) == ["step"]


def test_everything_in_a_new_folder_is_synced_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 2: contents first, then the name, then the folder that holds the name."""
    path = tmp_path / "step"
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with new_folder(path) as part:
        part_name = part.name
        (part / "sub").mkdir()
        (part / "sub" / "weights").write_bytes(b"1")
    assert {("sub", False), ("weights", False), (part_name, False)} <= set(synced)
    assert synced[-1] == (tmp_path.name, True)


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt(), EdgeIlsegError("no")])
def test_a_block_that_fails_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with new_folder(tmp_path / "step") as part:
            (part / "weights").write_bytes(b"1")
            raise error

    with pytest.raises(type(error)):
        write_and_fail()
    assert names_in(tmp_path) == []


def test_a_folder_that_is_there_is_kept_unless_it_shall_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    with pytest.raises(FileExistsError), new_folder(tmp_path / "step"):
        pytest.fail("the block must not run")
    assert names_in(tmp_path) == ["step"]


def test_a_link_that_leads_nowhere_is_in_the_way_too(tmp_path: Path) -> None:
    (tmp_path / "step").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "step"):
        pytest.fail("the block must not run")


def replace_step(folder: Path) -> None:
    with new_folder(folder / "step", replace=True) as part:
        (part / "new").write_bytes(b"2")


def old_step(folder: Path) -> Path:
    (folder / "step").mkdir()
    (folder / "step" / "old").write_bytes(b"1")
    return folder / "step"


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_by_the_whole_new_one(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(files, "_exchange_at_once", lambda *_: False)
    old_step(tmp_path)
    replace_step(tmp_path)
    assert names_in(tmp_path) == ["step"]
    assert names_in(tmp_path / "step") == ["new"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is a call of Linux")
def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no moment without a whole `step`, so no power cut can meet one."""
    old_step(tmp_path)
    monkeypatch.setattr(Path, "rename", lambda self, target: pytest.fail(f"{self} renamed to {target}"))
    replace_step(tmp_path)
    assert names_in(tmp_path / "step") == ["new"]


def test_an_exchange_in_two_steps_that_fails_between_them_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_step(tmp_path)
    monkeypatch.setattr(files, "_exchange_at_once", lambda *_: False)
    rename = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(KeyboardInterrupt):
        replace_step(tmp_path)
    assert names_in(tmp_path) == ["step"]
    assert names_in(tmp_path / "step") == ["old"]


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_only_a_folder_is_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "step"
    if kind == "file":
        path.write_bytes(b"1")
    else:
        if kind == "link":
            (tmp_path / "target").mkdir()
        path.symlink_to(tmp_path / "target")
    before = names_in(tmp_path)
    with (
        pytest.raises(EdgeIlsegError, match="only a folder can be replaced") as raised,
        new_folder(path, replace=True),
    ):
        pytest.fail("the block must not run")
    assert (raised.value.where, raised.value.found) == (path, "a file" if kind == "file" else "a link")
    assert names_in(tmp_path) == before
    assert path.read_bytes() == b"1" if kind == "file" else path.is_symlink()


def test_a_file_that_came_while_the_folder_was_made_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(EdgeIlsegError, match="only a folder can be replaced"),
        new_folder(tmp_path / "step", replace=True),
    ):
        (tmp_path / "step").write_bytes(b"1")
    assert names_in(tmp_path) == ["step"]
    assert (tmp_path / "step").read_bytes() == b"1"


@pytest.mark.usefixtures("broken_fsync")
def test_a_full_disk_at_the_end_of_a_block_leaves_the_old_folder(tmp_path: Path) -> None:
    old_step(tmp_path)
    with pytest.raises(EdgeIlsegError, match="the disk is full"):
        replace_step(tmp_path)
    assert names_in(tmp_path) == ["step"]
    assert names_in(tmp_path / "step") == ["old"]


def test_a_full_disk_inside_a_block_leaves_the_old_folder(small_disk: Path) -> None:
    old_step(small_disk)
    with (
        pytest.raises(EdgeIlsegError, match="the disk is full"),
        new_folder(small_disk / "step", replace=True) as part,
    ):
        (part / "weights").write_bytes(bytes(2 * FULL_DISK_BYTES))
    assert names_in(small_disk) == ["step"]
    assert names_in(small_disk / "step") == ["old"]


def test_a_disk_without_room_for_the_folder_itself_is_an_error_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(EdgeIlsegError, match="the disk is full"), new_folder(tmp_path / "step"):
        pytest.fail("the block must not run")


def test_a_process_that_dies_inside_a_block_leaves_the_old_folder(tmp_path: Path) -> None:
    old_step(tmp_path)
    program = (
        "import os, sys; from pathlib import Path; from edge_ilseg.files import new_folder\n"
        "with new_folder(Path(sys.argv[1]), replace=True) as part:\n"
        "    (part / 'new').write_bytes(b'2'); os._exit(9)"
    )
    died = subprocess.run([sys.executable, "-c", program, str(tmp_path / "step")], check=False)
    assert died.returncode == 9
    assert names_in(tmp_path / "step") == ["old"]
    replace_step(tmp_path)  # and what it left behind is in nobody's way
    assert names_in(tmp_path / "step") == ["new"]


def test_another_error_of_the_disk_names_the_file() -> None:
    error = disk_error(OSError(errno.EACCES, "Permission denied", "/data/file"), Path("/data/step"))
    assert (error.where, error.found) == ("/data/file", "Permission denied")
    assert "full" not in error.what
