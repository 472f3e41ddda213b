"""What the routing table says. Every table here stands in tests/fixtures/tables, with which nginx's side is tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from controller.core import table
from controller.core.model import Admin, Group, Health, Peer, Quarantine, Routing, State, Upstream, Warmth, WarmUp
from controller.core.policy import BalancePolicy, OutlierPolicy, Policy, QuarantinePolicy, StickyPolicy, WarmUpPolicy
from tests.core.world import A, B, C, server

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tables"
NOW = 1000.0
UP = Peer(health=Health.UP)
PLAIN = Policy(
    warm_up=WarmUpPolicy(duration=120.0),
    outlier=OutlierPolicy(errors=0, timeouts=0, server_errors=0),
    quarantine=QuarantinePolicy(marks=False),
)


def state(*upstreams: Upstream, **peers: Peer) -> State:
    """Servers 8001 and on, by the names a, b, c, d; up where nothing else is said."""
    groups = {}
    for each in upstreams:
        names = dict(zip((s.key for s in each.servers), "abcd", strict=False))
        groups[each.name] = Group(each, {key: peers.get(name, UP) for key, name in names.items()})
    return State(revision=1, groups=groups)


def app(policy: Policy, count: int = 3, **fields: str | bool) -> Upstream:
    servers = tuple(server(8001 + at) for at in range(count))
    return replace(Upstream("app", servers, policy=policy), **fields)  # type: ignore[arg-type]


def warm(phase: Warmth, elapsed: float = 0.0, epoch: int = 1) -> Peer:
    return replace(UP, warm_up=WarmUp(phase, elapsed, NOW, epoch))


TABLES = {
    "policies_all_off": state(app(PLAIN)),
    "policies_defaults": state(app(Policy())),
    "policies_all_on": state(
        app(
            Policy(
                warm_up=WarmUpPolicy(ignore_paths=("/healthz", "/ready")),
                balance=BalancePolicy("ewma"),
                sticky=StickyPolicy("route", path="/shop", same_site="Strict", max_age=3600),
                outlier=OutlierPolicy(3, 0, 7, base=10.0, cap=60.5, max_ejected=0.5),
                quarantine=QuarantinePolicy(90.0),
            )
        )
    ),
    "policies_hash_bounded": state(
        app(replace(PLAIN, balance=BalancePolicy("hash", "$cookie_session", bound=1.25)), method="least_conn"),
        replace(app(replace(PLAIN, balance=BalancePolicy("hash", "$uri", consistent=False, bound=2.0))), name="plain"),
        replace(
            app(replace(PLAIN, balance=BalancePolicy(bound=1.5)), method="hash", hash_key="$uri", consistent=True),
            name="of nginx.conf",
        ),
    ),
    "policies_random": state(
        app(replace(PLAIN, balance=BalancePolicy("random", two=False)), method="hash", hash_key="$uri"),
        replace(app(PLAIN, method="random", two=True), name="of nginx.conf"),
    ),
    "warm_up_steps": state(
        app(replace(PLAIN, warm_up=WarmUpPolicy(60.0, 1.0, 0.0625, 16, "healthy"))), c=warm(Warmth.RUNNING, 12.5)
    ),
    "warm_up_phases": state(
        app(PLAIN, 4),
        a=warm(Warmth.WAITING, epoch=3),
        b=warm(Warmth.RUNNING, epoch=4),
        c=warm(Warmth.HELD, 48.0, epoch=5),
        d=warm(Warmth.QUEUED, epoch=6),
    ),
    "outliers_beside_ejections": state(
        app(Policy(outlier=OutlierPolicy(max_ejected=0.5)), 4),
        b=replace(UP, quarantine=(Quarantine(NOW + 30, "success rate 0.0 % against 100.0 % of its peers", "outlier"),)),
        c=replace(UP, quarantine=(Quarantine(NOW + 30, "its health changed 6 times within 60 s", "flapping"),)),
    ),
    "warm_up_beside_sessions": state(
        app(PLAIN), a=replace(warm(Warmth.DONE), admin=Admin.DRAIN, sessions=True), b=warm(Warmth.RUNNING, 30.0)
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_that_nginx_is_tested_with(name: str) -> None:
    case = json.loads((FIXTURES / f"{name}.json").read_text())
    assert case["expect"] == {"status": 200}
    assert json.loads(json.dumps(table.table(TABLES[name], NOW))) == case["table"]


def test_a_held_ramp_says_its_clock_and_one_that_runs_does_not_wait_again() -> None:
    written = table.table(TABLES["warm_up_phases"], NOW + 10)["upstreams"]["app"]["servers"]  # type: ignore[index]
    ramps = [each.get("warm_up") for each in written]
    assert [each and each["elapsed_ms"] for each in ramps] == [0, 10_000, 48_000, None]
    assert [each and each["held"] for each in ramps] == [False, False, True, None]
    at_once = table.table(TABLES["warm_up_phases"], NOW)["upstreams"]["app"]["servers"]  # type: ignore[index]
    assert at_once[1]["warm_up"]["elapsed_ms"] == 1, "0 would mean: wait for the first request"


@pytest.mark.parametrize(
    "peer",
    [
        warm(Warmth.HELD, 47.0),
        warm(Warmth.RUNNING, 48.0),
        warm(Warmth.HELD, 48.0, epoch=9),
        warm(Warmth.QUEUED),
        warm(Warmth.DONE),
    ],
)
def test_what_nginx_must_know_of_a_ramp_is_a_new_revision(peer: Peer) -> None:
    before = state(app(PLAIN), c=warm(Warmth.HELD, 48.0))
    assert table.with_peer(before, "app", C, peer).revision == 2


def test_what_nginx_finds_by_itself_is_no_new_revision() -> None:
    before = state(app(PLAIN), c=warm(Warmth.RUNNING, 48.0))
    assert table.with_peer(before, "app", C, warm(Warmth.RUNNING, 50.0)).revision == 1


def test_a_first_request_is_a_new_revision_for_an_nginx_that_is_restarted_must_not_wait_for_it_again() -> None:
    before = state(app(PLAIN), b=warm(Warmth.WAITING))
    assert table.with_peer(before, "app", B, warm(Warmth.RUNNING)).revision == 2


def test_who_waits_for_its_turn_is_healthy_and_does_not_serve() -> None:
    group = state(app(PLAIN), a=warm(Warmth.QUEUED)).groups["app"]
    line = group.upstream.servers[0]
    assert table.routing_of(line, group.peers[A]) is Routing.WAITING
    assert table.serving(group) == (B, C)
    assert table.effective_weight(group, line, NOW) == 0
    assert table.routing_of(line, replace(group.peers[A], health=Health.DOWN)) is Routing.DOWN
    assert table.routing_of(line, replace(group.peers[A], admin=Admin.DRAIN)) is Routing.DRAIN


def test_backups_have_a_base_of_their_own() -> None:
    lines = (server(8001), server(8002, weight=4), server(8003, backup=True, weight=2))
    world = state(
        Upstream("app", lines, policy=PLAIN),
        a=warm(Warmth.RUNNING, 30.0),
        b=warm(Warmth.RUNNING, 60.0),
        c=warm(Warmth.RUNNING, 90.0),
    )
    assert table.effective_weights(world.groups["app"], NOW) == pytest.approx({A: 0.5, B: 4.0, C: 2.0})
