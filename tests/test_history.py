"""The history and the outbox of a device; numbers are the rules of `update/history.py`."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edge_ilseg.devices.update import history as module
from edge_ilseg.devices.update.history import SET_ASIDE, History, HistoryEvent, clean_text
from edge_ilseg.errors import UpdateError

ROOT = Path(__file__).parents[1]
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
NOW_S = int(NOW.timestamp())


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite"


def number(sequence: int) -> bytes:
    return b"report %d" % sequence


def filled(path: Path, clock: Clock, events: int = 200) -> None:
    """A history with something on many pages, and its log emptied into the file."""
    with History(path, now=clock) as history:
        history.queue(number)
    rows = [(count, "x" * 500) for count in range(events)]
    with closing(sqlite3.connect(path)) as connection:  # in one transaction: faster than one sync for each
        connection.executemany("INSERT INTO events VALUES (NULL, '', 'checked', ?, NULL, NULL, ?, '{}')", rows)
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def set_aside(path: Path) -> list[Path]:
    return sorted(item for item in path.parent.glob("*.damaged-*") if not item.name.endswith(("-wal", "-shm")))


# Events


def test_what_is_recorded_is_read_as_it_was_the_newest_first(path: Path, clock: Clock) -> None:
    numbers = {"old_miou_drop_pct": -0.25, "interval": [-1.0, 0.5], "images": 41, "measured": True, "note": None}
    with History(path, now=clock) as history:
        history.record("checked")
        clock.now += timedelta(milliseconds=1500)
        history.record(
            "gate refused", release=7, content_id="c" * 64, verdict="failed", reason="forgot 'boat'", numbers=numbers
        )
    with History(path, now=clock) as history:
        assert history.events() == (
            HistoryEvent(
                "2026-01-31T12:00:01.500+00:00", "gate refused", 7, "c" * 64, "failed", "forgot 'boat'", numbers
            ),
            HistoryEvent("2026-01-31T12:00:00.000+00:00", "checked"),
        )
        assert [event.kind for event in history.events(1)] == ["gate refused"]
        assert [event.kind for event in history.events(kind="checked")] == ["checked"]


def test_a_reason_of_any_bytes_is_one_plain_line(path: Path, clock: Clock) -> None:
    with History(path, now=clock) as history:
        history.record("failed", reason="a\nb\x1b[31m\udcff\u202e\0c" + "x" * 5000)
        (event,) = history.events()
    assert event.reason is not None
    assert event.reason.startswith("a b [31m   cx")
    assert len(event.reason) == module.MAX_REASON


@pytest.mark.parametrize(("text", "most", "plain"), [("", 5, ""), ("abcde", 5, "abcde"), ("abcdef", 5, "abcd…")])
def test_a_text_is_cut_where_it_is_too_long(text: str, most: int, plain: str) -> None:
    assert clean_text(text, most) == plain


def test_old_events_make_room(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EVENTS", 20)
    with History(path, now=clock) as history:
        for count in range(50):
            history.record("checked", release=count)
        assert [event.release for event in history.events(1000)] == list(range(49, 29, -1))


def test_the_room_of_old_events_is_used_again(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EVENTS", 20)
    sizes = []
    with History(path, now=clock) as history:
        for count in range(300):
            history.record("checked", reason="x" * 1900)
            if count in (30, 299):
                history._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                sizes.append(sum(item.stat().st_size for item in path.parent.iterdir()))
    assert sizes[1] <= sizes[0] + 8 * 4096


# Durability (rule 2)


def test_writes_are_synced_in_full(path: Path) -> None:
    with History(path) as history:
        connection = history._connection
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_every_write_is_synced_before_it_returns(path: Path) -> None:
    """Seen from the kernel: without FULL, SQLite syncs a write-ahead log now and then alone."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    program = """
    import os, sys
    from pathlib import Path
    from edge_ilseg.devices.update.history import History
    with History(Path(sys.argv[1])) as history:
        os.write(2, b"begin\\n")
        for count in range(5):
            history.record("checked")
        os.write(2, b"end\\n")
        os._exit(0)
    """
    command = ["strace", "-f", "-e", "trace=fsync,fdatasync,write", "-o", path.with_name("trace")]
    done = subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(program), path],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("this system does not allow ptrace")
    trace = path.with_name("trace").read_text()
    between = trace.split("begin")[1].split('"end')[0]
    assert between.count("sync(") >= 5


def test_what_a_killed_process_wrote_is_there(path: Path) -> None:
    program = """
    import os, signal, sys
    from pathlib import Path
    from edge_ilseg.devices.update.history import History
    history = History(Path(sys.argv[1]))
    history.record("activated", release=3)
    history.queue(lambda sequence: b"report")
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), path], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    with History(path) as history:
        assert [event.kind for event in history.events()] == ["activated"]
        assert history.count_waiting() == 1


