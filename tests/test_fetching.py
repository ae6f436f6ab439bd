"""A pack arrives on a device, over a real server that misbehaves; numbers are the rules of `update/fetching.py`."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from bundles import BASE, GROWN, write_bundle
from hostile_server import (
    Fault,
    HostileServer,
    cut_after,
    drips_the_body,
    endless,
    flips,
    hang_up,
    headers,
    hostile_server,
    ignores_range,
    raw,
    redirect,
    status,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_ilseg.chunks import ChunkSource
from edge_ilseg.codecs import RAW, ZLIB, ZSTD, compress_smallest, difference_smallest
from edge_ilseg.devices.update import tries
from edge_ilseg.devices.update.fetching import FetchedContent, fetch_content, open_chunks
from edge_ilseg.devices.update.release import PackRef, pack_path
from edge_ilseg.devices.update.transport import FolderTransport, Transport, TransportError, open_transport
from edge_ilseg.errors import UpdateError
from edge_ilseg.fetch_plan import fetch_plan
from edge_ilseg.pack import write_pack
from edge_ilseg.pack_index import PackChunk, PackDifference, PackFile, PackIndex, encode_index, parse_index

ROOT = Path(__file__).parents[1]
PATIENT_S = 30.0
DEADLINE_S = 300.0
MIB = 1 << 20
CHUNK_BYTES = 32 << 10


class Pack(NamedTuple):
    """A pack, how a release names it, and what it holds."""

    data: bytes
    ref: PackRef
    index: PackIndex
    files: Mapping[str, bytes]


def make_pack(files: Mapping[str, bytes], bases: Mapping[str, bytes] | None = None, *, best: bool = True) -> Pack:
    """A pack of `files`, each of them one chunk, with differences from the files of `bases`; not `best` is quick."""
    chunks: dict[bytes, PackChunk] = {}
    differences: list[PackDifference] = []
    stored: list[bytes] = []
    entries: list[PackFile] = []
    for path, data in sorted(files.items()):
        quick = min((RAW, data), (ZLIB, zlib.compress(data, 1)), key=lambda item: len(item[1]))
        codec, packed = compress_smallest(data) if best else quick
        digest = hashlib.sha256(data).digest()
        chunks[digest] = PackChunk(digest, len(data), 0, len(packed), codec)
        entries.append(PackFile(path, len(data), digest, (len(entries),)))
        stored.append(packed)
    for number, (path, data) in enumerate(sorted(files.items())):
        base = (bases or {}).get(path, data)
        found = difference_smallest(data, base) if base != data else None
        if found is not None and len(found[1]) < 0.9 * len(stored[number]):
            codec, packed = found
            base_sha256 = hashlib.sha256(base).digest()
            differences.append(PackDifference(number, base_sha256, len(base), 0, len(packed), codec))
            stored.append(packed)
    return packed_up(PackIndex(tuple(entries), tuple(chunks.values()), tuple(differences)), b"".join(stored), files)


def packed_up(index: PackIndex, stored: bytes, files: Mapping[str, bytes]) -> Pack:
    """The index, its hash, and the bytes."""
    head = encode_index(index)
    data = head + stored
    content_id = hashlib.sha256(head).hexdigest()
    ref = PackRef(pack_path(content_id), len(data), len(head), content_id)
    return Pack(data, ref, parse_index(head, pack_bytes=len(data)), files)


@pytest.fixture(scope="module")
def old_files() -> dict[str, bytes]:
    chance = random.Random(1)
    text = b"".join(b"%d " % chance.randrange(1000) for _ in range(50_000))
    return {name(number): chance.randbytes(CHUNK_BYTES) for number in range(20)} | {"bundle/text": text}


def name(number: int) -> str:
    return f"bundle/w{number:02}"


@pytest.fixture(scope="module")
def pack(old_files: dict[str, bytes]) -> Pack:
    """About 0.7 MiB. Against `old_files`, three chunks are new, and two differ by little."""
    chance = random.Random(2)
    files = dict(old_files)
    for number in (3, 4, 11):
        files[name(number)] = chance.randbytes(CHUNK_BYTES)
    for number in (6, 15):
        files[name(number)] = bytes(value ^ (place % 500 == 0) for place, value in enumerate(files[name(number)]))
    return make_pack(files, old_files)


@pytest.fixture(scope="module")
def running() -> Iterator[HostileServer]:
    with hostile_server() as server:
        yield server


@pytest.fixture
def server(running: HostileServer, pack: Pack) -> HostileServer:
    running.reset({pack.ref.path: pack.data})
    return running


@pytest.fixture
def slot(tmp_path: Path, old_files: dict[str, bytes]) -> Path:
    """A slot with the old content."""
    return write_files(tmp_path / "slot", old_files)


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between failures without progress add up to a minute."""
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.0)


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def fetch(
    server: HostileServer, pack: Pack, tmp_path: Path, *slots: Path, deadline_s: float = DEADLINE_S
) -> FetchedContent:
    """Over HTTP into `tmp_path/incoming`, with everything checked that a good end promises."""
    transport = open_transport(server.url, timeout_s=PATIENT_S)
    return checked(transport, pack, tmp_path, *slots, deadline_s=deadline_s)


