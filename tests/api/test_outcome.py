"""What was planned of a change beside what it did, over the API; and what is known of the traffic for it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller import runtime
from controller.api.plan import observe
from controller.client import Client
from controller.core.model import Group, Readings, StepName, Traffic
from controller.ports import Counters, PeerCounters
from tests.support.house import APP, House

FIRST, SECOND, _ = (server.key for server in APP.servers)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path) as started:
        yield started


def test_a_change_has_its_plan_from_the_beginning_and_its_outcome_from_the_end(house: House) -> None:
    client = Client(str(house.socket))
    house.do(house.processes.stuck.clear)
    number = client.begin_change("rollout", "app", (FIRST, SECOND))
    record = client.change(number)
    plan = record["plan"]
    assert (plan["serving"], plan["before"], plan["load"], record["outcome"]) == (2, 3, 1.5, None)
    house.do(house.processes.stuck.set)
    *_, record = client.follow_change(number)
    outcome = record["outcome"]
    assert record["plan"] == plan
    assert (outcome["serving"], outcome["load"], outcome["server"]) == (2, None, ""), "nobody asked for anything"
    assert outcome["duration"] == pytest.approx(record["ended_at"] - record["created_at"])
    assert client.change(number)["outcome"] == outcome, "once recorded it stays"


def test_a_drain_is_not_planned(house: House) -> None:
    client = Client(str(house.socket))
    change = client.set_admin("app", FIRST, "drain")["change"]
    assert client.change(change)["plan"] is None


def test_the_outcome_is_recorded_though_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "FLUSH", 0.1)
    with House(tmp_path) as house:
        number = Client(str(house.socket)).begin_change("restart", "app", (FIRST,))

        async def recorded() -> None:
            async with asyncio.timeout(20):
                while (record := await house.runtime.store.change(number)) is None or record.outcome is None:
                    await house.runtime.changed(house.runtime.version, 0.1)

        house.call(recorded())
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as db:
        assert db.execute("SELECT count(*) FROM change WHERE outcome IS NOT NULL").fetchone() == (1,)


@pytest.mark.parametrize(
    ("in_flight", "stays"),
    [(1, 0.25), (30, 3.0)],
    ids=["as long as answers take", "by Little's law, where streams stay longer"],
)
def test_a_drain_lasts_as_long_as_requests_stay(in_flight: int, stays: float) -> None:
    last = Readings(100.0, "nginx", {FIRST: Traffic()})
    group = replace(Group(APP, {}), compared=last)
    seen = PeerCounters(in_flight, 100, 0, answered=100, seconds=25.0)
    observed, counted = observe(group, Counters("nginx", 1, {"app": {FIRST: seen}}), 110.0)
    assert (observed.rate, counted) == (pytest.approx(10.0), in_flight)
    assert observed.seconds == {StepName.EMPTY: pytest.approx(stays)}
