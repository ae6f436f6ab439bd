"""What a device tells its fleet: one small JSON record for each thing that happens, kept until it is delivered.

1. A report is read strictly: whoever collects them reads what any device, or anybody, has sent. Sizes are capped before
   parsing, texts are single lines without control characters, a device's id is safe as the name of a file.
2. A report is delivered to a URL by POST (any 2xx takes it), or into a folder as `<device id>-<sequence>.json`, whole.
3. Reports go in their order, and one that is not taken stays. After a failure nothing is tried for a while that grows,
   and that the next process keeps, too.
4. The same report may come twice (a power cut between delivery and note): device and sequence tell.

Format page: docs/device-report-format.md.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from edge_ilseg import __version__
from edge_ilseg.devices.facts import DeviceFacts
from edge_ilseg.devices.update.history import History, WaitingReport, clean_text
from edge_ilseg.devices.update.transport import as_folder
from edge_ilseg.errors import EdgeIlsegError, UpdateError
from edge_ilseg.files import write_bytes
from edge_ilseg.records import parse_versioned

if TYPE_CHECKING:
    from urllib3 import PoolManager

REPORT_FORMAT: Literal["edge-ilseg-device-report"] = "edge-ilseg-device-report"
FORMAT_VERSION = 1
MAX_REPORT_BYTES = 64 << 10
SAME_VERSIONS = "use the same version of edge-ilseg here and on the devices"
MAX_SHORT, MAX_REASON = 100, 2000
"""Characters of a name, and of a reason."""
MAX_FORGOTTEN = 100
FIRST_WAIT_S, MAX_WAIT_S = 60.0, 6 * 3600.0
"""Between deliveries that fail."""
MAX_PUT_OFF_S = 86_400.0
"""A next try that lies further ahead was noted by a clock that was wrong."""

PLAIN = r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*\Z"
"""No control character, none that breaks a line or turns the direction of writing."""
DEVICE_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
DeviceId = Annotated[str, Meta(pattern=DEVICE_ID)]
Short = Annotated[str, Meta(max_length=MAX_SHORT, pattern=PLAIN)]
Reason = Annotated[str, Meta(max_length=MAX_REASON, pattern=PLAIN)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Number = Annotated[int, Meta(ge=1, le=2**53)]
Difference = Annotated[float, Meta(ge=-100, le=100)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Positive = Annotated[float, Meta(ge=0, le=1e12)]
Count = Annotated[int, Meta(ge=0, le=2**53)]

ReportEvent = Literal[
    "checked",
    "fetched",
    "staged",
    "gate passed",
    "gate refused",
    "gate crashed",
    "not judged",
    "activated",
    "confirmed",
    "rolled back",
    "rejected",
    "dropped",
    "damaged",
    "failed",
]


class ActiveModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What runs on the device."""

    bundle_id: Sha256
    step_name: Short
    release: Number | None = None
    """None: it came with the device."""


class ForgottenClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A class that fell below its limit."""

    name: Short
    drop_pct: Difference
    """Percentage points of IoU that it lost."""


class RetentionNumbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the gate measured; None: not measured."""

    old_miou_drop_pct: Difference | None = None
    old_miou_drop_interval_pct: tuple[Difference, Difference] | None = None
    """Where the drop lies, with the confidence that the gate works with."""
    new_miou_pct: Percent | None = None
    latency_p95_ms: Positive | None = None
    peak_rss_mib: Positive | None = None


