"""The store on one host: a SQLite file with one writer thread, and the lock that keeps a second daemon out.

Only rows and their meaning belong here. Durable values are kept as JSON documents of the core's dataclasses; what
people list and read (changes, steps, events) also stands in columns, with wall-clock times.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from controller.adapters.store.schema import MIGRATIONS
from controller.core.model import Change, Foreseen, Peer
from controller.core.outcome import Happened
from controller.ports import ChangeRecord, Delta, EventRecord, Saved, StepRecord, StoreError, TrafficRecord

READING = 10.0
"""Seconds after which a look at the traffic of long ago is given up."""

_T = TypeVar("_T")
_PREFIX = "sqlite:///"
_PEER = TypeAdapter(Peer)
_CHANGE = TypeAdapter(Change)
_FORESEEN = TypeAdapter(Foreseen)
_HAPPENED = TypeAdapter(Happened)


# A wall time, once recorded, stays: worked out again after the clock was set it would move.
_SAVE_CHANGE = """
    INSERT INTO change (id, kind, upstream, status, forced, created_at, ended_at, error, document, plan, batch,
        max_unavailable, workers)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET status = excluded.status, forced = excluded.forced, error = excluded.error,
        ended_at = COALESCE(ended_at, excluded.ended_at), document = excluded.document, batch = excluded.batch,
        max_unavailable = excluded.max_unavailable, workers = excluded.workers
"""
_SAVE_STEP = """
    INSERT INTO step VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (change, position) DO UPDATE SET name = excluded.name, server = excluded.server, batch = excluded.batch,
        state = excluded.state, detail = excluded.detail,
        started_at = COALESCE(started_at, excluded.started_at), ended_at = COALESCE(ended_at, excluded.ended_at)
    WHERE (state, detail) IS NOT (excluded.state, excluded.detail)
"""
_SAVE_TRAFFIC = """
    INSERT INTO traffic SELECT id, ?, ?, ?, ?, ?, ?, ? FROM series WHERE upstream = ? AND server = ?
    ON CONFLICT (series, at) DO UPDATE SET requests = requests + excluded.requests,
        answered = answered + excluded.answered, errors = errors + excluded.errors,
        failures = failures + excluded.failures, seconds = seconds + excluded.seconds,
        in_flight = MAX(in_flight, excluded.in_flight)
"""
_TRAFFIC = """
    SELECT upstream, server, :since + (at - :since) / :step * :step AS step, SUM(requests), SUM(answered), SUM(errors),
        SUM(failures), SUM(seconds), MAX(in_flight)
    FROM series JOIN traffic ON series = id
    WHERE upstream = :upstream AND (:server IS NULL OR server = :server) AND at >= :since AND at < :until
    GROUP BY server, step ORDER BY server, step
"""
# Two searches of one index each; one search for both names would sort them all.
_EVENTS_OF = """
    SELECT * FROM (
        SELECT * FROM (SELECT * FROM event WHERE upstream = ?1 AND server = ?2 ORDER BY id DESC LIMIT ?3)
        UNION ALL SELECT * FROM (SELECT * FROM event WHERE upstream = ?1 AND server = '' ORDER BY id DESC LIMIT ?3)
        ORDER BY id DESC LIMIT ?3
    ) ORDER BY id
"""
_EVENTS_BETWEEN = """
    SELECT * FROM (
        SELECT * FROM event WHERE upstream = ? AND at >= ? AND at < ? AND kind <> 'step' ORDER BY at DESC LIMIT ?
    ) ORDER BY id
