"""An nginx that was restarted in mid-ramp goes on from where the daemon knows the ramp to be."""

from __future__ import annotations

from dataclasses import replace

from controller.core.events import ConfigRead, PeerSeen, PlaneSeen, Restored
from controller.core.model import Warmth
from controller.core.policy import WarmUpPolicy
from tests.core.test_hold import ERRS, SLOW, Edge
from tests.core.world import A, B, C, World, upstream


def restarted(edge: Edge) -> None:
    edge.world.take(PlaneSeen("another", edge.world.state.plane.revision))


def test_a_ramp_that_ran_goes_on_in_an_epoch_that_the_new_nginx_does_not_know() -> None:
    edge = Edge().begin(elapsed=42.0)
    world, before = edge.world, edge.ramp()["epoch"]
    notes, revision = len(world.notes), world.state.revision
    restarted(edge)
    assert world.state.revision > revision, "nginx is told"
    assert edge.ramp()["elapsed_ms"] == 42_000
    assert edge.ramp()["epoch"] != before
    world.take(PeerSeen("app", C, revision, 0, before, 3.0, True))  # type: ignore[arg-type]
    world.acknowledge().pass_time(5.0)
    assert edge.ramp()["elapsed_ms"] == 47_000
    assert {note.kind for note in world.notes[notes:]} == {"plane"}, "it did not begin anew"
    world.pass_time(60.0)
    assert edge.phase() is Warmth.DONE


def test_what_stands_still_stands_in_the_snapshot_as_it_is() -> None:
    edge = Edge().begin().window(ERRS)
    before = edge.world.state.groups
    restarted(edge)
    assert edge.world.state.groups == before
    edge = Edge().begin(replace(SLOW, warm_up=WarmUpPolicy(duration=100.0, starts="first-request")))
    before = edge.world.state.groups
    restarted(edge)
    assert edge.world.state.groups == before


def test_the_same_nginx_keeps_its_epochs() -> None:
    edge = Edge().begin()
    before = edge.world.state.groups
    edge.world.take(PlaneSeen(edge.world.state.plane.boot, edge.world.state.plane.revision))
    assert edge.world.state.groups == before


def test_each_of_two_ramps_has_an_epoch_of_its_own() -> None:
    edge = Edge().begin(replace(SLOW, warm_up=WarmUpPolicy(duration=100.0, starts="healthy", max_cold=1.0)))
    edge.world.probe(B, ok=False, times=3).probe(B, times=2)
    known = {edge.world.peer(key).warm_up.epoch for key in (A, B, C)}
    restarted(edge)
    fresh = {edge.world.peer(key).warm_up.epoch for key in (B, C)}
    assert len(fresh) == 2
    assert not fresh & known
    assert edge.world.state.next_epoch > max(fresh)


def test_with_the_machine_nginx_was_restarted_as_well() -> None:
    edge = Edge().begin(elapsed=42.0)
    known = edge.world.state.next_epoch
    peers = {("app", key): peer for key, peer in edge.world.state.groups["app"].peers.items()}
    for rebooted in (True, False):
        later = World(now=edge.world.now)
        later.take(Restored(9, 1, known, peers, {}, rebooted=rebooted))
        later.take(ConfigRead((upstream(3, policy=SLOW),)))
        assert (later.peer(C).warm_up.epoch == known) is rebooted
        assert (later.state.next_epoch > known) is rebooted
