"""Versioned JSON; numbers are the rules on top of `edge_ilseg/records.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import pytest
from bundles import BASE, write_bundle

from edge_ilseg.bundle import parse_manifest
from edge_ilseg.calibration.ranges import Ranges, TensorRange, read_ranges, write_ranges
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import encode_report, parse_report
from edge_ilseg.errors import BundleError, EdgeIlsegError, ExportError, ReportError
from edge_ilseg.records import parse_versioned


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["note"]
    format_version: int
    text: str
    sizes: dict[str, float]


class NoteError(EdgeIlsegError):
    pass


NOTE = Note("note", 1, 'caf\u00e9 \\ "x"', {"a": 1.5, "\U0001f6a4": -2e-3})
DATA = msgspec.json.encode(NOTE)


def parse(data: bytes) -> Note:
    return parse_versioned(
        data,
        Note,
        format="note",
        version=1,
        error=NoteError,
        what="the note",
        where="n.json",
        hint="write it again",
    )


def flipped(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def test_a_record_is_read_as_it_was_written() -> None:
    assert parse(DATA) == NOTE


def test_every_byte_changed_to_every_other_gives_a_record_or_the_callers_error() -> None:
    """Rule 1. What is read can be written again."""
    refused = 0
    for position in range(len(DATA)):
        for mask in range(1, 256):
            try:
                note = parse(flipped(DATA, position, mask))
            except NoteError:
                refused += 1
            else:
                msgspec.json.encode(note)
    assert refused > 100 * len(DATA)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"format": "\xff"}', b"[" * 200_000, b'{"a":' * 200_000]
    + [DATA[:length] for length in range(0, len(DATA), 7)],
)
def test_bytes_that_are_no_json_object_are_refused(data: bytes) -> None:
    with pytest.raises(NoteError, match="the note is not JSON") as raised:
        parse(data)
    assert (raised.value.where, raised.value.hint) == ("n.json", "write it again")


@pytest.mark.parametrize("literal", ["2", "0", '"1"', "null", "1e400", "9" * 5000, "[1]"])
def test_another_version_is_refused_by_itself_whatever_else_is_in_the_record(literal: str) -> None:
    """Rule 2."""
    data = f'{{"format": "note", "format_version": {literal}, "new": 1}}'.encode()
    with pytest.raises(NoteError, match=r"a format that this version does not read|is not JSON"):
        parse(data)


@pytest.mark.parametrize("literal", ["true", "1.0"])
def test_a_version_of_another_type_is_refused(literal: str) -> None:
    with pytest.raises(NoteError, match="damaged"):
        parse(DATA.replace(b'"format_version":1', f'"format_version":{literal}'.encode()))


def test_another_format_is_refused_and_both_are_named() -> None:
    with pytest.raises(NoteError) as raised:
        parse(DATA.replace(b'"note"', b'"song"'))
    assert (raised.value.found, raised.value.expected) == ("'song' version 1", "'note' version 1")


def test_unknown_and_missing_fields_are_refused_and_named() -> None:
    """Rule 3."""
    with pytest.raises(NoteError, match="the note is damaged") as raised:
        parse(DATA.replace(b'"text"', b'"texts"'))
    assert "`texts`" in str(raised.value.found)
    with pytest.raises(NoteError, match="the note is damaged") as raised:
        parse(b'{"format": "note", "format_version": 1, "text": ""}')
    assert "`sizes`" in str(raised.value.found)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80])
def test_no_flipped_bit_of_a_manifest_a_report_or_ranges_ends_in_a_traceback(mask: int, tmp_path: Path) -> None:
    """0x80 makes any byte of these files invalid UTF-8."""
    write_bundle(tmp_path / "b", BASE, step_id="a")
    manifest = (tmp_path / "b/manifest.json").read_bytes()
    report = encode_report(verify_bundle(tmp_path / "b", VerifyRequest(latency_runs=1, threads=1)))
    ranges = Ranges(
        format="edge-ilseg-ranges",
        format_version=2,
        method="minmax",
        policy="carry",
        step="01",
        image_ids=("a",),
        images_sha256="00",
        graph_sha256="11",
        parent_graph_sha256=None,
        tensors={"Div": TensorRange(-1.0, 1.0, ("01",), "measured", "22", b"\x00\xff")},
    )
    path = tmp_path / "ranges.json"
    write_ranges(path, ranges)
    written = path.read_bytes()
    refused = 0
    for position in range(len(written)):
        path.write_bytes(flipped(written, position, mask))
        try:
            read_ranges(path)
        except (BundleError, ExportError):
            refused += 1
    for position in range(len(manifest)):
        try:
            parse_manifest(flipped(manifest, position, mask))
        except BundleError:
            refused += 1
    for position in range(len(report)):
        try:
            parse_report(flipped(report, position, mask))
        except ReportError:
            refused += 1
    assert refused > 500
    if mask == 0x80:
        assert refused == len(written) + len(manifest) + len(report)
