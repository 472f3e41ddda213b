"""One process behind two upstreams: it leaves both before it is told to stop, and comes back to both."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.core import table
from controller.core.events import (
    AdminWished,
    ChangeWished,
    ConfigRead,
    PlaneSeen,
    ProbeResult,
    Restored,
    SteerWished,
    StepDone,
    StepFailed,
)
from controller.core.membership import LINGER
from controller.core.model import (
    Admin,
    ChangeKind,
    ChangeStatus,
    Health,
    Refused,
    Routing,
    State,
    Steer,
    StepName,
    StepState,
    Upstream,
)
from controller.core.policy import DrainPolicy
from tests.core.world import POLICY, A, B, C, World, server, upstream

APP, API = upstream(), upstream(name="api")
OTHER = Upstream("other", (server(9001), server(9002)), policy=POLICY)
IN_HAND = frozenset(
    {StepName.TERMINATE, StepName.EXIT, StepName.KILL, StepName.DEPLOY, StepName.RELOAD, StepName.WORKERS}
    | {StepName.UPGRADE, StepName.SCALE, StepName.START}
)


def both(*configured: Upstream) -> World:
    world = World().configure(*(configured or (APP, API, OTHER)))
    for _ in range(2):
        for name, group in world.state.groups.items():
            for key in group.peers:
                world.take(ProbeResult(name, key, True, "ok"))
    return world.acknowledge()


def wish(world: World, kind: ChangeKind, name: str, *keys: str, **parts: object) -> int:
    outcome = world.take(ChangeWished(kind, name, keys, **parts))  # type: ignore[arg-type]
    world.acknowledge()
    assert outcome.change is not None
    return outcome.change


def serving(world: World, name: str) -> tuple[str, ...]:
    return table.serving(world.state.groups[name])


def under_way(world: World, number: int) -> list[StepName]:
    return [s.name for s in world.change(number).steps if s.state is StepState.RUNNING]


def detail(world: World, number: int, name: StepName) -> str:
    return next(s.detail for s in world.change(number).steps if s.name is name)


def until(world: World, number: int, name: StepName) -> World:
    for _ in range(400):
        if name in under_way(world, number):
            return world
        world.pass_time(0.5)
        if name not in [job.name for job in world.jobs]:
            world.answer()
        for each in ("app", "api"):
            for key in (A, B, C):
                if world.healthy(key):
                    world.take(ProbeResult(each, key, True, "ok"))
        world.acknowledge()
    raise AssertionError(f"{name} never began")


def test_a_process_leaves_every_upstream_before_it_is_told_to_stop_and_comes_back_to_each() -> None:
    world = both()
    world.in_flight["api " + A] = 1
    number = wish(world, ChangeKind.RESTART, "app", A)
    world.answer()
    assert (serving(world, "app"), serving(world, "api")) == ((B, C), (B, C))
    world.live(10)
    assert under_way(world, number) == [StepName.EMPTY], "api still has one in flight"
    assert world.state.groups["api"].peers[A].admin is Admin.READY, "nobody wished otherwise there"
    world.in_flight.clear()
    world.acknowledge()
    until(world, number, StepName.TERMINATE)
    assert detail(world, number, StepName.EMPTY) == "no request in flight, nor by api"
    world.live(60)
    assert world.change(number).status is ChangeStatus.DONE
    assert (serving(world, "app"), serving(world, "api")) == ((A, B, C), (A, B, C))
    assert world.state.groups["api"].peers[A].warm_up.cause == "restarted"
    said = [note.text for note in world.notes if (note.upstream, note.kind) == ("api", "admin")]
    assert said == [f"api: {A} drains: change {number} (restart of app) handles its process"]
    assert serving(world, "other") == ("127.0.0.1:9001", "127.0.0.1:9002")


@pytest.mark.parametrize(("on_timeout", "status"), [("abort", "failed"), ("proceed", "done")])
def test_the_deadline_of_a_drain_holds_for_all_upstreams(on_timeout: str, status: str) -> None:
    policy = replace(POLICY, drain=DrainPolicy(timeout=5.0, on_timeout=on_timeout, settle=0.0))
    world = both(replace(APP, policy=policy), API)
    world.in_flight["api " + A] = 2
    number = wish(world, ChangeKind.RESTART, "app", A)
    world.answer().live(60)
    assert detail(world, number, StepName.EMPTY).startswith("2 requests still in flight by api after 5 s")
    assert world.change(number).status == status
    assert serving(world, "api") == (A, B, C), "it has its place back"


def test_one_change_at_a_time_handles_a_process_whatever_the_upstream() -> None:
    world = both()
    number = wish(world, ChangeKind.RESTART, "app", A)
    for key in (A, B):
        with pytest.raises(Refused, match=f"change {number} .restart. of app is still running") as refused:
            wish(world, ChangeKind.RESTART, "api", key)
        assert refused.value.code == "busy"
    with pytest.raises(Refused, match=f"change {number} .restart. of app"):
        world.take(AdminWished("api", A, Admin.READY))
    with pytest.raises(Refused, match=f"change {number} .restart. of app"):
        wish(world, ChangeKind.DRAIN, "api", A)
    wish(world, ChangeKind.DRAIN, "api", B)
    wish(world, ChangeKind.RESTART, "other", "127.0.0.1:9001")
    queued = wish(world, ChangeKind.ROLLOUT, "api", queue=True)
    assert world.change(queued).status is ChangeStatus.QUEUED
    world.take(AdminWished("api", B, Admin.READY))
    world.live(40)
    assert world.change(number).status is ChangeStatus.DONE
    assert world.change(queued).status is ChangeStatus.RUNNING
    world.live(200)
    assert world.change(queued).status is ChangeStatus.DONE


def test_no_upstream_is_emptied_by_a_change_of_another_one() -> None:
    small = replace(API, servers=APP.servers[:1])
    with pytest.raises(Refused, match="no other server of api serves"):
        wish(both(APP, small), ChangeKind.RESTART, "app", A)
    pair = replace(API, servers=APP.servers[:2])
    with pytest.raises(Refused, match=f"{A}, {B}: no other server of api serves"):
        wish(both(APP, pair), ChangeKind.ROLLOUT, "app", batch=2)
    world = both(APP, pair)
    number = wish(world, ChangeKind.RESTART, "app", A)
    world.take(AdminWished("api", B, Admin.MAINT))
    world.answer()
    assert "no other server of api serves" in world.change(number).error
    assert serving(world, "app") == (A, B, C)
    world = both(APP, small)
    wish(world, ChangeKind.RESTART, "app", A, forced=True)
    world.answer().live(60)
    assert serving(world, "api") == (A,)


def test_no_upstream_gets_more_than_its_max_load_by_a_change_of_another_one() -> None:
    limited = replace(POLICY, rollout=replace(POLICY.rollout, max_load=2.0))
    heavy = replace(API, servers=(server(8001, weight=3), server(8002)), policy=limited)
    with pytest.raises(Refused, match=f"without {A} each other server of api gets 4"):
        wish(both(APP, heavy), ChangeKind.ROLLOUT, "app")


def test_a_drain_by_an_operator_stays_in_its_upstream() -> None:
    world = both()
    wish(world, ChangeKind.DRAIN, "app", A)
    assert (serving(world, "app"), serving(world, "api")) == ((B, C), (A, B, C))


@pytest.mark.parametrize("admin", [Admin.DRAIN, Admin.MAINT])
def test_each_peer_gets_back_what_it_had(admin: Admin) -> None:
    world = both()
    world.take(AdminWished("api", A, admin))
    number = wish(world, ChangeKind.RESTART, "app", A)
    world.answer().live(60)
    assert world.change(number).status is ChangeStatus.DONE
    assert world.state.groups["api"].peers[A].admin is admin
    assert (serving(world, "app"), serving(world, "api")) == ((A, B, C), (B, C))


def test_an_aborted_change_gives_all_back_at_once() -> None:
    world = both()
    world.in_flight["api " + A] = 1
    number = wish(world, ChangeKind.ROLLOUT, "app")
    world.answer()
    assert serving(world, "api") == (B, C)
    world.take(SteerWished(number, Steer.ABORT))
    world.acknowledge()
    assert world.change(number).status is ChangeStatus.ABORTED
    assert (serving(world, "app"), serving(world, "api")) == ((A, B, C), (A, B, C))


def test_a_rollout_waits_until_its_server_is_up_and_warm_in_each_upstream() -> None:
    slow = replace(POLICY, warm_up=replace(POLICY.warm_up, duration=40.0))
    world = both(APP, replace(API, policy=slow))
    number = wish(world, ChangeKind.ROLLOUT, "app")
    until(world, number, StepName.WARM)
    world.live(20)
    assert under_way(world, number) == [StepName.WARM]
    assert detail(world, number, StepName.WARM) == "waits until it is warm in api"
    world.live(30)
    assert [s.server for s in world.change(number).steps if s.state is StepState.RUNNING] == [B]


def test_it_fails_where_one_upstream_does_not_call_it_up_again() -> None:
    world = both()
    number = wish(world, ChangeKind.RESTART, "app", A)
    until(world, number, StepName.UP)
    for _ in range(60):
        world.pass_time(0.5)
        world.take(ProbeResult("app", A, True, "ok"))
        world.take(ProbeResult("api", A, False, "refused"))
    assert world.change(number).error == f"{A}: up: not up in api within 20 s: refused"


def test_what_was_stopped_stays_away_until_it_is_started() -> None:
    world = both()
    number = wish(world, ChangeKind.STOP, "app", A)
    world.answer().live(10)
    assert world.change(number).status is ChangeStatus.DONE
    world.live(10)  # somebody started it by hand, and probes pass
    assert serving(world, "api") == (B, C)
    number = wish(world, ChangeKind.START, "app", A)
    world.answer().live(60)
    assert world.change(number).status is ChangeStatus.DONE
    assert (serving(world, "app"), serving(world, "api")) == ((A, B, C), (A, B, C))


def test_an_operator_brings_back_what_a_failed_change_left_out() -> None:
    world = both()
    number = wish(world, ChangeKind.RESTART, "app", A)
    until(world, number, StepName.START)
    world.take(StepFailed(number, world.jobs.pop().step, "it does not load"))
    world.live(20)
    assert world.change(number).status is ChangeStatus.FAILED
    assert (serving(world, "app"), serving(world, "api")) == ((B, C), (B, C))
    again = World(state=world.state, now=world.now)
    again.take(AdminWished("api", A, Admin.READY))
    assert serving(again, "api") == (A, B, C), "the probes say that it lives"
    number = wish(world, ChangeKind.RESTART, "app", A)
    world.answer().live(60)
    assert world.change(number).status is ChangeStatus.DONE
    assert (serving(world, "app"), serving(world, "api")) == ((A, B, C), (A, B, C))


def test_a_server_that_leaves_the_configuration_leaves_its_mates_behind_in_traffic() -> None:
    for lost, seconds in ((replace(APP, servers=APP.servers[1:]), 0.0), (OTHER, LINGER)):
        world = both()
        world.in_flight["api " + A] = 1
        number = wish(world, ChangeKind.RESTART, "app", A)
        world.answer()
        world.take(ConfigRead((lost, API)))
        world.pass_time(seconds).pass_time(seconds)
        assert world.change(number).status is ChangeStatus.FAILED
        assert serving(world, "api") == (A, B, C)


def test_an_upstream_that_comes_while_a_process_is_away_does_not_get_it() -> None:
    world = both(APP)
    number = wish(world, ChangeKind.RESTART, "app", A)
    until(world, number, StepName.EXIT)
    world.configure(APP, API)
    assert serving(world, "api") == (B, C)
    world.live(60)
    assert world.change(number).status is ChangeStatus.DONE
    assert serving(world, "api") == (A, B, C)


def test_a_process_with_two_names_in_one_upstream_is_handled_once() -> None:
    twice = replace(APP, servers=(*APP.servers, replace(server(8001), key=f"web:8001@{A}", address="web:8001")))
    world = both(twice)
    number = wish(world, ChangeKind.ROLLOUT, "app")
    assert {s.server for s in world.change(number).steps} == {A, B, C}
    world.answer()
    assert serving(world, "app") == (B, C)
    world.live(200)
    assert world.change(number).status is ChangeStatus.DONE
    assert len(serving(world, "app")) == 4


def reborn(old: State, now: float) -> World:
    """A daemon that knows what was stored."""
    peers = {(name, key): peer for name, group in old.groups.items() for key, peer in group.peers.items()}
    changes = {n: each for n, each in old.changes.items() if not each.status.ended}
    again = World(now=now + 100)
    again.take(Restored(old.revision, old.next_change, old.next_epoch, peers, changes, away=100))
    again.take(PlaneSeen("boot", old.revision))
    again.take(ConfigRead((APP, API, OTHER)))
    return again.acknowledge()


def assert_nothing_is_sent_to_what_is_handled(state: State) -> None:
    for change in state.changes.values():
        drained = {s.server for s in change.steps if s.name is StepName.DRAIN and s.started is not None}
        for step in change.steps:
            if step.name in IN_HAND and step.state is StepState.RUNNING and step.server in drained:
                for name, group in state.groups.items():
                    for each in group.upstream.servers:
                        if each.key == step.server:
                            assert table.routing_of(each, group.peers[each.key]) is not Routing.UP, (name, step)


@pytest.mark.parametrize("at", range(0, 60, 2))
def test_a_daemon_that_dies_gives_both_back_all_the_same(at: int) -> None:
    world = both()
    number = wish(world, ChangeKind.RESTART, "app", A)
    for _ in range(at):
        world.live(0.5)
        assert_nothing_is_sent_to_what_is_handled(world.state)
    again = reborn(world.state, world.now)
    for _ in range(120):
        assert_nothing_is_sent_to_what_is_handled(again.state)
        again.live(0.5)
    if not world.change(number).status.ended:
        assert again.change(number).status is ChangeStatus.DONE
    assert (serving(again, "app"), serving(again, "api")) == ((A, B, C), (A, B, C))
    assert all(peer.health is Health.UP for group in again.state.groups.values() for peer in group.peers.values())


def test_a_queued_change_waits_until_it_is_known_what_shares_a_process_with_it() -> None:
    world = both()
    wish(world, ChangeKind.RESTART, "api", A)
    number = wish(world, ChangeKind.RESTART, "app", A, queue=True)
    peers = {(name, key): peer for name, group in world.state.groups.items() for key, peer in group.peers.items()}
    again = World(now=world.now)
    again.take(Restored(world.state.revision, 9, 9, peers, dict(world.state.changes)))
    assert again.change(number).status is ChangeStatus.QUEUED
    again.take(ConfigRead((API,)))
    again.pass_time(LINGER)
    assert again.change(number).error == "app is gone from nginx.conf"


NAMES, KEYS = st.sampled_from(["app", "api"]), st.sampled_from([A, B, C])
KINDS = st.sampled_from([kind for kind in ChangeKind if kind not in (ChangeKind.DEPLOY, ChangeKind.ROLL_BACK)])
WISHES = st.one_of(
    st.builds(
        ChangeWished, KINDS, NAMES, st.lists(KEYS, max_size=2, unique=True).map(tuple), st.integers(1, 2),
        queue=st.booleans(), workers=st.just(1),
    ),
    st.builds(AdminWished, NAMES, KEYS, st.sampled_from([Admin.READY, Admin.MAINT])),
    st.builds(SteerWished, st.integers(1, 4), st.sampled_from(list(Steer))),
    st.builds(ProbeResult, NAMES, KEYS, st.booleans(), st.just("refused")),
    st.sampled_from(["answer", "fail", "restart", "time", "time"]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(WISHES, max_size=30))
def test_whatever_happens_nothing_is_sent_to_a_process_in_the_hands_of_a_change(happens: list[object]) -> None:
    world = both()
    for each in happens:
        try:
            if each == "answer":
                world.answer()
            elif each == "fail" and world.jobs:
                job = world.jobs.pop()
                world.take(StepFailed(job.change, job.step, "no"))
            elif each == "restart":
                world = reborn(world.state, world.now)
            elif each == "time":
                world.pass_time(1.5)
            elif not isinstance(each, str):
                world.take(each)  # type: ignore[arg-type]
        except Refused:
            continue
        world.acknowledge()
        assert_nothing_is_sent_to_what_is_handled(world.state)
        going = [c for c in world.state.changes.values() if not c.status.ended and c.status is not ChangeStatus.QUEUED]
        handled = [s for c in going if c.kind is not ChangeKind.DRAIN for s in {s.server for s in c.steps}]
        assert len(handled) == len(set(handled)), "one change at a time handles a process"
        for group in world.state.groups.values():
            for peer in group.peers.values():
                assert not peer.held or peer.held < world.state.next_change
    for number, change in world.state.changes.items():
        if not change.status.ended:
            world.state = replace(world.state)
            world.take(StepDone(number, 0, "late"))
