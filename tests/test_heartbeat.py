"""What an application tells of a model, and what a hostile file can do to whoever reads it."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ilseg.devices.update.heartbeat import (
    BASELINE_NAME,
    HEARTBEAT_NAME,
    MAX_ERROR_CHARACTERS,
    MAX_HEARTBEAT_BYTES,
    ClassPixels,
    Heartbeat,
    encode_heartbeat,
    keep_baseline,
    parse_heartbeat,
    percentile,
    read_baseline,
    read_heartbeat,
    short_error,
    write_heartbeat,
)
from edge_ilseg.devices.update.trial_clock import Moment, trial_seconds
from edge_ilseg.errors import UpdateError

TIME = datetime(2026, 6, 1, 12, tzinfo=UTC)
OLD, NEW = "a" * 64, "b" * 64


def heartbeat(**changes: Any) -> Heartbeat:
    found = Heartbeat(
        format="edge-ilseg-heartbeat",
        format_version=1,
        content_id=OLD,
        bundle_id="d" * 64,
        pid=17,
        processes=2,
        started=TIME,
        updated=TIME,
        first_frame=TIME,
        last_frame=TIME,
        watched_s=60.5,
        frames=200,
        failures=1,
        last_failure="could not run the model",
        constant_masks=50,
        latency_frames=100,
        latency_p50_ms=10.0,
        latency_p95_ms=20.0,
        latency_max_ms=30.0,
        background="sky",
        classes=(ClassPixels("sky", 600), ClassPixels("apple", 300), ClassPixels("boat", 100)),
    )
    return msgspec.structs.replace(found, **changes)


def test_a_heartbeat_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_heartbeat(tmp_path, heartbeat())
    assert read_heartbeat(tmp_path) == heartbeat()
    assert [path.name for path in tmp_path.iterdir()] == [HEARTBEAT_NAME]


def test_shares_leave_the_background_out_and_unknown_classes_too() -> None:
    assert heartbeat().share_pct(frozenset({"sky", "apple"})) == 30.0
    assert heartbeat().share_pct(frozenset({"apple", "boat", "tree"})) == 40.0
    assert heartbeat(background=None).share_pct(frozenset({"sky", "apple"})) == 90.0
    assert heartbeat(classes=()).share_pct(frozenset({"apple"})) is None
    assert heartbeat().constant_pct == 25.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", -1),
        ("frames", 1e400),
        ("frames", 2**54),
        ("frames", 99),  # fewer than are timed
        ("constant_masks", 201),  # more than there are
        ("frames", "200"),
        ("watched_s", -0.1),
        ("watched_s", 1e11),
        ("latency_p95_ms", 31.0),  # beyond the highest
        ("latency_p50_ms", None),
        ("latency_frames", 0),
        ("content_id", "A" * 64),
        ("content_id", "a" * 64 + "\n"),
        ("started", "2026-06-01T12:00:00"),  # of no time zone
        ("last_failure", "x" * 301),
        ("classes", [{"name": "sky", "pixels": 1}, {"name": "sky", "pixels": 2}]),
        ("classes", [{"name": str(number), "pixels": 1} for number in range(256)]),
        ("classes", [{"name": "x" * 257, "pixels": 1}]),
        ("extra", 1),
        ("format", "edge-ilseg-release"),
        ("format_version", 2),
    ],
)
def test_a_heartbeat_that_cannot_be_is_refused(field: str, value: object, tmp_path: Path) -> None:
    table = json.loads(encode_heartbeat(heartbeat()))
    table[field] = value
    data = json.dumps(table).encode()
    with pytest.raises(UpdateError):
        parse_heartbeat(data)
    (tmp_path / HEARTBEAT_NAME).write_bytes(data)
    assert read_heartbeat(tmp_path) is None


@given(st.binary(max_size=200), st.integers(0, 800), st.integers(0, 800))
def test_any_bytes_are_a_heartbeat_or_an_error(noise: bytes, start: int, length: int) -> None:
    whole = encode_heartbeat(heartbeat())
    for data in (noise, whole[:start], whole[:start] + noise + whole[start + length :]):
        try:
            found = parse_heartbeat(data)
        except UpdateError:
            continue
        assert parse_heartbeat(encode_heartbeat(found)) == found


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="too large"):
        parse_heartbeat(b" " * (MAX_HEARTBEAT_BYTES + 1))
    with (tmp_path / HEARTBEAT_NAME).open("wb") as file:
        file.truncate(1 << 40)
    assert read_heartbeat(tmp_path) is None


@pytest.mark.parametrize("kind", ["pipe", "full pipe", "link", "socket", "folder", "nothing"])
def test_what_is_no_plain_file_is_no_heartbeat_and_holds_nobody_up(kind: str, tmp_path: Path) -> None:
    path = tmp_path / HEARTBEAT_NAME
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "full pipe":
        os.mkfifo(path)
        held = os.open(path, os.O_RDWR)
        os.write(held, encode_heartbeat(heartbeat()))
    elif kind == "link":
        (tmp_path / "other").write_bytes(encode_heartbeat(heartbeat()))
        path.symlink_to("other")
    elif kind == "socket":
        short = os.path.relpath(path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(short if len(short) < len(str(path)) else str(path))
    elif kind == "folder":
        path.mkdir()
    assert read_heartbeat(tmp_path) is None
    if kind == "full pipe":
        os.close(held)


def test_the_part_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / f".{HEARTBEAT_NAME}.part").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic"):
        write_heartbeat(tmp_path, heartbeat())
    assert (tmp_path / "precious").read_text() == "as it was"


def test_the_heartbeat_of_the_model_before_is_kept_and_the_trial_begins_without_one(tmp_path: Path) -> None:
    write_heartbeat(tmp_path, heartbeat())
    keep_baseline(tmp_path, OLD)
    assert (read_heartbeat(tmp_path), read_baseline(tmp_path)) == (None, heartbeat())
    write_heartbeat(tmp_path, heartbeat(frames=120))  # the application has not changed yet, and goes on writing
    keep_baseline(tmp_path, OLD)  # after a power cut
    assert (read_heartbeat(tmp_path), read_baseline(tmp_path)) == (None, heartbeat())
    write_heartbeat(tmp_path, heartbeat(frames=300))
    keep_baseline(tmp_path, OLD)
    assert read_baseline(tmp_path) == heartbeat(frames=300)


def test_a_heartbeat_of_another_model_is_no_baseline(tmp_path: Path) -> None:
    write_heartbeat(tmp_path, heartbeat(content_id=NEW))
    (tmp_path / BASELINE_NAME).write_bytes(encode_heartbeat(heartbeat(content_id="e" * 64)))
    keep_baseline(tmp_path, OLD)
    assert (read_heartbeat(tmp_path), read_baseline(tmp_path)) == (None, None)
    keep_baseline(tmp_path, OLD)  # where there is nothing at all


def test_a_new_trial_has_all_its_time(tmp_path: Path) -> None:
    trial_seconds(tmp_path, NEW, Moment("x", 10.0))
    assert trial_seconds(tmp_path, NEW, Moment("x", 70.0)) == 60.0
    keep_baseline(tmp_path, OLD)
    assert trial_seconds(tmp_path, NEW, Moment("x", 80.0)) == 0.0


def test_errors_fit_into_a_line() -> None:
    assert short_error(ValueError("one\n  two")) == "one two"
    assert short_error(ValueError()) == "ValueError"
    assert len(short_error("x" * 1000)) == MAX_ERROR_CHARACTERS
    parse_heartbeat(encode_heartbeat(heartbeat(last_failure=short_error("\ud800" + "ä" * 1000))))


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (20, 19), (21, 20), (100, 95)])
def test_percentiles_are_values_that_were_seen(count: int, expected: int) -> None:
    assert percentile([float(number) for number in range(count, 0, -1)], 95) == expected
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
