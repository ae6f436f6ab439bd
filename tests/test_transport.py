"""Bytes out of a repository, against a real server that misbehaves; numbers are the rules of `update/transport.py`."""

from __future__ import annotations

import datetime
import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hostile_server import (
    Fault,
    HostileServer,
    cut_after,
    drip,
    drips_the_body,
    endless,
    flips,
    hang_up,
    hangs,
    headers,
    hostile_server,
    ignores_range,
    raw,
    redirect,
    status,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError

from edge_ilseg.devices.update import http_transport, tries
from edge_ilseg.devices.update.connections import Watchdog
from edge_ilseg.devices.update.http_transport import HttpTransport
from edge_ilseg.devices.update.transport import PIECE_BYTES, FolderTransport, Transport, TransportError, open_transport
from edge_ilseg.devices.update.tries import Tries, wait_before
from edge_ilseg.devices.update.tuf_fetcher import BASE_URL, TufFetcher
from edge_ilseg.errors import UpdateError

DATA = random.Random(1).randbytes(300_000)
PATH = "packs/a b.pack"
PATIENT_S = 30.0
"""For tests in which nothing is slow: this machine may be."""
HASTY_S = 0.2


@pytest.fixture(scope="module")
def running() -> Iterator[HostileServer]:
    with hostile_server() as server:
        yield server


@pytest.fixture
def server(running: HostileServer) -> HostileServer:
    running.reset({PATH: DATA})
    return running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "repository/packs").mkdir(parents=True)
    (tmp_path / "repository" / PATH).write_bytes(DATA)
    return tmp_path / "repository"


def opened(server: HostileServer, timeout_s: float = PATIENT_S) -> HttpTransport:
    transport = open_transport(server.url, timeout_s=timeout_s)
    assert isinstance(transport, HttpTransport)
    return transport


def get(transport: Transport, start: int = 0, end: int | None = None, path: str = PATH) -> bytes:
    return b"".join(transport.read_range(path, start, end))


def refusal(transport: Transport, start: int = 0, end: int | None = None, path: str = PATH) -> TransportError:
    with pytest.raises(TransportError) as raised:
        get(transport, start, end, path)
    return raised.value


# What is asked for comes, and nothing else

RANGES = [(0, None), (0, 1), (0, 300_000), (1, 2), (65_536, 131_072), (100_000, 299_999), (299_999, 300_000), (7, None)]


@pytest.mark.parametrize(("start", "end"), RANGES)
@pytest.mark.parametrize("kind", ["http", "folder", "file"])
def test_a_range_is_exactly_the_one_that_was_asked_for(
    kind: str, start: int, end: int | None, server: HostileServer, folder: Path
) -> None:
    address = {"http": server.url + "/", "folder": str(folder), "file": f"file://{folder}"}[kind]
    transport = open_transport(address, timeout_s=PATIENT_S)
    pieces = list(transport.read_range(PATH, start, end))
    assert b"".join(pieces) == DATA[start:end]
    assert max(map(len, pieces)) <= PIECE_BYTES
    assert all(pieces)


@pytest.mark.parametrize("kind", ["http", "folder"])
def test_an_empty_range_is_empty(kind: str, server: HostileServer, folder: Path) -> None:
    transport = opened(server) if kind == "http" else FolderTransport(folder)
    assert get(transport, 5, 5) == b""
    assert server.requests == []


def test_one_connection_serves_many_ranges(server: HostileServer) -> None:
    peers = set()

    def note(exchange: object) -> None:
        peers.add(exchange.handler.client_address)  # type: ignore[attr-defined]
        exchange.answer()  # type: ignore[attr-defined]

    server.always = note
    transport = opened(server)
    for start in range(0, 300_000, 50_000):
        assert get(transport, start, start + 50_000) == DATA[start : start + 50_000]
    assert len(peers) == 1


def test_who_stops_reading_gets_the_next_range_all_the_same(server: HostileServer) -> None:
    transport = opened(server)
    pieces = transport.read_range(PATH, 0, None)
    assert DATA.startswith(next(pieces))
    pieces.close()
    assert get(transport, 10, 20) == DATA[10:20]


