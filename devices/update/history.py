"""What happened on a device, and the reports that wait to be delivered: one SQLite file.

1. It decides nothing: `state.json` is the only authority. A history that is damaged, or of another version, is set
   aside under the date and begun anew; the first event of the new one says so. The agent goes on.
2. Every write is durable when the call returns (WAL, synchronous=FULL), and whole or not there after a power cut.
3. It is bounded: the oldest events, and the oldest reports that nobody took, make room for new ones.
4. The number of a report is above every earlier one of the device, also after a history was lost: it is at least the
   seconds since 1970, and a device makes fewer reports than one a second.
5. A report stays until it is said to be delivered. When to try again is written down, for the next process.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import msgspec

from edge_ilseg.errors import UpdateError
from edge_ilseg.files import sync_folder

SCHEMA_VERSION = 1
MAX_EVENTS = 5000
MAX_WAITING = 1000
MAX_SET_ASIDE = 3
"""Damaged histories that are kept for whoever wants to look at them."""
MAX_REASON = 2000
"""Characters of a reason."""
BUSY_S = 10.0
"""Longest wait for another process that writes."""
SET_ASIDE = "history set aside"
SCHEMA = """
CREATE TABLE events (number INTEGER PRIMARY KEY AUTOINCREMENT, happened TEXT NOT NULL, kind TEXT NOT NULL,
    release INTEGER, content_id TEXT, verdict TEXT, reason TEXT, numbers TEXT NOT NULL);
CREATE TABLE outbox (sequence INTEGER PRIMARY KEY AUTOINCREMENT, report BLOB NOT NULL);
CREATE TABLE delivery (one INTEGER PRIMARY KEY CHECK (one = 1), failures INTEGER NOT NULL, next_try_s REAL NOT NULL);
INSERT INTO delivery VALUES (1, 0, 0);
"""
LOG_ENDINGS = ("-wal", "-shm", "")
"""What SQLite writes beside a file, and the file: in the order in which they are renamed."""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG)
LOST = (
    # errors of the disk after which the file's bytes cannot be counted on; one that is full is not among them
    *(sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ),
    *(sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_CORRUPTFS),
)

T = TypeVar("T")


class HistoryEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that happened."""

    when: str
    """UTC, ISO 8601."""
    kind: str
    release: int | None = None
    content_id: str | None = None
    verdict: str | None = None
    reason: str | None = None
    numbers: dict[str, object] = {}
    """What was measured, as JSON."""


class WaitingReport(NamedTuple):
    """A report that is not delivered yet, as it is sent."""

    sequence: int
    report: bytes


class DeliveryState(NamedTuple):
    """How the delivery of reports stands."""

    failures: int
    """Since the last one that was delivered."""
    next_try_s: float
    """Not before this time, in seconds since 1970."""


class _DamagedError(Exception):
    """The file is no history of this version."""


ERRORS = (_DamagedError, sqlite3.DatabaseError, UnicodeDecodeError, msgspec.MsgspecError)
"""What using the file can raise: SQLite quotes damaged names, which need not be UTF-8, and values may have changed."""


def utc_now() -> datetime:
    """The time of the device."""
    return datetime.now(UTC)


