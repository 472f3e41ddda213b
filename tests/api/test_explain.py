"""What is said of a server, and on what it rests: state and records in, sentences out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from controller.api.explain import Facts, explain, warmed
from controller.core import table
from controller.core.model import (
    Admin,
    Agent,
    Ejection,
    Group,
    Health,
    Peer,
    Plane,
    Quarantine,
    Server,
    State,
    Upstream,
    Warmth,
    WarmUp,
)
from controller.core.policy import BalancePolicy, HealthPolicy, Policy, StickyPolicy, WarmUpPolicy
from controller.ports import ChangeRecord, Counters, EventRecord, PeerCounters, StepRecord, TrafficRecord

NOW = 1000.0
WALL = 1_700_000_000.0
FIRST, SECOND = "127.0.0.1:8001", "127.0.0.1:8002"
UP = Peer(health=Health.UP)
WARM = WarmUpPolicy(duration=100.0, curve=1.0, floor=0.1)
GET, STILL, BEGIN, CURVE, LONG = (
    "Does it get",
    "Does traffic still",
    "Why did its warm-up",
    "Why is the curve",
    "Why did its last",
)


def group(peer: Peer, name: str = "app", warm_up: WarmUpPolicy = WARM, **policy: Any) -> Group:
    servers = tuple(Server(key, key, "127.0.0.1", int(key[-4:])) for key in (FIRST, SECOND))
    policies = Policy(warm_up=warm_up, health=HealthPolicy(rise=2), **policy)
    return Group(Upstream(name, servers, policy=policies), {FIRST: peer, SECOND: UP})


def facts(peer: Peer, *groups: Group, counters: dict[str, PeerCounters] | None = None, **known: Any) -> Facts:
    groups = groups or (group(peer),)
    state = State(configured=True, plane=known.pop("plane", Plane("boot", 1, "")))
    state = replace(table.with_groups(state, {each.upstream.name: each for each in groups}), revision=1)
    shown = state.groups[groups[0].upstream.name]
    seen = Counters("boot", 1, {"app": counters or {}})
    return Facts(state, shown, FIRST, seen, known.pop("data_plane", "lua"), NOW, WALL, **known)


def said(known: Facts, question: str) -> list[str]:
    return [sentence for asked, sentences in explain(known) if asked.startswith(question) for sentence in sentences]


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def event(number: int, at: float, kind: str, text: str, server: str = FIRST) -> EventRecord:
    return EventRecord(number, at, kind, text, "app", server)


def traffic(*seconds: float, server: str = FIRST, requests: float = 5.0) -> tuple[TrafficRecord, ...]:
    return tuple(TrafficRecord("app", server, int(at), requests, requests, 0, 0, 0, 0) for at in seconds)


def test_a_server_that_serves_is_told_its_share() -> None:
    assert said(facts(UP), GET) == ["It gets 50% of the new requests: its weight now is 1 of 2 in all."]
    assert said(facts(UP), STILL) == []


def test_a_warming_server_is_told_how_far_it_is() -> None:
    warming = replace(UP, warm_up=WarmUp(Warmth.RUNNING, 25.0, NOW, 3, "restarted"))
    assert said(facts(warming), GET) == [
        "It gets 20% of the new requests: its weight now is 0.25 of 1.25 in all.",
        "It warms up, and has 25% of its full weight.",
    ]


def test_a_warming_server_that_was_never_picked_is_told_when_it_is_due() -> None:
    warming = replace(UP, warm_up=WarmUp(Warmth.RUNNING, 25.0, NOW, 3, "restarted"))
    waits = "In this warm-up nginx has not picked it yet; by its weight its first request is due in 5."
    sticky = group(warming, sticky=StickyPolicy("route"))
    for known, expected in (
        (facts(warming, counters={FIRST: PeerCounters(0, 0, 0, 3)}), True),
        (facts(warming, counters={FIRST: PeerCounters(0, 9, 0, 3, warm_picked=True)}), False),
        (facts(warming, counters={FIRST: PeerCounters(0, 0, 0, 2)}), False),
        (facts(warming, counters={FIRST: PeerCounters(0, 0, 0, 3)}, data_plane="reload"), False),
        (facts(warming, sticky, counters={FIRST: PeerCounters(0, 0, 0, 3)}), False),
    ):
        assert (waits in said(known, GET)) is expected


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        (replace(UP, admin=Admin.MAINT), "it is under maintenance"),
        (replace(UP, admin=Admin.DRAIN), "it drains"),
        (replace(UP, agent=Agent(admin=Admin.DRAIN)), "its agent says so"),
        (replace(UP, agent=Agent(down="failing")), "its agent says that it is down (failing)"),
        (replace(UP, health=Health.DOWN, reason="timeout"), "its probes fail (timeout)"),
        (Peer(), "no probe has passed yet"),
        (
            replace(UP, quarantine=(Quarantine(NOW + 60, "announced by hand", "notice"),)),
            "it is kept away for 60 s more (notice): announced by hand",
        ),
        (
            replace(UP, quarantine=(Quarantine(NOW + 30, "5 changes", "flapping"),)),
            "it is kept away for 30 s more (flapping): 5 changes",
        ),
        (
            replace(UP, ejected=Ejection(NOW + 20, "timeouts", 1)),
            "nginx keeps it away for 20 s more after 5 timeouts in a row",
        ),
        (
            replace(UP, warm_up=WarmUp(Warmth.QUEUED, 0.0, NOW, 3, "new")),
            "it waits for its turn to warm up, for as much of the upstream is cold as warm_up.max_cold allows",
        ),
    ],
)
def test_a_server_without_traffic_is_told_why(peer: Peer, why: str) -> None:
    assert said(facts(peer), GET) == [f"No new request goes to it: {why}."]


def test_since_when_a_server_is_away_comes_from_the_record_that_put_it_away() -> None:
    down = replace(UP, health=Health.DOWN, reason="timeout")
    records = (event(1, WALL - 90, "health", "app: is down"), event(2, WALL - 10, "admin", "app: is now ready"))
    assert said(facts(down, events=records), GET)[0].endswith(f"(timeout), since {clock(WALL - 90)}.")
    drain = StepRecord("drain", FIRST, 0, "done", WALL - 31, WALL - 30, "")
    change = ChangeRecord(4, "drain", "app", "done", False, WALL - 31, WALL - 20, "", (drain,))
    drained = facts(replace(UP, admin=Admin.DRAIN), change=change, events=records[:1])
    assert said(drained, GET)[0].endswith(f"it drains, since {clock(WALL - 30)}.")


def test_a_drained_server_still_has_what_began_before_its_sessions_and_its_place_in_another_upstream() -> None:
    sticky = StickyPolicy(cookie="route", drain=30.0, idle=5.0)
    peer = replace(UP, admin=Admin.DRAIN, sessions=True)
    known = facts(
        peer, group(peer, sticky=sticky), group(UP, "api"), counters={FIRST: PeerCounters(4, 10, 0)},
        events=(event(1, WALL - 60, "admin", "drains"),), traffic=traffic(WALL - 62, WALL - 60),
    )  # fmt: skip
    assert said(known, STILL) == [
        "4 requests that began before are still under way; a drain gives them 30 s (drain.timeout).",
        "It keeps the sessions that the cookie route binds to it for up to 30 s (sticky.drain),"
        " or until none asked for 5 s.",
        "The same address is a server of the upstream api, too, and serves there.",
        f"nginx has sent it no new request since {clock(WALL - 60)}.",
        "Headgate's probes go on, and stand in its access log; they are not counted as traffic.",
    ]


def test_requests_that_were_recorded_after_it_went_offline_are_counted_and_dated() -> None:
    known = facts(
        replace(UP, admin=Admin.MAINT),
        events=(event(1, WALL - 60, "admin", "maint"),),
        traffic=traffic(WALL - 61, WALL - 59, WALL - 50, WALL - 40),
    )
    at, last = clock(WALL - 60), clock(WALL - 40)
    assert said(known, STILL) == [f"nginx has sent it 10 requests since it went offline at {at}, the last at {last}."]


def test_a_table_that_nginx_has_not_taken_yet_is_named_as_the_cause() -> None:
    known = facts(replace(UP, admin=Admin.MAINT), plane=Plane("boot", 0, "connection refused"))
    assert said(known, STILL)[0] == (
        "nginx still serves table 0, and 1 is wanted: connection refused. Until then new requests may reach it."
    )


def test_where_nothing_is_known_to_send_to_it_callers_beside_nginx_are_suspected() -> None:
    assert said(facts(replace(UP, admin=Admin.MAINT)), STILL) == [
        "None is under way. What reaches it all the same does not come through this nginx and this upstream."
    ]


def test_a_warm_up_that_runs_says_when_and_why_it_began_and_when_its_first_request_came() -> None:
    records = (
        event(1, WALL - 51, "health", "app: is up; 2 of 2 servers serving"),
        event(2, WALL - 50, "warm-up", "app: it warms up over 100 s from its first request on (restarted)"),
    )
    peer = replace(UP, warm_up=WarmUp(Warmth.RUNNING, 30.0, NOW, 3, "restarted"))
    policy = replace(WARM, ignore_paths=("/live",))
    known = facts(peer, group(peer, warm_up=policy), events=records, traffic=traffic(WALL - 70, WALL - 30))
    assert said(known, BEGIN) == [
        f"At {clock(WALL - 50)} was recorded: {records[1].text}.",
        f"It was called up at {clock(WALL - 51)}, after 2 good probes in a row (check.rise).",
        "The ramp runs from the first request on, other than for /live (warm_up.starts);"
        f" the first came at {clock(WALL - 30)}.",
    ]
    waiting = replace(peer, warm_up=WarmUp(Warmth.WAITING, 0.0, NOW, 3, "restarted"))
    known = facts(waiting, group(waiting, warm_up=policy), events=records)
    assert said(known, BEGIN)[-1].startswith("The ramp has not begun to run: no request has come, other than for /live")
    known = facts(peer, group(peer, warm_up=replace(WARM, starts="healthy")), events=records)
    assert said(known, BEGIN)[-1] == 'The ramp runs from there, for warm_up.starts is "healthy".'


def test_where_there_is_no_warm_up_the_reason_is_said() -> None:
    assert said(facts(UP, group(UP, warm_up=WarmUpPolicy(duration=0))), BEGIN) == [
        "It has none: warm_up.duration is 0."
    ]
    alone = group(UP)
    alone = replace(alone, upstream=replace(alone.upstream, servers=alone.upstream.servers[:1]), peers={FIRST: UP})
    assert said(facts(UP, alone), BEGIN) == ["It has none: no other server could take what it would leave."]
    queued = replace(UP, warm_up=WarmUp(Warmth.QUEUED, 0.0, NOW, 3, "new"))
    assert said(facts(queued), BEGIN)[0].startswith("It has not begun (new): as much of the upstream is cold")
    assert said(facts(UP), BEGIN)[0].startswith("None is recorded")


RAMP = (
    event(1, WALL - 500, "warm-up", "app: it holds at 10 % of its weight: of an earlier one"),
    event(2, WALL - 90, "warm-up", "app: it warms up over 100 s (restarted)"),
    event(3, WALL - 60, "warm-up", "app: it holds at 30 % of its weight: error rate 9.0 % against 0.0 %"),
    event(4, WALL - 20, "warm-up", "ramp ineffective: no warm server in app", server=""),
    event(5, WALL - 1, "warm-up", "app: it is warm"),
)


def test_a_curve_is_explained_by_what_held_it_and_by_how_it_is_configured() -> None:
    peer = replace(UP, warm_up=WarmUp(Warmth.DONE, 100.0, NOW, 3, "restarted"))
    assert said(facts(peer, events=RAMP, rate=100.0), CURVE) == [
        f"At {clock(WALL - 60)} was recorded: {RAMP[2].text}.",
        f"At {clock(WALL - 20)} was recorded: {RAMP[3].text}.",
        "As configured it begins with 10%, has 50% after 50 s and all after 100 s (floor 10%, curve 1).",
    ]
    assert said(facts(peer), CURVE) == []
    assert warmed(facts(peer, events=RAMP)) == (WALL - 90, WALL + 10)
    assert warmed(facts(peer)) is None


def test_stairs_methods_sessions_and_single_requests_are_named_where_they_shape_the_curve() -> None:
    peer = replace(UP, warm_up=WarmUp(Warmth.DONE, 100.0, NOW, 3, "restarted"))
    odd = group(
        peer, warm_up=replace(WARM, steps=4), balance=BalancePolicy(method="hash", key="$uri"),
        sticky=StickyPolicy(cookie="route"),
    )  # fmt: skip
    found = said(facts(peer, odd, events=RAMP[:2], rate=2.0, data_plane="reload"), CURVE)
    assert found[0] == "Nothing is recorded that held it or made it jump."
    assert found[2:] == [
        "It goes up in 4 stairs of 25 s (warm_up.steps).",
        "On the reload plane weights are whole numbers and change with reloads, so the curve has stairs.",
        "The method hash chooses by more than the weight, so the share follows it only roughly.",
        "Requests of a session go where its cookie says, whatever the weights.",
        "The upstream had 2.0 requests a second: at its beginning the ramp was one request in 10 s,"
        " so the line consists of single requests.",
    ]


def test_a_release_is_explained_by_its_longest_stages_and_its_place_in_the_queue() -> None:
    times = (("find", 0, 0.05), ("empty", 0.05, 8.05), ("settle", 8.05, 11.0), ("exit", 11.0, 16.0), ("up", 16.0, 17.0))
    steps = (
        StepRecord("warm", SECOND, 0, "done", WALL - 130, WALL - 100, ""),
        *(StepRecord(name, FIRST, 1, "done", WALL - 100 + a, WALL - 100 + b, "") for name, a, b in times),
        StepRecord("warm", FIRST, 1, "skipped", None, WALL - 80, ""),
    )
    change = ChangeRecord(9, "rollout", "app", "failed", False, WALL - 130, WALL - 80, "it went down", steps)
    assert said(facts(UP, change=change), LONG) == [
        f"Change 9 (rollout) began at {clock(WALL - 130)} and took 50.0 s for 2 servers in 2 batches.",
        "This server's turn came after 30.0 s: batches follow one another.",
        "8.0 s of it went by in empty: requests that had begun before were still under way, up to drain.timeout.",
        "5.0 s of it went by in exit: its process finished what it had, up to process.graceful_timeout and margin.",
        "3.0 s of it went by in settle: the wait after deregistration, drain.settle.",
        "It ended with: it went down.",
    ]


def test_a_record_of_another_day_is_told_with_its_date() -> None:
    records = (event(1, WALL - 2 * 86400, "health", "down"),)
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(records[0].at))
    assert said(facts(replace(UP, health=Health.DOWN), events=records), GET)[0].endswith(f"since {date}.")
