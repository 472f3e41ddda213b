"""What reload, upgrade, deploy, roll back and scale do between drain and warm-up, and when they fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core.events import ChangeWished, StepDone, StepFailed
from controller.core.model import Admin, ChangeKind, ChangeStatus, Master, Refused, StepName, StepState, Warmth
from controller.core.policy import ProcessPolicy
from tests.core.test_steering import DEPLOYING, done, until
from tests.core.world import POLICY, A, B, C, World, upstream


@pytest.mark.parametrize(
    ("kind", "between"),
    [
        (ChangeKind.RELOAD, ["reload", "workers"]),
        (ChangeKind.UPGRADE, ["upgrade", "terminate", "exit"]),
        (ChangeKind.DEPLOY, ["terminate", "exit", "deploy", "start"]),
        (ChangeKind.ROLL_BACK, ["terminate", "exit", "roll-back", "start"]),
        (ChangeKind.SCALE, ["scale"]),
    ],
)
def test_each_kind_drains_first_and_comes_back_by_its_probes_and_a_warm_up(
    kind: ChangeKind, between: list[str]
) -> None:
    world = World().configure(upstream(policy=DEPLOYING)).probe(A, times=2)
    outcome = world.take(ChangeWished(kind, "app", (A,)) if kind is not ChangeKind.SCALE else SCALE_IN)
    assert outcome.change is not None
    number = outcome.change
    job = world.jobs.pop()
    world.take(StepDone(number, job.step, "", Master(1, 1.0, "x", ((2, 1.0), (3, 1.0)))))
    for name in between:
        until(world, number, StepName(name))
        assert A not in world.serving(), f"{name} happens while nothing is sent to the server"
    until(world, number, StepName.WARM)
    assert world.peer(A).warm_up.phase is Warmth.RUNNING
    world.live(60)
    assert world.change(number).status is ChangeStatus.DONE
    assert done(world, number, A) == ["find", "drain", "empty", "settle", *between, "up", "warm", "hold"]
    assert world.serving() == (A, B, C)


SCALE_IN = ChangeWished(ChangeKind.SCALE, "app", (A,), workers=1)


def test_scaling_out_takes_nothing_away() -> None:
    world = World().configure().probe(A, times=2)
    outcome = world.take(ChangeWished(ChangeKind.SCALE, "app", (A,), workers=4))
    world.answer()
    assert [(job.name, job.workers) for job in world.jobs] == [(StepName.SCALE, 4)]
    assert world.entry(A)["state"] == "up"
    world.answer().live(3)
    assert outcome.change is not None
    assert world.change(outcome.change).status is ChangeStatus.DONE
    assert done(world, outcome.change, A) == ["find", "scale", "up", "warm", "hold"]
    assert world.peer(A).warm_up.phase is not Warmth.RUNNING


def test_the_old_master_is_ended_and_the_new_one_is_watched() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.UPGRADE, A)
    until(world, number, StepName.UPGRADE)
    job = world.jobs.pop()
    old = job.master
    world.take(StepDone(number, job.step, "beside", Master(77, 5.0, "x")))
    assert [(j.name, j.master) for j in world.jobs] == [(StepName.TERMINATE, old)]
    until(world, number, StepName.UP)
    up = next(s for s in world.change(number).steps if s.name is StepName.UP)
    assert up.master == Master(77, 5.0, "x")


@pytest.mark.parametrize("kind", [ChangeKind.UPGRADE, ChangeKind.SCALE])
def test_where_it_fails_the_server_serves_on_as_before(kind: ChangeKind) -> None:
    world = World().configure()
    wish = replace(SCALE_IN, kind=kind, workers=int(kind is ChangeKind.SCALE))
    outcome = world.take(wish)
    number = outcome.change or 0
    job = world.jobs.pop()
    world.take(StepDone(number, job.step, "", Master(1, 1.0, "x", ((2, 1.0), (3, 1.0)))))
    world.acknowledge()
    until(world, number, StepName(kind.value))
    assert world.peer(A).admin is Admin.DRAIN
    world.take(StepFailed(number, world.jobs.pop().step, "the new one does not load"))
    assert world.change(number).status is ChangeStatus.FAILED
    assert world.peer(A).admin is Admin.READY


@pytest.mark.parametrize("kind", [ChangeKind.RELOAD, ChangeKind.UPGRADE, ChangeKind.SCALE])
def test_what_does_not_run_is_said_before_traffic_is_touched(kind: ChangeKind) -> None:
    world = World().configure()
    number = world.take(replace(SCALE_IN, kind=kind, workers=int(kind is ChangeKind.SCALE))).change or 0
    world.take(StepDone(number, 0, "no process is running"))
    assert world.change(number).error == f"{A}: find: no process is running (start it instead)"
    assert world.peer(A).admin is Admin.READY


def test_a_deploy_that_fails_is_rolled_back_and_the_server_comes_back() -> None:
    world = World().configure(upstream(policy=DEPLOYING))
    number = world.wish(ChangeKind.DEPLOY)
    until(world, number, StepName.DEPLOY)
    world.take(StepFailed(number, world.jobs.pop().step, "no such release"))
    world.acknowledge().live(60)
    change = world.change(number)
    assert change.status is ChangeStatus.FAILED
    assert change.error == f"{A}: deploy: no such release; rolled back"
    assert done(world, number, A)[-3:] == ["roll-back", "start", "up"]
    assert done(world, number, B) == [], "and no other server gets the new version"
    assert world.serving() == (A, B, C)


def test_a_new_version_that_never_becomes_healthy_is_stopped_and_rolled_back() -> None:
    world = World().configure(upstream(policy=DEPLOYING))
    number = world.wish(ChangeKind.DEPLOY)
    until(world, number, StepName.UP)
    rolled_back = [False]
    world.healthy = lambda key: key != A or rolled_back[0]
    for _ in range(200):
        world.live(0.5)
        rolled_back[0] = rolled_back[0] or "roll-back" in done(world, number, A)
    assert world.change(number).error == f"{A}: up: not up within 20 s: refused; rolled back"
    assert done(world, number, A)[-8:] == ["find", "drain", "empty", "terminate", "exit", "roll-back", "start", "up"]
    assert world.serving() == (A, B, C)


def test_a_new_version_that_errs_while_it_warms_is_rolled_back_too() -> None:
    world = World().configure(upstream(policy=DEPLOYING))
    number = world.wish(ChangeKind.DEPLOY)
    until(world, number, StepName.WARM)
    world.probe(A, ok=False, times=3, reason="status: 500")
    world.live(60)
    assert world.change(number).error == f"{A}: warm: went down while warming: status: 500; rolled back"
    assert world.serving() == (A, B, C)


def test_a_roll_back_that_fails_too_is_not_tried_again() -> None:
    world = World().configure(upstream(policy=DEPLOYING))
    number = world.wish(ChangeKind.DEPLOY, A)
    until(world, number, StepName.DEPLOY)
    world.take(StepFailed(number, world.jobs.pop().step, "no such release"))
    until(world, number, StepName.ROLL_BACK)
    world.take(StepFailed(number, world.jobs.pop().step, "gone as well"))
    world.live(10)
    change = world.change(number)
    assert (change.status, change.error) == (ChangeStatus.FAILED, f"{A}: deploy: no such release")
    assert [s.name.value for s in change.steps if s.state is StepState.FAILED] == ["deploy", "roll-back"]


def test_without_a_command_to_roll_back_a_failed_deploy_leaves_the_server_out() -> None:
    policy = replace(POLICY, process=ProcessPolicy(deploy=("new",)))
    world = World().configure(upstream(policy=policy))
    number = world.wish(ChangeKind.DEPLOY, A)
    until(world, number, StepName.DEPLOY)
    world.take(StepFailed(number, world.jobs.pop().step, "no such release"))
    world.live(30)
    assert world.change(number).status is ChangeStatus.FAILED
    assert world.serving() == (B, C)


@pytest.mark.parametrize(
    ("kind", "alone"),
    [
        (ChangeKind.STOP, True),
        (ChangeKind.DEPLOY, True),
        (ChangeKind.ROLL_BACK, True),
        (ChangeKind.RESTART, False),  # a process that is newer than the change is what a restart is for
        (ChangeKind.UPGRADE, False),  # the new master is there already
    ],
)
def test_nothing_may_serve_in_the_place_of_a_master_whose_end_something_else_waits_for(
    kind: ChangeKind, alone: bool
) -> None:
    world = World().configure(upstream(policy=DEPLOYING))
    number = world.wish(kind, A)
    for name in (StepName.TERMINATE, StepName.EXIT, StepName.KILL):
        until(world, number, name)
        job = world.jobs.pop()
        assert (job.name, job.alone) == (name, alone)
        world.take(StepDone(number, job.step, "", gone=False))


def test_a_deploy_whose_master_was_replaced_gives_the_place_back_and_runs_no_command() -> None:
    world = World().configure(upstream(policy=DEPLOYING))
    number = world.wish(ChangeKind.DEPLOY)
    until(world, number, StepName.TERMINATE)
    world.take(StepFailed(number, world.jobs.pop().step, "pid 7 serves in its place"))
    world.acknowledge().live(60)
    assert world.change(number).error == f"{A}: terminate: pid 7 serves in its place"
    assert done(world, number, A) == ["find", "drain", "empty", "settle"]
    assert world.serving() == (A, B, C)


def test_a_roll_back_takes_the_servers_in_the_other_order() -> None:
    world = World().configure(upstream(policy=DEPLOYING))
    number = world.wish(ChangeKind.ROLL_BACK)
    assert list(dict.fromkeys(s.server for s in world.change(number).steps)) == [C, B, A]


@pytest.mark.parametrize(
    ("kind", "process", "said"),
    [
        (ChangeKind.DEPLOY, ProcessPolicy(), "no command deploy is configured for app"),
        (ChangeKind.ROLL_BACK, ProcessPolicy(deploy=("x",)), "no command roll_back is configured for app"),
        (ChangeKind.RELOAD, ProcessPolicy(kind="systemd", unit="a"), "reload speaks to gunicorn"),
        (ChangeKind.UPGRADE, ProcessPolicy(unit="app@{port}.service"), "systemd would end app@"),
        (ChangeKind.SCALE, ProcessPolicy(), "at least one worker"),
    ],
)
def test_what_is_not_configured_or_cannot_be_is_refused_before_anything_begins(
    kind: ChangeKind, process: ProcessPolicy, said: str
) -> None:
    world = World().configure(upstream(policy=replace(POLICY, process=process)))
    with pytest.raises(Refused, match=said):
        world.wish(kind, A)
    assert world.state.changes == {}


def test_only_a_scale_takes_a_number_of_workers() -> None:
    """With one, a restart would leave out the drain where the master has that many."""
    world = World().configure()
    with pytest.raises(Refused, match="restart leaves the number of workers as it is"):
        world.take(ChangeWished(ChangeKind.RESTART, "app", (A,), workers=4))
    assert world.state.changes == {}
