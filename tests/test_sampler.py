"""Readings of nginx's counters become what each server got in each second."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.ports import Counters, PeerCounters, TrafficRecord
from controller.sampler import LEAST, MOST, Sampler

WALL = 1_000_000.0


def counters(boot: str = "boot", **servers: int | PeerCounters) -> Counters:
    seen = {k: PeerCounters(0, v, 0, answered=v) if isinstance(v, int) else v for k, v in servers.items()}
    return Counters(boot, 1, {"app": seen})


def taken(sampler: Sampler, *readings: tuple[float, Counters]) -> tuple[TrafficRecord, ...]:
    for at, reading in readings:
        sampler.read(reading, at, WALL + at)
    return sampler.take()


def test_what_was_counted_is_spread_evenly_over_the_seconds_between_two_readings() -> None:
    rows = taken(Sampler(), (0.5, counters(a=100)), (2.5, counters(a=140)))
    assert [(row.at - WALL, row.requests) for row in rows] == [(0, 10.0), (1, 20.0), (2, 10.0)]
    assert {(row.upstream, row.server) for row in rows} == {("app", "a")}


def test_every_count_is_kept_and_requests_in_flight_are_shown_in_each_second() -> None:
    old = PeerCounters(1, 100, 10, answered=90, errors=5, seconds=9.0)
    new = PeerCounters(3, 110, 12, answered=98, errors=9, seconds=9.8)
    (row,) = taken(Sampler(), (0.0, counters(a=old)), (1.0, counters(a=new)))
    assert row == TrafficRecord("app", "a", int(WALL), 10, 8, 4, 2, pytest.approx(0.8), 3)


@given(st.lists(st.tuples(st.floats(1.0, MOST - 1.0), st.integers(0, 1000)), min_size=1, max_size=30))
def test_however_the_readings_come_nothing_is_lost_or_doubled(steps: list[tuple[float, int]]) -> None:
    sampler, at, total = Sampler(), 0.0, 0
    sampler.read(counters(a=0), at, WALL)
    for wait, more in steps:
        at, total = at + wait, total + more
        sampler.read(counters(a=total), at, WALL + at)
    seconds: dict[int, float] = defaultdict(float)
    for row in sampler.take():
        seconds[row.at] += row.requests
        assert row.requests >= 0
        assert WALL - 1 < row.at <= WALL + at
    assert sum(seconds.values()) == pytest.approx(total)
    assert sampler.take() == ()


def test_readings_that_follow_closely_wait_for_a_later_one() -> None:
    sampler = Sampler()
    assert taken(sampler, (0.0, counters(a=0)), (LEAST / 2, counters(a=10))) == ()
    assert sum(row.requests for row in taken(sampler, (1.0, counters(a=20)))) == pytest.approx(20)


def test_another_nginx_and_a_server_that_came_back_begin_anew() -> None:
    sampler = Sampler()
    rows = taken(sampler, (0.0, counters(a=100)), (1.0, counters("other", a=7)))
    assert rows == ()
    assert [row.requests for row in taken(sampler, (2.0, counters("other", a=9)))] == [2]
    assert taken(sampler, (3.0, counters("other", a=3))) == ()
    assert [row.requests for row in taken(sampler, (4.0, counters("other", a=4)))] == [1]


def test_after_a_long_silence_nobody_knows_when_the_requests_came() -> None:
    assert taken(Sampler(), (0.0, counters(a=0)), (MOST + 1, counters(a=10))) == ()


def test_a_server_without_traffic_has_no_rows_but_one_with_requests_under_way_has() -> None:
    busy = PeerCounters(2, 5, 0, answered=3)
    rows = taken(Sampler(), (0.0, counters(a=5, b=busy)), (1.0, counters(a=5, b=busy)))
    assert [(row.server, row.requests, row.in_flight) for row in rows] == [("b", 0, 2)]


def test_upstreams_that_are_read_apart_do_not_disturb_each_other() -> None:
    sampler = Sampler()
    for at, seen in ((0.0, {"app": 0, "api": 0}), (1.0, {"app": 10}), (2.0, {"app": 20, "api": 8})):
        reading = {name: {"a": PeerCounters(0, count, 0)} for name, count in seen.items()}
        sampler.read(Counters("boot", 1, reading), at, WALL + at)
    found = [(row.upstream, row.at - WALL, row.requests) for row in sampler.take()]
    assert found == [("app", 0, 10), ("app", 1, 10), ("api", 0, 4), ("api", 1, 4)]
