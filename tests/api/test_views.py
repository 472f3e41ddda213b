"""What the views say of a server that does not get its share, as JSON and as `headgate status` words it."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from controller import cli_view
from controller.api import views
from controller.core import table
from controller.core.model import (
    Admin,
    Agent,
    Ejection,
    Group,
    Health,
    Peer,
    Quarantine,
    Server,
    State,
    Upstream,
    Warmth,
    WarmUp,
)
from controller.core.policy import BalancePolicy, HealthPolicy, Policy, WarmUpPolicy
from controller.ports import Counters, PeerCounters

NOW = 1000.0
KEYS = ("127.0.0.1:8001", "127.0.0.1:8002")
UP = Peer(health=Health.UP)


def group(peer: Peer, other: Peer = UP) -> Group:
    policy = Policy(health=HealthPolicy(panic=0.75), warm_up=WarmUpPolicy(duration=100, floor=0.01))
    servers = tuple(Server(key, key, "127.0.0.1", int(key[-4:])) for key in KEYS)
    return Group(Upstream("app", servers, policy=policy), dict(zip(KEYS, (peer, other), strict=True)))


def view(shown: Group, counters: dict[str, PeerCounters] | None = None) -> dict[str, Any]:
    seen = Counters("boot", 1, {"app": counters or {}})
    state = table.with_groups(State(configured=True), {"app": shown})
    return views.status(state, seen, "lua", NOW).model_dump(mode="json")


def words(answer: dict[str, Any], width: int = 120) -> list[str]:
    out = Console(file=io.StringIO(), width=width, highlight=False)
    out.print(cli_view.status(answer))
    assert isinstance(out.file, io.StringIO)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


def first(answer: dict[str, Any]) -> dict[str, Any]:
    server: dict[str, Any] = answer["upstreams"][0]["servers"][0]
    return server


def test_a_quarantine_is_shown_with_its_kind_and_the_rest_of_its_time() -> None:
    answer = view(group(replace(UP, quarantine=(Quarantine(NOW + 90, "it says that it goes offline", "mark"),))))
    assert first(answer)["quarantine"] == [{"remaining": 90.0, "why": "it says that it goes offline", "kind": "mark"}]
    lines = words(answer)
    assert "app: 1 of 2 servers serving" in lines
    assert f"{KEYS[0]}: quarantined for 90.0 s more (mark): it says that it goes offline" in lines


@pytest.mark.parametrize(
    ("ejection", "line"),
    [
        (Ejection(NOW + 30, "timeouts", 1), "ejected by nginx for 30.0 s more: timeouts in a row"),
        (
            Ejection(NOW + 60, "server_errors", 2),
            "ejected by nginx for 60.0 s more: 5xx answers in a row, 2 times by now",
        ),
    ],
)
def test_an_ejection_is_shown_with_its_reason_and_how_often(ejection: Ejection, line: str) -> None:
    answer = view(group(replace(UP, ejected=ejection)))
    assert first(answer)["ejected"] == {
        "reason": ejection.reason,
        "remaining": ejection.until - NOW,
        "times": ejection.times,
    }
    assert f"{KEYS[0]}: {line}" in words(answer)


def test_what_an_agent_says_is_shown_only_where_it_says_something() -> None:
    answer = view(group(replace(UP, agent=Agent(0.5, Admin.DRAIN, "stopped", 30))))
    assert first(answer)["agent"] == {"weight": 0.5, "admin": "drain", "down": "stopped", "max_conns": 30}
    assert f"{KEYS[0]}: its agent says: weight 50%, drain, stopped, at most 30 requests at once" in words(answer)
    assert first(view(group(UP)))["agent"] is None


def test_a_held_ramp_says_why_and_a_queued_one_that_it_waits() -> None:
    why = "error rate 12.0 % against 0.1 % of its warm peers"
    held = WarmUp(Warmth.HELD, 40, NOW - 5, 1, "restarted", why)
    answer = view(group(replace(UP, warm_up=held)))
    assert {key: first(answer)["warm_up"][key] for key in ("phase", "elapsed", "why")} == {
        "phase": "held",
        "elapsed": 40.0,
        "why": why,
    }
    lines = words(answer)
    assert f"{KEYS[0]}: its warm-up holds: {why}" in lines
    assert any(line.startswith(KEYS[0]) and "████░░░░░░ 40% held" in line for line in lines)
    queued = words(view(group(replace(UP, warm_up=WarmUp(Warmth.QUEUED, 0, NOW, 2)))))
    assert f"{KEYS[0]}: waits for its turn to warm up: enough of the upstream is cold already" in queued


def test_panic_is_told_from_nothing_being_up() -> None:
    down = Peer(health=Health.DOWN)
    few = words(view(group(down)))
    assert "app: too few servers are up, so health is ignored and 2 of 2 serve (panic)" in few
    none = words(view(group(down, down)))
    assert "app: no server is up, so the 2 of 2 that are down are tried (fail open)" in none


def test_the_method_is_the_one_in_force() -> None:
    shown = group(UP)
    assert view(shown)["upstreams"][0]["method"] == "round_robin"
    policy = replace(shown.upstream.policy, balance=BalancePolicy(method="ewma"))
    shown = replace(shown, upstream=replace(shown.upstream, policy=policy))
    assert view(shown)["upstreams"][0]["method"] == "ewma"


def test_counters_are_shown_as_nginx_has_them_and_a_mean_only_of_what_was_answered() -> None:
    counted = PeerCounters(3, 110, 9, answered=100, errors=7, timeouts=4, seconds=2.5)
    answer = view(group(UP), {KEYS[0]: counted})
    told = {key: first(answer)[key] for key in ("in_flight", "requests", "answered", "errors", "failures", "timeouts")}
    assert list(told.values()) == [3, 110, 100, 7, 9, 4]
    assert first(answer)["response_time"] == 0.025
    assert answer["upstreams"][0]["servers"][1]["response_time"] is None


def test_all_of_it_at_once_keeps_within_the_width() -> None:
    every = Peer(
        admin=Admin.DRAIN,
        health=Health.DOWN,
        reason="status: status 503",
        quarantine=(Quarantine(NOW + 7, "it changed 9 times in 60 s", "flapping"),),
        ejected=Ejection(NOW + 3, "errors", 4),
        warm_up=WarmUp(Warmth.WAITING, 0, NOW, 1),
    )
    shown = words(view(group(every), {KEYS[0]: PeerCounters(1234, 123456789, 98765)}))
    assert sum(line.startswith(KEYS[0]) for line in shown) == 3, "a row that is not folded, and a line for each reason"
    assert any(line.startswith(KEYS[0]) and "123,456,789" in line and "98,765" in line for line in shown)
