"""What nginx does by itself is followed: ejections, marks, and the servers that only their probes find alive."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core import table
from controller.core.events import ChangeWished, PlaneSeen, Restored, TrafficSeen
from controller.core.model import Admin, ChangeKind, Ejection, Refused, Traffic
from controller.core.policy import QuarantinePolicy
from tests.core.world import POLICY, A, B, C, World, upstream


def test_an_ejection_is_shown_from_begin_to_end_and_needs_no_new_table() -> None:
    world = world_up()
    revision = world.state.revision
    look(world, A, "timeouts", 30)
    assert world.serving() == (B, C)
    assert weight(world, A) == 0
    assert world.entry(A)["state"] == "up", "nginx keeps it away by itself"
    before = world.state
    world.now += 2
    look(world, A, "timeouts", 28)
    assert world.state is before
    look(world, A)
    assert world.serving() == (A, B, C)
    assert world.state.revision == revision
    assert [note.text for note in world.notes if note.kind == "ejection"] == [
        "app: nginx ejected 127.0.0.1:8001 for 30 s after 5 timeouts in a row; 2 of 3 servers serving",
        "app: 127.0.0.1:8001 is no longer ejected; 3 of 3 servers serving",
    ]


def test_an_ejection_ends_by_itself_when_nginx_has_nothing_more_to_tell() -> None:
    world = look(world_up(), A, "errors", 30).pass_time(29)
    assert world.peer(A).ejected
    assert world.pass_time(1).peer(A).ejected is None


def test_probes_that_pass_again_and_again_while_nginx_keeps_the_server_away_tell_of_a_pseudo_dead_one() -> None:
    world = look(world_up(), A, "server_errors", 30)
    world.probe(A)
    assert not told(world, "pseudo-dead")
    world.probe(A, times=10)
    assert told(world, "pseudo-dead") == [
        "app: 127.0.0.1:8001 is pseudo-dead: its probes pass, "
        "and nginx ejected it after 5 answers with status 5xx in a row"
    ]


def test_a_server_that_is_dead_indeed_is_not_called_pseudo_dead() -> None:
    world = look(world_up(), A, "errors", 30).probe(A, ok=False, times=3).probe(A, times=10)
    assert not told(world, "pseudo-dead")
    assert world.peer(A).ejected is None, "it recovered, so that it is forgiven"
    assert world.entry(A)["forgive"] == 1


def test_what_was_forgiven_is_not_followed_again_before_nginx_knows() -> None:
    world = look(world_up(), A, "errors", 30).probe(A, ok=False, times=3)
    world.nginx = False
    world.probe(A, times=2)
    look(world, A, "errors", 25)
    assert world.peer(A).ejected is None


def test_another_nginx_has_ejected_nobody() -> None:
    world = look(world_up(), A, "errors", 30)
    world.take(PlaneSeen("another boot", world.state.revision))
    assert world.serving() == (A, B, C)


def test_a_mark_is_a_quarantine_of_ours_that_outlives_nginx_and_ends_to_the_second() -> None:
    world = look(world_up(), A, "mark", 120)
    assert world.entry(A)["state"] == "quarantine"
    assert world.notes[-1].text == (
        "app: 127.0.0.1:8001 is quarantined for 120 s: it said in a response that it goes offline; "
        "2 of 3 servers serving"
    )
    world.take(PlaneSeen("another boot", world.state.revision))
    assert world.entry(A)["state"] == "quarantine"
    world.pass_time(119.9)
    assert world.entry(A)["state"] == "quarantine"
    world.pass_time(0.1)
    assert world.entry(A)["state"] == "up"
    assert told(world, "quarantine")[-1] == (
        "app: 127.0.0.1:8001 has been away long enough (it said in a response that it goes offline); "
        "3 of 3 servers serving"
    )


def test_a_mark_that_is_told_again_and_again_is_one() -> None:
    world = look(world_up(), A, "mark", 120)
    for left in (118.0, 116.1, 113.9):
        world.now += 2
        before = world.state
        look(world, A, "mark", left)
        assert world.state is before


def test_marks_that_are_not_believed_change_nothing() -> None:
    world = look(world_up(quarantine=QuarantinePolicy(marks=False)), A)
    before = world.state
    look(world, A, "mark", 120)
    assert world.state is before


def test_a_restart_that_is_seen_ends_a_mark_early() -> None:
    world = look(world_up(), A, "mark", 120)
    world.probe(A, ok=False, times=3).probe(A, times=2)
    assert world.serving() == (A, B, C)
    assert world.entry(A)["forgive"] == 1
    assert told(world, "quarantine")[-1] == (
        "app: the quarantine of 127.0.0.1:8001 ends early: it was down and is up again"
    )


def test_a_restart_by_headgate_ends_a_mark_early() -> None:
    world = look(world_up(), A, "mark", 1200)
    world.wish(ChangeKind.RESTART, A)
    world.live(20)
    assert A in world.serving()
    assert world.entry(A)["forgive"] == 1


def test_an_operator_who_enables_a_server_forgives_all() -> None:
    world = look(world_up(), A, "mark", 120).admin(A, Admin.READY)
    assert world.serving() == (A, B, C)
    assert told(world, "quarantine")[-1] == "app: the quarantine of 127.0.0.1:8001 ends early: it was enabled"
    assert world.entry(A)["forgive"] == 1
    notes = len(world.notes)
    assert world.admin(A, Admin.READY).entry(A)["forgive"] == 2, "nginx may know of something that was not seen yet"
    assert len(world.notes) == notes


def test_dead_servers_serve_where_nginx_ejected_the_others_and_ejections_stay_known() -> None:
    world = look(world_up(), A, "errors", 30).probe(B, ok=False, times=3).probe(C, ok=False, times=3)
    assert world.state.groups["app"].fail_open
    assert all(weight(world, key) for key in (A, B, C))
    before = world.state
    look(world, A)
    assert world.state is before, "nginx ignores ejections now, which is not their end"
    assert not world.pass_time(30).state.groups["app"].fail_open
    assert world.serving() == (A,)


def test_the_guard_knows_that_an_ejected_server_does_not_serve() -> None:
    world = look(world_up(), A, "errors", 30).admin(B, Admin.MAINT)
    with pytest.raises(Refused, match="no other server of app serves"):
        world.take(ChangeWished(ChangeKind.DRAIN, "app", (C,)))


def test_quarantines_and_ejections_keep_their_kind_and_their_time_when_the_machine_was_rebooted() -> None:
    world = look(look(world_up(), A, "mark", 120), B, "errors", 300)
    peers = {("app", key): peer for key, peer in world.state.groups["app"].peers.items()}
    later = World(now=5.0)
    later.take(Restored(9, 1, 9, peers, {}, away=5.0 - world.now, rebooted=True))
    later.configure()
    kept, ejected = later.peer(A).quarantine[0], later.peer(B).ejected
    assert (kept.kind, kept.until) == ("mark", 125)
    assert ejected
    assert ejected.until == 305


def world_up(**policy: object) -> World:
    world = World().configure(upstream(policy=replace(POLICY, **policy)))  # type: ignore[arg-type]
    return world.probe(A, times=2).probe(B, times=2).probe(C, times=2)


def look(world: World, key: str, reason: str = "", seconds: float = 0.0, times: int = 1) -> World:
    """nginx tells of its servers: this one is ejected, or is not."""
    ejected = Ejection(world.now + seconds, reason, times) if reason else None
    known = {each: Traffic(ejected=peer.ejected) for each, peer in world.state.groups["app"].peers.items()}
    world.take(TrafficSeen("app", "boot", known | {key: Traffic(ejected=ejected)}))
    return world.acknowledge()


def weight(world: World, key: str) -> float:
    group = world.state.groups["app"]
    server = next(each for each in group.upstream.servers if each.key == key)
    return table.effective_weight(group, server, world.now)


def told(world: World, kind: str) -> list[str]:
    return [note.text for note in world.notes if note.kind == kind]