def test_two_processes_may_write_at_once(path: Path) -> None:
    program = """
    import sys
    from pathlib import Path
    from edge_ilseg.devices.update.history import History
    for count in range(40):
        with History(Path(sys.argv[1])) as history:
            history.record("checked")
            history.queue(lambda sequence: b"report")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    for writer in writers:
        _, problems = writer.communicate(timeout=120)
        assert writer.returncode == 0, problems
    with History(path) as history:
        assert len(history.events(1000)) == history.count_waiting() == 80


# A file that cannot be used (rule 1)


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("not a database, but long enough to be taken for one" * 100),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a torn head": lambda path: overwrite(path, 0, bytes(512)),
    "a torn page of the tables": lambda path: overwrite(path, 100, b"\xff" * 2000),
    "torn pages": lambda path: overwrite(path, 8192, b"\xff" * 16384),
    "a torn page of old events": lambda path: overwrite(path, 40_960, b"\xff" * 4096),
    "zeroed pages": lambda path: overwrite(path, 8192, bytes(16384)),
    "cut in the middle": lambda path: os.truncate(path, path.stat().st_size // 2 // 4096 * 4096 + 100),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_history_is_set_aside_and_begun_anew(name: str, path: Path, clock: Clock) -> None:
    filled(path, clock)
    DAMAGES[name](path)
    damaged = path.read_bytes()
    clock.now += timedelta(days=1)
    with History(path, now=clock) as history:
        assert len(set_aside(path)) == 1  # found when it is opened, and not in the middle of an update
        (event,) = history.events()
        assert event.kind == SET_ASIDE
        assert "history.sqlite.damaged-20260201T120000Z" in str(event.reason)
        history.record("checked")
        assert history.queue(number) > NOW_S
    (aside,) = set_aside(path)
    assert aside.name == "history.sqlite.damaged-20260201T120000Z"
    assert aside.read_bytes() == damaged
    with History(path, now=clock) as history:
        assert [item.kind for item in history.events()] == ["checked", SET_ASIDE]


def test_an_empty_file_is_a_history_that_was_not_begun(path: Path) -> None:
    path.write_bytes(b"")
    with History(path) as history:
        assert history.events() == ()
    assert set_aside(path) == []


@pytest.mark.parametrize(
    "statements",
    [
        "PRAGMA user_version = 2",
        "PRAGMA user_version = 0",
        "DROP TABLE outbox",
        "ALTER TABLE events ADD COLUMN more TEXT",
        "CREATE TABLE other (x)",
        "DELETE FROM delivery",
    ],
)
def test_a_history_of_another_version_or_shape_is_set_aside(statements: str, path: Path, clock: Clock) -> None:
    filled(path, clock, events=2)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(statements)
    with History(path, now=clock) as history:
        assert [event.kind for event in history.events()] == [SET_ASIDE]
        assert history.delivery_state() == (0, 0.0)
    assert len(set_aside(path)) == 1


def test_damage_that_is_met_later_stops_nothing(path: Path, clock: Clock) -> None:
    History(path, now=clock).close()
    with closing(sqlite3.connect(path)) as connection:  # more than SQLite keeps in memory
        rows = [("x" * 3000,)] * 1500
        connection.executemany("INSERT INTO events VALUES (NULL, '', 'checked', 1, NULL, NULL, ?, '{}')", rows)
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with History(path, now=clock) as history:
        overwrite(path, 4096, b"\xff" * (path.stat().st_size - 4096))
        assert history.events(5000)[-1].kind == SET_ASIDE
        history.record("activated", release=9)
        assert [event.kind for event in history.events()] == ["activated", SET_ASIDE]
    with History(path, now=clock) as history:
        assert [event.kind for event in history.events()] == ["activated", SET_ASIDE]


@pytest.mark.parametrize(
    ("statement", "use"),
    [
        ("UPDATE events SET numbers = '{'", lambda history: history.events()),
        ("UPDATE events SET release = 'seven'", lambda history: history.events()),
        ("UPDATE events SET reason = CAST(x'ff61' AS TEXT)", lambda history: history.events()),
        ("UPDATE outbox SET report = 5", lambda history: history.waiting()),
        ("UPDATE delivery SET next_try_s = 'soon'", lambda history: history.delivery_state()),
    ],
)
def test_values_that_have_changed_stop_nothing(
    statement: str, use: Callable[[History], object], path: Path, clock: Clock
) -> None:
    filled(path, clock, events=2)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(statement)
    with History(path, now=clock) as history:
        use(history)
        history.record("activated")
        assert history.events(1)[0].kind == "activated"


@pytest.mark.parametrize("start", [0, 4096])
def test_the_log_of_a_damaged_history_does_not_get_into_the_new_one(start: int, path: Path, clock: Clock) -> None:
    filled(path, clock)
    history = History(path, now=clock)
    history.record("checked")
    log = path.with_name("history.sqlite-wal")
    copies = {item: item.read_bytes() for item in (path, log)}
    history.close()
    for item, data in copies.items():
        item.write_bytes(data)
    overwrite(path, start, b"\xff" * (path.stat().st_size - start))
    for _ in range(2):
        with History(path, now=clock) as history:
            assert [event.kind for event in history.events()] == [SET_ASIDE]
    assert len(set_aside(path)) == 1


def test_a_log_that_another_process_keeps_open_is_set_aside_with_its_file(path: Path, clock: Clock) -> None:
    """SQLite removes the log when the last process closes; beside the new file, the next would find the old one."""
    filled(path, clock)
    program = """
    import sqlite3, sys
    connection = sqlite3.connect(sys.argv[1], isolation_level=None)
    connection.execute("INSERT INTO events VALUES (NULL, '', 'checked', 1, NULL, NULL, NULL, '{}')")
    print("ready", flush=True)
    sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        log = path.with_name("history.sqlite-wal").read_bytes()
        overwrite(path, 4096, b"\xff" * (path.stat().st_size - 4096))
        with History(path, now=clock) as history:
            assert [event.kind for event in history.events()] == [SET_ASIDE]
        (aside,) = set_aside(path)
        assert aside.with_name(aside.name + "-wal").read_bytes() == log != b""
        other.communicate()
    with History(path, now=clock) as history:
        assert [event.kind for event in history.events()] == [SET_ASIDE]


