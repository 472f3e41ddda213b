"""What people ask of a daemon whose store is large: the times of its answers, beside those of a small one.

The real runtime, store and API over its unix socket; nginx answers at once (tests/support/house.py).

    python -m tests.bench.store_size [EVENTS] [CHANGES]
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from controller.adapters.store.sqlite import SqliteStore
from controller.client import Client
from tests.support.house import APP, House

EVENTS, CHANGES, STEPS = 1_000_000, 5_000, 10
PAGE = 200  # as many rows as an answer has at most: the small store has no more
CALLS = 31


@dataclass(frozen=True, slots=True)
class Times:
    """The median seconds of one question, with the small store and with the large one."""

    small: float
    large: float


def fill(path: Path, events: int, changes: int) -> None:
    """Make a store with so many events of the servers of `app`, and so many restarts of them that have ended."""

    async def made() -> None:
        store = SqliteStore(f"sqlite:///{path}")
        await store.load()
        await store.close()

    asyncio.run(made())
    keys = [server.key for server in APP.servers]
    now = time.time()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executemany(
            "INSERT INTO event (at, kind, text, upstream, server) VALUES (?, 'health', ?, 'app', ?)",
            (
                (now - events + n, f"app: {keys[n % 3]} is up; 3 of 3 servers serving", keys[n % 3])
                for n in range(events)
            ),
        )
        ids = range(1, changes + 1)
        db.executemany(
            "INSERT INTO change (id, kind, upstream, status, forced, created_at, ended_at, error)"
            " VALUES (?, 'restart', 'app', 'done', 0, ?, ?, '')",
            ((n, now - changes + n, now - changes + n + 1) for n in ids),
        )
        db.executemany(
            "INSERT INTO step VALUES (?, ?, 'find', ?, 0, 'done', ?, ?, 'master 4711 with 4 workers')",
            ((n, position, keys[n % 3], now, now) for n in ids for position in range(STEPS)),
        )
        db.execute("INSERT INTO meta VALUES (1, 1.0, 'before', 1, ?, 1)", (changes + 1,))


def measure(events: int = EVENTS, changes: int = CHANGES) -> Mapping[str, Times]:
    """The times of each question, by its name."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # what the daemons log
        large = _client(stack, events, changes)
        small = _client(stack, PAGE, PAGE)
        return {
            "status": _times(small, large, Client.status),
            "changes": _times(small, large, Client.changes),
            "events": _times(small, large, Client.events),
            "explain": _times(small, large, lambda client: client.explain("app", APP.servers[0].key)),
        }


def _client(stack: contextlib.ExitStack, events: int, changes: int) -> Client:
    """The client of a daemon with such a store, as long as the stack is open."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headgate-store-")))
    fill(directory / "state.db", events, changes)
    house = stack.enter_context(House(directory, keep_events=2 * events))
    client = Client(str(house.socket))
    assert [event["id"] for event in client.events(after=0, limit=1)] == [1], "every event is still there"
    return client


def _times(small: Client, large: Client, ask: Callable[[Client], object]) -> Times:
    """They take turns, so that whatever else the machine does slows both."""
    times: dict[Client, list[float]] = {small: [], large: []}
    for _ in range(CALLS):
        for client, taken in times.items():
            began = time.perf_counter()
            ask(client)
            taken.append(time.perf_counter() - began)
    return Times(statistics.median(times[small]), statistics.median(times[large]))


if __name__ == "__main__":
    for what, times in measure(*map(int, sys.argv[1:])).items():
        print(f"{what}: {times.large * 1000:.1f} ms, {times.small * 1000:.1f} ms where the store is small")
