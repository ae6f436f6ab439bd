"""Slots: whole under their name or not there, and one link that is replaced in one step."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_disk import CrashDisk, changed
from crash_life import Content, make_content
from msgspec.structs import replace

from edge_ilseg.devices.update.disk import RealDisk, join
from edge_ilseg.devices.update.slots import (
    bundle_path,
    check_slot,
    collect,
    current_content,
    flip,
    is_whole,
    prepare,
    slot_names,
    slot_path,
    stage,
)
from edge_ilseg.errors import UpdateError
from edge_ilseg.pack_index import PackFile

A, B, C = make_content("A", validation=True), make_content("B"), make_content("C")
MODEL = "bundle/models/model.bin"


def put(disk: CrashDisk | RealDisk, *contents: Content) -> None:
    for content in contents:
        stage(disk, content.content_id, content.index, content.chunks.__getitem__)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(RealDisk(tmp_path), A, B)
    return tmp_path


def test_a_slot_holds_the_bundle_the_validation_data_and_the_index(root: Path) -> None:
    slot = root / slot_path(A.content_id)
    files = {path.relative_to(slot).as_posix(): path.read_bytes() for path in slot.rglob("*") if path.is_file()}
    index = files.pop("index")
    assert hashlib.sha256(index[8:]).hexdigest() == A.content_id
    assert files == {
        "bundle/manifest.json": A.chunks[0],
        MODEL: A.chunks[1] + A.chunks[2],
        "validation/list.txt": A.chunks[3],
    }
    assert bundle_path(A.content_id) == f"slots/{A.content_id}/bundle"
    assert sorted(os.listdir(root / "slots")) == sorted([A.content_id, B.content_id])


def test_a_slot_that_is_there_is_not_written_again(root: Path) -> None:
    before = (root / slot_path(A.content_id) / MODEL).stat()

    def no_chunk(number: int) -> bytes:
        raise AssertionError(f"chunk {number} is asked for")

    stage(RealDisk(root), A.content_id, A.index, no_chunk)
    assert (root / slot_path(A.content_id) / MODEL).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "damage",
    [
        lambda slot: (slot / MODEL).write_bytes(b"other"),
        lambda slot: (slot / MODEL).unlink(),
        lambda slot: (slot / "bundle/more.bin").touch(),
        lambda slot: (slot / "bundle/empty").mkdir() or (slot / "bundle/empty/file").touch(),
        lambda slot: (slot / "bundle/manifest.json").unlink() or (slot / "bundle/manifest.json").symlink_to("x"),
        lambda slot: (slot / "index").unlink(),
        lambda slot: (slot / "index").write_bytes(b""),
        lambda slot: (slot / "index").write_bytes((slot / "index").read_bytes()[:-1]),
        lambda slot: (slot / "index").write_bytes(b"\xff" * 8 + (slot / "index").read_bytes()[8:]),
        lambda slot: os.mkfifo(slot / "bundle/pipe"),
    ],
    ids=[
        "changed",
        "missing",
        "more",
        "a file in a new folder",
        "a link",
        "no index",
        "empty",
        "torn",
        "size",
        "a pipe",
    ],
)
def test_a_slot_that_is_not_its_content_is_damaged_and_staged_anew(
    damage: Callable[[Path], object], root: Path
) -> None:
    damage(root / slot_path(A.content_id))
    disk = RealDisk(root)
    for bundle_only in (False, True):
        with pytest.raises(UpdateError):
            check_slot(disk, A.content_id, bundle_only=bundle_only)
    put(disk, A)
    check_slot(disk, A.content_id)
    assert sorted(os.listdir(root / "slots")) == sorted([A.content_id, B.content_id])


def test_validation_data_that_went_bad_do_not_stop_the_model(root: Path) -> None:
    (root / slot_path(A.content_id) / "validation/list.txt").write_bytes(b"bad")
    assert is_whole(RealDisk(root), A.content_id, bundle_only=True)
    assert not is_whole(RealDisk(root), A.content_id)


def test_a_slot_of_another_content_does_not_pass_for_it(root: Path) -> None:
    (root / slot_path(B.content_id)).rename(root / slot_path(C.content_id))
    assert not is_whole(RealDisk(root), C.content_id)


def test_an_index_of_another_content_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="the index is not that of the content"):
        stage(RealDisk(tmp_path), A.content_id, B.index, B.chunks.__getitem__)
    assert list(tmp_path.iterdir()) == []


def test_an_index_with_a_name_that_leaves_the_slot_is_refused(tmp_path: Path) -> None:
    from edge_ilseg.pack_index import encode_index

    files = (
        PackFile("bundle/../../../x", *[getattr(A.index.files[0], name) for name in ("bytes", "sha256", "chunks")]),
    )
    index = replace(A.index, files=(*files, *A.index.files[1:]))
    content_id = hashlib.sha256(encode_index(index)).hexdigest()
    with pytest.raises(UpdateError, match="leaves its folder"):
        stage(RealDisk(tmp_path), content_id, index, A.chunks.__getitem__)
    assert list(tmp_path.iterdir()) == []


def test_chunks_that_do_not_make_the_file_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    asked: list[int] = []

    def wrong(number: int) -> bytes:
        asked.append(number)
        return A.chunks[number][:-1] + b"?" if number == 2 else A.chunks[number]

    with pytest.raises(UpdateError, match="the chunks do not make the file") as caught:
        stage(RealDisk(tmp_path), A.content_id, A.index, wrong)
    assert caught.value.where == MODEL
    assert asked.count(2) == 1  # no use to try again
    assert list((tmp_path / "slots").iterdir()) == []


class Worn(CrashDisk):
    """Gives back other bytes than were written, the first `times`."""

    times = 0

    def pieces(self, path: str) -> object:
        for piece in super().pieces(path):
            is_wrong = path.endswith("model.bin") and self.times > 0
            self.times -= is_wrong
            yield bytes(len(piece)) if is_wrong else piece


def test_what_the_disk_gives_back_with_other_bytes_is_written_again_three_times() -> None:
    disk = Worn()
    disk.times = 2
    put(disk, A)
    assert is_whole(disk, A.content_id)
    disk.times = 3
    with pytest.raises(UpdateError, match="did not keep what was written, 3 times") as caught:
        put(disk, B)
    assert "worn out" in str(caught.value.hint)
    assert disk.names("slots") == (A.content_id,)


class Unreadable(CrashDisk):
    """Fails to read the first `times`, with an error of the disk."""

    times = 0

    def pieces(self, path: str) -> object:
        if self.times > 0:
            self.times -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return super().pieces(path)


def test_an_error_in_reading_is_tried_again_before_a_slot_counts_as_damaged() -> None:
    disk = Unreadable()
    put(disk, A)
    disk.times = 2
    check_slot(disk, A.content_id)
    disk.times = 3
    with pytest.raises(UpdateError, match="cannot be read"):
        check_slot(disk, A.content_id)


def test_a_full_disk_leaves_no_half_slot_and_gives_its_room_back() -> None:
    disk = CrashDisk()

    def full(operation: str) -> None:
        if operation.startswith("append") and "model.bin" in operation:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation)

    put(disk, A)
    disk.before = full
    with pytest.raises(UpdateError, match="cannot be put on the disk") as caught:
        put(disk, B)
    assert "free some space" in str(caught.value.hint)
    assert disk.names("slots") == (A.content_id,)


def test_what_a_cut_left_of_a_slot_is_no_slot_and_is_removed(root: Path) -> None:
    part = root / "slots" / f".{C.content_id}.part"
    (part / "bundle").mkdir(parents=True)
    (part / "bundle/manifest.json").write_bytes(b"torn")
    assert slot_names(RealDisk(root)) == tuple(sorted((A.content_id, B.content_id)))
    put(RealDisk(root), C)
    assert not part.exists()
    part.mkdir()
    assert collect(RealDisk(root), [A.content_id, B.content_id, C.content_id]) == (part.name,)


def test_current_names_a_slot_and_is_replaced_without_being_missing(root: Path) -> None:
    disk = RealDisk(root)
    assert current_content(disk) is None
    flip(disk, A.content_id)
    assert os.readlink(root / "current") == f"slots/{A.content_id}"
    assert (root / "current" / MODEL).read_bytes() == A.chunks[1] + A.chunks[2]
    (root / ".current.part").symlink_to("left by a cut")
    flip(disk, B.content_id)
    assert current_content(disk) == B.content_id
    assert not os.path.lexists(root / ".current.part")


@pytest.mark.parametrize("target", ["", "slots/x", f"slots/../{A.content_id}", f"/slots/{A.content_id}", A.content_id])
def test_a_link_to_something_else_names_no_slot(target: str) -> None:
    disk = CrashDisk()
    disk.symlink(target, "current")
    assert current_content(disk) is None


def test_a_file_in_the_place_of_current_names_no_slot_and_is_replaced(root: Path) -> None:
    (root / "current").write_text(A.content_id)
    assert current_content(RealDisk(root)) is None
    flip(RealDisk(root), A.content_id)
    assert current_content(RealDisk(root)) == A.content_id


def test_what_is_kept_or_in_use_stays_and_the_rest_goes(root: Path) -> None:
    disk = RealDisk(root)
    put(disk, C)
    flip(disk, A.content_id)
    for name in (f"{A.content_id}.part", f"{C.content_id}.part", f"{C.content_id}.index", "stray"):
        (root / "incoming" / name).touch()
    removed = collect(disk, [B.content_id], incoming=[C.content_id])
    assert set(removed) == {f".{C.content_id}.old", f"{A.content_id}.part", "stray"}
    assert slot_names(disk) == tuple(sorted((A.content_id, B.content_id)))
    assert sorted(os.listdir(root / "incoming")) == sorted([f"{C.content_id}.part", f"{C.content_id}.index"])
    assert collect(disk, [B.content_id], incoming=[C.content_id]) == ()


def test_the_folders_are_made_once(tmp_path: Path) -> None:
    for _ in range(2):
        prepare(RealDisk(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["incoming", "slots"]


def test_one_turned_bit_in_any_file_of_a_slot_is_found() -> None:
    disk = CrashDisk()
    put(disk, A)
    for path in (*(file.path for file in A.index.files), "index"):
        image = changed(
            disk.kept(), join(slot_path(A.content_id), path), lambda data: data[:-1] + bytes([data[-1] ^ 1])
        )
        assert not is_whole(CrashDisk(image), A.content_id), path