"""
_OLD_CHANGES = "SELECT id FROM change WHERE id < ? AND document IS NULL"
_CHANGE_COLUMNS = """id, kind, upstream, status, forced, created_at, ended_at, error, plan, outcome,
    batch, max_unavailable, workers"""


class SqliteStore:
    """`ports.Store` on a SQLite file; `url` is `sqlite:////absolute/path`.

    The newest `keep_events` events stay, the newest `keep_changes` changes with their steps and all that are not
    finished, and what servers got in the last `keep_traffic` seconds. A damaged file is
    kept aside at the first call, as `<path>.corrupt-N`, and a new one begins; `load` says so.

    Nothing is opened before the first call; directory (0750) and file (0640) are created where they are missing.
    The file `<path>.lock` is held until `close`; a second daemon's first call raises StoreError.
    """

    def __init__(
        self, url: str, keep_events: int = 50_000, keep_traffic: float = 86400.0, keep_changes: int = 10_000
    ) -> None:
        path = url.removeprefix(_PREFIX)
        if not url.startswith(_PREFIX) or not path.startswith("/") or path.endswith("/"):
            raise StoreError(f"store.url {url!r} is not a SQLite file", "write sqlite:////absolute/path/state.db")
        self.path = Path(path)
        self._keep_events = keep_events
        self._keep_traffic = keep_traffic
        self._keep_changes = keep_changes
        self._pruned = 0.0
        self._lost = ""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._connection: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._closed = False

    async def load(self) -> Saved:
        """What an earlier life left: all peers, and the changes that are not finished."""
        return await self._run(self._load)

    async def save(self, delta: Delta) -> tuple[EventRecord, ...]:
        """Write one transaction; when it raises StoreError nothing of it is written."""
        return await self._run(lambda db: self._save(db, delta))

    async def changes(self, limit: int = 50, before: int | None = None) -> tuple[ChangeRecord, ...]:
        """The newest changes first, those with an id below `before` where given; without steps."""
        sql = f"SELECT {_CHANGE_COLUMNS} FROM change WHERE ?1 IS NULL OR id < ?1 ORDER BY id DESC LIMIT ?2"
        return await self._run(lambda db: tuple(map(_change_record, db.execute(sql, (before, limit)))))

    async def change(self, change: int) -> ChangeRecord | None:
        """One change with its steps in order."""
        return await self._run(lambda db: self._one(db, change))

    async def unjudged(self) -> tuple[int, ...]:
        """The oldest changes that have ended and of which is planned, and not yet recorded, what they did."""
        sql = "SELECT id FROM change WHERE plan IS NOT NULL AND outcome IS NULL AND document IS NULL LIMIT 10"
        return await self._run(lambda db: tuple(row[0] for row in db.execute(sql)))

    async def save_outcome(self, change: int, happened: Happened) -> None:
        """Record what a change did."""
        values = (_encode(happened), change)
        await self._run(lambda db: db.execute("UPDATE change SET outcome = ? WHERE id = ?", values))

    async def last_change(self, upstream: str, server: str) -> ChangeRecord | None:
        """The newest change in which this server has steps, with its steps."""
        sql = """
            SELECT change FROM step JOIN change ON change.id = step.change
            WHERE step.server = ? AND change.upstream = ? ORDER BY step.change DESC LIMIT 1
        """

        def last(db: sqlite3.Connection) -> ChangeRecord | None:
            found = db.execute(sql, (server, upstream)).fetchone()
            return found and self._one(db, found[0])

        return await self._run(last)

    async def events(self, after: int | None = None, limit: int = 200) -> tuple[EventRecord, ...]:
        """Events with id > `after` in order; without `after` the newest `limit`, in order."""
        newest = "SELECT * FROM (SELECT * FROM event ORDER BY id DESC LIMIT ?) ORDER BY id"
        since = "SELECT * FROM event WHERE id > ? ORDER BY id LIMIT ?"
        sql, values = (newest, (limit,)) if after is None else (since, (after, limit))
        return await self._run(lambda db: tuple(EventRecord(*row) for row in db.execute(sql, values)))

    async def events_between(self, upstream: str, since: float, until: float, limit: int) -> tuple[EventRecord, ...]:
        """The newest `limit` events of an upstream within a time (seconds since the epoch, `until` excluded), in
        order; without the single steps of changes."""
        values = (upstream, since, until, limit)
        return await self._run(lambda db: tuple(EventRecord(*row) for row in db.execute(_EVENTS_BETWEEN, values)))

    async def events_of(self, upstream: str, server: str, limit: int) -> tuple[EventRecord, ...]:
        """The newest `limit` events of this server, and of its upstream as a whole, in order."""
        values = (upstream, server, limit)
        return await self._run(lambda db: tuple(EventRecord(*row) for row in db.execute(_EVENTS_OF, values)))

    async def save_traffic(self, rows: Sequence[TrafficRecord], wall: float) -> None:
        """Add these seconds to what is there, and forget, once a minute, what is too old."""
        await self._run(lambda db: self._save_traffic(db, rows, wall))

    async def traffic(
        self, upstream: str, since: int, until: int, step: int, server: str | None = None
    ) -> tuple[TrafficRecord, ...]:
        """What the servers of an upstream (or one of them) got in steps of `step` seconds, counted from `since` to
        `until` (excluded); in order of server and time. A step without traffic is left out.

        It is read beside the writer, so that nobody who looks at a long time delays a decision.
        """
        values: dict[str, int | str | None] = {"upstream": upstream, "since": since, "until": until}
        values |= {"step": step, "server": server}
        await self._run(lambda _: None)  # it is open from here on
        return await asyncio.to_thread(self._read_traffic, values)

    async def close(self) -> None:
        """Finish writing, close the file and let go of the lock. It may be called twice."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._executor, self._shut)
            self._executor.shutdown()

    # --- in the writer thread ---------------------------------------------------------------------------------

    async def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        def guarded() -> _T:
            try:
                if self._connection is None:
                    self._connection = self._open()
                return work(self._connection)
            except sqlite3.Error as error:
                raise self._store_error(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._executor, guarded)

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._take_lock()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            self._shut()
            remedy = "make the directory writable for the user that runs headgate, or change store.url"
            raise StoreError(f"the store {self.path} cannot be opened: {error.strerror}", remedy) from error
        os.close(descriptor)
        try:
            try:
                return self._connect()
            except sqlite3.DatabaseError as error:
                if _code(error) not in _DAMAGED:
                    raise
                self._set_aside(error)
                return self._connect()
        except BaseException:
            self._shut()
            raise

    def _connect(self) -> sqlite3.Connection:
        # One thread makes and uses the connection; transactions are written out below.
        db = sqlite3.connect(self.path, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA foreign_keys = ON")
            self._migrate(db)
        except BaseException:
            db.close()
            raise
        return db

    def _set_aside(self, error: sqlite3.Error) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.corrupt-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
            for end in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{self.path}{end}", f"{aside}{end}")
        except OSError as failure:
            remedy = "make the directory writable for the user that runs headgate"
            raise StoreError(
                f"the damaged store {self.path} cannot be set aside: {failure.strerror}", remedy
            ) from error
        self._lost = (
            f"the store {self.path} could not be read ({error}); it is kept as {aside.name}, and a new one begins:"
            " changes and events of before are not in it"
        )

    def _take_lock(self) -> None:
        lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 20).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise StoreError(
                f"the store {self.path} is in use by another daemon (pid {holder})",
                "stop that daemon first, or give this one its own store.url and api.socket",
            ) from error
        self._lock = lock
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())

    def _migrate(self, db: sqlite3.Connection) -> None:
        verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError("damaged: " + " ".join(verdict.split()))
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the store {self.path} was written by a newer Headgate (schema {version}, this one knows"
                f" {len(MIGRATIONS)})",
                "install that version again, or give this one its own store.url",
            )
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT")

    def _load(self, db: sqlite3.Connection) -> Saved:
        meta = db.execute("SELECT now, boot, revision, next_change, next_epoch FROM meta").fetchone()
        peers = {
            (upstream, server): self._decode(_PEER, document, f"peer {upstream} {server}")
            for upstream, server, document in db.execute("SELECT upstream, server, document FROM peer")
        }
        changes = {
            number: self._decode(_CHANGE, document, f"change {number}")
            for number, document in db.execute("SELECT id, document FROM change WHERE document IS NOT NULL ORDER BY id")
        }
        if meta is None:
            return Saved(lost=self._lost)
        now, boot, revision, next_change, next_epoch = meta
        return Saved(now, boot, revision, next_change, next_epoch, peers, changes)

    def _save(self, db: sqlite3.Connection, delta: Delta) -> tuple[EventRecord, ...]:
        with _transaction(db):
            db.execute(
                "INSERT OR REPLACE INTO meta VALUES (1, ?, ?, ?, ?, ?)",
                (delta.now, delta.boot, delta.revision, delta.next_change, delta.next_epoch),
            )
            for key, peer in delta.peers.items():
                if peer is None:
                    db.execute("DELETE FROM peer WHERE upstream = ? AND server = ?", key)
                else:
                    db.execute("INSERT OR REPLACE INTO peer VALUES (?, ?, ?)", (*key, _encode(peer)))
            for change in delta.changes.values():
                self._save_change(db, change, delta)
            if any(change.status.ended for change in delta.changes.values()):
                old = delta.next_change - self._keep_changes  # they are numbered without a gap
                db.execute(f"DELETE FROM step WHERE change IN ({_OLD_CHANGES})", (old,))
                db.execute(f"DELETE FROM change WHERE id IN ({_OLD_CHANGES})", (old,))
            records = []
            for note in delta.notes:
                values = (delta.wall, note.kind, note.text, note.upstream, note.server, note.change)
                number = db.execute("INSERT INTO event VALUES (NULL, ?, ?, ?, ?, ?, ?)", values).lastrowid
                records.append(EventRecord(number or 0, *values))
            if records:
                db.execute("DELETE FROM event WHERE id <= ?", (records[-1].id - self._keep_events,))
        return tuple(records)

    def _save_traffic(self, db: sqlite3.Connection, rows: Sequence[TrafficRecord], wall: float) -> None:
        with _transaction(db):
            names = dict.fromkeys((row.upstream, row.server) for row in rows)
            db.executemany("INSERT OR IGNORE INTO series VALUES (NULL, ?, ?)", names)
            db.executemany(
                _SAVE_TRAFFIC,
                (
                    (
                        *(row.at, row.requests, row.answered, row.errors, row.failures, row.seconds, row.in_flight),
                        *(row.upstream, row.server),
                    )
                    for row in rows
                ),
            )
            if abs(wall - self._pruned) >= 60:
                self._pruned = wall
                for (series,) in db.execute("SELECT id FROM series").fetchall():
                    old = (series, wall - self._keep_traffic)
                    db.execute("DELETE FROM traffic WHERE series = ? AND at < ?", old)
                db.execute("DELETE FROM series WHERE NOT EXISTS (SELECT 1 FROM traffic WHERE series = id)")

    def _read_traffic(self, values: Mapping[str, int | str | None]) -> tuple[TrafficRecord, ...]:
        deadline = time.monotonic() + READING
        try:
            with contextlib.closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)) as db:
                db.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
                return tuple(TrafficRecord(*row) for row in db.execute(_TRAFFIC, values))
        except sqlite3.Error as error:
            raise self._store_error(error) from error

    def _save_change(self, db: sqlite3.Connection, change: Change, delta: Delta) -> None:
        def wall(seconds: float | None) -> float | None:
            return None if seconds is None else delta.wall - (delta.now - seconds)

        document = None if change.status.ended else _encode(change)
        db.execute(
            _SAVE_CHANGE,
            (
                *(change.id, change.kind, change.upstream, change.status, change.forced),
                *(wall(change.created), wall(change.ended), change.error, document),
                change.foreseen and _encode(change.foreseen),
                *(change.batch, change.max_unavailable or None, change.workers or None),
            ),
        )
        db.executemany(
            _SAVE_STEP,
            (
                (
                    *(change.id, position, step.name, step.server, step.batch, step.state),
                    *(wall(step.started), wall(step.ended), step.detail),
                )
                for position, step in enumerate(change.steps)
            ),
        )

    def _one(self, db: sqlite3.Connection, change: int) -> ChangeRecord | None:
        row = db.execute(f"SELECT {_CHANGE_COLUMNS} FROM change WHERE id = ?", (change,)).fetchone()
        columns = "name, server, batch, state, started_at, ended_at, detail"
        steps = db.execute(f"SELECT {columns} FROM step WHERE change = ? ORDER BY position", (change,))
        return row and _change_record(row, tuple(StepRecord(*step) for step in steps))

    def _decode(self, adapter: TypeAdapter[_T], document: str, what: str) -> _T:
        try:
            return adapter.validate_json(document, strict=True)
        except ValidationError as error:
            message = f"the store {self.path} holds a {what} that cannot be read: {error}"
            remedy = (
                "install the Headgate that wrote it, or move the file and its -wal and -shm away and start again: what"
                " operators wished (drain, maint) and unfinished changes are forgotten, the traffic is not touched"
            )
            raise StoreError(message, remedy) from error

    def _store_error(self, error: sqlite3.Error) -> StoreError:
        remedy = {
            sqlite3.SQLITE_FULL: "free space on its file system; nginx goes on with the table it has",
            sqlite3.SQLITE_IOERR: "look at its file system (space, quota, dmesg); nginx goes on with the table it has",
            sqlite3.SQLITE_READONLY: "make file and directory writable for the user that runs headgate",
            sqlite3.SQLITE_CANTOPEN: "make file and directory writable for the user that runs headgate",
            sqlite3.SQLITE_INTERRUPT: f"it took longer than {READING:g} s to read; ask for less time",
            sqlite3.SQLITE_BUSY: "close the other program that writes to it",
            **dict.fromkeys(_DAMAGED, "restart the daemon: it keeps the file aside and begins a new one"),
        }.get(_code(error), "look at the file and its file system")
        return StoreError(f"the store {self.path}: {error}", remedy)

    def _shut(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lock is not None:
            # Unlinking it would let two daemons hold two locks of one name.
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None


_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # A full disk makes SQLite roll back by itself, and a second ROLLBACK would be the error that is seen.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _encode(value: Peer | Change | Foreseen | Happened) -> str:
    return to_json(value, inf_nan_mode="constants").decode()


def _change_record(row: tuple[Any, ...], steps: tuple[StepRecord, ...] = ()) -> ChangeRecord:
    number, kind, upstream, status, forced, created_at, ended_at, error, plan, outcome, *asked = row
    foreseen = plan and _FORESEEN.validate_json(plan)
    happened = outcome and _HAPPENED.validate_json(outcome)
    summary = (number, kind, upstream, status, bool(forced), created_at, ended_at, error)
    return ChangeRecord(*summary, steps, foreseen or None, happened or None, *asked)
