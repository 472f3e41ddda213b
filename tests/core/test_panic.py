"""Panic: with too few servers up their health is ignored, visibly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core.events import AgentSaid
from controller.core.model import Admin, Health
from controller.core.policy import HealthPolicy
from tests.core.world import POLICY, World, server, upstream

KEYS = [f"127.0.0.1:{port}" for port in range(8001, 8005)]


@pytest.mark.parametrize(
    ("panic", "up", "open_"),
    [(0.5, 4, False), (0.5, 2, False), (0.5, 1, True), (0.5, 0, True), (0.0, 1, False), (0.0, 0, True), (1.0, 3, True)],
)
def test_envoy_fewer_than_the_share_up_and_health_is_ignored(panic: float, up: int, open_: bool) -> None:
    world = world_of(panic, up)
    assert world.state.groups["app"].fail_open is open_


def test_panic_begins_and_ends_with_an_event_that_has_the_numbers() -> None:
    world = world_of(0.5, 1)
    world.probe(KEYS[1], times=1)
    assert [note.text for note in world.notes if note.kind == "fail-open"] == [
        "app fails open: 1 of 4 servers are up, fewer than 50 %, so all of them serve",
        "app no longer fails open: 2 of 4 servers serving",
    ]


def test_servers_that_people_or_agents_took_out_are_not_missed() -> None:
    world = world_of(0.5, 2)
    world.admin(KEYS[0], Admin.MAINT)
    assert world.state.groups["app"].fail_open, "1 of 3"
    world.take(AgentSaid("app", KEYS[3], "drain"))
    assert not world.state.groups["app"].fail_open, "1 of 2"


def test_backups_are_neither_wanted_nor_up_but_serve_instead_of_a_panic() -> None:
    policy = replace(POLICY, health=HealthPolicy(1, 1, panic=0.5, flaps=0))
    servers = (*(server(8001 + at) for at in range(4)), server(9000, backup=True))
    world = World().configure(replace(upstream(policy=policy), servers=servers))
    world.probe("127.0.0.1:9000")
    for key in KEYS[:3]:
        world.probe(key, ok=False)
    assert world.state.groups["app"].fail_open
    world.probe(KEYS[3], ok=False)
    assert not world.state.groups["app"].fail_open
    assert world.serving() == ("127.0.0.1:9000",)


def test_in_a_panic_the_flapping_serve_as_well() -> None:
    world = world_of(0.5, 4, flaps=1)
    for key in KEYS[:3]:
        world.probe(key, ok=False).probe(key)
    group = world.state.groups["app"]
    assert {peer.health for peer in group.peers.values()} == {Health.UP}
    assert group.fail_open
    assert {world.entry(key)["state"] for key in KEYS[:3]} == {"down"}


def world_of(panic: float, up: int, flaps: int = 0) -> World:
    policy = replace(POLICY, health=HealthPolicy(1, 1, panic=panic, flaps=flaps))
    world = World().configure(upstream(4, policy=policy))
    for at, key in enumerate(KEYS):
        world.probe(key, ok=at < up)
    return world