class MachineInShort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the device is; None: not found out."""

    machine: Short | None = None
    processor: Short | None = None
    cores: Count | None = None
    memory_mib: Count | None = None
    system: Short | None = None
    python: Short | None = None


class DeviceReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One thing that happened on one device, and how the device stands after it."""

    format: Literal["edge-ilseg-device-report"] = REPORT_FORMAT
    format_version: int = FORMAT_VERSION
    device_id: DeviceId
    group: Short
    sequence: Number = 1
    """Above that of every earlier report of the device; gaps mean nothing. Set by `queue_report`."""
    created: Annotated[str, Meta(max_length=40)]
    """UTC by the device's clock, ISO 8601."""
    event: ReportEvent
    release: Number | None = None
    """The release that the event is about, with its bundle and step."""
    bundle_id: Sha256 | None = None
    step_name: Short | None = None
    step_index: Count | None = None
    active: ActiveModel | None = None
    verdict: Short | None = None
    reason: Reason | None = None
    forgotten: Annotated[tuple[ForgottenClass, ...], Meta(max_length=MAX_FORGOTTEN)] = ()
    """The worst first."""
    retention: RetentionNumbers | None = None
    agent_version: Short = __version__
    machine: MachineInShort | None = None


class _Sender(msgspec.Struct, frozen=True):
    """Of a report of any version, who sent it."""

    device_id: DeviceId


class Delivery(NamedTuple):
    """How a call of `deliver` ended."""

    delivered: int
    waiting: int
    problem: str | None
    """Why not everything was delivered."""


def check_device_id(device_id: str) -> str:
    """The id, which is safe as a part of a file's name.

    Raises:
        UpdateError: it is not.
    """
    if not re.match(DEVICE_ID, device_id):
        raise UpdateError(
            "the id of the device cannot be used",
            found=repr(device_id)[:100],
            expected="1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or a digit",
            hint="give another: --device-id, or device_id in agent.toml",
        )
    return device_id


def machine_in_short(facts: DeviceFacts) -> MachineInShort:
    """Of everything that is known about the device, what a fleet wants to group by."""
    texts = (facts.machine, facts.processor, facts.system, facts.python)
    machine, processor, system, python = (None if text is None else clean_text(text, MAX_SHORT) for text in texts)
    return MachineInShort(machine, processor, facts.cores, facts.memory_mib, system, python)


def queue_report(history: History, report: DeviceReport) -> DeviceReport:
    """Put a report into the outbox, under the next number and with texts that every reader takes.

    Raises:
        UpdateError: the history cannot be written, or a field has a value that no reader would take.
    """
    cleaned = _clean(report)
    sequence = history.queue(lambda number: encode_report(msgspec.structs.replace(cleaned, sequence=number)))
    return msgspec.structs.replace(cleaned, sequence=sequence)


def _clean(report: DeviceReport) -> DeviceReport:
    forgotten = sorted(report.forgotten, key=lambda item: -item.drop_pct)[:MAX_FORGOTTEN]
    return msgspec.structs.replace(
        report,
        group=clean_text(report.group, MAX_SHORT),
        step_name=None if report.step_name is None else clean_text(report.step_name, MAX_SHORT),
        verdict=None if report.verdict is None else clean_text(report.verdict, MAX_SHORT),
        reason=None if report.reason is None else clean_text(report.reason, MAX_REASON),
        forgotten=tuple(ForgottenClass(clean_text(item.name, MAX_SHORT), item.drop_pct) for item in forgotten),
    )


def encode_report(report: DeviceReport) -> bytes:
    """As it is sent.

    Raises:
        UpdateError: a field has a value that `parse_device_report` does not take.
    """
    data = msgspec.json.encode(report)
    parse_device_report(data)
    return data


def parse_device_report(data: bytes, *, where: object = None) -> DeviceReport:
    """Turn bytes from anywhere into a report (rule 1).

    Raises:
        UpdateError: too large, not such a record, of another version, or with a value that is out of bounds.
    """
    if len(data) > MAX_REPORT_BYTES:
        raise UpdateError(
            "the report of a device is too large",
            where=where,
            found=f"{len(data)} bytes",
            expected=f"at most {MAX_REPORT_BYTES}",
            hint=SAME_VERSIONS,
        )
    report = parse_versioned(
        data,
        DeviceReport,
        format=REPORT_FORMAT,
        version=FORMAT_VERSION,
        error=UpdateError,
        what="the report of a device",
        where=where,
        hint=SAME_VERSIONS,
    )
    interval = report.retention and report.retention.old_miou_drop_interval_pct
    if interval and interval[0] > interval[1]:
        raise UpdateError("an interval ends before it begins", where=where, found=str(interval), hint=SAME_VERSIONS)
    try:
        moment = datetime.fromisoformat(report.created)
    except ValueError as error:
        raise UpdateError(
            "a time is not in ISO 8601", where=where, found=repr(report.created), hint=SAME_VERSIONS
        ) from error
    if moment.tzinfo is None:
        raise UpdateError("a time has no time zone", where=where, found=repr(report.created), hint=SAME_VERSIONS)
    return report


