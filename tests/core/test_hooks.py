"""Hooks as steps of a change: when they are called, what their failure means, and that nobody stays deregistered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core.events import Restored, RunStep, SteerWished, StepFailed
from controller.core.model import Admin, ChangeKind, ChangeStatus, Steer, StepName, StepState
from controller.core.policy import Hook, HookPolicy, NoticePolicy, Policy
from tests.core.world import POLICY, A, B, C, World, upstream

CALL = (Hook((("POST", "http://127.0.0.1:1/"),)),)
ALL = replace(POLICY, hooks=HookPolicy(CALL, CALL, CALL))


def world(policy: Policy = ALL, **parts: object) -> World:
    return World(**parts).configure(upstream(policy=policy)).probe(A, times=2)  # type: ignore[arg-type]


def states(world: World, number: int, server: str = A) -> dict[StepName, StepState]:
    return {step.name: step.state for step in world.change(number).steps if step.server == server}


def due(world: World, number: int) -> list[StepName]:
    return [step.name for step in world.change(number).steps if step.state is StepState.RUNNING]


def until(world: World, number: int, name: StepName) -> int:
    """Go on until a step of this name runs, and return its place in the change."""
    for _ in range(200):
        if name in due(world, number):
            steps = world.change(number).steps
            return next(at for at, s in enumerate(steps) if s.name is name and s.state is StepState.RUNNING)
        world.live(0.5)
    raise AssertionError(f"{name} never ran: {due(world, number)}")


def fail(world: World, number: int, name: StepName, why: str = "POST http://127.0.0.1:1/ answered 500") -> World:
    """The step of this name, which runs, fails."""
    at = until(world, number, name)
    world.jobs = [job for job in world.jobs if job.step != at]
    world.take(StepFailed(number, at, why))
    return world.acknowledge()


def test_hooks_are_called_before_the_drain_after_it_and_when_the_probes_pass() -> None:
    it = world()
    number = it.wish(ChangeKind.RESTART, A)
    it.live(60)
    begun = [note.text.rsplit(" ", 1)[1] for note in it.notes if note.kind == "step"]
    assert begun == [
        "find", "before_drain", "drain", "empty", "after_drain", "settle", "terminate", "exit",
        "start", "up", "after_up", "warm", "hold",
    ]  # fmt: skip
    assert it.change(number).status is ChangeStatus.DONE


def test_a_server_may_be_registered_once_it_is_warm() -> None:
    it = world(replace(ALL, hooks=replace(ALL.hooks, register_at="warm")))
    number = it.wish(ChangeKind.RESTART, A)
    until(it, number, StepName.WARM)
    assert StepName.AFTER_UP not in [job.name for job in it.jobs]
    it.live(60)
    begun = [note.text.rsplit(" ", 1)[1] for note in it.notes if note.kind == "step"]
    assert begun[-4:] == ["up", "warm", "after_up", "hold"]
    assert it.change(number).status is ChangeStatus.DONE


def test_one_that_is_aborted_while_it_warms_is_registered_at_once() -> None:
    it = world(replace(ALL, hooks=replace(ALL.hooks, register_at="warm")))
    number = it.wish(ChangeKind.RESTART, A)
    until(it, number, StepName.WARM)
    it.take(SteerWished(number, Steer.ABORT))
    assert due(it, number) == [StepName.AFTER_UP]


def test_no_hook_that_is_not_configured_is_a_step() -> None:
    it = world(replace(POLICY, hooks=HookPolicy(after_up=CALL)))
    number = it.wish(ChangeKind.RESTART, A)
    assert {StepName.BEFORE_DRAIN, StepName.AFTER_DRAIN, StepName.AFTER_UP} & states(it, number).keys() == {
        StepName.AFTER_UP
    }


def test_a_server_keeps_its_traffic_until_it_has_been_deregistered() -> None:
    it = world()
    number = it.wish(ChangeKind.RESTART, A)
    until(it, number, StepName.BEFORE_DRAIN)
    assert it.entry(A)["state"] == "up"
    it.answer()
    assert it.entry(A)["state"] == "drain"


@pytest.mark.parametrize("kind", [ChangeKind.RESTART, ChangeKind.STOP])
def test_a_deregistration_that_fails_ends_the_change_and_is_taken_back(kind: ChangeKind) -> None:
    it = world()
    number = it.wish(kind, A)
    fail(it, number, StepName.BEFORE_DRAIN)
    assert it.entry(A)["state"] == "up"
    assert due(it, number) == [StepName.AFTER_UP], "an earlier hook of the step may have deregistered it"
    it.answer()
    change = it.change(number)
    assert change.status is ChangeStatus.FAILED
    assert change.error == f"{A}: before_drain: POST http://127.0.0.1:1/ answered 500"
    assert states(it, number)[StepName.AFTER_UP] is StepState.DONE
    assert states(it, number)[StepName.DRAIN] is StepState.SKIPPED
    assert it.peer(A).admin is Admin.READY


@pytest.mark.parametrize("kind", [ChangeKind.RESTART, ChangeKind.STOP])
def test_a_server_that_cannot_be_emptied_comes_back_to_the_registry_as_it_does_to_nginx(kind: ChangeKind) -> None:
    it = world(in_flight={A: 1})
    number = it.wish(kind, A)
    until(it, number, StepName.EMPTY)
    it.pass_time(31)
    assert due(it, number) == [StepName.AFTER_UP]
    assert it.entry(A)["state"] == "up"
    it.answer()
    assert it.change(number).status is ChangeStatus.FAILED
    assert states(it, number)[StepName.AFTER_UP] is StepState.DONE


def test_a_hook_that_fails_when_the_server_is_empty_gives_its_place_back() -> None:
    it = world()
    number = it.wish(ChangeKind.RESTART, A)
    fail(it, number, StepName.AFTER_DRAIN).answer()
    assert it.peer(A).admin is Admin.READY
    assert it.change(number).status is ChangeStatus.FAILED
    assert states(it, number)[StepName.AFTER_UP] is StepState.DONE
    assert states(it, number)[StepName.TERMINATE] is StepState.SKIPPED


def test_a_failed_call_back_is_recorded_and_ends_the_change_too() -> None:
    it = world()
    number = it.wish(ChangeKind.RESTART, A)
    fail(it, number, StepName.BEFORE_DRAIN, "it hangs")
    fail(it, number, StepName.AFTER_UP, "it still hangs")
    assert it.change(number).status is ChangeStatus.FAILED
    assert it.change(number).error == f"{A}: before_drain: it hangs"
    assert states(it, number)[StepName.AFTER_UP] is StepState.FAILED


def test_nothing_is_called_back_where_nobody_was_told_or_the_process_has_been_stopped() -> None:
    it = world()
    number = it.wish(ChangeKind.RESTART, A)
    it.take(StepFailed(number, 0, "pid 1 is not the process"))
    assert states(it, number)[StepName.AFTER_UP] is StepState.SKIPPED
    number = it.wish(ChangeKind.RESTART, A)
    fail(it, number, StepName.START, "it ended with exit status 1")
    assert states(it, number)[StepName.AFTER_UP] is StepState.SKIPPED
    assert it.change(number).status is ChangeStatus.FAILED


def test_a_rollout_begins_no_batch_after_a_hook_that_failed_but_calls_back() -> None:
    it = world().probe(B, times=2).probe(C, times=2)
    number = it.wish(ChangeKind.ROLLOUT, A, B, C)
    fail(it, number, StepName.BEFORE_DRAIN)
    assert due(it, number) == [StepName.AFTER_UP]
    it.live(5)
    assert it.change(number).status is ChangeStatus.FAILED
    assert set(states(it, number, B).values()) == {StepState.SKIPPED}


def test_a_server_whose_return_cannot_be_told_serves_and_ends_the_change() -> None:
    it = world()
    number = it.wish(ChangeKind.RESTART, A)
    fail(it, number, StepName.AFTER_UP)
    assert it.change(number).status is ChangeStatus.FAILED
    assert it.entry(A)["state"] == "up"
    assert states(it, number)[StepName.WARM] is StepState.SKIPPED


def test_force_goes_on_whatever_a_hook_says() -> None:
    it = world()
    number = it.wish(ChangeKind.RESTART, A, forced=True)
    fail(it, number, StepName.BEFORE_DRAIN, "it hangs")
    assert states(it, number)[StepName.BEFORE_DRAIN] is StepState.DONE
    assert it.change(number).steps[1].detail == "it hangs; proceeding as it is forced"
    fail(it, number, StepName.AFTER_UP)
    it.live(60)
    assert it.change(number).status is ChangeStatus.DONE


def test_a_server_that_is_down_can_be_restarted_though_it_does_not_answer_its_hooks() -> None:
    it = world().probe(A, ok=False, times=3)
    number = it.wish(ChangeKind.RESTART, A)
    fail(it, number, StepName.BEFORE_DRAIN, "refused")
    assert it.change(number).steps[1].detail == "refused; proceeding as the server is down"
    it.live(60)
    assert it.change(number).status is ChangeStatus.DONE


def test_a_hook_that_was_under_way_when_the_daemon_ended_is_called_again() -> None:
    it = world()
    number = it.wish(ChangeKind.RESTART, A)
    at = until(it, number, StepName.BEFORE_DRAIN)
    saved = {("app", key): peer for key, peer in it.state.groups["app"].peers.items()}
    again = World(now=it.now)
    again.take(Restored(it.state.revision, it.state.next_change, it.state.next_epoch, saved, dict(it.state.changes)))
    again.configure(upstream(policy=ALL))
    assert [(job.step, job.name) for job in again.jobs if isinstance(job, RunStep)] == [(at, StepName.BEFORE_DRAIN)]
    again.live(60)
    assert again.change(number).status is ChangeStatus.DONE


def test_an_aborted_change_tells_the_registry_that_the_server_stays() -> None:
    it = world(in_flight={A: 1})
    number = it.wish(ChangeKind.RESTART, A)
    until(it, number, StepName.EMPTY)
    it.take(SteerWished(number, Steer.ABORT))
    assert due(it, number) == [StepName.AFTER_UP]
    assert it.peer(A).admin is Admin.READY
    it.answer()
    assert it.change(number).status is ChangeStatus.ABORTED


def abort_during(name: StepName) -> tuple[World, int]:
    """A change that is aborted while a call of this name is under way, and the answer has not come."""
    it = world(replace(ALL, notices=NoticePolicy(enabled=True)))
    number = it.wish(ChangeKind.RESTART, A)
    until(it, number, name)
    it.take(SteerWished(number, Steer.ABORT))
    return it.acknowledge(), number


@pytest.mark.parametrize("name", [StepName.BEFORE_DRAIN, StepName.NOTIFY, StepName.AFTER_DRAIN])
def test_a_call_that_is_under_way_at_an_abort_ends_before_the_registry_hears_that_the_server_stays(
    name: StepName,
) -> None:
    it, number = abort_during(name)
    assert due(it, number) == [name], "it could still reach the registry, after the registration"
    assert it.peer(A).admin is Admin.READY, "the traffic does not wait for that"
    assert it.change(number).status is ChangeStatus.ABORTING
    it.answer()
    assert due(it, number) == [StepName.AFTER_UP]
    it.answer()
    assert it.change(number).status is ChangeStatus.ABORTED
    assert states(it, number)[StepName.TERMINATE] is StepState.SKIPPED


def test_a_call_that_fails_after_an_abort_is_taken_back_too() -> None:
    it, number = abort_during(StepName.BEFORE_DRAIN)
    it.take(StepFailed(number, it.jobs.pop().step, "it hangs"))
    assert due(it, number) == [StepName.AFTER_UP]
    it.answer()
    change = it.change(number)
    assert (change.status, change.error) == (ChangeStatus.ABORTED, f"{A}: before_drain: it hangs")


def test_a_call_under_way_at_an_abort_is_repeated_by_the_next_daemon_and_taken_back_behind_it() -> None:
    it, number = abort_during(StepName.BEFORE_DRAIN)
    saved = {("app", key): peer for key, peer in it.state.groups["app"].peers.items()}
    again = World(now=it.now)
    again.take(Restored(it.state.revision, it.state.next_change, it.state.next_epoch, saved, dict(it.state.changes)))
    again.configure(upstream(policy=ALL))
    assert [job.name for job in again.jobs] == [StepName.BEFORE_DRAIN]
    again.answer()
    assert [job.name for job in again.jobs] == [StepName.AFTER_UP]
    again.answer()
    assert again.change(number).status is ChangeStatus.ABORTED