def clean_text(text: str, most: int) -> str:
    """One line of at most `most` characters that any terminal, JSON and database can take."""
    plain = "".join(sign if sign.isprintable() else " " for sign in text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


class History:
    """The file at `path`, made if it is not there; a `with` block closes it."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = utc_now) -> None:
        """Open the history; one that cannot be used is set aside (rule 1).

        Raises:
            UpdateError: there can be no history here: no folder, no right, no room.
        """
        self._path = path
        self._now = now
        try:
            self._connection = _open(path)
        except ERRORS as error:
            if not _is_damage(error):
                raise self._error(error) from error
            self._connection = self._begin_anew(error)

    def __enter__(self) -> History:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        with suppress(sqlite3.Error):  # what was written is durable already
            self._connection.close()

    def record(
        self,
        kind: str,
        *,
        release: int | None = None,
        content_id: str | None = None,
        verdict: str | None = None,
        reason: str | None = None,
        numbers: Mapping[str, object] | None = None,
    ) -> None:
        """Write down what happened just now.

        Raises:
            UpdateError: it cannot be written: the disk is full or fails.
        """
        text = None if reason is None else clean_text(reason, MAX_REASON)
        measured = msgspec.json.encode(numbers or {}).decode()
        row = (self._now().isoformat(timespec="milliseconds"), kind, release, content_id, verdict, text, measured)
        self._do(lambda connection: _insert_event(connection, row))

    def events(self, limit: int = 100, *, kind: str | None = None) -> tuple[HistoryEvent, ...]:
        """The latest events, of one kind or of all, the newest first."""
        query = (
            "SELECT happened, kind, release, content_id, verdict, reason, numbers FROM events"
            " WHERE ?1 IS NULL OR kind = ?1 ORDER BY number DESC LIMIT ?2"
        )

        def read(connection: sqlite3.Connection) -> tuple[HistoryEvent, ...]:
            return tuple(map(_event_of, connection.execute(query, (kind, limit))))

        return self._do(read)

    def queue(self, build: Callable[[int], bytes]) -> int:
        """Put a report into the outbox: `build` gets its number (rule 4), and gives its bytes.

        Raises:
            UpdateError: it cannot be written.
        """
        return self._do(lambda connection: _insert_report(connection, build, int(self._now().timestamp())))

    def waiting(self, limit: int = 100) -> tuple[WaitingReport, ...]:
        """Reports that are not delivered, the oldest first."""
        query = "SELECT sequence, report FROM outbox ORDER BY sequence LIMIT ?"
        return self._do(
            lambda connection: msgspec.convert(
                connection.execute(query, (limit,)).fetchall(), tuple[WaitingReport, ...]
            )
        )

    def count_waiting(self) -> int:
        """How many reports are not delivered."""
        (count,) = self._do(lambda connection: connection.execute("SELECT count(*) FROM outbox").fetchone())
        return int(count)

    def mark_delivered(self, sequence: int) -> None:
        """The report is where it should be: forget it, and every failure."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM outbox WHERE sequence = ?", (sequence,))
            connection.execute("UPDATE delivery SET failures = 0, next_try_s = 0")

        self._do(write)

    def mark_failed(self, next_try_s: float) -> None:
        """A delivery failed: not again before that time, in seconds since 1970."""
        change = "UPDATE delivery SET failures = failures + 1, next_try_s = ?"
        self._do(lambda connection: connection.execute(change, (next_try_s,)))

    def delivery_state(self) -> DeliveryState:
        """Failures so far, and when to try again."""
        query = "SELECT failures, next_try_s FROM delivery"
        return self._do(lambda connection: msgspec.convert(connection.execute(query).fetchone(), DeliveryState))

    def _do(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Run `action` in one transaction; where the file turns out to be damaged, once more in a new one."""
        try:
            return _in_transaction(self._connection, action)
        except ERRORS as error:
            if not _is_damage(error):
                raise self._error(error) from error
            self.close()
            self._connection = self._begin_anew(error)
        try:
            return _in_transaction(self._connection, action)
        except ERRORS as error:
            raise self._error(error) from error

    def _begin_anew(self, cause: Exception) -> sqlite3.Connection:
        """Set the file aside and begin a new one, whose first event says so (rule 1)."""
        try:
            aside = _set_aside(self._path, self._now())
            connection = _open(self._path)
            reason = clean_text(f"{cause}; kept as {aside.name}", MAX_REASON)
            when = self._now().isoformat(timespec="milliseconds")
            row = (when, SET_ASIDE, None, None, None, reason, "{}")
            _in_transaction(connection, lambda new: _insert_event(new, row))
        except (*ERRORS, OSError) as error:
            raise self._error(error) from error
        return connection

    def _error(self, error: Exception) -> UpdateError:
        return UpdateError(
            "the history of this device cannot be written or read",
            where=self._path,
            found=str(error),
            hint="free some space, or give this user the right to write there; the model goes on running",
        )


def _open(path: Path) -> sqlite3.Connection:
    """A connection to a sound history of this version, which is made where there is none."""
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    connection.text_factory = lambda data: data.decode(errors="replace")
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA journal_size_limit = 1048576")
        _in_transaction(connection, _make_or_check)
        sync_folder(path.parent)
    except BaseException:
        with suppress(sqlite3.Error):
            connection.close()
        raise
    return connection


def _make_or_check(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    found = _tables(connection)
    if version == 0 and not found:
        for statement in SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return
    if version != SCHEMA_VERSION:
        raise _DamagedError(f"a history of version {version}, and this program knows version {SCHEMA_VERSION}")
    if found != _expected_tables():
        raise _DamagedError("the tables are not those of a history")
    (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        raise _DamagedError(f"the file is damaged: {state}")
    if connection.execute("SELECT count(*) FROM delivery").fetchone() != (1,):
        raise _DamagedError("the state of the delivery is missing")


def _tables(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    return connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()


def _expected_tables() -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        return _tables(connection)


def _in_transaction(connection: sqlite3.Connection, action: Callable[[sqlite3.Connection], T]) -> T:
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = action(connection)
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
            connection.execute("ROLLBACK")
        raise
    return result


def _event_of(row: tuple[object, ...]) -> HistoryEvent:
    *texts, numbers = row
    fields = dict(zip(HistoryEvent.__struct_fields__, texts, strict=False))
    return msgspec.convert({**fields, "numbers": msgspec.json.decode(str(numbers))}, HistoryEvent)


def _insert_event(connection: sqlite3.Connection, row: tuple[object, ...]) -> None:
    columns = "happened, kind, release, content_id, verdict, reason, numbers"
    connection.execute(f"INSERT INTO events ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    connection.execute("DELETE FROM events WHERE number <= (SELECT max(number) FROM events) - ?", (MAX_EVENTS,))


def _insert_report(connection: sqlite3.Connection, build: Callable[[int], bytes], least: int) -> int:
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
    sequence = max(least, row[0] + 1 if row else 1)
    connection.execute("INSERT INTO outbox VALUES (?, ?)", (sequence, build(sequence)))
    oldest = "SELECT sequence FROM outbox ORDER BY sequence DESC LIMIT 1 OFFSET ?"
    connection.execute(f"DELETE FROM outbox WHERE sequence <= ({oldest})", (MAX_WAITING,))
    return sequence


def _is_damage(error: Exception) -> bool:
    """Whether the file is to blame, and not the disk's room, a right or another process."""
    if not isinstance(error, sqlite3.DatabaseError):
        return True
    code = getattr(error, "sqlite_errorcode", None)  # not there on errors of the module itself
    return code is not None and (code & 0xFF in DAMAGED or code in LOST)


def _set_aside(path: Path, now: datetime) -> Path:
    """Rename the file, and keep the latest `MAX_SET_ASIDE` such files.

    Its write-ahead log goes first: beside a new file, SQLite would take it for that one's.
    """
    stem = f"{path.name}.damaged-{now:%Y%m%dT%H%M%SZ}"
    aside, number = path.with_name(stem), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{stem}-{number}")
    for ending in LOG_ENDINGS:
        with suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))
    others = sorted(
        other
        for other in path.parent.glob(f"{path.name}.damaged-*")
        if other != aside and not other.name.endswith(LOG_ENDINGS[:2])
    )
    for other in others[: len(others) + 1 - MAX_SET_ASIDE]:
        for ending in LOG_ENDINGS:
            other.with_name(other.name + ending).unlink(missing_ok=True)
    return aside
