"""A table that is all that is left says where the traffic goes: the next one sends it the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.core import recall, table
from controller.core.events import ConfigRead, PlaneSeen, Restored
from controller.core.model import Admin, Health, Peer, Quarantine, State, Warmth, WarmUp
from controller.core.step import step
from tests.core.world import upstream

NOW = 1000.0
UP = Peer(health=Health.UP)
PEERS = {
    "up": UP,
    "warming": replace(UP, warm_up=WarmUp(Warmth.RUNNING, 4.0, NOW, 7, "restarted")),
    "waiting for a request": replace(UP, warm_up=WarmUp(Warmth.WAITING, 0.0, NOW, 8, "new")),
    "down": Peer(health=Health.DOWN),
    "drain": replace(UP, admin=Admin.DRAIN, forgiven=3),
    "sessions": replace(UP, admin=Admin.DRAIN, sessions=True),
    "maint": replace(UP, admin=Admin.MAINT),
    "quarantine": replace(UP, quarantine=(Quarantine(NOW + 60, "it goes offline"),)),
}


def served(state: State, now: float) -> list[dict[str, Any]]:
    made: Any = table.table(state, now)
    servers = made["upstreams"]["app"]["servers"]
    return [{name: each.get(name) for name in ("key", "state", "warm_up", "forgive")} for each in servers]


def test_what_is_recalled_from_a_table_makes_the_same_table_again() -> None:
    app = upstream(len(PEERS))
    app = replace(app, policy=replace(app.policy, warm_up=replace(app.policy.warm_up, starts="first-request")))
    state, _ = step(State(), ConfigRead((app,)), NOW)
    for server, peer in zip(app.servers, PEERS.values(), strict=True):
        state = table.with_peer(state, "app", server.key, peer)
    before = served(state, NOW)
    assert len({each["state"] for each in before}) == 6

    known = recall.peers(table.table(state, NOW), NOW)
    after, _ = step(State(), Restored(0, 1, 99, known, {}), NOW)
    after, _ = step(after, PlaneSeen("boot", 41), NOW)
    after, _ = step(after, ConfigRead((app,)), NOW)
    assert served(after, NOW) == before
    assert after.revision > 41


def test_a_server_that_waited_for_its_turn_is_probed_first() -> None:
    found = recall.peers({"upstreams": {"app": {"servers": [{"key": "a", "state": "waiting"}]}}}, NOW)
    assert found == {("app", "a"): Peer(health=Health.DOWN)}


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"upstreams": []},
        {"upstreams": {"app": {}}},
        {"upstreams": {"app": {"servers": [{"key": "a"}]}}},
        {"upstreams": {"app": {"servers": [{"key": "a", "state": "odd"}]}}},
        {"upstreams": {"app": {"servers": [{"key": "a", "state": "up", "warm_up": {"elapsed_ms": "x"}}]}}},
        {"upstreams": {"app": {"servers": None}}},
    ],
)
def test_from_what_is_no_table_nothing_is_recalled(odd: dict[str, Any]) -> None:
    assert recall.peers(odd, NOW) == {}


def test_addresses_of_host_names_are_recalled_by_the_line_that_has_them() -> None:
    rows = [
        {"key": "app:80@10.0.0.1", "address": "app:80", "ip": "10.0.0.1"},
        {"key": "app:80@10.0.0.2", "address": "app:80", "ip": "10.0.0.2"},
        {"key": "127.0.0.1:81", "ip": "127.0.0.1"},
    ]
    known = {"upstreams": {"one": {"servers": rows}, "two": {"servers": rows[:1]}}}
    assert recall.addresses(known) == {"app:80": ("10.0.0.1", "10.0.0.2")}
    assert recall.addresses({}) == recall.addresses({"upstreams": 3}) == {}