def test_we_ask_for_the_bytes_as_they_are(server: HostileServer) -> None:
    get(opened(server), 5, 9)
    assert server.requests[0].headers["accept-encoding"] == "identity"
    assert server.requests[0].headers["user-agent"].startswith("edge-ilseg/")
    assert server.requests[0].headers["range"] == "bytes=5-8"


@pytest.mark.parametrize("kind", ["http", "folder"])
def test_a_small_file_is_read_whole_and_a_larger_one_refused(kind: str, server: HostileServer, folder: Path) -> None:
    transport = opened(server) if kind == "http" else FolderTransport(folder)
    assert transport.read_whole(PATH, len(DATA)) == DATA
    with pytest.raises(TransportError, match="larger than it may be") as raised:
        transport.read_whole(PATH, len(DATA) - 1)
    assert not raised.value.is_transient


def test_an_answer_in_chunks_without_a_length_is_read(server: HostileServer) -> None:
    server.always = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    assert opened(server).read_whole(PATH, 5) == b"abcde"


# A server that ignores Range (rule 5)


@pytest.mark.parametrize(("start", "end"), [(0, 10), (0, 65_537), (100_000, 100_001), (299_999, 300_000), (7, None)])
def test_a_server_that_ignores_ranges_is_read_from_the_start(
    start: int, end: int | None, server: HostileServer
) -> None:
    server.always = ignores_range
    transport = opened(server)
    assert transport.has_ranges
    assert get(transport, start, end) == DATA[start:end]
    assert not transport.has_ranges


def test_a_whole_file_as_an_answer_to_its_whole_range_says_nothing_about_ranges(server: HostileServer) -> None:
    server.always = ignores_range
    transport = opened(server)
    assert get(transport, 0, len(DATA)) == DATA
    assert transport.has_ranges


def test_what_is_thrown_away_has_a_cap(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_transport, "MAX_SKIP_BYTES", 1000)  # the real one is 256 MiB
    server.always = ignores_range
    assert get(opened(server), 1000, 1001) == DATA[1000:1001]
    error = refusal(opened(server), 1001, 1002)
    assert error.what == "the server cannot send a part of a file"
    assert not error.is_transient


# Answers that contradict the question, or themselves

PERMANENT: dict[str, tuple[Fault, str]] = {
    "another part": (headers(Content_Range="bytes 0-99/300000"), "another part"),
    "a part one byte on": (headers(Content_Range="bytes 101-199/300000"), "another part"),
    "a longer part": (headers(Content_Range="bytes 100-200/300000"), "another part"),
    "a shorter part": (headers(Content_Range="bytes 100-150/300000"), "another part"),
    "no part named": (headers(Content_Range=None), "another part"),
    "a part in other units": (headers(Content_Range="lines 100-199/300000"), "another part"),
    "a part that is no number": (
        headers(Content_Range="bytes ٣-١٩٩/300000".encode().decode("latin-1")),
        "another part",
    ),
    "a number of 5000 digits": (headers(Content_Range=f"bytes {'1' * 5000}-199/300000"), "another part"),
    "a file too short for the part": (headers(Content_Range="bytes 100-199/150"), "shorter than it should be"),
    "a longer body than the part": (headers(Content_Length=101), "contradicts itself"),
    "a shorter body than the part": (headers(Content_Length=99), "contradicts itself"),
    "compressed": (headers(Content_Encoding="gzip"), "compresses its answer"),
    "compressed twice": (headers(Content_Encoding="br, gzip"), "compresses its answer"),
    "a whole file that is too short": (status(200, body=bytes(199)), "shorter than it should be"),
    "404": (status(404), "is not in the repository"),
    "410": (status(410), "is not in the repository"),
    "403": (status(403), "refuses"),
    "401": (status(401), "refuses"),
    "416": (status(416), "shorter than it should be"),
    "400": (status(400), "does not give"),
    "204": (status(204, body=b""), "does not give"),
    "a redirection to nowhere": (status(302), "does not give"),
    "a redirection to a file": (redirect("file:///etc/passwd"), "another kind"),
    "a redirection to https": (redirect("https://127.0.0.1/"), "another kind"),
    "a redirection to ftp": (redirect("ftp://127.0.0.1/x"), "another kind"),
    "a redirection to no address": (redirect("http://[::1/"), "cannot be understood"),
    "a redirection to an impossible port": (redirect("http://127.0.0.1:99999999/"), "cannot be understood"),
}


