"""All that a device or a fleet reads from the network or the disk is hostile: any bytes give a value or an error.

Records are mutated as JSON (a value, a key, a type, a length exchanged) and as bytes (bits, cuts, repeats): what is
still valid is read, and all else is refused in this project's own words. The pack's index, which is binary, has its
own tests (`test_pack_index.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bundles import BASE, write_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_ilseg.bundle import MANIFEST_NAME, parse_manifest
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.update.decisions import first_state
from edge_ilseg.devices.update.heartbeat import Heartbeat, encode_heartbeat, parse_heartbeat
from edge_ilseg.devices.update.release import (
    PackRef,
    Release,
    Rollout,
    RolloutEntry,
    Rollouts,
    WatchLimits,
    encode_record,
    pack_path,
    parse_release,
    parse_rollouts,
)
from edge_ilseg.devices.update.reporting import DeviceReport, encode_report, parse_device_report
from edge_ilseg.devices.update.state import Installed, encode_state, parse_state
from edge_ilseg.errors import EdgeIlsegError

ID, OTHER_ID = "a" * 64, "b" * 64
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**53, 2**63, 2**64, 10**400, 1e308, -0.0, "", "\0", "..", "/etc/passwd", "a" * 70_000),
    *("\ud800", "2026-13-40", "2026-01-01T00:00:00", "0" * 64, f"{ID}\n", [], {}, [[[[]]]], {"": {}}, ["x"] * 1000),
)
Parse = Callable[..., object]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, Parse]]:
    folder = tmp_path_factory.mktemp("bundle") / "base"
    write_bundle(folder, BASE, step_id=ID)
    entry = RolloutEntry(1, ID, OTHER_ID, 0, "00-base", Rollout("r", 10.0, ("lab",), NOW.isoformat()))
    pack = PackRef(pack_path(OTHER_ID), 1000, 100, OTHER_ID)
    release = Release(
        "edge-ilseg-release", 1, 1, NOW.isoformat(), ID, 0, "00-base", pack, Limits(max_class_drop_pct=5), WatchLimits()
    )
    heartbeat = Heartbeat(
        "edge-ilseg-heartbeat",
        1,
        ID,
        OTHER_ID,
        1,
        1,
        NOW,
        NOW,
        None,
        None,
        0.0,
        0,
        0,
        None,
        0,
        0,
        None,
        None,
        None,
        None,
        (),
    )
    report = DeviceReport(device_id="cam-1", group="lab", created=NOW.isoformat(), event="confirmed", release=1)
    return {
        "manifest": ((folder / MANIFEST_NAME).read_bytes(), parse_manifest),
        "rollouts": (encode_record(Rollouts("edge-ilseg-rollouts", 1, NOW.isoformat(), (entry,))), parse_rollouts),
        "release": (encode_record(release), parse_release),
        "state": (encode_state(first_state(Installed(ID, 3), NOW)), parse_state),
        "heartbeat": (encode_heartbeat(heartbeat), parse_heartbeat),
        "report": (encode_report(report), parse_device_report),
    }


NAMES = ("manifest", "rollouts", "release", "state", "heartbeat", "report")


@pytest.mark.parametrize("name", NAMES)
def test_the_record_itself_is_read(name: str, records: dict[str, tuple[bytes, Parse]]) -> None:
    data, parse = records[name]
    parse(data)


def read(parse: Parse, data: bytes) -> bool:
    """Whether it is read; anything but a value or an error of ours is a defect, and fails the test."""
    try:
        parse(data, where=Path("somewhere"))
    except EdgeIlsegError:
        return False
    return True


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value[:3]):
            yield from places(item, (*path, number))


def mutated(value: Any, path: tuple[Any, ...], change: str, strange: Any) -> Any:
    """The value with one place exchanged, removed, doubled or renamed."""
    if not path:
        return strange if change == "exchange" else [value, value]
    copy = json.loads(json.dumps(value))
    inside = copy
    for key in path[:-1]:
        inside = inside[key]
    key = path[-1]
    if change == "exchange":
        inside[key] = strange
    elif change == "remove":
        del inside[key]
    elif isinstance(inside, list):
        inside.append(inside[key])
    else:
        inside[f"{key}x"] = inside.pop(key)
    return copy


def check_mutants(name: str, records: dict[str, tuple[bytes, Parse]], count: int) -> None:
    data, parse = records[name]
    value = json.loads(data)
    everywhere = list(places(value))

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(
            st.binary(max_size=300),
            st.tuples(
                st.sampled_from(everywhere),
                st.sampled_from(("exchange", "remove", "double")),
                st.one_of(
                    st.sampled_from(range(len(STRANGE))).map(STRANGE.__getitem__), st.text(max_size=20), st.floats()
                ),
            ),
            st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), min_size=1, max_size=4),
            st.integers(0, len(data)),
        )
    )
    def check(mutation: Any) -> None:
        if isinstance(mutation, bytes):
            assert not read(parse, mutation)
        elif isinstance(mutation, tuple):
            read(parse, json.dumps(mutated(value, *mutation)).encode("utf-8", "surrogatepass"))
        elif isinstance(mutation, int):
            assert read(parse, data[:mutation]) == (not data[mutation:].strip())
        else:
            changed = bytearray(data)
            for position, byte in mutation:
                changed[position] = byte
            read(parse, bytes(changed))

    check()


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_give_a_value_or_an_error(name: str, records: dict[str, tuple[bytes, Parse]]) -> None:
    check_mutants(name, records, 150)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_mutants_give_a_value_or_an_error(name: str, records: dict[str, tuple[bytes, Parse]]) -> None:
    check_mutants(name, records, 10_000)


@pytest.mark.parametrize("name", NAMES)
def test_another_version_is_refused_with_what_to_do(name: str, records: dict[str, tuple[bytes, Parse]]) -> None:
    data, parse = records[name]
    value = {**json.loads(data), "format_version": 99}
    with pytest.raises(EdgeIlsegError) as caught:
        parse(json.dumps(value).encode())
    assert "99" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_depth_does_not_end_the_process(name: str, records: dict[str, tuple[bytes, Parse]]) -> None:
    _, parse = records[name]
    for opening in (b"[", b'{"a":'):
        assert not read(parse, opening * 50_000)
