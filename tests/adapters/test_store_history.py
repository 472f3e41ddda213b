"""What the store remembers of the past: traffic second by second, and the events and changes of one server."""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from controller.adapters.store import sqlite
from controller.adapters.store.schema import MIGRATIONS
from controller.adapters.store.sqlite import SqliteStore
from controller.core.events import Note
from controller.core.model import Change, ChangeKind, Step, StepName
from controller.ports import Delta, StoreError, TrafficRecord

DAY = 86400
NOW = 20_000 * DAY


def row(at: int, server: str = "a", upstream: str = "app", requests: float = 1.0) -> TrafficRecord:
    return TrafficRecord(upstream, server, at, requests, requests, 0.0, 0.0, requests / 10, 1)


def delta(wall: float, *notes: Note, changes: dict[int, Change] | None = None) -> Delta:
    return Delta(wall, wall, "boot", 1, 1, 1, changes=changes or {}, notes=notes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    opened = SqliteStore(f"sqlite:///{path}", keep_traffic=3600)
    yield opened
    await opened.close()


async def test_traffic_comes_back_second_by_second_by_server_and_time(store: SqliteStore) -> None:
    rows = (row(NOW, "b"), row(NOW + 1, "a"), row(NOW, "a"), row(NOW, "a", "api"))
    await store.save_traffic(rows, NOW)
    assert await store.traffic("app", NOW, NOW + 60, 1) == (rows[2], rows[1], rows[0])
    assert await store.traffic("app", NOW + 1, NOW + 60, 1) == (rows[1],)
    assert await store.traffic("app", NOW, NOW + 1, 1) == (rows[2], rows[0])
    assert await store.traffic("app", NOW, NOW + 60, 1, "b") == (rows[0],)
    assert await store.traffic("none", NOW, NOW + 60, 1) == ()


async def test_two_parts_of_one_second_add_up_and_the_greatest_number_in_flight_counts(store: SqliteStore) -> None:
    await store.save_traffic((row(NOW, requests=1.5), replace(row(NOW, requests=2.5), in_flight=9)), NOW)
    await store.save_traffic((row(NOW, requests=1.0),), NOW)
    assert await store.traffic("app", NOW, NOW + 1, 1) == (
        TrafficRecord("app", "a", NOW, 5.0, 5.0, 0.0, 0.0, pytest.approx(0.5), 9),
    )


async def test_longer_steps_are_counted_from_the_beginning_that_was_asked_for(store: SqliteStore) -> None:
    await store.save_traffic(tuple(row(NOW + at) for at in range(25)), NOW)
    steps = await store.traffic("app", NOW + 3, NOW + 23, 10)
    assert [(each.at - NOW, each.requests) for each in steps] == [(3, 10.0), (13, 10.0)]


async def test_a_look_at_the_traffic_is_given_up_when_it_takes_too_long(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.save_traffic(tuple(row(NOW + at, f"s{server}") for at in range(1000) for server in range(50)), NOW)
    monkeypatch.setattr(sqlite, "READING", 0.0)
    with pytest.raises(StoreError, match=r"interrupted.*ask for less time"):
        await store.traffic("app", NOW, NOW + 1000, 10)
    await store.save_traffic((row(NOW),), NOW)


async def test_traffic_that_is_too_old_is_forgotten_with_the_servers_that_have_none_left(
    store: SqliteStore, path: Path
) -> None:
    await store.save_traffic((row(NOW, "gone"), row(NOW)), NOW)
    await store.save_traffic((row(NOW + 3600),), NOW + 3601)
    assert [each.at for each in await store.traffic("app", 0, NOW + DAY, 1)] == [NOW + 3600]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT server FROM series").fetchall() == [("a",)]


async def test_events_of_a_server_are_its_own_and_those_of_the_whole_upstream(store: SqliteStore) -> None:
    notes = [
        Note("health", "one", "app", "a"),
        Note("health", "not mine", "app", "b"),
        Note("fail-open", "of all", "app"),
        Note("health", "elsewhere", "api", "a"),
        Note("plane", "of nginx"),
        Note("health", "two", "app", "a"),
    ]
    await store.save(delta(NOW, *notes))
    assert [event.text for event in await store.events_of("app", "a", 10)] == ["one", "of all", "two"]
    assert [event.text for event in await store.events_of("app", "a", 2)] == ["of all", "two"]


async def test_events_between_two_times_are_those_of_the_upstream_without_single_steps(store: SqliteStore) -> None:
    for at in range(5):
        await store.save(delta(NOW + at, Note("health", str(at), "app", "a"), Note("step", "drain", "app", "a")))
        await store.save(delta(NOW + at, Note("health", "elsewhere", "api", "a")))
    assert [event.text for event in await store.events_between("app", NOW + 1, NOW + 4, 10)] == ["1", "2", "3"]
    assert [event.text for event in await store.events_between("app", NOW, NOW + 9, 2)] == ["3", "4"]


async def test_the_last_change_of_a_server_is_the_newest_in_which_it_has_steps(store: SqliteStore) -> None:
    def change(number: int, upstream: str, *servers: str) -> Change:
        steps = tuple(Step(StepName.UP, server) for server in servers)
        return Change(number, ChangeKind.ROLLOUT, upstream, steps, created=NOW)

    changes = (change(1, "app", "a", "b"), change(2, "app", "b"), change(3, "api", "a"))
    await store.save(delta(NOW, changes={each.id: each for each in changes}))
    found = await store.last_change("app", "a")
    assert found is not None
    assert (found.id, [step.server for step in found.steps]) == (1, ["a", "b"])
    assert await store.last_change("app", "c") is None


async def test_a_store_of_the_first_schema_is_taken_over_with_all_that_is_in_it(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(f"{MIGRATIONS[0]}; PRAGMA user_version = 1")
        db.execute("INSERT INTO event VALUES (7, ?, 'health', 'of old', 'app', 'a', NULL)", (NOW,))
        db.commit()
    store = SqliteStore(f"sqlite:///{path}")
    await store.save_traffic((row(NOW),), NOW)
    assert [event.id for event in await store.events_of("app", "a", 10)] == [7]
    await store.close()


def fill(path: Path, events: int) -> None:
    """So many events, and a change with ten steps for every hundred of them."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        names = "'app' || (value % 10), 'server' || (value % 50)"
        db.execute(
            f"WITH RECURSIVE n(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE value < {events})"
            f" INSERT INTO event SELECT value, {NOW} + value, 'health', 'a server is up; 3 of 3 serving', {names}, NULL"
            " FROM n"
        )
        db.execute(
            f"WITH RECURSIVE n(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE value < {events // 100})"
            " INSERT INTO change (id, kind, upstream, status, forced, created_at, ended_at, error)"
            f" SELECT value, 'restart', 'app' || (value % 10), 'done', 0, {NOW}, {NOW}, '' FROM n"
        )
        db.execute(
            "INSERT INTO step SELECT id, value, 'up', 'server' || (id % 50), 0, 'done', 1.0, 2.0, ''"
            " FROM change, (WITH RECURSIVE n(value) AS (SELECT 0 UNION ALL SELECT value + 1 FROM n WHERE value < 9)"
            " SELECT value FROM n)"
        )


@pytest.mark.slow
async def test_a_store_of_a_million_events_answers_as_one_of_ten_thousand(tmp_path: Path) -> None:
    stores = {}
    for events in (10_000, 1_000_000):
        store = stores[events] = SqliteStore(f"sqlite:///{tmp_path}/{events}.db", keep_events=1_000_000)
        await store.load()
        fill(store.path, events)
    asked: dict[str, Callable[[SqliteStore], Awaitable[object]]] = {
        "changes": lambda store: store.changes(20),
        "one change": lambda store: store.change(50),
        "events": lambda store: store.events(limit=200),
        "events of": lambda store: store.events_of("app3", "server3", 200),
        "events between": lambda store: store.events_between("app3", NOW + 5000, NOW + 6000, 200),
        "last change": lambda store: store.last_change("app3", "server3"),
        "of nobody": lambda store: store.last_change("app3", "server4"),
        "save": lambda store: store.save(delta(NOW, Note("health", "is up", "app", "a"))),
    }
    slower = {}
    for name, ask in asked.items():
        few, many = [await median(ask, store) for store in stores.values()]
        slower[name] = many / max(few, 0.0005)
    for store in stores.values():
        await store.close()
    # One that read all events would be slower a hundredfold.
    assert {name: ratio for name, ratio in slower.items() if ratio > 20} == {}


async def median(ask: Callable[[SqliteStore], Awaitable[object]], store: SqliteStore) -> float:
    times = []
    for _ in range(15):
        began = time.perf_counter()
        await ask(store)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
