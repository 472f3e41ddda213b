"""Flap damping: who comes and goes too often rests, longer each time, and never the last one that serves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.core import table
from controller.core.events import AgentSaid, ProbeResult
from controller.core.model import Admin, Health, Peer, Routing, Server, Warmth
from controller.core.policy import HealthPolicy
from controller.core.table import routing_of
from tests.core.world import POLICY, A, B, C, World, upstream

FLAPS = replace(POLICY, health=HealthPolicy(rise=1, fall=1, flaps=3, flap_window=60, flap_hold=30, flap_cap=100))


def test_more_changes_than_allowed_within_the_window_are_a_rest_and_it_warms_up_after() -> None:
    world = flap(world_up(), A, 3)
    assert not world.peer(A).quarantine
    flap(world, A, 1)
    assert world.peer(A).health is Health.UP
    assert world.serving() == (B, C)
    assert world.notes[-1].text == ("app: 127.0.0.1:8001 flaps: it changed 4 times within 60 s and rests for 30 s")
    world.pass_time(29.5)
    assert world.serving() == (B, C)
    world.pass_time(0.5)
    assert world.serving() == (A, B, C)
    assert world.peer(A).warm_up.phase is Warmth.RUNNING
    assert world.notes[-2].text == (
        "app: 127.0.0.1:8001 has been away long enough (its health changed 4 times within 60 s); 3 of 3 servers serving"
    )


def test_changes_that_lie_apart_are_no_flapping() -> None:
    world = world_up()
    for _ in range(20):
        world.pass_time(21)
        flap(world, A, 1)
    assert not world.peer(A).quarantine


def test_a_server_that_flaps_on_while_it_rests_stays_away_without_a_word_and_without_a_new_table() -> None:
    world = flap(world_up(), A, 4)
    for at in range(300):
        world.pass_time(1)
        flap(world, A, 1)
        if at == 20:  # an earlier warm-up is over
            revision, notes = world.state.revision, len(world.notes)
    assert (world.state.revision, len(world.notes)) == (revision, notes)
    assert world.peer(A).quarantine[0].until == world.now + 100, "the cap"


def test_rests_grow_up_to_the_cap_and_fall_back_in_calm_times() -> None:
    world, lengths = world_up(), []
    for _ in range(5):
        flap(world, A, 4 - len(world.peer(A).changed))
        lengths.append(world.peer(A).quarantine[0].until - world.now)
        world.pass_time(lengths[-1])
    assert lengths == [30, 60, 90, 100, 100]
    assert world.peer(A).rests == 4
    world.pass_time(150)
    flap(world, A, 1)
    assert world.peer(A).rests == 2, "two windows were calm"


def test_the_last_serving_server_does_not_rest() -> None:
    world = world_up().probe(B, ok=False).probe(C, ok=False)
    flap(world, A, 10)
    assert not world.peer(A).quarantine
    told = [note.text for note in world.notes if note.kind == "flapping"]
    assert told == [
        "app: 127.0.0.1:8001 flaps: it changed 4 times within 60 s, but no other server serves, so it stays"
    ]


def test_who_rests_comes_back_early_when_the_others_die() -> None:
    world = flap(world_up(), A, 4)
    world.probe(B, ok=False)
    assert world.serving() == (C,)
    world.probe(C, ok=False)
    assert world.serving() == (A,)
    assert not world.state.groups["app"].fail_open
    assert "app: 127.0.0.1:8001 comes back early, for no other server serves" in [note.text for note in world.notes]


def test_a_rest_ends_with_the_operators_word_and_not_with_a_restart() -> None:
    world = flap(world_up(), A, 4)
    world.probe(A, ok=False).probe(A)
    assert world.serving() == (B, C)
    world.admin(A, Admin.READY)
    assert world.serving() == (A, B, C)
    assert world.peer(A).rests == 0
    assert world.peer(A).changed == ()


def test_it_can_be_switched_off() -> None:
    policy = replace(FLAPS, health=replace(FLAPS.health, flaps=0))
    world = World().configure(upstream(policy=policy)).probe(A).probe(B).probe(C)
    flap(world, A, 50)
    assert not world.peer(A).quarantine


def test_an_agent_that_says_down_and_the_probe_that_finds_the_same_are_one_change() -> None:
    world = world_up()
    world.take(AgentSaid("app", A, "down"))
    world.probe(A, ok=False)
    world.take(AgentSaid("app", A, "up"))
    world.probe(A)
    assert len(world.peer(A).changed) == 2
    for words in ("down", "up"):
        world.take(AgentSaid("app", A, words))
    assert world.serving() == (B, C), "an agent may flap as well"


def test_planned_restarts_are_no_flapping() -> None:
    world = world_up()
    for _ in range(10):
        world.admin(A, Admin.MAINT).admin(A, Admin.READY).probe(A)
    assert not world.peer(A).quarantine


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.5, 1, 2, 5, 20]), st.booleans()), min_size=100, max_size=400))
def test_however_a_server_flaps_it_comes_and_goes_a_bounded_number_of_times(results: list[tuple[float, bool]]) -> None:
    world = world_up()
    moves = []
    for wait, ok in results:
        world.pass_time(wait)
        served = A in world.serving()
        world.take(ProbeResult("app", A, ok, "refused"))
        if (A in world.serving()) is not served:
            moves.append(world.now)
    policy = FLAPS.health
    for at in moves:
        close = [move for move in moves if at <= move < at + min(policy.flap_window, policy.flap_hold)]
        assert len(close) <= policy.flaps + 1


def test_a_thousand_servers_that_flap_at_once_are_bounded_and_leave_no_upstream_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = Counter[str]()

    def counted(server: Server, peer: Peer) -> Routing:
        judged["servers"] += 1
        return routing_of(server, peer)

    monkeypatch.setattr(table, "routing_of", counted)
    world = World().configure(upstream(1000, policy=FLAPS))
    keys = [server.key for server in world.state.groups["app"].upstream.servers]
    for at in range(9):
        world.now += 1
        for key in keys:
            world.take(ProbeResult("app", key, at % 2 == 0, "refused"))
            group = world.state.groups["app"]
            assert group.tally.serving or group.fail_open
    flapping = [note for note in world.notes if note.kind == "flapping"]
    assert len(flapping) <= 4 * len(keys)
    assert judged["servers"] < 15 * len(world.journal), "what a result costs does not grow with its upstream"


def world_up() -> World:
    return World().configure(upstream(policy=FLAPS)).probe(A).probe(B).probe(C)


def flap(world: World, key: str, times: int) -> World:
    for _ in range(times):
        world.probe(key, ok=world.peer(key).health is Health.DOWN)
    return world
