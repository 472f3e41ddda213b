"""Rise and fall, and what a verdict does to the table."""

from __future__ import annotations

import pytest

from controller.core import health
from controller.core.events import ConfigRead
from controller.core.model import Admin, Health, Peer, Warmth
from controller.core.policy import HealthPolicy
from tests.core.world import A, B, C, World, upstream

POLICY = HealthPolicy(rise=2, fall=3)


@pytest.mark.parametrize(
    ("start", "results", "verdict"),
    [
        (Health.UNKNOWN, "+", Health.UNKNOWN),
        (Health.UNKNOWN, "++", Health.UP),
        (Health.UNKNOWN, "--", Health.UNKNOWN),
        (Health.UNKNOWN, "---", Health.DOWN),
        (Health.UP, "--+--", Health.UP),
        (Health.UP, "--+---", Health.DOWN),
        (Health.DOWN, "+-+-+", Health.DOWN),
        (Health.DOWN, "+-++", Health.UP),
    ],
)
def test_only_results_in_a_row_change_a_verdict(start: Health, results: str, verdict: Health) -> None:
    peer = Peer(health=start)
    for result in results:
        peer = health.observe(peer, result == "+", "timeout", POLICY)
    assert peer.health is verdict


def test_a_result_that_changes_nothing_gives_back_the_same_object() -> None:
    peer = Peer(health=Health.UP, passes=2)
    assert health.observe(peer, True, "", POLICY) is peer
    down = Peer(health=Health.DOWN, fails=3, reason="refused")
    assert health.observe(down, False, "refused", POLICY) is down


def test_servers_that_nginx_served_before_headgate_came_serve_while_unknown() -> None:
    world = World().configure()
    assert world.serving() == (A, B, C)


def test_a_new_server_serves_only_after_its_probes_rose_and_warms_up() -> None:
    world = World().configure(upstream(2))
    world.take(ConfigRead((upstream(3),)))
    assert world.serving() == (A, B)
    world.probe(C)
    assert world.entry(C)["state"] == "down"
    world.probe(C)
    assert world.serving() == (A, B, C)
    assert world.peer(C).warm_up.phase is Warmth.RUNNING
    assert world.entry(C)["warm_up"] == {
        "elapsed_ms": 0,
        "duration_ms": 10000,
        "curve": 1.0,
        "floor": 0.1,
        "starts": "healthy",
        "held": False,
        "epoch": 1,
    }


def test_the_first_pass_of_a_server_that_served_already_starts_no_warm_up() -> None:
    world = World().configure().probe(A, times=5)
    assert world.peer(A).health is Health.UP
    assert world.peer(A).warm_up.phase is Warmth.NONE


def test_a_server_that_recovers_warms_up_however_long_it_was_down() -> None:
    world = World().configure().probe(A, times=2).probe(A, ok=False, times=3)
    assert world.serving() == (B, C)
    world.pass_time(5000).probe(A, times=2)
    assert world.peer(A).warm_up.cause == "recovered"
    assert world.peer(A).warm_up.phase is Warmth.RUNNING


def test_health_alone_never_empties_an_upstream() -> None:
    world = World().configure()
    for key in (A, B, C):
        world.probe(key, ok=False, times=3)
    assert world.state.groups["app"].fail_open
    assert [note.text for note in world.notes if note.kind == "fail-open"] == [
        "app fails open: no server is up, so those that are down serve"
    ]
    world.probe(B, times=2)
    assert not world.state.groups["app"].fail_open
    assert world.serving() == (B,)


def test_a_failed_open_upstream_does_not_bring_back_what_an_operator_took_out() -> None:
    world = World().configure().admin(A, Admin.MAINT)
    world.probe(B, ok=False, times=3).probe(C, ok=False, times=3)
    assert world.state.groups["app"].fail_open
    assert world.entry(A)["state"] == "maint"


def test_a_passing_probe_never_undrains() -> None:
    world = World().configure().admin(B, Admin.MAINT)
    world.probe(B, times=10)
    assert world.peer(B).admin is Admin.MAINT
    assert world.peer(B).health is Health.UNKNOWN, "under maintenance probes rest"


def test_after_maintenance_a_server_is_probed_before_it_serves() -> None:
    world = World().configure().probe(A, times=2).admin(A, Admin.MAINT).admin(A, Admin.READY)
    assert world.entry(A)["state"] == "down"
    world.probe(A, times=2)
    assert world.entry(A)["state"] == "up"


def test_steady_results_publish_nothing() -> None:
    world = World().configure().probe(A, times=2).probe(B, times=2).probe(C, times=2)
    revision, state = world.state.revision, world.state
    world.probe(A, times=50).probe(B, times=50)
    assert world.state is state
    assert world.state.revision == revision