def deliver(history: History, target: str, *, deadline_s: float, timeout_s: float = 20.0) -> Delivery:
    """Deliver what waits in the outbox (rules 2 to 4).

    Args:
        history: holds the outbox, and when to try again.
        target: `https://…` or `http://…`, `file://…` or the path of a folder.
        deadline_s: no report is begun after it.
        timeout_s: longest wait for the server.

    Raises:
        UpdateError: `target` is of no kind that is known, or the history cannot be written.
    """
    send = _sender(target, timeout_s)
    state = history.delivery_state()
    ahead_s = state.next_try_s - time.time()
    if 0 < ahead_s <= MAX_PUT_OFF_S:
        return Delivery(0, history.count_waiting(), f"put off for {ahead_s:.0f} s after {state.failures} failures")
    end = time.monotonic() + deadline_s
    delivered, problem = 0, None
    while problem is None and (batch := history.waiting(1)):
        (report,) = batch
        if time.monotonic() >= end:
            problem = f"the {deadline_s:g} s for it were over"
            break
        try:
            send(report)
        except EdgeIlsegError as error:
            problem = error.one_line()
            failures = history.delivery_state().failures + 1
            history.mark_failed(time.time() + _wait_s(failures, getattr(error, "retry_after_s", None)))
        else:
            history.mark_delivered(report.sequence)
            delivered += 1
    return Delivery(delivered, history.count_waiting(), problem)


def _wait_s(failures: int, retry_after_s: float | None) -> float:
    """Rule 3, spread at random: a fleet must not come back as one."""
    longest_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** min(failures - 1, 20))
    return min(max(random.uniform(longest_s / 2, longest_s), retry_after_s or 0.0), MAX_PUT_OFF_S)


def _sender(target: str, timeout_s: float) -> Callable[[WaitingReport], None]:
    folder = as_folder(target, "the address for reports")
    if folder is not None:
        return partial(_write, folder)
    from edge_ilseg.devices.update.connections import open_pool
    from edge_ilseg.devices.update.http_transport import check_address  # a folder needs no HTTP

    address = check_address(target, "the address for reports")
    return partial(_post, open_pool(timeout_s), target, address._replace(query="", fragment="").geturl())


def _write(folder: Path, report: WaitingReport) -> None:
    if not folder.is_dir():
        raise UpdateError("the folder for reports is not there", where=folder, hint="plug it in, or mount it")
    write_bytes(folder / f"{_device_of(report)}-{report.sequence}.json", report.report)


def _post(pool: PoolManager, url: str, shown: str, report: WaitingReport) -> None:
    from edge_ilseg.devices.update.connections import HEADERS
    from edge_ilseg.devices.update.http_transport import as_transport_errors, refused

    key = f"{_device_of(report)}:{report.sequence}"
    headers = {**HEADERS, "Content-Type": "application/json", "Idempotency-Key": key}
    with as_transport_errors(shown):
        response = pool.request("POST", url, body=report.report, headers=headers, preload_content=False, redirect=False)
        try:
            if not 200 <= response.status < 300:
                raise refused("the server does not take the report", response, shown)
        finally:
            response.close()  # what it says beside is nothing to us


def _device_of(report: WaitingReport) -> str:
    return msgspec.json.decode(report.report, type=_Sender).device_id