def checked(
    transport: Transport, pack: Pack, tmp_path: Path, *slots: Path, deadline_s: float = DEADLINE_S
) -> FetchedContent:
    source = ChunkSource(slots)
    fetched = fetch_content(transport, pack.ref, source, tmp_path / "incoming", deadline_s=deadline_s)
    assert contents(fetched, source) == pack.files
    return fetched


def contents(fetched: FetchedContent, source: ChunkSource) -> dict[str, bytes]:
    chunk = open_chunks(fetched, source)
    return {file.path: b"".join(map(chunk, file.chunks)) for file in fetched.index.files}


def part_of(pack: Pack, tmp_path: Path) -> Path:
    return tmp_path / "incoming" / f"{pack.ref.index_sha256}.part"


def asked_bytes(server: HostileServer) -> int:
    return sum((end or 0) - start for start, end in filter(None, server.ranges))


# What is fetched


def test_a_device_that_has_nothing_fetches_everything(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    fetched = fetch(server, pack, tmp_path)
    differences_bytes = sum(item.stored_bytes for item in pack.index.differences)
    assert fetched.fetched_bytes == len(pack.data) - differences_bytes == asked_bytes(server)
    assert fetched.reused_bytes == 0
    assert fetched.index == pack.index
    assert len(server.requests) == 2


def test_what_the_device_has_is_not_fetched(server: HostileServer, pack: Pack, slot: Path, tmp_path: Path) -> None:
    plan = fetch_plan(pack.index, ChunkSource([slot]).__contains__)
    fetched = fetch(server, pack, tmp_path, slot)
    assert fetched.fetched_bytes == pack.ref.index_bytes + plan.bytes < 0.3 * len(pack.data)
    assert server.ranges == [(0, pack.ref.index_bytes), *plan.ranges]
    assert len([item for item in plan.chunks if item.base_sha256 is not None]) == 2
    assert fetched.reused_bytes == sum(map(len, pack.files.values())) - 5 * CHUNK_BYTES


def test_a_device_that_has_everything_fetches_the_index(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    fetched = fetch(server, pack, tmp_path, write_files(tmp_path / "slot", pack.files))
    assert fetched.fetched_bytes == pack.ref.index_bytes == asked_bytes(server)


def test_a_second_call_fetches_nothing(server: HostileServer, pack: Pack, slot: Path, tmp_path: Path) -> None:
    fetch(server, pack, tmp_path, slot)
    server.reset({})
    assert fetch(server, pack, tmp_path, slot).fetched_bytes == 0
    assert server.requests == []


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_stick_serves_as_well_as_a_server(form: str, pack: Pack, slot: Path, tmp_path: Path) -> None:
    stick = write_files(tmp_path / "stick", {pack.ref.path: pack.data})
    transport = open_transport(form.format(stick), timeout_s=1)
    plan = fetch_plan(pack.index, ChunkSource([slot]).__contains__)
    assert checked(transport, pack, tmp_path, slot).fetched_bytes == pack.ref.index_bytes + plan.bytes


def test_the_server_of_pythons_own_library_will_do(pack: Pack, slot: Path, tmp_path: Path) -> None:
    """It speaks HTTP/1.0 and knows no ranges."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    folder = write_files(tmp_path / "repository", {pack.ref.path: pack.data})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder))) as plain:
        thread = threading.Thread(target=plain.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            transport = open_transport(f"http://127.0.0.1:{plain.server_port}", timeout_s=PATIENT_S)
            fetched = checked(transport, pack, tmp_path, slot)
        finally:
            plain.shutdown()
            thread.join()
    assert not transport.has_ranges
    assert fetched.reused_bytes > 0


def test_the_pack_of_a_real_bundle_arrives(tmp_path: Path, server: HostileServer) -> None:
    write_bundle(tmp_path / "slot/bundle", BASE, step_id="a" * 64)
    write_bundle(tmp_path / "new", GROWN, step_id="b" * 64, parent_id="a" * 64)
    facts = write_pack(tmp_path / "pack", tmp_path / "new", bases=[tmp_path / "slot/bundle"])
    data = (tmp_path / "pack").read_bytes()
    ref = PackRef(pack_path(facts.content_id), facts.pack_bytes, facts.index_bytes, facts.content_id)
    new = sorted(path for path in (tmp_path / "new").rglob("*") if path.is_file())
    files = {f"bundle/{path.relative_to(tmp_path / 'new')}": path.read_bytes() for path in new}
    server.reset({ref.path: data})
    fetched = fetch(server, Pack(data, ref, facts.index, files), tmp_path, tmp_path / "slot")
    assert fetched.fetched_bytes <= facts.pack_bytes


def test_the_part_takes_no_more_room_than_what_was_fetched(
    server: HostileServer, pack: Pack, slot: Path, tmp_path: Path
) -> None:
    fetched = fetch(server, pack, tmp_path, slot)
    blocks_bytes = fetched.part.stat().st_blocks * 512
    assert blocks_bytes <= fetched.fetched_bytes + 16 * 4096 < len(pack.data)


def test_how_far_it_is_is_told(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    told: list[float] = []
    transport = open_transport(server.url, timeout_s=PATIENT_S)
    fetch_content(
        transport,
        pack.ref,
        ChunkSource([]),
        tmp_path / "incoming",
        deadline_s=DEADLINE_S,
        progress=lambda _, share: told.append(share),
    )
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(told) > 10


# Cuts (rule 3)


@pytest.mark.parametrize(("cut_bytes", "repeat"), [(1_000_000, 5), (100_000, 3), (10_000, 1)])
@pytest.mark.parametrize("reset", [False, True], ids=["ended", "reset"])
def test_a_connection_that_is_cut_again_and_again_brings_every_byte_once(
    cut_bytes: int, repeat: int, reset: bool, server: HostileServer, tmp_path: Path
) -> None:
    chance = random.Random(repeat)
    files = {name(number): chance.randbytes(8 * CHUNK_BYTES) for number in range(3 * repeat)}
    large = make_pack(files, best=False)
    server.reset({large.ref.path: large.data})
    server.always = cut_after(cut_bytes, reset=reset)
    fetched = fetch(server, large, tmp_path)
    if not reset:  # a reset may take bytes with it that were on their way
        assert fetched.fetched_bytes == len(large.data)
    starts = [item[0] for item in server.ranges if item]
    assert starts == sorted(starts)
    assert len(server.requests) >= len(large.data) // cut_bytes


def test_an_index_that_is_cut_goes_on_where_it_was_cut(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    server.faults.extend([cut_after(100), hang_up, cut_after(300)])
    fetch(server, pack, tmp_path)
    assert [item[0] for item in server.ranges[:4] if item] == [0, 100, 100, 400]


@pytest.mark.usefixtures("no_waits")
def test_a_server_without_ranges_that_is_cut_is_given_up(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    def fault(exchange: object) -> None:
        exchange.head(200, [("Content-Length", len(pack.data))])  # type: ignore[attr-defined]
        exchange.write(pack.data[:100_000])  # type: ignore[attr-defined]
        hang_up(exchange)  # type: ignore[arg-type]

    server.always = fault
    with pytest.raises(TransportError) as raised:
        fetch(server, pack, tmp_path)
    assert raised.value.is_transient
    assert part_of(pack, tmp_path).stat().st_size > 60_000


PASSING: dict[str, Fault] = {
    "hung up": hang_up,
    "cut in the head": raw(b"HTTP/1.1 206 Partial Content\r\nContent-Ra"),
    "500": status(500),
    "503 with a time": status(503, ("Retry-After", "0")),
    "503 with a date": status(
        503, ("Retry-After", "Fri, 30 Jan 2026 12:00:00 GMT"), ("Date", "Fri, 30 Jan 2026 12:00:00 GMT")
    ),
    "429": status(429, ("Retry-After", "0")),
    "cut at once": cut_after(0),
    "reset": cut_after(5000, reset=True),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_waited_for(name: str, server: HostileServer, pack: Pack, slot: Path, tmp_path: Path) -> None:
    server.faults.extend([PASSING[name], None, PASSING[name], PASSING[name], None, PASSING[name]])
    fetch(server, pack, tmp_path, slot)


FINAL: dict[str, tuple[Fault, str]] = {
    "404": (status(404), "not in the repository"),
    "403": (status(403), "refuses"),
    "a lying Content-Range": (headers(Content_Range="bytes 7-99/*"), "another part"),
    "a Content-Length too long": (headers(Content_Length=10**9), "contradicts itself"),
    "a Content-Length too short": (headers(Content_Length=3), "contradicts itself"),
    "compressed": (headers(Content_Encoding="gzip"), "compresses"),
    "in a circle": (redirect("/x"), "circle"),
    "to another scheme": (redirect("file:///etc/passwd"), "another kind"),
    "told to come back tomorrow": (status(503, ("Retry-After", "86400")), "does not give"),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_does_not_pass_ends_it_and_the_part_stays(
    name: str, server: HostileServer, pack: Pack, tmp_path: Path
) -> None:
    fault, what = FINAL[name]
    server.faults.extend([None, cut_after(20_000)])
    server.always = fault
    with pytest.raises(TransportError) as raised:
        fetch(server, pack, tmp_path)
    assert what in raised.value.what
    assert part_of(pack, tmp_path).read_bytes().endswith(pack.data[pack.ref.index_bytes :][:20_000])
    server.always = None
    fetch(server, pack, tmp_path)


@pytest.mark.usefixtures("no_waits")
def test_a_server_that_stays_away_is_given_up(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    server.always = status(500)
    with pytest.raises(TransportError) as raised:
        fetch(server, pack, tmp_path)
    assert raised.value.is_transient
    assert len(server.requests) == tries.MAX_TRIES


def test_a_drip_ends_at_the_deadline(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    server.faults.append(None)
    server.always = drips_the_body(0.01)
    with pytest.raises(TransportError, match="too slowly") as raised:
        fetch(server, pack, tmp_path, deadline_s=0.5)
    assert "goes on where it stopped" in str(raised.value.hint)
    assert part_of(pack, tmp_path).stat().st_size > pack.ref.index_bytes


def test_a_body_without_end_brings_the_right_bytes(
    server: HostileServer, pack: Pack, slot: Path, tmp_path: Path
) -> None:
    server.always = endless
    assert fetch(server, pack, tmp_path, slot).fetched_bytes < len(pack.data)


def test_a_server_that_ignores_ranges_is_read_through_once(
    server: HostileServer, pack: Pack, slot: Path, tmp_path: Path
) -> None:
    server.always = ignores_range
    plan = fetch_plan(pack.index, ChunkSource([slot]).__contains__)
    assert len(plan.ranges) > 2
    fetched = fetch(server, pack, tmp_path, slot)
    assert len(server.requests) == 2
    assert fetched.part.stat().st_blocks * 512 <= plan.bytes + 2 * 4096 * len(plan.ranges)


# Starts after a power cut (rule 2)


def stop_after(count: int, server: HostileServer, pack: Pack, tmp_path: Path, *slots: Path) -> None:
    """A first start that ends after `count` bytes of chunks."""
    server.faults.extend([None, cut_after(count), status(404)])
    with pytest.raises(TransportError):
        fetch(server, pack, tmp_path, *slots)
    server.requests.clear()


@pytest.mark.parametrize("count", [1, 10_000, 100_000, 200_000, 700_000])
def test_a_start_after_another_fetches_the_rest(count: int, server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    stop_after(count, server, pack, tmp_path)
    fetched = fetch(server, pack, tmp_path)
    whole = sum(item.stored_bytes for item in pack.index.chunks)
    largest = max(item.stored_bytes for item in pack.index.chunks)
    assert whole - count <= fetched.fetched_bytes < whole - count + largest
    assert server.ranges[0] != (0, pack.ref.index_bytes)


TEARS = {
    "zeros": lambda data, at: data[:at] + bytes(len(data) - at),
    "old bytes": lambda data, at: data[:at] + b"\xff" * (len(data) - at),
    "cut short": lambda data, at: data[:at],
    "one bit": lambda data, at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
    "grown": lambda data, at: data[:at] + bytes(len(data) - at) + bytes(1_000_000),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_tail_is_fetched_again_and_that_alone(
    tear: str, server: HostileServer, pack: Pack, tmp_path: Path
) -> None:
    fetch(server, pack, tmp_path)
    server.requests.clear()
    part = part_of(pack, tmp_path)
    chunks = pack.index.chunks
    torn = chunks[-3]
    part.write_bytes(TEARS[tear](part.read_bytes(), torn.offset + 100))
    end = torn.offset + torn.stored_bytes if tear == "one bit" else chunks[-1].offset + chunks[-1].stored_bytes
    assert fetch(server, pack, tmp_path).fetched_bytes == end - torn.offset
    assert server.ranges == [(torn.offset, end)]
    assert part.stat().st_size <= len(pack.data)


@pytest.mark.parametrize("tear", [*TEARS, "emptied"])
def test_a_damaged_index_is_fetched_again(tear: str, server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    fetch(server, pack, tmp_path)
    server.requests.clear()
    index = part_of(pack, tmp_path).with_suffix(".index")
    index.write_bytes(b"" if tear == "emptied" else TEARS[tear](index.read_bytes(), 500))
    assert fetch(server, pack, tmp_path).fetched_bytes == pack.ref.index_bytes
    assert server.ranges == [(0, pack.ref.index_bytes)]
    assert index.read_bytes() == pack.data[: pack.ref.index_bytes]


def test_a_chunk_that_came_whole_is_not_fetched_as_a_difference(
    server: HostileServer, pack: Pack, slot: Path, tmp_path: Path
) -> None:
    fetch(server, pack, tmp_path)
    assert fetch(server, pack, tmp_path, slot).fetched_bytes == 0


def test_a_link_in_the_place_of_the_part_is_not_written_through(
    server: HostileServer, pack: Pack, tmp_path: Path
) -> None:
    (tmp_path / "incoming").mkdir()
    (tmp_path / "victim").write_bytes(b"mine")
    part_of(pack, tmp_path).symlink_to(tmp_path / "victim")
    with pytest.raises(UpdateError, match="cannot be written"):
        fetch(server, pack, tmp_path)
    assert (tmp_path / "victim").read_bytes() == b"mine"


FETCH = """
    import sys
    from pathlib import Path
    import msgspec
    from edge_ilseg.chunks import ChunkSource
    from edge_ilseg.devices.update.fetching import fetch_content, open_chunks
    from edge_ilseg.devices.update.release import PackRef
    from edge_ilseg.devices.update.transport import open_transport
    from edge_ilseg.errors import UpdateError

    repository, ref, incoming = sys.argv[1], msgspec.json.decode(sys.argv[2], type=PackRef), Path(sys.argv[3])

    def peak_kib():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    def fetch(progress=lambda text, share: None):
        transport = open_transport(repository, timeout_s=30)
        return fetch_content(transport, ref, ChunkSource([]), incoming, deadline_s=300, progress=progress)
"""


def in_a_child(
    program: str, server_url: str, pack: Pack, incoming: Path, *before: str
) -> subprocess.CompletedProcess[str]:
    """Run a program that goes on from `FETCH`, behind the commands of `before`."""
    text = textwrap.dedent(FETCH) + textwrap.dedent(program)
    arguments = [server_url, msgspec.json.encode(pack.ref).decode(), str(incoming)]
    command = [*before, sys.executable, "-W", "error", "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)


def test_a_killed_process_leaves_a_part_that_the_next_start_goes_on_with(
    server: HostileServer, pack: Pack, tmp_path: Path
) -> None:
    program = """
    import os, signal
    fetch(lambda text, share: os.kill(os.getpid(), signal.SIGKILL) if share > 0.5 else None)
    """
    done = in_a_child(program, server.url, pack, tmp_path / "incoming")
    assert done.returncode == -signal.SIGKILL, done.stderr
    fetched = fetch(server, pack, tmp_path)
    assert 0 < fetched.fetched_bytes < 0.6 * len(pack.data)


# Other bytes than were signed (rules 1 and 4)


def test_one_wrong_chunk_is_fetched_again_and_that_alone(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    chunk = pack.index.chunks[5]
    server.faults.extend([None, flips(chunk.offset + 10)])
    fetch(server, pack, tmp_path)
    assert server.ranges[2][0] == chunk.offset  # type: ignore[index]
    assert len(server.requests) == 3


def test_a_chunk_that_is_always_wrong_ends_it_and_the_part_stays(
    server: HostileServer, pack: Pack, tmp_path: Path
) -> None:
    chunk = pack.index.chunks[5]
    server.always = flips(chunk.offset + 10)
    with pytest.raises(UpdateError, match="other bytes than were signed") as raised:
        fetch(server, pack, tmp_path)
    assert not isinstance(raised.value, TransportError)
    assert raised.value.where == pack.ref.path
    assert len(server.requests) == 3
    assert part_of(pack, tmp_path).read_bytes()[: chunk.offset].endswith(pack.data[pack.ref.index_bytes : chunk.offset])
    server.always = None
    fetch(server, pack, tmp_path)


def test_a_wrong_index_is_fetched_again_once(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    server.faults.append(flips(50))
    assert fetch(server, pack, tmp_path).fetched_bytes > pack.ref.index_bytes
    server.requests.clear()
    server.always = flips(50)
    with pytest.raises(UpdateError, match="other bytes than were signed"):
        fetch(server, pack, tmp_path / "again")
    assert len(server.requests) == 2
    assert not part_of(pack, tmp_path / "again").exists()


@pytest.mark.parametrize("codec", [0, 1, 2, 3])
def test_a_pack_in_which_every_byte_is_another_ends_in_an_error(
    codec: int, server: HostileServer, tmp_path: Path
) -> None:
    """Whatever a decompressor is fed with."""
    chance = random.Random(codec)
    good = make_pack({"bundle/x": b"".join(b"%d " % chance.randrange(10) for _ in range(30_000))})
    length = good.index.chunks[0].length
    changed = msgspec.structs.replace(good.index.chunks[0], codec=codec, stored_bytes=length - (codec != RAW))
    index = msgspec.structs.replace(good.index, chunks=(changed,))
    bad = packed_up(index, chance.randbytes(changed.stored_bytes), {})
    server.reset({bad.ref.path: bad.data})
    with pytest.raises(UpdateError, match="other bytes than were signed"):
        fetch(server, bad, tmp_path)


def test_a_pack_without_the_promised_bytes_is_refused(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    server.files[pack.ref.path] = pack.data[:-40_000]
    with pytest.raises(TransportError, match="shorter"):
        fetch(server, pack, tmp_path / "http")
    stick = write_files(
        tmp_path / "stick",
        {pack.ref.path: pack.data[: -sum(item.stored_bytes for item in pack.index.differences) - 40_000]},
    )
    with pytest.raises(TransportError, match="shorter"):
        checked(FolderTransport(stick), pack, tmp_path)


# The device's own chunks (rule 5)


def rot(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:5] + bytes([data[5] ^ 1]) + data[6:])


def test_what_has_rotted_is_fetched(server: HostileServer, pack: Pack, slot: Path, tmp_path: Path) -> None:
    """Rot in a chunk that is reused, and in the base of a difference, after the slot was looked through."""
    source = ChunkSource([slot])
    for number in (1, 6):
        rot(slot / name(number))
    transport = open_transport(server.url, timeout_s=PATIENT_S)
    fetched = fetch_content(transport, pack.ref, source, tmp_path / "incoming", deadline_s=DEADLINE_S)
    assert contents(fetched, source) == pack.files
    assert fetched.fetched_bytes > pack.ref.index_bytes + 5 * CHUNK_BYTES


def test_a_base_that_rots_while_its_difference_arrives_is_done_without(
    server: HostileServer, pack: Pack, slot: Path, tmp_path: Path
) -> None:
    source = ChunkSource([slot])
    sound = [slot / name(6), slot / name(15)]

    def rot_one(*_: object) -> None:
        if sound:
            rot(sound.pop())

    transport = open_transport(server.url, timeout_s=PATIENT_S)
    fetched = fetch_content(transport, pack.ref, source, tmp_path / "incoming", deadline_s=DEADLINE_S, progress=rot_one)
    assert contents(fetched, source) == pack.files


def test_a_chunk_that_is_lost_after_it_was_fetched_is_named(
    server: HostileServer, pack: Pack, slot: Path, tmp_path: Path
) -> None:
    source = ChunkSource([slot])
    transport = open_transport(server.url, timeout_s=PATIENT_S)
    fetched = fetch_content(transport, pack.ref, source, tmp_path / "incoming", deadline_s=DEADLINE_S)
    rot(slot / name(1))
    with pytest.raises(UpdateError, match="lost or damaged") as raised:
        contents(fetched, source)
    assert raised.value.hint == "fetch the release again"
    fetched.part.unlink()
    with pytest.raises(UpdateError, match="lost or damaged"):
        contents(fetched, source)
    assert contents(fetch_content(transport, pack.ref, source, tmp_path / "incoming", deadline_s=DEADLINE_S), source)


# The disk (rule 6)


def test_a_stick_that_is_pulled_out_ends_it_and_put_back_goes_on(pack: Pack, tmp_path: Path) -> None:
    stick = write_files(tmp_path / "stick", {pack.ref.path: pack.data})
    transport = FolderTransport(stick)
    source = ChunkSource([write_files(tmp_path / "slot", {"a": pack.files[name(9)]})])

    def pull_out(*_: object) -> None:
        if stick.exists():
            stick.rename(tmp_path / "pocket")

    with pytest.raises(TransportError, match="folder of the repository is not there") as raised:
        fetch_content(transport, pack.ref, source, tmp_path / "incoming", deadline_s=60, progress=pull_out)
    assert "plug it in" in str(raised.value.hint)
    (tmp_path / "pocket").rename(stick)
    fetched = fetch_content(transport, pack.ref, source, tmp_path / "incoming", deadline_s=60)
    assert contents(fetched, source) == pack.files
    assert fetched.fetched_bytes < sum(item.stored_bytes for item in pack.index.chunks)


def test_a_pack_that_is_a_link_out_of_the_stick_is_refused(pack: Pack, tmp_path: Path) -> None:
    write_files(tmp_path, {"elsewhere": pack.data})
    stick = write_files(tmp_path / "stick", {"packs/x": b""})
    (stick / pack.ref.path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TransportError, match="leads out"):
        checked(FolderTransport(stick), pack, tmp_path)


def test_a_disk_without_room_is_found_before_a_chunk_is_fetched(
    server: HostileServer, pack: Pack, tmp_path: Path
) -> None:
    program = """
    try:
        fetch()
    except UpdateError as error:
        print(error)
    """
    done = on_a_small_disk(program, "1m", server, pack, tmp_path)
    assert "the disk has no room for the update" in done.stdout, done.stderr
    assert "run the same command again" in done.stdout
    assert server.ranges == [(0, pack.ref.index_bytes)]


def test_a_disk_that_fills_up_ends_it_and_the_part_stays(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    program = """
    import os
    def fill(text, share):
        free = os.statvfs(incoming).f_bavail * 4096 - 150_000
        if free > 0:
            (incoming / "filler").write_bytes(bytes(free))
    try:
        fetch(fill)
    except UpdateError as error:
        print(error)
    (part,) = incoming.glob("*.part")
    kept = part.stat().st_size
    (incoming / "filler").unlink()
    print("kept", kept, "then fetched", fetch().fetched_bytes)
    """
    done = on_a_small_disk(program, "4m", server, pack, tmp_path)
    assert "the disk is full" in done.stdout, done.stderr
    kept, fetched = (int(text) for text in done.stdout.split("kept ")[-1].split(" then fetched "))
    assert 100_000 < kept < len(pack.data)
    assert fetched < len(pack.data) - 100_000


def on_a_small_disk(
    program: str, size: str, server: HostileServer, pack: Pack, tmp_path: Path
) -> subprocess.CompletedProcess[str]:
    """Run a program whose `incoming` is on a disk of its own; skips the test where this user may mount none."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs {disk} && exec "$@"'
    front = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    try:
        possible = subprocess.run([*front, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("a small disk needs a mount in a user namespace, which this system does not allow")
    done = in_a_child(program, server.url, pack, disk, *front)
    assert done.returncode == 0, done.stderr
    return done


def test_a_limit_on_the_size_of_files_is_a_full_disk(server: HostileServer, pack: Pack, tmp_path: Path) -> None:
    program = """
    import resource
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        fetch()
    except UpdateError as error:
        print(error)
    (part,) = incoming.glob("*.part")
    assert part.stat().st_size == 300_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print("then fetched", fetch().fetched_bytes)
    """
    done = in_a_child(program, server.url, pack, tmp_path / "incoming")
    assert done.stdout.startswith("the disk is full"), done.stderr
    assert int(done.stdout.split("then fetched")[-1]) < len(pack.data) - 300_000 + CHUNK_BYTES


def test_where_a_sync_fails_the_part_is_not_believed(
    server: HostileServer, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells a lost write once, and goes on to show the bytes from memory."""
    (tmp_path / "incoming").mkdir()
    real = os.fsync

    def broken(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".part"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UpdateError, match="has lost what was written"):
        fetch(server, pack, tmp_path)
    assert not part_of(pack, tmp_path).exists()
    monkeypatch.undo()
    fetch(server, pack, tmp_path)


def test_the_part_is_synced_about_every_mebibyte(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = make_pack({name(number): random.Random(number).randbytes(MIB // 8) for number in range(40)}, best=False)
    server.reset({large.ref.path: large.data})
    synced: list[int] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    fetch(server, large, tmp_path)
    sizes = [size for size in synced if size > MIB]
    assert len(sizes) >= 5
    assert all(second - first <= MIB + 2 * 65_536 + MIB // 8 for first, second in itertools.pairwise(sizes))
    assert sizes[-1] == len(large.data)


# What it needs of the device (rule 7)


def test_zstd_that_is_missing_is_named_before_a_chunk_is_fetched(server: HostileServer, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"a" * 1000).digest()
    index = PackIndex((PackFile("bundle/a", 1000, digest, (0,)),), (PackChunk(digest, 1000, 0, 99, ZSTD),), ())
    packed = packed_up(index, bytes(99), {})
    server.reset({packed.ref.path: packed.data})
    program = """
    sys.modules["backports.zstd"] = sys.modules["compression.zstd"] = None
    try:
        fetch()
    except UpdateError as error:
        print(error)
    """
    done = in_a_child(program, server.url, packed, tmp_path / "incoming")
    assert "edge-ilseg[update]" in done.stdout, done.stderr
    assert server.ranges == [(0, packed.ref.index_bytes)]


@pytest.mark.slow
def test_a_large_pack_is_fetched_in_little_memory_and_without_numpy(server: HostileServer, tmp_path: Path) -> None:
    chance = random.Random(4)
    files = {name(number): chance.randbytes(8 * CHUNK_BYTES) for number in range(80)}
    files |= {f"bundle/t{number}": b"%d, " % number * 50_000 for number in range(20)}
    large = make_pack(files, best=False)
    assert len(large.data) > 20_000_000
    server.reset({large.ref.path: large.data})
    program = """
    before = peak_kib()
    fetched = fetch()
    chunk = open_chunks(fetched, ChunkSource([]))
    for number in range(len(fetched.index.chunks)):
        chunk(number)
    print(before, peak_kib(), "numpy" in sys.modules, "tuf" in sys.modules)
    """
    done = in_a_child(program, server.url, large, tmp_path / "incoming")
    assert done.returncode == 0, done.stderr
    before, after, has_numpy, has_tuf = done.stdout.split()
    assert (int(after) - int(before)) / 1024 < 16  # measured: 7 over HTTP, most of it urllib3; the pack has 20
    assert (has_numpy, has_tuf) == ("False", "False")


# Whatever happens

ANY_FAULT: list[Fault | None] = [
    None,
    *PASSING.values(),
    *(fault for fault, _ in FINAL.values()),
    ignores_range,
    endless,
    cut_after(30_000),
    cut_after(70_000),
    flips(2_000),
    flips(100_000),
    flips(400_000),
]


@pytest.mark.slow
@pytest.mark.usefixtures("no_waits")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(st.sampled_from(ANY_FAULT), max_size=12), has_slot=st.booleans())
def test_any_faults_end_in_the_right_bytes_or_a_clear_error_and_the_next_start_goes_on(
    script: list[Fault | None],
    has_slot: bool,
    server: HostileServer,
    pack: Pack,
    slot: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("device")
    slots = [slot] if has_slot else []
    server.reset({pack.ref.path: pack.data})
    server.faults.extend(script)
    while server.faults:
        with suppress(UpdateError):  # nothing else may come out, and `fetch` has checked the bytes where it ends well
            fetch(server, pack, folder, *slots)
            break
    server.faults.clear()
    fetch(server, pack, folder, *slots)
