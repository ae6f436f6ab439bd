"""A fleet by its reports: good ones, damaged ones, and such as somebody else has put there."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundles import write_family

from edge_ilseg.bundle import read_manifest
from edge_ilseg.cli import run
from edge_ilseg.devices.update.release import Rollout, RolloutEntry
from edge_ilseg.devices.update.reporting import (
    ActiveModel,
    DeviceReport,
    ForgottenClass,
    RetentionNumbers,
    encode_report,
)
from edge_ilseg.errors import DataError
from edge_ilseg.fleet import FleetStatus, ReleaseStatus, read_fleet, to_halt
from edge_ilseg.publishing.keys import KeyRing
from edge_ilseg.publishing.releases import read_status

OLD, NEW = "a" * 64, "b" * 64
BOAT = ForgottenClass("boat", 40.0)


def report(device: str, sequence: int, event: str, **others: Any) -> DeviceReport:
    fields: dict[str, Any] = {
        "device_id": device,
        "group": "lab",
        "sequence": sequence,
        "created": f"2026-06-01T12:00:{sequence % 60:02}+00:00",
        "event": event,
        "release": 2,
        "bundle_id": NEW,
        "step_name": "01-boat",
        "active": ActiveModel(OLD, "00-base", 1),
    }
    return DeviceReport(**{**fields, **others})


def put(folder: Path, *reports: DeviceReport) -> Path:
    folder.mkdir(exist_ok=True)
    for item in reports:
        (folder / f"{item.device_id}-{item.sequence}.json").write_bytes(encode_report(item))
    return folder


def refused(device: str, sequence: int = 2, **others: Any) -> DeviceReport:
    numbers = RetentionNumbers(old_miou_drop_pct=12.5, old_miou_drop_interval_pct=(11.0, 14.0))
    fields = {"verdict": "refused", "reason": "it forgot boat", "forgotten": (BOAT,), "retention": numbers}
    return report(device, sequence, "gate refused", **{**fields, **others})


def only_release(status: FleetStatus) -> ReleaseStatus:
    (found,) = status.releases
    return found


def test_a_device_stands_as_its_newest_report_says(tmp_path: Path) -> None:
    put(
        tmp_path,
        report("cam-1", 9, "checked"),
        refused("cam-1", 10),
        report("cam-1", 11, "damaged", release=None, bundle_id=None, active=None, created="1970-01-01T00:00:00+00:00"),
        report("cam-0", 5, "confirmed", active=ActiveModel(NEW, "01-boat", 2), group="harbour"),
    )
    status = read_fleet(tmp_path)
    assert [item.device_id for item in status.devices] == ["cam-0", "cam-1"]
    harbour, lab = status.devices
    assert (harbour.group, harbour.active, harbour.event) == ("harbour", ActiveModel(NEW, "01-boat", 2), "confirmed")
    assert (lab.event, lab.last_seen, lab.reports) == ("damaged", "1970-01-01T00:00:00+00:00", 3)
    assert lab.active == ActiveModel(OLD, "00-base", 1)
    assert (lab.verdict, lab.reason, lab.forgotten) == ("refused", "it forgot boat", (BOAT,))
    assert lab.retention is not None
    assert lab.retention.old_miou_drop_pct == 12.5
    assert (status.reports, status.damaged_count) == (4, 0)


def test_for_a_release_each_device_counts_once_by_what_came_last(tmp_path: Path) -> None:
    put(
        tmp_path,
        *(report("a", number, event) for number, event in enumerate(["checked", "fetched", "staged"], 1)),
        *(report("b", number, event) for number, event in enumerate(["checked", "gate passed", "activated"], 1)),
        *(report("c", number, event) for number, event in enumerate(["activated", "confirmed"], 1)),
        *(report("d", number, event) for number, event in enumerate(["activated", "confirmed", "rolled back"], 1)),
        refused("e"),
        refused("f", 7),
        report("f", 8, "failed"),  # changes nothing
        report("g", 1, "rejected", reason="the gate crashed three times"),
    )
    found = only_release(read_fleet(tmp_path))
    assert (found.release, found.bundle_id, found.step_name) == (2, NEW, "01-boat")
    assert (found.chosen, found.trying, found.confirmed, found.rolled_back, found.refused) == (7, 1, 1, 1, 3)
    assert (found.tried, found.failed_pct) == (6, pytest.approx(100 * 4 / 6))
    assert found.forgotten == {"boat": 2}


def test_releases_are_told_apart_by_number_and_bundle(tmp_path: Path) -> None:
    put(tmp_path, report("a", 1, "confirmed", release=1, bundle_id=OLD), report("a", 2, "confirmed"))
    put(tmp_path, report("b", 1, "confirmed", release=2, bundle_id="c" * 64))
    assert [(item.release, item.bundle_id) for item in read_fleet(tmp_path).releases] == [
        (2, NEW),
        (2, "c" * 64),
        (1, OLD),
    ]


def test_the_same_report_twice_is_one_and_two_under_one_number_are_a_sign_of_two_devices(tmp_path: Path) -> None:
    put(tmp_path, report("a", 1, "checked"))
    (tmp_path / "again").mkdir()
    put(tmp_path / "again", report("a", 1, "checked"))
    assert read_fleet(tmp_path).reports == 1
    put(tmp_path / "again", report("a", 1, "confirmed"))
    status = read_fleet(tmp_path)
    assert (status.reports, status.damaged_count) == (1, 1)
    assert "the same number" in status.damaged[0].reason


def test_damaged_and_hostile_files_are_named_and_end_nothing(tmp_path: Path) -> None:
    put(tmp_path, report("good", 1, "confirmed"))
    whole = encode_report(report("evil", 1, "confirmed"))
    table = json.loads(whole)
    for name, data in {
        "empty": b"",
        "cut": whole[:100],
        "noise": os.urandom(200),
        "deep": b"[" * 60_000,
        "device": json.dumps({**table, "device_id": "../../etc"}).encode(),
        "escape": json.dumps({**table, "reason": "\x1b[2J"}).encode(),
        "event": json.dumps({**table, "event": "exploded"}).encode(),
        "number": json.dumps({**table, "sequence": 1e300}).encode(),
        "field": json.dumps({**table, "extra": 1}).encode(),
        "version": json.dumps({**table, "format_version": 9}).encode(),
        "huge": b" " * (1 << 20),
    }.items():
        (tmp_path / f"{name}.json").write_bytes(data)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("good-1.json")
    (tmp_path / "\x1b[31mred.json").write_bytes(b"x")
    (tmp_path / os.fsdecode(b"\xff.json")).write_bytes(b"x")
    (tmp_path / ".hidden.json").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    status = read_fleet(tmp_path)
    assert [item.device_id for item in status.devices] == ["good"]
    assert status.damaged_count == len(status.damaged) == 15
    text = " ".join(f"{item.file} {item.reason}" for item in status.damaged)
    assert text.isprintable()
    assert msgspec.json.decode(msgspec.json.encode(status))["damaged_count"] == 15


def test_many_damaged_files_are_counted_and_the_first_of_them_named(tmp_path: Path) -> None:
    for number in range(150):
        (tmp_path / f"{number:03}.json").write_bytes(b"x")
    status = read_fleet(tmp_path)
    assert (len(status.damaged), status.damaged_count, status.damaged[0].file) == (100, 150, "000.json")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        read_fleet(tmp_path / "none")


def entry(number: int = 2, bundle_id: str = NEW, *, halted: bool = False) -> RolloutEntry:
    return RolloutEntry(number, bundle_id, "c" * 64, 1, "01-boat", Rollout("x"), halted=halted)


@pytest.mark.parametrize(
    ("confirmed", "failed", "above_pct", "is_halted"),
    [
        (0, 2, 5, False),  # too few devices to tell
        (2, 1, 5, True),
        (0, 3, 5, True),
        (19, 1, 5, False),  # 5 %, and not more
        (18, 1, 5, True),
        (99, 1, 0, True),
        (100, 0, 0, False),
    ],
)
def test_a_release_is_halted_when_it_fails_on_too_large_a_share_of_enough_devices(
    confirmed: int, failed: int, above_pct: float, is_halted: bool
) -> None:
    release = ReleaseStatus(2, NEW, "01-boat", 500, 0, confirmed, 0, failed, {"boat": failed})
    found = to_halt([release], [entry()], above_pct, 3)
    assert list(found) == ([2] if is_halted else [])
    if is_halted:
        assert found[2].endswith(f"(limit {above_pct} %); forgotten: boat on {failed}")


def test_devices_on_trial_have_tried_it_and_those_that_only_chose_it_have_not() -> None:
    release = ReleaseStatus(2, NEW, "01-boat", 500, 97, 0, 1, 2, {})
    assert to_halt([release], [entry()], 5, 3) == {}
    assert list(to_halt([msgspec.structs.replace(release, trying=0)], [entry()], 5, 3)) == [2]


@pytest.mark.parametrize("known", [entry(halted=True), entry(3), entry(bundle_id=OLD)])
def test_what_is_halted_already_or_not_published_here_stays_as_it_is(known: RolloutEntry) -> None:
    release = ReleaseStatus(2, NEW, "01-boat", 9, 0, 0, 0, 9, {})
    assert to_halt([release], [known], 5, 3) == {}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository `models` with two releases, and an empty folder `reports`."""
    monkeypatch.setenv("EDGE_ILSEG_KEY_PASSPHRASE", "four words and a number 7")
    child, parent = write_family(tmp_path)
    assert run(["publish", "init", str(tmp_path / "models")]) == 0
    for bundle in (parent, child):
        assert run(["publish", "add", str(tmp_path / "models"), str(bundle)]) == 0
    (tmp_path / "reports").mkdir()
    return tmp_path


