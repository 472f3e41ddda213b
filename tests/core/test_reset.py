"""A reset: a restart after which nothing is held against a server any more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core.events import AgentSaid, OfflineNoticed, StepFailed, TrafficSeen
from controller.core.model import Admin, Agent, ChangeKind, ChangeStatus, Ejection, StepName, StepState, Traffic
from controller.core.policy import HealthPolicy
from tests.core.test_steering import done, until
from tests.core.world import POLICY, A, B, C, World, upstream

AGENTS = replace(POLICY, health=HealthPolicy(rise=1, fall=1, flaps=2, agent=True))
STEPS = ["find", "drain", "empty", "settle", "terminate", "exit", "reset", "start", "up", "warm", "hold"]


def detail(world: World, number: int) -> str:
    return next(step.detail for step in world.change(number).steps if step.name is StepName.RESET)


def accused() -> World:
    """A server against which everything is held that can be."""
    world = World().configure(upstream(policy=AGENTS)).probe(A).probe(B).probe(C)
    for ok in (False, True, False, True):
        world.probe(A, ok)
    world.take(OfflineNoticed("app", A, "notice-1", 600.0))
    world.take(AgentSaid("app", A, "50% up maxconn:3"))
    world.acknowledge()
    world.take(TrafficSeen("app", "boot", {A: Traffic(ejected=Ejection(world.now + 600, "timeouts", 4))}))
    return world.acknowledge()


def test_it_forgets_quarantines_ejections_flaps_and_the_agents_words_and_the_server_serves_again() -> None:
    world = accused()
    before = world.peer(A)
    assert {entry.kind for entry in before.quarantine} == {"notice", "flapping"}
    assert before.ejected
    number = world.wish(ChangeKind.RESET, A)
    until(world, number, StepName.START)
    peer = world.peer(A)
    assert (peer.quarantine, peer.ejected, peer.rests, peer.changed, peer.agent) == ((), None, 0, (), Agent())
    assert peer.forgiven > before.forgiven, "nginx forgets its ejections as well"
    assert peer.heard == ("notice-1",), "a late repetition is of the old process"
    assert A not in world.serving(), "it is ready, but not before its probes pass"
    world.live(60)
    assert world.change(number).status is ChangeStatus.DONE
    assert done(world, number, A) == STEPS
    assert world.serving() == (A, B, C)
    said = detail(world, number)
    assert said.startswith("forgot a quarantine (flapping: ")
    assert said.endswith("ejections, its changes of health, what its agent said")


@pytest.mark.parametrize("admin", [Admin.DRAIN, Admin.MAINT])
def test_a_server_that_was_put_away_and_is_named_is_ready_afterwards(admin: Admin) -> None:
    world = World().configure().admin(A, admin)
    number = world.wish(ChangeKind.RESET, A)
    world.live(60)
    assert world.change(number).status is ChangeStatus.DONE
    assert world.peer(A).admin is Admin.READY
    assert world.serving() == (A, B, C)


def test_without_names_it_takes_those_that_are_ready_one_by_one() -> None:
    world = World().configure().admin(A, Admin.MAINT)
    number = world.wish(ChangeKind.RESET)
    assert {(step.server, step.batch) for step in world.change(number).steps} == {(B, 0), (C, 1)}


def test_one_with_nothing_held_against_it_is_restarted_all_the_same() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESET, A)
    world.live(60)
    assert detail(world, number) == "forgot nothing: it was clean"
    assert done(world, number, A) == STEPS


def test_where_it_cannot_be_stopped_nothing_is_forgotten() -> None:
    world = accused()
    before = world.peer(A)
    number = world.wish(ChangeKind.RESET, A)
    until(world, number, StepName.TERMINATE)
    world.take(StepFailed(number, world.jobs.pop().step, "it may not be signalled"))
    assert world.change(number).status is ChangeStatus.FAILED
    after = world.peer(A)
    assert (after.quarantine, after.rests, after.agent, after.admin) == (
        before.quarantine, before.rests, before.agent, before.admin,
    )  # fmt: skip
    step = next(step for step in world.change(number).steps if step.name is StepName.RESET)
    assert step.state is StepState.SKIPPED
