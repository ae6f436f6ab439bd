"""Steps on the disk: whole or not there, found by their hash when damaged, never pickled."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import msgspec
import pytest
import torch
from records import SPEC, make_record

from edge_ilseg.checkpoint import (
    RECORD_NAME,
    WEIGHTS_NAME,
    check_weights,
    load_model,
    parse_record,
    read_record,
    record_id,
    write_step,
)
from edge_ilseg.errors import EdgeIlsegError, WorkspaceError
from edge_ilseg.files import sha256_bytes
from edge_ilseg.models.segmentation import SegmentationModel, build_model


@pytest.fixture
def model() -> SegmentationModel:
    torch.manual_seed(0)
    return build_model(SPEC, (2, 1))


@pytest.fixture
def step_folder(tmp_path: Path, model: SegmentationModel) -> Path:
    write_step(tmp_path / "01-boat", make_record(), model)
    return tmp_path / "01-boat"


def test_a_step_is_two_files_and_loads_as_it_was(step_folder: Path, model: SegmentationModel) -> None:
    assert sorted(path.name for path in step_folder.iterdir()) == [WEIGHTS_NAME, RECORD_NAME]
    record = read_record(step_folder)
    loaded = load_model(step_folder, record)
    assert record.class_counts == (2, 1)
    assert (record.old_count, record.new_classes) == (2, ("boat",))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not loaded.training


def test_a_record_survives_a_round_trip(step_folder: Path) -> None:
    record = read_record(step_folder)
    assert parse_record(msgspec.json.encode(record)) == record
    assert record.id == record_id(record)


def test_a_record_that_is_older_than_a_setting_keeps_its_id(step_folder: Path) -> None:
    content = msgspec.json.decode((step_folder / RECORD_NAME).read_bytes())
    del content["training"]["augment_views"]
    content["id"] = sha256_bytes(msgspec.json.encode({**content, "id": ""}, order="sorted"))
    older = parse_record(msgspec.json.encode(content))
    assert older.training == read_record(step_folder).training
    assert older.id != read_record(step_folder).id
    content["training"]["seed"] += 1
    with pytest.raises(WorkspaceError, match="was changed after it was written"):
        parse_record(msgspec.json.encode(content))


def test_the_id_covers_the_weights_and_the_lineage(tmp_path: Path, model: SegmentationModel) -> None:
    first = write_step(tmp_path / "a", make_record(), model)
    other_parent = write_step(tmp_path / "b", make_record(parent_id="2" * 64), model)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    other_weights = write_step(tmp_path / "c", make_record(), model)
    assert len({first.id, other_parent.id, other_weights.id}) == 3


def test_a_flipped_bit_in_the_weights_is_found_and_the_step_named(step_folder: Path) -> None:
    path = step_folder / WEIGHTS_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(WorkspaceError, match="weights of step 01-boat are damaged"):
        load_model(step_folder, read_record(step_folder))


@pytest.mark.parametrize("keep", [0, 1, 1000])
def test_half_written_weights_are_found(step_folder: Path, keep: int) -> None:
    path = step_folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WorkspaceError, match="are damaged"):
        check_weights(step_folder, read_record(step_folder))


def test_missing_files_are_named(step_folder: Path) -> None:
    record = read_record(step_folder)
    (step_folder / WEIGHTS_NAME).unlink()
    with pytest.raises(WorkspaceError, match="found:    no file"):
        check_weights(step_folder, record)
    (step_folder / RECORD_NAME).unlink()
    with pytest.raises(WorkspaceError, match=r"no step\.json"):
        read_record(step_folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"boat"', b'"goat"', "was changed after it was written"),
        (b'"index": 1', b'"index": 2', "was changed after it was written"),
        (b'"format_version": 2', b'"format_version": 3', "format that this version does not read"),
        (b'"metrics"', b'"metricz"', "damaged"),
        (b"{", b"[", "is not JSON"),
        (b"boat", b"\xff\xfe\xff\xff", "is not JSON"),
    ],
)
def test_an_edited_record_is_refused(step_folder: Path, old: bytes, new: bytes, message: str) -> None:
    path = step_folder / RECORD_NAME
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(WorkspaceError, match=message):
        read_record(step_folder)


def test_a_step_is_never_written_over(step_folder: Path, model: SegmentationModel) -> None:
    before = (step_folder / WEIGHTS_NAME).read_bytes()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(WorkspaceError, match="step of that name already"):
        write_step(step_folder, make_record(), model)
    assert (step_folder / WEIGHTS_NAME).read_bytes() == before


def test_weights_of_another_network_are_refused(tmp_path: Path, model: SegmentationModel) -> None:
    write_step(tmp_path / "s", make_record(model=msgspec.structs.replace(SPEC, decoder_channels=8)), model)
    with pytest.raises(WorkspaceError, match="do not fit its record"):
        load_model(tmp_path / "s", read_record(tmp_path / "s"))


def test_an_error_of_the_disk_leaves_the_earlier_steps(
    step_folder: Path, model: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fsync = os.fsync

    def full(descriptor: int) -> None:
        if ".02-bird." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EdgeIlsegError, match="disk is full; nothing that was there before has changed"):
        write_step(step_folder.parent / "02-bird", make_record(name="02-bird"), model)
    assert [path.name for path in step_folder.parent.iterdir()] == ["01-boat"]
    load_model(step_folder, read_record(step_folder))


def test_a_really_full_disk_leaves_the_earlier_steps(tmp_path: Path, model: SegmentationModel) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here (it takes root)")
    try:
        first = write_step(disk / "01-boat", make_record(), model)
        (disk / "filler").write_bytes(b"x" * ((1 << 20) - first.weights_bytes - 100_000))
        with pytest.raises(EdgeIlsegError, match="the disk is full"):
            write_step(disk / "02-bird", make_record(name="02-bird"), model)
        assert sorted(path.name for path in disk.iterdir()) == ["01-boat", "filler"]
        load_model(disk / "01-boat", read_record(disk / "01-boat"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_every_flipped_byte_of_a_record_is_found(step_folder: Path) -> None:
    data = (step_folder / RECORD_NAME).read_bytes()
    record = parse_record(data)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x81
        try:
            assert parse_record(bytes(changed)) == record, position  # white space between values is not content
        except WorkspaceError:
            continue