def halted_in(place: Path) -> dict[int, str | None]:
    ring = KeyRing((place / "models.keys",))
    entries = read_status(place / "models", ring, datetime.now(UTC)).entries
    return {item.release: item.reason for item in entries if item.halted}


def test_the_command_halts_a_release_that_fails_too_often(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle_id = read_manifest(place / "child").bundle_id
    put(place / "reports", *(refused(f"cam-{number}", bundle_id=bundle_id) for number in range(2)))
    words = ["fleet", "status", str(place / "reports"), "--halt-above", "5%", "--repo", str(place / "models")]
    assert run(words) == 0
    assert halted_in(place) == {}
    put(place / "reports", report("cam-2", 1, "rolled back", bundle_id=bundle_id))
    capsys.readouterr()
    assert run(words) == 0
    said = capsys.readouterr()
    assert "halted: release 2: 100.0 % of 3 devices" in said.err
    assert "2 (halted)" in said.out
    assert halted_in(place) == {2: "100.0 % of 3 devices refused it or went back (limit 5 %); forgotten: boat on 2"}
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["halted"] == []  # it was halted before


def test_the_table_shows_devices_and_releases_and_takes_no_markup_from_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ActiveModel(OLD, "[red]step[/red]", 1)
    put(tmp_path, refused("cam-1", 3, active=odd), report("cam-2", 1, "confirmed"))
    (tmp_path / "broken.json").write_bytes(b"{")
    assert run(["fleet", "status", str(tmp_path)]) == 0
    said = capsys.readouterr()
    for text in ("2 devices, 2 reports, 1 files that are none", "[red]step[/red]", "12.5 (11.0 to 14.0)", "boat"):
        assert text in said.out
    assert "50.0 %" in said.out
    assert "no report: broken.json: the report of a device is not JSON" in said.err


@pytest.mark.parametrize(
    "words",
    [["--halt-above", "5%"], ["--repo", "x"], ["--halt-above", "many", "--repo", "x"], ["--halt-above", "100%"]],
)
def test_half_an_order_to_halt_is_refused(words: list[str], tmp_path: Path) -> None:
    assert run(["fleet", "status", str(tmp_path), *words]) == 3


def test_an_empty_folder_is_an_empty_fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fleet", "status", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["devices"], found["releases"]) == ("edge-ilseg-fleet-status", [], [])