def test_few_damaged_histories_are_kept_and_the_latest_always(path: Path, clock: Clock) -> None:
    for count in range(6):
        filled(path, clock, events=1)
        path.write_bytes(b"damaged %d" % count + bytes(5000))
        if count == 5:
            clock.now = datetime(1970, 1, 1, tzinfo=UTC)
        History(path, now=clock).close()
        assert len(set_aside(path)) == min(count + 1, module.MAX_SET_ASIDE)
    assert any(item.read_bytes().startswith(b"damaged 5") for item in set_aside(path))


def test_flipped_bytes_anywhere_never_stop_a_device(path: Path, clock: Clock, tmp_path: Path) -> None:
    filled(path, clock, events=30)
    good = path.read_bytes()
    chance = random.Random(1)
    for count in range(60):
        folder = tmp_path / str(count)
        folder.mkdir()
        data = bytearray(good)
        for _ in range(chance.choice([1, 5, 200])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        target = folder / "history.sqlite"
        target.write_bytes(data)
        with History(target, now=clock) as history:
            history.record("activated")
            assert history.events(1)[0].kind == "activated"
            history.events(1000)
            history.waiting()
            history.queue(number)
            history.mark_failed(history.delivery_state().next_try_s + 1)


@pytest.mark.parametrize("place", ["a folder", "no folder"])
def test_a_place_that_cannot_hold_a_history_is_named(place: str, path: Path) -> None:
    if place == "a folder":
        path.mkdir()
    else:
        path = path.parent / "missing" / "history.sqlite"
    with pytest.raises(UpdateError, match="cannot be written") as raised:
        History(path)
    assert raised.value.where == path
    assert "model goes on" in str(raised.value.hint)


def test_a_full_disk_is_an_error_and_no_damage(path: Path) -> None:
    """By a limit on the size of files, in a process of its own."""
    program = """
    import resource, sys
    from pathlib import Path
    from edge_ilseg.devices.update.history import History
    from edge_ilseg.errors import UpdateError
    path = Path(sys.argv[1])
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with History(path) as history:
        history.record("first")
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        try:
            for count in range(1000):
                history.record("more", reason="x" * 1000)
        except UpdateError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        history.record("last")
        print(history.events(10000)[-1].kind, history.events(1)[0].kind)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), path],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert "cannot be written" in done.stdout, done.stderr
    assert done.stdout.endswith("first last\n")
    assert set_aside(path) == []


def test_a_history_that_another_process_holds_is_waited_for_and_no_damage(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_S", 0.05)
    with History(path, now=clock) as history, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UpdateError, match="locked"):
            history.record("checked")
        other.execute("ROLLBACK")
        history.record("checked")
        assert len(history.events()) == 1
    assert set_aside(path) == []


# The outbox (rules 3 to 5)


def test_reports_wait_in_their_order_until_they_are_delivered(path: Path, clock: Clock) -> None:
    with History(path, now=clock) as history:
        numbers = [history.queue(number) for _ in range(4)]
        assert numbers == [NOW_S, NOW_S + 1, NOW_S + 2, NOW_S + 3]
    with History(path, now=clock) as history:
        assert history.waiting() == tuple((item, number(item)) for item in numbers)
        assert history.waiting(1) == ((NOW_S, number(NOW_S)),)
        history.mark_delivered(numbers[0])
        history.mark_delivered(numbers[2])
        assert [item.sequence for item in history.waiting()] == [numbers[1], numbers[3]]
        assert history.count_waiting() == 2


def test_numbers_rise_whatever_the_clock_says_and_after_everything_was_delivered(path: Path, clock: Clock) -> None:
    numbers: list[int] = []
    for now in (NOW, datetime(1970, 1, 1, tzinfo=UTC), NOW + timedelta(days=1), NOW - timedelta(days=400)):
        clock.now = now
        with History(path, now=clock) as history:
            for _ in range(3):
                numbers.append(history.queue(number))
                history.mark_delivered(numbers[-1])
    assert numbers == sorted(set(numbers))
    assert numbers[6] == NOW_S + 86_400


def test_a_report_that_cannot_be_built_takes_no_number(path: Path, clock: Clock) -> None:
    def fails(_: int) -> bytes:
        raise UpdateError("no")

    with History(path, now=clock) as history:
        with pytest.raises(UpdateError, match="no"):
            history.queue(fails)
        assert history.queue(number) == NOW_S
        assert history.count_waiting() == 1


def test_reports_that_nobody_takes_make_room(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 10)
    with History(path, now=clock) as history:
        for _ in range(25):
            last = history.queue(number)
        assert [item.sequence for item in history.waiting()] == list(range(last - 9, last + 1))


def test_failures_are_counted_for_the_next_process(path: Path, clock: Clock) -> None:
    with History(path, now=clock) as history:
        sequence = history.queue(number)
        assert history.delivery_state() == (0, 0.0)
        history.mark_failed(1000.5)
        history.mark_failed(2000.5)
    with History(path, now=clock) as history:
        assert history.delivery_state() == (2, 2000.5)
        history.mark_delivered(sequence)
        assert history.delivery_state() == (0, 0.0)
