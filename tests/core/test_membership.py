"""Upstreams and servers that leave nginx.conf and come back, as a file does that is moved or written in pieces."""

from dataclasses import replace

import pytest

from controller.core import table
from controller.core.events import ConfigRead, Restored
from controller.core.membership import LINGER
from controller.core.model import Admin, ChangeKind, ChangeStatus, Health, Peer, State
from tests.core.world import POLICY, A, B, C, World, upstream


def entries(world: World) -> dict[str, object]:
    upstreams = table.table(world.state, world.now)["upstreams"]
    assert isinstance(upstreams, dict)
    return upstreams


def config_notes(world: World) -> list[str]:
    return [note.text for note in world.notes if note.kind == "config"]


def test_an_upstream_that_is_gone_for_a_moment_stays_as_it_was() -> None:
    world = World().configure().probe(A, times=2).probe(B, times=2).probe(C, times=2)
    world.admin(A, Admin.MAINT)
    before = entries(world)
    world.take(ConfigRead(()))
    world.acknowledge()
    assert entries(world) == before, "nginx goes on with the table, and sends nothing to the server in maintenance"
    world.pass_time(LINGER - 1)
    world.take(ConfigRead((upstream(),)))
    assert entries(world) == before
    world.pass_time(LINGER)
    assert entries(world) == before
    assert f"upstream app is gone from nginx.conf; it stays for {LINGER:g} s in case it comes back" in config_notes(
        world
    )


def test_an_upstream_that_stays_away_is_let_go() -> None:
    world = World().configure()
    world.take(ConfigRead(()))
    world.pass_time(LINGER / 2)
    world.take(ConfigRead(()))
    world.pass_time(LINGER / 2)
    assert entries(world) == {}
    assert config_notes(world).count("upstream app is not managed any more") == 1
    world.pass_time(LINGER)
    assert world.state.departed == {}


def test_an_upstream_that_was_released_goes_at_once() -> None:
    world = World().configure()
    world.take(ConfigRead((), released=("app",)))
    assert entries(world) == {}
    assert config_notes(world) == ["upstream app has lost its hook"]


def test_a_server_line_that_comes_back_is_probed_anew_and_what_operators_wanted_holds() -> None:
    world = World().configure().probe(A, times=2).probe(B, times=2).probe(C, times=2)
    world.admin(A, Admin.MAINT)
    three = upstream()
    world.take(ConfigRead((replace(three, servers=three.servers[1:2]),)))
    world.pass_time(1)
    world.take(ConfigRead((three,)))
    assert world.peer(A).admin is Admin.MAINT
    assert (world.peer(C).health, world.entry(C)["state"]) == (Health.UNKNOWN, "down")
    assert world.peer(B).health is Health.UP


def test_after_a_while_a_server_of_that_address_is_a_new_one() -> None:
    world = World().configure()
    world.admin(A, Admin.MAINT)
    three = upstream()
    world.take(ConfigRead((replace(three, servers=three.servers[1:]),)))
    world.pass_time(LINGER)
    world.take(ConfigRead((three,)))
    assert world.peer(A) == Peer()


def test_an_upstream_that_was_let_go_and_comes_back_serves_without_servers_under_maintenance() -> None:
    world = World().configure()
    world.admin(A, Admin.MAINT)
    world.take(ConfigRead((), released=("app",)))
    world.take(ConfigRead((upstream(),)))
    assert world.peer(A).admin is Admin.MAINT
    assert world.state.groups["app"].fail_open, "nginx sends to the others as before, until they are probed"


def test_a_change_goes_on_when_its_upstream_comes_back() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESTART, A)
    world.take(ConfigRead(()))
    world.live(5)
    world.take(ConfigRead((upstream(),)))
    world.live(60)
    assert world.change(number).status is ChangeStatus.DONE


@pytest.mark.parametrize("back", [True, False])
def test_a_change_waits_for_its_upstream_where_a_new_daemon_does_not_find_it(back: bool) -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESTART, A)
    world.answer()
    peers = {("app", key): peer for key, peer in world.state.groups["app"].peers.items()}
    changes = {number: world.change(number)}
    world.state = State()
    world.take(Restored(world.state.revision, number + 1, 9, peers, changes))
    world.take(ConfigRead(()))
    world.pass_time(LINGER - 1)
    assert world.change(number).status is ChangeStatus.RUNNING
    if back:
        world.take(ConfigRead((upstream(policy=POLICY),)))
        assert world.peer(A).admin is Admin.DRAIN
    else:
        world.pass_time(1)
        assert world.change(number).error == "app is gone from nginx.conf"
