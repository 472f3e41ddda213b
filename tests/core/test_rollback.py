"""Changes that go back, by themselves when they fail or by hand: every server gets what it had before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.core import rollback
from controller.core.events import ChangeWished, ConfigRead, PlaneSeen, Restored, SteerWished, StepFailed
from controller.core.model import Admin, ChangeKind, ChangeStatus, Refused, State, Steer, StepName, StepState
from controller.core.policy import Policy, ProcessPolicy, RolloutPolicy
from tests.core.test_budget import ERRS, SAID, Site
from tests.core.test_steering import DEPLOYING, done, running, until
from tests.core.world import POLICY, A, B, C, World, upstream

BACK = replace(DEPLOYING, rollout=replace(POLICY.rollout, on_failure="roll-back"))
EVERY = ["find", "drain", "empty", "settle", "terminate", "exit", "roll-back", "start", "up", "warm", "hold"]


def begin(kind: ChangeKind = ChangeKind.DEPLOY, policy: Policy = BACK, count: int = 3, **parts: object) -> World:
    """A world in which such a change is the first."""
    world = World().configure(upstream(count, policy=policy))
    for key in world.state.groups["app"].peers:
        world.probe(key, times=2)
    world.take(ChangeWished(kind, "app", **parts))  # type: ignore[arg-type]
    return world.acknowledge()


def reach(world: World, server: str, name: StepName) -> World:
    """Live until this step of this server is under way for the first time."""
    for _ in range(4000):
        if (server, name.value) in running(world, 1):
            return world
        job = next((job for job in world.jobs if (job.server, job.name) == (server, name)), None)
        if job is None:
            world.answer()
        if (server, name.value) not in running(world, 1):
            world.pass_time(0.5)
            for key in world.state.groups["app"].peers:
                world.probe(key, world.healthy(key))
    raise AssertionError(f"{name} of {server} never began: {world.change(1)}")


def fails(world: World, name: StepName, why: str = "no") -> World:
    """The adapter that carries this step out reports that it failed."""
    job = next(job for job in world.jobs if job.name is name)
    world.jobs.remove(job)
    world.take(StepFailed(job.change, job.step, why))
    return world.acknowledge()


def back(world: World, server: str) -> list[str]:
    """The steps of the way back that are done for this server."""
    change = world.change(1)
    mine = [s for s in change.steps if s.server == server and 0 < change.back <= s.batch]
    return [s.name.value for s in mine if s.state is StepState.DONE]


def order(world: World) -> list[str]:
    """In which order the command that rolls back was run."""
    ended = [(s.ended, s.server) for s in world.change(1).steps if s.name is StepName.ROLL_BACK and s.state == "done"]
    return [server for _, server in sorted(ended)]


def test_a_failed_deploy_takes_the_new_version_from_every_server_that_has_it_the_last_one_first() -> None:
    world = reach(begin(), C, StepName.DEPLOY)
    fails(world, StepName.DEPLOY, "no such release")
    assert world.change(1).status is ChangeStatus.ROLLING_BACK
    world.live(200)
    change = world.change(1)
    assert (change.status, change.error) == (ChangeStatus.FAILED, f"{C}: deploy: no such release; rolled back")
    assert order(world) == [C, B, A]
    assert back(world, C) == EVERY[6:], "its process was not running"
    assert back(world, B) == back(world, A) == EVERY
    assert world.serving() == (A, B, C)
    assert "change 1: deploy of app is rolled back: " in " ".join(note.text for note in world.notes)


def test_so_does_a_new_version_that_errs_at_the_second_server() -> None:
    world = reach(begin(), B, StepName.WARM)
    world.healthy = lambda key: key != B or "roll-back" in done(world, 1, B)
    world.live(200)
    assert world.change(1).error == f"{B}: warm: went down while warming: refused; rolled back"
    assert order(world) == [B, A]
    assert back(world, B) == back(world, A) == EVERY
    assert done(world, 1, C) == []
    assert world.serving() == (A, B, C)


def test_without_it_the_servers_that_have_the_new_version_keep_it() -> None:
    world = reach(begin(policy=DEPLOYING), B, StepName.DEPLOY)
    fails(world, StepName.DEPLOY).live(200)
    assert world.change(1).error == f"{B}: deploy: no; rolled back"
    assert order(world) == [B]


@pytest.mark.parametrize("wish", [True, False])
def test_the_wish_goes_before_the_settings(wish: bool) -> None:
    world = reach(begin(policy=DEPLOYING if wish else BACK, roll_back=wish), B, StepName.DEPLOY)
    fails(world, StepName.DEPLOY).live(200)
    assert order(world) == ([B, A] if wish else [B])


def test_an_exceeded_budget_rolls_back_as_well() -> None:
    site = Site().begin(replace(BACK, rollout=RolloutPolicy(up_timeout=20.0, on_failure="roll-back")))
    number = site.rollout(ChangeKind.DEPLOY)
    until(site.world, number, StepName.WARM)
    site.window(ERRS).world.live(200)
    assert site.world.change(number).status is ChangeStatus.FAILED
    assert site.error(number) == f"{SAID}; rolled back"
    assert order(site.world) == [A]


@pytest.mark.parametrize(
    ("name", "taken_back"),
    [
        (StepName.FIND, None),
        (StepName.EMPTY, None),
        (StepName.TERMINATE, EVERY[7:]),
        (StepName.EXIT, EVERY[7:]),
        (StepName.DEPLOY, EVERY[6:]),
        (StepName.START, EVERY),
        (StepName.UP, EVERY),
        (StepName.WARM, EVERY),
    ],
)
def test_by_hand_it_goes_back_from_wherever_it_is(name: StepName, taken_back: list[str] | None) -> None:
    world = begin()
    if name is StepName.EMPTY:
        world.in_flight[B] = 1
    reach(world, B, name).take(SteerWished(1, Steer.ROLL_BACK))
    world.in_flight.clear()
    world.live(300)
    change = world.change(1)
    assert (change.status, change.error) == (ChangeStatus.ABORTED, "by an operator; rolled back")
    if name is StepName.DEPLOY:
        assert done(world, 1, B)[-6:] == ["deploy", *EVERY[6:]]
    assert back(world, B) == (taken_back or [])
    assert back(world, A) == EVERY
    assert done(world, 1, C) == []
    assert world.serving() == (A, B, C)
    assert {peer.admin for peer in world.state.groups["app"].peers.values()} == {Admin.READY}


@pytest.mark.parametrize("kind", [ChangeKind.ROLLOUT, ChangeKind.RELOAD, ChangeKind.UPGRADE])
def test_kinds_without_a_version_run_the_command_for_the_servers_already_done(kind: ChangeKind) -> None:
    world = reach(begin(kind), B, StepName.WARM)
    world.healthy = lambda key: key != B or "roll-back" in done(world, 1, B)
    world.live(200)
    assert world.change(1).error == f"{B}: warm: went down while warming: refused; rolled back"
    assert back(world, B) == back(world, A) == EVERY
    assert order(world) == [B, A]


def test_a_rollout_that_does_not_start_again_is_rolled_back_before_it_is_started_anew() -> None:
    world = reach(begin(ChangeKind.ROLLOUT), B, StepName.START)
    fails(world, StepName.START).live(200)
    assert back(world, B) == EVERY[6:]
    assert back(world, A) == EVERY


def test_an_upgrade_that_fails_leaves_its_server_as_it_was() -> None:
    world = reach(begin(ChangeKind.UPGRADE), B, StepName.UPGRADE)
    fails(world, StepName.UPGRADE).live(200)
    assert (back(world, B), back(world, A)) == ([], EVERY)


def test_servers_of_one_batch_are_first_brought_to_where_they_can_be_taken_back() -> None:
    world = reach(begin(count=5, batch=2), C, StepName.DEPLOY)
    fails(world, StepName.DEPLOY)
    assert len(running(world, 1)) == 1, "the command at the other server comes to its end"
    world.live(300)
    assert world.change(1).error == f"{C}: deploy: no; rolled back"
    batches = {s.server: s.batch for s in world.change(1).steps if s.name is StepName.ROLL_BACK}
    assert batches == {"127.0.0.1:8004": 4, C: 4, B: 5, A: 5}
    assert len(world.serving()) == 5


@pytest.mark.parametrize(
    ("kind", "policy", "said"),
    [
        (ChangeKind.ROLLOUT, POLICY, "no command roll_back is configured for app"),
        (ChangeKind.DEPLOY, replace(POLICY, process=ProcessPolicy(deploy=("new",))), "no command roll_back"),
        (ChangeKind.STOP, DEPLOYING, "a stop brings no new version"),
        (ChangeKind.SCALE, DEPLOYING, "a scale brings no new version"),
    ],
)
def test_what_cannot_be_rolled_back_is_refused_at_the_wish(kind: ChangeKind, policy: Policy, said: str) -> None:
    workers = int(kind is ChangeKind.SCALE)
    with pytest.raises(Refused, match=said):
        begin(kind, policy, servers=(A,), workers=workers, roll_back=True)
    world = begin(kind, policy, servers=(A,), workers=workers)
    with pytest.raises(Refused, match=said):
        world.take(SteerWished(1, Steer.ROLL_BACK))
    assert world.change(1).status is ChangeStatus.RUNNING


def test_settings_that_roll_back_mean_nothing_to_kinds_that_bring_nothing() -> None:
    assert not begin(ChangeKind.STOP, servers=(A,)).change(1).roll_back


def test_a_roll_back_that_fails_says_where_and_goes_no_further() -> None:
    world = reach(begin(), C, StepName.DEPLOY)
    fails(world, StepName.DEPLOY)
    fails(reach(world, B, StepName.ROLL_BACK), StepName.ROLL_BACK, "gone as well")
    world.live(100)
    change = world.change(1)
    said = f"{C}: deploy: no; the roll back failed at {B}: roll-back: gone as well"
    assert (change.status, change.error) == (ChangeStatus.FAILED, said)
    assert back(world, A) == []
    assert world.serving() == (A, C)


def test_the_way_back_waits_rather_than_empty_an_upstream() -> None:
    world = reach(begin(count=2), B, StepName.WARM)
    world.take(SteerWished(1, Steer.ROLL_BACK))
    world.probe(A, ok=False, times=3)
    world.healthy = lambda key: key != A
    world.live(20)
    waits = next(s for s in world.change(1).steps if s.batch and s.server == B and s.detail.startswith("waits"))
    assert waits.detail == f"waits: {B}: no other server of app serves"
    assert world.serving() == (B,)
    world.healthy = lambda key: True
    for _ in range(400):
        world.live(0.5)
        assert world.serving(), "never without a server"
    assert world.change(1).error == "by an operator; rolled back"
    assert back(world, A) == back(world, B) == EVERY


def test_max_unavailable_holds_on_the_way_back_too() -> None:
    world = reach(begin(count=4, batch=2, max_unavailable=1), "127.0.0.1:8004", StepName.DEPLOY)
    fails(world, StepName.DEPLOY)
    out = 0
    for _ in range(800):
        world.live(0.5)
        out = max(out, 4 - len(world.serving()))
    assert world.change(1).error == "127.0.0.1:8004: deploy: no; rolled back"
    assert out == 1
    assert back(world, A) == back(world, B) == EVERY


def test_an_aborted_way_back_brings_the_server_under_way_up_and_leaves_the_others() -> None:
    world = reach(begin(), C, StepName.DEPLOY)
    world.take(SteerWished(1, Steer.ROLL_BACK))
    with pytest.raises(Refused, match="is rolling-back: it cannot abort"):
        world.take(SteerWished(1, Steer.ABORT))
    world.answer()
    reach(world, B, StepName.EXIT).take(SteerWished(1, Steer.ABORT))
    world.live(60)
    change = world.change(1)
    said = "by an operator; the roll back was not finished"
    assert (change.status, change.error) == (ChangeStatus.ABORTED, said)
    assert back(world, B)[-2:] == ["start", "up"]
    assert back(world, A) == []
    assert world.serving() == (A, B, C)


def test_nobody_else_handles_the_processes_meanwhile() -> None:
    world = fails(reach(begin(), B, StepName.DEPLOY), StepName.DEPLOY)
    with pytest.raises(Refused, match="is being rolled back"):
        world.wish(ChangeKind.RESTART, C)
    with pytest.raises(Refused, match="is rolling-back: it cannot pause"):
        world.take(SteerWished(1, Steer.PAUSE))


def test_a_change_that_has_ended_is_rolled_back_by_another_one() -> None:
    world = begin(policy=DEPLOYING)
    reach(world, C, StepName.DEPLOY)
    fails(world, StepName.DEPLOY).live(60)
    change, group = world.change(1), world.state.groups["app"]
    assert change.status is ChangeStatus.FAILED
    wish = rollback.of_ended(1, change.kind, change.steps, group)
    assert wish == ChangeWished(ChangeKind.ROLL_BACK, "app", (B, A)), "the failed one has been taken back already"
    world.take(wish)
    world.live(200)
    assert world.change(2).status is ChangeStatus.DONE
    with pytest.raises(Refused, match="no server of app has anything of change 1 any more"):
        rollback.of_ended(1, change.kind, [s for s in change.steps if s.server == C], group)
    world.take(ConfigRead((upstream(1, policy=DEPLOYING),)))
    assert rollback.of_ended(1, change.kind, change.steps, world.state.groups["app"]).servers == (A,)


def reborn(world: World) -> None:
    """The daemon is killed, and another one reads the store."""
    old = world.state
    world.state, world.jobs = State(), []
    peers = {("app", key): peer for key, peer in old.groups["app"].peers.items()}
    world.take(Restored(old.revision, old.next_change, old.next_epoch, peers, dict(old.changes)))
    world.take(PlaneSeen("boot", old.revision))
    world.take(ConfigRead((old.groups["app"].upstream,)))


def by_failure(world: World) -> None:
    fails(reach(world, B, StepName.DEPLOY), StepName.DEPLOY)


def by_hand(world: World) -> None:
    reach(world, B, StepName.UP).take(SteerWished(1, Steer.ROLL_BACK))


@pytest.mark.parametrize("goes_back", [by_failure, by_hand])
def test_a_daemon_that_is_killed_between_any_two_steps_ends_it_as_it_would_have(
    goes_back: Callable[[World], None],
) -> None:
    world = begin()
    goes_back(world)
    told: list[tuple[str, str]] = []
    for _ in range(400):
        if world.change(1).status.ended:
            break
        told += [(s.server, s.name.value) for s in world.change(1).steps if s.state is StepState.RUNNING]
        reborn(world)
        world.live(0.5)
    assert world.change(1).error.endswith("; rolled back")
    assert len(set(told)) > 10
    assert order(world) == [B, A]
    assert back(world, A) == EVERY
    assert world.serving() == (A, B, C)


KEYS = st.sampled_from([A, B, C])
HAPPENS = st.lists(
    st.one_of(
        *[st.just(("answer", ""))] * 4,
        *[st.just(("pass", ""))] * 3,
        KEYS.map(lambda key: ("up", key)),
        KEYS.map(lambda key: ("down", key)),
        st.just(("fail", "")),
        st.just(("kill", "")),
        st.sampled_from(list(Steer)).map(lambda wish: ("steer", wish.value)),
    ),
    max_size=150,
)


def happens(world: World, what: str, of: str) -> None:
    match what:
        case "answer":
            world.answer()
        case "pass":
            world.pass_time(3)
        case "up" | "down":
            world.probe(of, what == "up", times=3)
        case "fail" if world.jobs:
            fails(world, world.jobs[0].name)
        case "kill":
            reborn(world)
        case "steer":
            with contextlib.suppress(Refused):
                world.take(SteerWished(1, Steer(of)))
    world.acknowledge()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(rollback.BRINGS)), st.integers(1, 2), HAPPENS)
def test_whatever_happens_it_ends_and_nobody_keeps_what_was_rolled_back(
    kind: ChangeKind, batch: int, history: list[tuple[str, str]]
) -> None:
    world = begin(kind, batch=batch)
    for what, of in history:
        happens(world, what, of)
        assert any(peer.admin is Admin.READY for peer in world.state.groups["app"].peers.values())
    if world.change(1).status is ChangeStatus.PAUSED:
        world.take(SteerWished(1, Steer.RESUME))
    for _ in range(100):
        if not world.change(1).status.ended:
            world.live(20)
    change = world.change(1)
    assert change.status.ended
    assert not {s.state for s in change.steps} & {StepState.RUNNING, StepState.PENDING}
    if change.error.endswith("; rolled back"):
        assert rollback.changed(kind, change.steps) == ()
        assert not any(s.state is StepState.FAILED for s in change.steps if 0 < change.back <= s.batch)
    if change.status is ChangeStatus.DONE:
        assert {s.state for s in change.steps} <= {StepState.DONE, StepState.SKIPPED}