@pytest.mark.parametrize("name", PERMANENT)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(name: str, server: HostileServer) -> None:
    fault, what = PERMANENT[name]
    server.always = fault
    error = refusal(opened(server), 100, 200)
    assert what in error.what
    assert not error.is_transient
    assert str(error.where).startswith(server.url)


@pytest.mark.parametrize("total", [b"9", b"5", b"*"])
def test_a_part_is_refused_where_the_whole_was_asked_for(total: bytes, server: HostileServer) -> None:
    part = b"Content-Range: bytes 0-4/" + total
    server.always = raw(b"HTTP/1.1 206 Partial Content\r\n" + part + b"\r\nContent-Length: 5\r\n\r\nabcde")
    assert "another part" in refusal(opened(server)).what


TRANSIENT: dict[str, tuple[Fault, str]] = {
    "cut before the answer": (hang_up, "was cut"),
    "cut in the head": (raw(b"HTTP/1.1 206 Partial"), "was cut"),
    "cut in the headers": (raw(b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 100-19"), "was cut"),
    "cut in a body without a length": (
        raw(b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 100-199/300000\r\n\r\nabc"),
        "was cut",
    ),
    "cut in the front that is thrown away": (raw(b"HTTP/1.1 200 OK\r\n\r\nabc"), "was cut"),
    "cut in a length": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 30"), "was cut"),
    "cut after the headers": (cut_after(0), "was cut"),
    "cut in the body": (cut_after(50), "was cut"),
    "reset in the body": (cut_after(50, reset=True), "was cut"),
    "no HTTP at all": (raw(b"220 ready for you\r\n"), "was cut"),
    "a body of the wrong chunks": (
        raw(b"HTTP/1.1 206 X\r\nContent-Range: bytes 100-199/300\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        "was cut",
    ),
    "408": (status(408), "does not give"),
    "429": (status(429), "does not give"),
    "500": (status(500), "does not give"),
    "503": (status(503), "does not give"),
    "599": (raw(b"HTTP/1.1 599 What\r\nContent-Length: 0\r\n\r\n"), "does not give"),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_may_pass_is_called_transient(name: str, server: HostileServer) -> None:
    fault, what = TRANSIENT[name]
    server.faults.append(fault)
    transport = opened(server)
    error = refusal(transport, 100, 200)
    assert what in error.what
    assert error.is_transient
    assert get(transport, 100, 200) == DATA[100:200]


def test_what_came_before_a_cut_is_right(server: HostileServer) -> None:
    server.always = cut_after(70_000)
    pieces = opened(server).read_range(PATH, 1000, 200_000)
    got = b""
    with suppress(TransportError):
        while True:
            got += next(pieces)
    assert got == DATA[1000:71_000]


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nServer: x"]
)
def test_a_head_that_is_cut_is_no_empty_file(head: bytes, server: HostileServer) -> None:
    server.always = raw(head)
    assert refusal(opened(server)).is_transient


def test_a_body_without_end_gives_no_byte_too_many(server: HostileServer) -> None:
    server.always = endless
    assert get(opened(server), 100, 300_000) == DATA[100:]
    with pytest.raises(TransportError, match="larger"):
        opened(server).read_whole(PATH, 1 << 20)


@pytest.mark.parametrize(
    ("extra", "wait_s"),
    [
        ([("Retry-After", "7")], 7.0),
        ([("Retry-After", "999999999")], 86_400.0),
        ([("Retry-After", "-7")], None),
        ([("Retry-After", "soon")], None),
        ([("Retry-After", "Fri, 30 Jan 2026 12:01:00 GMT"), ("Date", "Fri, 30 Jan 2026 12:00:00 GMT")], 60.0),
        ([("Retry-After", "Fri, 30 Jan 2026 11:00:00 GMT"), ("Date", "Fri, 30 Jan 2026 12:00:00 GMT")], 0.0),
        ([("Retry-After", "Fri, 30 Jan 2026 12:01:00 GMT")], None),
        ([], None),
    ],
)
def test_the_server_says_how_long_to_wait(
    extra: list[tuple[str, object]], wait_s: float | None, server: HostileServer
) -> None:
    server.always = status(503, *extra)
    assert refusal(opened(server)).retry_after_s == wait_s


def test_a_server_that_is_not_there_may_come_back() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    error = refusal(open_transport(f"http://127.0.0.1:{port}", timeout_s=PATIENT_S))
    assert error.what == "the server cannot be reached"
    assert error.is_transient


def test_a_name_that_is_not_known_may_be_later() -> None:
    error = refusal(open_transport("http://no-such-host.invalid", timeout_s=PATIENT_S))
    assert error.what == "the server's name is not known"
    assert error.is_transient


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    garbage=st.binary(max_size=300), front=st.sampled_from([b"", b"HTTP/1.1 206 ", b"HTTP/1.1 302 Found\r\nLocation: "])
)
def test_garbage_for_an_answer_ends_in_a_transport_error(garbage: bytes, front: bytes, server: HostileServer) -> None:
    server.always = raw(front + garbage + b"\r\n\r\n")
    refusal(opened(server), 100, 200)


# Redirections (rule 4)


def test_a_redirection_is_followed_to_another_server_with_the_range(server: HostileServer) -> None:
    with hostile_server({"elsewhere/x": DATA}) as other:
        server.always = redirect(f"{other.url}/elsewhere/x", 307)
        assert get(opened(server), 5, 900) == DATA[5:900]
        assert other.ranges == [(5, 900)]


def test_a_relative_redirection_is_followed(server: HostileServer) -> None:
    server.files["packs/new"] = DATA
    server.faults.append(redirect("new", 301))
    assert get(opened(server), 5, 900) == DATA[5:900]


def test_a_circle_of_redirections_ends(server: HostileServer) -> None:
    server.always = redirect(f"{server.url}/packs/a%20b.pack")
    error = refusal(opened(server))
    assert error.what == "the server sends us in a circle"
    assert not error.is_transient
    assert len(server.requests) == http_transport.MAX_REDIRECTS + 1


# Slowness: every wait ends (rule 1 of `update/connections.py`)

SLOW: dict[str, Fault] = {
    "no answer": hangs,
    "a head that drips": drip(b"HTTP/1.1 206 Partial Content\r\n" + b"X: " + b"y" * 10_000, HASTY_S / 4),
    "chunk lengths that drip": drip(
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 100-199/300\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"y" * 10_000,
        HASTY_S / 400,
    ),
    "a body that stops": lambda exchange: (
        exchange.head(*exchange.good_headers()),
        exchange.write(b"some"),
        exchange.hang(),
    )[0],
}


@pytest.mark.parametrize("name", SLOW)
def test_whoever_makes_us_wait_is_left(name: str, server: HostileServer) -> None:
    server.always = SLOW[name]
    error = refusal(opened(server, HASTY_S), 100, 200)
    assert error.what == "the server does not answer in time"
    assert error.is_transient


def test_trailers_without_end_are_not_read_for_ever(server: HostileServer) -> None:
    def fault(exchange: object) -> None:
        exchange.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")  # type: ignore[attr-defined]
        while True:
            exchange.write(b"X: y\r\n" * 1000)  # type: ignore[attr-defined]

    server.always = fault
    assert refusal(opened(server, HASTY_S)).is_transient


def test_who_reads_slowly_does_not_make_the_server_late(server: HostileServer) -> None:
    """The limit is for the other side: a disk that takes its time to sync is not a slow server."""
    server.files[PATH] = DATA * 40
    pieces = opened(server, HASTY_S).read_range(PATH, 0, None)
    first = next(pieces)
    threading.Event().wait(4 * HASTY_S)
    assert first + b"".join(pieces) == DATA * 40


def test_a_small_file_that_drips_is_given_up(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_transport, "WHOLE_PATIENCE", 1.0)  # ten timeouts are too long for a test
    server.always = drips_the_body(HASTY_S / 8)
    with pytest.raises(TransportError, match="too slowly") as raised:
        opened(server, HASTY_S * 4).read_whole(PATH, len(DATA))
    assert raised.value.is_transient


def test_a_watchdog_that_has_ended_bites_no_more() -> None:
    bites: list[int] = []
    with Watchdog(lambda: bites.append(1), 0.05) as dog:
        pass
    threading.Event().wait(0.2)
    assert bites == []
    assert not dog.has_bitten


# TLS: used where the address says so, never left


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of nobody's authority for 127.0.0.1, with its key."""
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(built.public_bytes(serialization.Encoding.PEM) + private)
    return path


def test_https_is_used_and_a_known_authority_believed(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with hostile_server({PATH: DATA}, certificate=certificate) as server:
        assert server.url.startswith("https://")
        transport = opened(server)
        assert get(transport, 10, 200_000) == DATA[10:200_000]
        server.faults.append(cut_after(100))
        assert refusal(transport, 0, 1000).is_transient
        server.always = drip(b"HTTP/1.1 206 Partial Content\r\n" + b"X: " + b"y" * 10_000, HASTY_S)
        assert refusal(opened(server, 4 * HASTY_S), 0, 1000).what == "the server does not answer in time"


def test_a_server_that_cannot_prove_who_it_is_gets_no_request(certificate: Path) -> None:
    with hostile_server({PATH: DATA}, certificate=certificate) as server:
        error = refusal(opened(server))
        assert error.what == "the server does not prove who it is"
        assert not error.is_transient
        assert "clock" in str(error.hint)
        assert server.requests == []


def test_https_does_not_lead_to_http(certificate: Path, server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with hostile_server({PATH: DATA}, certificate=certificate) as secure:
        secure.always = redirect(f"{server.url}/packs/a%20b.pack")
        assert "another kind" in refusal(opened(secure)).what
        assert server.requests == []


# Names and addresses (rule 3)


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../x", "a/../x", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb", "..", "\x7f"],
)
@pytest.mark.parametrize("kind", ["http", "folder"])
def test_a_name_that_leaves_the_repository_is_refused(
    path: str, kind: str, server: HostileServer, folder: Path
) -> None:
    transport = opened(server) if kind == "http" else FolderTransport(folder)
    assert "name" in refusal(transport, path=path).what
    assert server.requests == []


def test_a_name_is_a_name_and_no_part_of_an_address(server: HostileServer) -> None:
    server.files["a?b#c%20 ü"] = b"yes"
    assert get(opened(server), path="a?b#c%20 ü") == b"yes"


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("ftp://host/x", "unknown kind"),
        ("s3://bucket", "unknown kind"),
        ("file://other-machine/x", "on another machine"),
        ("http://", "names no host"),
        ("https://host/x?y=1", "not plain"),
        ("https://host/x#y", "not plain"),
        ("https://[::1/x", "no URL"),
        ("https://host:99999999/x", "no URL"),
        ("https://me:hunter2@host/x", "holds a password"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, what: str) -> None:
    with pytest.raises(UpdateError) as raised:
        open_transport(address, timeout_s=1)
    assert what in raised.value.what
    assert "hunter2" not in str(raised.value)


# Folders


def test_a_link_inside_the_repository_is_followed_and_one_that_leads_out_is_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "inside").symlink_to(PATH)
    (folder / "outside").symlink_to(tmp_path / "secret")
    (folder / "climbing").symlink_to("../secret")
    (folder / "away").symlink_to(tmp_path)
    transport = FolderTransport(folder)
    assert get(transport, 0, 10, "inside") == DATA[:10]
    for path in ("outside", "climbing", "away/secret"):
        error = refusal(transport, path=path)
        assert error.what == "a link leads out of the repository"
        assert not error.is_transient


def test_a_repository_may_itself_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert get(FolderTransport(tmp_path / "link"), 5, 9) == DATA[5:9]


def test_a_pipe_a_folder_and_a_loop_are_no_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    for path in ("pipe", "packs", "loop", PATH + "/x"):
        assert not refusal(FolderTransport(folder), path=path).is_transient


def test_a_missing_file_is_told_from_a_missing_folder(folder: Path) -> None:
    error = refusal(FolderTransport(folder), path="packs/none")
    assert (error.status, error.what) == (404, "a file of the repository cannot be read")
    folder.rename(folder.with_name("unplugged"))
    error = refusal(FolderTransport(folder), path="packs/none")
    assert (error.status, error.what) == (None, "the folder of the repository is not there")
    assert "plug it in" in str(error.hint)


def test_a_file_that_shrinks_while_it_is_read_is_too_short(folder: Path) -> None:
    pieces = FolderTransport(folder).read_range(PATH, 0, len(DATA))
    assert next(pieces) == DATA[:PIECE_BYTES]
    os.truncate(folder / PATH, PIECE_BYTES + 10)
    with pytest.raises(TransportError, match="shorter") as raised:
        list(pieces)
    assert not raised.value.is_transient


# How often


def test_waits_grow_to_a_minute_and_are_spread() -> None:
    for failures, longest_s in ((1, 0.01), (2, 0.04), (5, 2.56), (7, 40.96), (8, 60.0), (10_000, 60.0)):
        waits = {wait_before(failures) for _ in range(50)}
        assert longest_s / 2 <= min(waits) < max(waits) <= longest_s


def test_failures_without_progress_are_counted_and_progress_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.0)  # ten real waits are some minutes
    error = TransportError("cut", is_transient=True)
    counted = Tries(60.0)
    for _ in range(3):
        for _ in range(tries.MAX_TRIES - 1):
            counted.failed(error)
        counted.progressed()
    for _ in range(tries.MAX_TRIES - 1):
        counted.failed(error)
    with pytest.raises(TransportError, match="cut"):
        counted.failed(error)


@pytest.mark.parametrize(
    "error",
    [TransportError("no"), TransportError("busy", is_transient=True, retry_after_s=61.0)],
    ids=["nothing that passes", "to come back after the deadline"],
)
def test_there_is_no_other_try(error: TransportError) -> None:
    with pytest.raises(TransportError) as raised:
        Tries(60.0).failed(error)
    assert raised.value is error


def test_progress_after_the_deadline_ends_it() -> None:
    with pytest.raises(TransportError, match="too slowly"):
        Tries(-1.0).progressed()


# tuf over a transport


@pytest.mark.parametrize("kind", ["http", "folder"])
def test_tuf_reads_through_a_transport(kind: str, server: HostileServer, folder: Path) -> None:
    fetcher = TufFetcher(opened(server) if kind == "http" else FolderTransport(folder))
    assert fetcher.download_bytes(BASE_URL + PATH, len(DATA)) == DATA
    with pytest.raises(DownloadLengthMismatchError):
        fetcher.download_bytes(BASE_URL + PATH, len(DATA) - 1)
    with pytest.raises(DownloadHTTPError) as raised:
        fetcher.download_bytes(BASE_URL + "2.root.json", 10)
    assert raised.value.status_code == 404
    with pytest.raises(DownloadError):
        fetcher.download_bytes("https://elsewhere/root.json", 10)


def test_tuf_goes_on_after_a_cut(server: HostileServer) -> None:
    server.faults.extend([status(503, ("Retry-After", "0")), *[cut_after(10_000)] * 29])
    assert TufFetcher(opened(server)).download_bytes(BASE_URL + PATH, len(DATA)) == DATA
    assert server.ranges[2:4] == [(10_000, None), (20_000, None)]


def test_tuf_gets_its_own_errors(server: HostileServer) -> None:
    server.always = drips_the_body(0.05)
    with pytest.raises(DownloadError, match="too slowly"):
        TufFetcher(opened(server), deadline_s=0.2).download_bytes(BASE_URL + PATH, len(DATA))
    server.always = status(500, ("Retry-After", "999"))
    with pytest.raises(DownloadHTTPError) as raised:
        TufFetcher(opened(server)).download_bytes(BASE_URL + PATH, len(DATA))
    assert raised.value.status_code == 500


def test_a_flipped_bit_is_no_business_of_the_transport(server: HostileServer) -> None:
    server.always = flips(150)
    assert get(opened(server), 100, 200) != DATA[100:200]
