"""What a device tells its fleet; numbers are the rules of `update/reporting.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hostile_server import Fault, HostileServer, drip, hang_up, hangs, hostile_server, raw, redirect, status
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ilseg.devices.facts import DeviceFacts, read_device_facts
from edge_ilseg.devices.update import reporting
from edge_ilseg.devices.update.history import History
from edge_ilseg.devices.update.reporting import (
    MAX_REPORT_BYTES,
    ActiveModel,
    Delivery,
    DeviceReport,
    ForgottenClass,
    MachineInShort,
    ReportEvent,
    RetentionNumbers,
    check_device_id,
    deliver,
    encode_report,
    machine_in_short,
    parse_device_report,
    queue_report,
)
from edge_ilseg.errors import UpdateError

ROOT = Path(__file__).parents[1]
PATIENT_S = 30.0
HASTY_S = 0.2

FULL = DeviceReport(
    device_id="camera-1",
    group="lab",
    sequence=5,
    created="2026-01-31T12:00:00+00:00",
    event="gate refused",
    release=7,
    bundle_id="b" * 64,
    step_name="01-boat",
    step_index=1,
    active=ActiveModel("a" * 64, "00-base", 6),
    verdict="refused",
    reason="'tree' lost 12.0 points",
    forgotten=(ForgottenClass("tree", 12.0),),
    retention=RetentionNumbers(1.5, (0.5, 2.5), 61.0, 33.3, 120.5),
    machine=machine_in_short(read_device_facts()),
)


@pytest.fixture(scope="module")
def running() -> Iterator[HostileServer]:
    with hostile_server() as server:
        yield server


@pytest.fixture
def server(running: HostileServer) -> HostileServer:
    running.reset({})
    running.always = status(204, body=b"")
    return running


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History(tmp_path / "history.sqlite") as opened:
        yield opened


def queued(history: History, count: int) -> list[DeviceReport]:
    return [queue_report(history, FULL) for _ in range(count)]


def send(history: History, target: object, *, deadline_s: float = 60.0, timeout_s: float = PATIENT_S) -> Delivery:
    return deliver(history, str(target), deadline_s=deadline_s, timeout_s=timeout_s)


# The record (rule 1)


def test_what_is_written_is_read_as_it_was() -> None:
    assert parse_device_report(encode_report(FULL)) == FULL


def test_a_report_may_say_little() -> None:
    little = DeviceReport(device_id="a", group="", created="2026-01-31T12:00:00Z", event="checked")
    assert parse_device_report(encode_report(little)) == little
    assert little.agent_version


def forged(**changes: object) -> bytes:
    content: dict[str, Any] = json.loads(encode_report(FULL))
    content.update(changes)
    return json.dumps(content).encode()


BAD = {
    "no JSON": b"{",
    "no object": b"[]",
    "nothing": b"",
    "no UTF-8": b'{"format": "\xff"}',
    "another format": forged(format="edge-ilseg-release"),
    "another version": forged(format_version=2),
    "an unknown field": forged(more=1),
    "an unknown event": forged(event="exploded"),
    "an id that climbs": forged(device_id="../../etc/passwd"),
    "an id that is hidden": forged(device_id=".ssh"),
    "an id with a slash": forged(device_id="a/b"),
    "an id with a newline": forged(device_id="camera-1\n"),
    "an id with a zero byte": forged(device_id="camera\0"),
    "an id that is empty": forged(device_id=""),
    "an id that is too long": forged(device_id="a" * 65),
    "an id in other letters": forged(device_id="kamera-ü"),
    "a number below one": forged(sequence=0),
    "a number that is too large": forged(sequence=2**53 + 1),
    "a number that is none": forged(sequence=True),
    "a group with a control character": forged(group="a\x1b[2J"),
    "a group that is too long": forged(group="a" * 101),
    "a step that turns the text round": forged(step_name="\u202egnp"),
    "a reason of two lines": forged(reason="a\nb"),
    "a reason with a line separator": forged(reason="a\u2028b"),
    "a reason that is too long": forged(reason="a" * 2001),
    "a hash that is none": forged(bundle_id="b" * 63),
    "a hash with a newline": forged(bundle_id="b" * 64 + "\n"),
    "a time that is none": forged(created="yesterday"),
    "a time without a zone": forged(created="2026-01-31T12:00:00"),
    "a time that is too long": forged(created="2026-01-31T12:00:00+00:00" + " " * 100),
    "too many forgotten": forged(forgotten=[{"name": "a", "drop_pct": 1.0}] * 101),
    "a drop that is none": forged(forgotten=[{"name": "a", "drop_pct": None}]),
    "a drop beyond all": forged(forgotten=[{"name": "a", "drop_pct": 101.0}]),
    "a latency below zero": forged(retention={"latency_p95_ms": -1.0}),
    "an interval the wrong way": forged(retention={"old_miou_drop_interval_pct": [2.0, 1.0]}),
    "an interval of three": forged(retention={"old_miou_drop_interval_pct": [1.0, 2.0, 3.0]}),
    "a number that is not finite": encode_report(FULL).replace(b"61.0", b"1e999"),
    "a number that is not a number": encode_report(FULL).replace(b"61.0", b"NaN"),
    "too deep": b'{"format":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "too large": encode_report(FULL) + b" " * MAX_REPORT_BYTES,
    "half a surrogate": encode_report(FULL).replace(b"lab", b"\\ud800"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_report_is_refused(name: str) -> None:
    with pytest.raises(UpdateError) as raised:
        parse_device_report(BAD[name], where="inbox/x")
    assert raised.value.where == "inbox/x"


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(0, 200))
def test_any_bytes_are_a_report_or_an_update_error(junk: bytes, start: int, length: int) -> None:
    good = encode_report(FULL)
    data = good[:start] + junk + good[start + length :]
    try:
        report = parse_device_report(data)
    except UpdateError:
        return
    assert isinstance(report, DeviceReport)


@settings(max_examples=200)
@given(st.binary(max_size=100_000))
def test_bytes_of_any_size_are_refused(data: bytes) -> None:
    with pytest.raises(UpdateError):
        parse_device_report(data)


@pytest.mark.parametrize("device_id", ["a", "camera-1", "A.b_c-9", "0" * 64])
def test_an_id_that_is_safe_is_taken(device_id: str) -> None:
    assert check_device_id(device_id) == device_id


@pytest.mark.parametrize("device_id", ["", ".", "..", "-a", "_a", "a b", "a/b", "a\\b", "a\n", "ü", "a" * 65, "a:b"])
def test_an_id_that_is_not_safe_is_refused(device_id: str) -> None:
    with pytest.raises(UpdateError, match="id of the device"):
        check_device_id(device_id)


def test_the_largest_report_that_can_be_queued_is_read(history: History) -> None:
    wide = "\U0001f6a2" * 5000
    largest = msgspec.structs.replace(
        FULL,
        group=wide,
        step_name=wide,
        verdict=wide,
        reason=wide,
        forgotten=tuple(ForgottenClass(wide, float(drop)) for drop in range(-100, 101)) * 5,
    )
    sent = queue_report(history, largest)
    (waiting,) = history.waiting()
    assert parse_device_report(waiting.report) == sent
    assert len(sent.forgotten) == reporting.MAX_FORGOTTEN
    assert sent.forgotten[0].drop_pct == 100.0
    assert sent.reason is not None
    assert sent.reason.endswith("…")


def test_texts_of_any_kind_are_made_plain_on_the_device(history: History) -> None:
    odd = "a\nb\x1b\u202e\udcff"
    sent = queue_report(
        history,
        msgspec.structs.replace(FULL, reason=odd, verdict=odd, group=odd, forgotten=(ForgottenClass(odd, 1.0),)),
    )
    assert sent.reason == sent.verdict == sent.group == sent.forgotten[0].name == "a b   "


def test_a_report_that_nobody_could_read_is_not_queued(history: History) -> None:
    with pytest.raises(UpdateError, match="damaged"):
        queue_report(history, msgspec.structs.replace(FULL, forgotten=(ForgottenClass("a", float("nan")),)))
    assert history.count_waiting() == 0


def test_the_machine_is_described_in_short() -> None:
    facts: DeviceFacts = read_device_facts()
    short = machine_in_short(facts)
    assert (short.machine, short.cores, short.memory_mib) == (facts.machine, facts.cores, facts.memory_mib)
    nothing = msgspec.structs.replace(facts, machine=None, processor=None, system=None, cores=None, memory_mib=None)
    assert machine_in_short(nothing).processor is None
    assert machine_in_short(msgspec.structs.replace(facts, processor="x\n" * 500)).processor is not None


def test_reports_are_read_and_delivered_without_numpy(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from edge_ilseg.devices.update.history import History
from edge_ilseg.devices.update.reporting import DeviceReport, deliver, queue_report
with History(Path(sys.argv[1]) / "history.sqlite") as history:
    queue_report(history, DeviceReport(device_id="a", group="", created="2026-01-31T12:00:00Z", event="checked"))
    print(deliver(history, sys.argv[1], deadline_s=60).delivered)
print(sorted({"numpy", "urllib3", "tuf"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, tmp_path], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout == "1\n[]\n", done.stderr


# Delivery to a server (rules 2 and 3)


def test_reports_are_posted_in_their_order(history: History, server: HostileServer) -> None:
    sent = queued(history, 5)
    assert send(history, server.url + "/in?key=1") == (5, 0, None)
    assert [parse_device_report(request.body) for request in server.requests] == sent
    assert [request.headers["idempotency-key"] for request in server.requests] == [
        f"camera-1:{report.sequence}" for report in sent
    ]
    assert {request.headers["content-type"] for request in server.requests} == {"application/json"}
    assert {(request.method, request.path) for request in server.requests} == {("POST", "/in?key=1")}
    assert send(history, server.url) == (0, 0, None)
    assert len(server.requests) == 5


@pytest.mark.parametrize("code", [200, 201, 202, 204])
def test_any_success_takes_a_report(code: int, history: History, server: HostileServer) -> None:
    queued(history, 2)
    server.always = status(code, body=b"" if code == 204 else b"thanks")
    assert send(history, server.url) == (2, 0, None)


REFUSALS: dict[str, tuple[Fault, str]] = {
    "400": (status(400), "HTTP status 400"),
    "404": (status(404), "HTTP status 404"),
    "500": (status(500), "HTTP status 500"),
    "503": (status(503, ("Retry-After", "5")), "HTTP status 503"),
    "304": (status(304, body=b""), "HTTP status 304"),
    "a redirection": (redirect("/elsewhere", 307), "HTTP status 307"),
    "hung up": (hang_up, "was cut"),
    "no HTTP": (raw(b"220 hello\r\n"), "was cut"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_report_that_is_not_taken_stays_and_those_behind_it_wait(
    name: str, history: History, server: HostileServer
) -> None:
    fault, text = REFUSALS[name]
    sent = queued(history, 3)
    server.faults.extend([status(204, body=b""), fault])
    done = send(history, server.url)
    assert (done.delivered, done.waiting) == (1, 2)
    assert text in str(done.problem)
    assert len(server.requests) == 2
    assert [item.sequence for item in history.waiting()] == [report.sequence for report in sent[1:]]
    history.mark_failed(0.0)  # the time to try again has come
    assert send(history, server.url) == (2, 0, None)


SLOW: dict[str, Fault] = {"no answer": hangs, "a head that drips": drip(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 9999, 0.05)}


@pytest.mark.parametrize("name", SLOW)
def test_a_server_that_makes_us_wait_is_left(name: str, history: History, server: HostileServer) -> None:
    queued(history, 1)
    server.always = SLOW[name]
    done = send(history, server.url, timeout_s=HASTY_S)
    assert done.delivered == 0
    assert "does not answer in time" in str(done.problem)


def test_what_the_server_says_beside_its_status_is_nothing_to_us(history: History, server: HostileServer) -> None:
    queued(history, 2)
    server.always = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\nContent-Encoding: gzip\r\n\r\njunk")
    assert send(history, server.url) == (2, 0, None)


def test_after_a_failure_nothing_is_tried_for_a_while_that_grows(history: History, server: HostileServer) -> None:
    queued(history, 1)
    server.always = status(500)
    for failures in range(1, 5):
        before_s = time.time()
        assert "HTTP status 500" in str(send(history, server.url).problem)
        state = history.delivery_state()
        wait_s = state.next_try_s - before_s
        assert state.failures == failures
        assert 30 * 2 ** (failures - 1) <= wait_s <= 60 * 2 ** (failures - 1) + 60
        asked = len(server.requests)
        put_off = send(history, server.url)
        assert f"after {failures} failures" in str(put_off.problem)
        assert (put_off.delivered, put_off.waiting, len(server.requests)) == (0, 1, asked)
        history._do(lambda connection: connection.execute("UPDATE delivery SET next_try_s = 1"))
    server.always = status(204, body=b"")
    assert send(history, server.url) == (1, 0, None)
    assert history.delivery_state() == (0, 0.0)


def test_the_server_may_ask_for_a_longer_while(history: History, server: HostileServer) -> None:
    queued(history, 1)
    server.always = status(503, ("Retry-After", "7200"))
    before_s = time.time()
    send(history, server.url)
    assert history.delivery_state().next_try_s >= before_s + 7200


def test_a_next_try_that_a_wrong_clock_wrote_is_not_waited_for(history: History, server: HostileServer) -> None:
    """It was 2040 for a moment."""
    queued(history, 1)
    history.mark_failed(time.time() + 14 * 365 * 86_400)
    assert send(history, server.url) == (1, 0, None)


def test_no_report_is_begun_after_the_deadline(history: History, server: HostileServer) -> None:
    queued(history, 3)
    done = send(history, server.url, deadline_s=0.0)
    assert (done.delivered, done.waiting) == (0, 3)
    assert "were over" in str(done.problem)
    assert history.delivery_state().failures == 0


def test_a_secret_in_an_address_is_not_shown(history: History) -> None:
    queued(history, 1)
    done = send(history, "http://no-such-host.invalid/in?token=hunter2")
    assert "no-such-host" in str(done.problem)
    assert "hunter2" not in str(done.problem)


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("ftp://host/x", "unknown kind"),
        ("file://elsewhere/x", "another machine"),
        ("https://me:hunter2@host/x", "holds a password"),
        ("https://", "names no host"),
        ("http://[::1", "no URL"),
    ],
)
def test_an_address_for_reports_that_is_none_is_refused(target: str, what: str, history: History) -> None:
    with pytest.raises(UpdateError) as raised:
        send(history, target)
    assert what in raised.value.what
    assert "hunter2" not in str(raised.value)


# Delivery into a folder (rules 2 and 4)


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_reports_are_written_into_a_folder(form: str, history: History, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    sent = queued(history, 3)
    assert send(history, form.format(inbox)) == (3, 0, None)
    assert sorted(item.name for item in inbox.iterdir()) == [f"camera-1-{report.sequence}.json" for report in sent]
    for report in sent:
        assert parse_device_report((inbox / f"camera-1-{report.sequence}.json").read_bytes()) == report


def test_a_report_that_was_written_before_a_power_cut_is_written_again(history: History, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (report,) = queued(history, 1)
    path = inbox / f"camera-1-{report.sequence}.json"
    path.write_bytes(b"torn")
    assert send(history, inbox) == (1, 0, None)
    assert parse_device_report(path.read_bytes()) == report


def test_a_folder_that_is_not_there_is_not_made(history: History, tmp_path: Path) -> None:
    queued(history, 1)
    done = send(history, tmp_path / "stick")
    assert (done.delivered, done.waiting) == (0, 1)
    assert "is not there" in str(done.problem)
    assert not (tmp_path / "stick").exists()


def test_a_folder_without_room_keeps_the_report_and_gets_no_half(history: History, tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from edge_ilseg.devices.update.history import History
from edge_ilseg.devices.update.reporting import deliver
with History(Path(sys.argv[1])) as history:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    print(history.waiting(1)[0].sequence > 0)
    from edge_ilseg.devices.update.reporting import _write
    from edge_ilseg.errors import EdgeIlsegError
    try:
        _write(Path(sys.argv[2]), history.waiting(1)[0])
    except EdgeIlsegError as error:
        print(error.what)
"""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    queued(history, 1)
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "history.sqlite", inbox],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert "could not be read or written" in done.stdout, done.stderr
    assert list(inbox.iterdir()) == []
    assert history.count_waiting() == 1


def test_a_report_of_a_later_version_still_finds_its_way(history: History, tmp_path: Path) -> None:
    """An agent that was put back to an older version has such ones in its outbox."""
    later = json.dumps({"format_version": 9, "device_id": "camera-1", "more": [1]}).encode()
    sequence = history.queue(lambda _: later)
    assert send(history, tmp_path) == (1, 0, None)
    assert (tmp_path / f"camera-1-{sequence}.json").read_bytes() == later


# The page


def test_the_page_names_every_field_and_event_and_its_example_is_a_report() -> None:
    page = (ROOT / "docs/device-report-format.md").read_text()
    structs = (DeviceReport, ActiveModel, ForgottenClass, RetentionNumbers, MachineInShort)
    names = {name for struct in structs for name in struct.__struct_fields__} | set(get_args(ReportEvent))
    assert {name for name in names if f"`{name}`" not in page} == set()
    example = page.split("```json\n")[1].split("```")[0]
    parse_device_report(example.replace("5f1c…", "5" * 64).replace("90ab…", "9" * 64).encode())
