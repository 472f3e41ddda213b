"""Notices: offline, online, replays, their ends; and how a drain treats sticky sessions and consumers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core import peers
from controller.core.events import (
    ConfigRead,
    ConsumersTold,
    Note,
    OfflineNoticed,
    OnlineNoticed,
    Outcome,
    PeerSeen,
    ProbeNow,
    Restored,
    TellConsumers,
    Ticked,
)
from controller.core.model import Admin, ChangeKind, ChangeStatus, Health, Refused, State, StepName, StepState, Warmth
from controller.core.policy import DrainPolicy, NoticePolicy, Policy, QuarantinePolicy, StickyPolicy
from controller.core.step import step
from tests.core.world import POLICY, A, B, C, World, upstream


def settled(policy: Policy = POLICY) -> World:
    world = World().configure(upstream(policy=policy))
    for key in (A, B, C):
        world.probe(key, times=2)
    return world


def test_an_offline_notice_keeps_a_server_out_of_traffic_for_the_configured_time() -> None:
    world = settled(replace(POLICY, quarantine=QuarantinePolicy(duration=120)))
    outcome = world.take(OfflineNoticed("app", A, "n-1"))
    assert world.entry(A)["state"] == "quarantine"
    assert [e.text for e in outcome.effects if isinstance(e, Note)] == [
        f"app: {A} is quarantined for 120 s: it says that it goes offline"
    ]
    world.pass_time(119.9)
    assert world.entry(A)["state"] == "quarantine"
    world.pass_time(0.1)
    assert world.entry(A)["state"] == "up"


def test_each_quarantine_ends_at_its_own_time_and_the_next_end_is_known() -> None:
    world = settled()
    world.take(OfflineNoticed("app", A, seconds=10))
    world.now += 4
    world.take(OfflineNoticed("app", B, seconds=3))
    assert peers.next_expiry(world.state) == world.now + 3
    world.pass_time(3)
    assert (world.entry(A)["state"], world.entry(B)["state"]) == ("quarantine", "up")
    assert peers.next_expiry(world.state) == world.now + 3


def test_a_notice_that_comes_again_is_acknowledged_and_changes_nothing() -> None:
    world = settled()
    world.take(OfflineNoticed("app", A, "n-1", seconds=10))
    world.take(OnlineNoticed("app", A))
    before = world.state
    outcome = world.take(OfflineNoticed("app", A, "n-1", seconds=10))
    assert outcome.replayed
    assert world.state is before


def test_a_replay_is_known_as_such_by_the_next_daemon_too() -> None:
    world = settled()
    world.take(OfflineNoticed("app", A, "n-1", seconds=5))
    saved = {("app", key): peer for key, peer in world.state.groups["app"].peers.items()}
    state, _ = step(State(), Restored(1, 1, 1, saved, {}, away=60), world.now + 60)
    state, _ = step(state, ConfigRead((upstream(),)), world.now + 60)
    _, outcome = step(state, OfflineNoticed("app", A, "n-1"), world.now + 60)
    assert outcome.replayed


def test_only_so_many_notices_are_remembered() -> None:
    world = settled()
    for number in range(100):
        world.take(OfflineNoticed("app", A, f"n-{number}"))
    assert len(world.peer(A).heard) == 8


def test_a_notice_for_an_unknown_server_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(Refused, match="has no server") as refused:
        settled().take(OfflineNoticed("app", "127.0.0.1:9"))
    assert A in refused.value.remedy


def test_a_notice_for_the_last_server_that_serves_is_refused() -> None:
    world = settled()
    world.take(OfflineNoticed("app", A))
    world.take(OfflineNoticed("app", B))
    with pytest.raises(Refused, match="no other server"):
        world.take(OfflineNoticed("app", C))
    assert world.serving() == (C,)


def test_an_online_notice_ends_the_quarantine_probes_at_once_and_warms_up() -> None:
    world = settled()
    world.take(OfflineNoticed("app", A))
    outcome = world.take(OnlineNoticed("app", A))
    assert ProbeNow("app", A) in outcome.effects
    assert world.entry(A)["state"] == "down", "until it is probed"
    world.probe(A, times=2)
    assert (world.entry(A)["state"], world.peer(A).warm_up.phase) == ("up", Warmth.RUNNING)


def test_a_server_that_restarted_faster_than_its_probes_noticed_warms_up_again() -> None:
    world = settled()
    assert world.peer(A).warm_up.phase is Warmth.NONE
    world.take(OnlineNoticed("app", A))
    assert world.entry(A)["state"] == "up", "it never stopped serving"
    assert (world.peer(A).warm_up.phase, world.peer(A).warm_up.cause) == (Warmth.RUNNING, "restarted")


def test_an_online_notice_leaves_an_operators_wish_alone() -> None:
    world = settled()
    world.admin(A, Admin.MAINT)
    world.take(OnlineNoticed("app", A))
    assert (world.peer(A).admin, world.entry(A)["state"]) == (Admin.MAINT, "maint")


def test_a_notice_makes_nginx_forget_what_it_held_against_the_server() -> None:
    world = settled()
    before = world.peer(A).forgiven
    world.take(OnlineNoticed("app", A))
    assert world.peer(A).forgiven == before + 1


# --- consumers ----------------------------------------------------------------------------------------------------


def test_consumers_are_told_after_the_drain_is_published_and_before_the_process_stops() -> None:
    world = settled(replace(POLICY, notices=NoticePolicy(True, ("http://127.0.0.1:1/",))))
    number = world.wish(ChangeKind.RESTART, A)
    names = [s.name for s in world.change(number).steps]
    assert names.index(StepName.DRAIN) < names.index(StepName.NOTIFY) < names.index(StepName.TERMINATE)
    world.live(60)
    assert world.change(number).status is ChangeStatus.DONE


@pytest.mark.parametrize("kind", [ChangeKind.RESTART, ChangeKind.DRAIN])
def test_without_notices_there_is_no_such_step(kind: ChangeKind) -> None:
    world = settled()
    steps = world.change(world.wish(kind, A)).steps
    assert not {StepName.NOTIFY, StepName.SESSIONS} & {s.name for s in steps}


TELLING = replace(POLICY, notices=NoticePolicy(True, ("http://127.0.0.1:1/",)))


def test_consumers_are_told_of_a_drain_by_hand_also_where_no_process_is_driven() -> None:
    world = settled(replace(TELLING, process=None))
    number = world.wish(ChangeKind.DRAIN, A)
    assert [s.name for s in world.change(number).steps] == [StepName.DRAIN, StepName.NOTIFY, StepName.EMPTY]
    assert [(job.name, job.server) for job in world.jobs] == [(StepName.NOTIFY, A)]
    assert world.entry(A)["state"] == "drain"
    world.answer()
    assert world.change(number).status is ChangeStatus.DONE


def test_a_drain_that_is_taken_back_while_consumers_are_told_hears_their_answer_no_more() -> None:
    world = settled(TELLING)
    number = world.wish(ChangeKind.DRAIN, A)
    world.admin(A, Admin.READY)
    assert world.change(number).status is ChangeStatus.SUPERSEDED
    before = world.change(number)
    world.answer()
    assert (world.change(number), world.entry(A)["state"]) == (before, "up")


def told(outcome: Outcome) -> list[str]:
    return [effect.server for effect in outcome.effects if isinstance(effect, TellConsumers)]


def test_consumers_are_told_of_a_notice_and_of_its_repetitions_no_more() -> None:
    world = settled(TELLING)
    assert told(world.take(OfflineNoticed("app", A, "n-1", seconds=10))) == [A]
    assert told(world.take(OfflineNoticed("app", A, "n-1", seconds=10))) == []
    assert told(world.take(OfflineNoticed("app", A, "n-2", seconds=10))) == [], "it has not been back since"
    assert told(world.take(OfflineNoticed("app", A, seconds=10))) == []
    assert told(world.take(OfflineNoticed("app", B, "n-1", seconds=10))) == [B]
    world.pass_time(10)
    assert told(world.take(OfflineNoticed("app", A, "n-3"))) == [A], "it was back, and goes again"


def test_a_server_that_is_drained_and_says_so_itself_is_told_of_once() -> None:
    world = settled(TELLING)
    world.wish(ChangeKind.RESTART, A)
    world.answer()
    assert StepName.NOTIFY in [job.name for job in world.jobs]
    assert told(world.take(OfflineNoticed("app", A, "its own"))) == []


def test_nobody_is_told_of_a_notice_where_notices_are_off() -> None:
    assert told(settled().take(OfflineNoticed("app", A))) == []


def test_who_heard_of_a_notice_is_an_event() -> None:
    outcome = settled(TELLING).take(ConsumersTold("app", A, "1 of 1 consumers acknowledged"))
    text = f"app: told that {A} goes offline: 1 of 1 consumers acknowledged"
    assert outcome.effects == (Note("notice", text, "app", A),)


# --- sticky sessions ----------------------------------------------------------------------------------------------

STICKY = replace(POLICY, sticky=StickyPolicy("route", drain=20, idle=5))


def draining() -> tuple[World, int]:
    world = settled(STICKY)
    return world, world.wish(ChangeKind.DRAIN, A)


def reads(world: World, requests: int, in_flight: int = 0) -> None:
    world.requests[A], world.in_flight[A] = requests, in_flight
    world.take(PeerSeen("app", A, world.state.plane.revision, in_flight, requests=requests))
    world.acknowledge()


def state_of(world: World, number: int, name: StepName) -> StepState:
    return next(s.state for s in world.change(number).steps if s.name is name)


def test_a_draining_server_keeps_its_sessions_while_they_ask() -> None:
    world, number = draining()
    assert world.entry(A)["state"] == "sessions"
    for second in range(15):
        world.now += 1
        reads(world, 100 + second)
    assert world.entry(A)["state"] == "sessions"
    assert state_of(world, number, StepName.SESSIONS) is StepState.RUNNING


def test_sessions_have_ended_when_none_asked_for_the_idle_time_and_then_the_drain_is_as_any_other() -> None:
    world, number = draining()
    reads(world, 100)
    world.now += 4.9
    reads(world, 100)
    assert world.entry(A)["state"] == "sessions"
    world.now += 0.1
    reads(world, 100)
    assert world.entry(A)["state"] == "drain"
    assert world.change(number).status is ChangeStatus.DONE


def test_the_deadline_moves_sessions_that_never_end() -> None:
    world, number = draining()
    for second in range(20):
        world.now += 1
        reads(world, 100 + second, in_flight=1)
    assert world.entry(A)["state"] == "drain"
    assert state_of(world, number, StepName.EMPTY) is StepState.RUNNING, "what is in flight still finishes"


@pytest.mark.parametrize("left", [0, 1])
def test_by_default_what_is_in_flight_has_its_time_after_the_sessions_have_had_theirs(left: int) -> None:
    world = settled(replace(POLICY, drain=DrainPolicy(), sticky=StickyPolicy("route")))
    number = world.wish(ChangeKind.DRAIN, A)
    for second in range(59):
        world.now += 1
        reads(world, 100 + min(second, 29), in_flight=1)
    assert state_of(world, number, StepName.SESSIONS) is StepState.DONE
    assert state_of(world, number, StepName.EMPTY) is StepState.RUNNING
    world.now += 1
    reads(world, 129, in_flight=left)
    assert world.change(number).status is (ChangeStatus.FAILED if left else ChangeStatus.DONE)


def test_a_drain_is_not_empty_before_nginx_serves_the_table_without_the_sessions() -> None:
    world, number = draining()
    old = world.state.plane.revision
    world.nginx = False
    world.now += 20
    world.take(Ticked())
    world.take(PeerSeen("app", A, old, 0))
    assert state_of(world, number, StepName.EMPTY) is StepState.RUNNING
    world.nginx = True
    world.acknowledge()
    assert world.change(number).status is ChangeStatus.DONE


def test_enabling_a_server_ends_the_keeping_of_its_sessions() -> None:
    world, number = draining()
    world.admin(A, Admin.READY)
    assert (world.entry(A)["state"], world.peer(A).sessions) == ("up", False)
    assert world.change(number).status is not ChangeStatus.RUNNING


def test_a_restart_of_a_sticky_upstream_ends_like_any_other() -> None:
    world = settled(STICKY)
    number = world.wish(ChangeKind.RESTART, A)
    world.live(80)
    assert world.change(number).status is ChangeStatus.DONE
    assert world.peer(A).health is Health.UP
