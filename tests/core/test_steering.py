"""Changes that are paused, resumed, aborted, queued, and held back while too few servers serve."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core.events import ChangeWished, ConfigRead, PlaneSeen, Restored, SteerWished, StepDone, StepFailed
from controller.core.model import Admin, ChangeKind, ChangeStatus, Refused, Steer, StepName, StepState
from controller.core.policy import ProcessPolicy
from tests.core.world import POLICY, A, B, C, World, upstream

DEPLOYING = replace(POLICY, process=ProcessPolicy(deploy=("new",), roll_back=("old",)))


def steer(world: World, number: int, wish: Steer) -> World:
    world.take(SteerWished(number, wish))
    return world.acknowledge()


def running(world: World, number: int) -> list[tuple[str, str]]:
    return [(s.server, s.name.value) for s in world.change(number).steps if s.state is StepState.RUNNING]


def done(world: World, number: int, key: str) -> list[str]:
    return [s.name.value for s in world.change(number).steps if s.server == key and s.state is StepState.DONE]


def until(world: World, number: int, name: StepName) -> World:
    """Live until this step is under way."""

    def reached() -> bool:
        return any(s.name is name and s.state is StepState.RUNNING for s in world.change(number).steps)

    for _ in range(400):
        for pause in (world.answer, lambda: world.pass_time(0.5), lambda: world.probe(A, world.healthy(A))):
            if reached():
                return world
            pause()
    raise AssertionError(f"{name} never began: {world.change(number)}")


def test_a_paused_rollout_finishes_the_server_under_way_and_begins_no_other() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.ROLLOUT)
    until(world, number, StepName.EXIT)
    steer(world, number, Steer.PAUSE).live(200)
    assert world.change(number).status is ChangeStatus.PAUSED
    assert done(world, number, A)[-1] == "hold"
    assert running(world, number) == []
    assert world.serving() == (A, B, C)
    steer(world, number, Steer.RESUME).live(200)
    assert world.change(number).status is ChangeStatus.DONE


def test_a_change_that_is_paused_at_its_last_server_ends_with_it() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESTART, A)
    steer(until(world, number, StepName.EXIT), number, Steer.PAUSE).live(100)
    assert world.change(number).status is ChangeStatus.DONE


def test_a_paused_change_still_keeps_others_away() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.ROLLOUT)
    steer(world, number, Steer.PAUSE).live(200)
    with pytest.raises(Refused, match=f"change {number} .rollout. of app is paused"):
        world.wish(ChangeKind.RESTART, B)


@pytest.mark.parametrize("name", [StepName.FIND, StepName.DRAIN, StepName.EMPTY, StepName.SETTLE])
def test_aborted_before_it_was_told_to_stop_a_server_gets_its_place_back_at_once(name: StepName) -> None:
    world = World(in_flight={A: 1}).configure().probe(A, times=2)
    number = world.wish(ChangeKind.ROLLOUT)
    if name is not StepName.FIND:
        world.nginx = name is not StepName.DRAIN
        world.answer()
    if name is StepName.SETTLE:
        world.in_flight.clear()
        world.acknowledge()
    assert running(world, number) == [(A, name)]
    world.nginx = True
    steer(world, number, Steer.ABORT)
    change = world.change(number)
    assert (change.status, change.error) == (ChangeStatus.ABORTED, "by an operator")
    assert world.peer(A).admin is Admin.READY
    assert world.jobs == [] or name is StepName.FIND
    jobs = len(world.jobs)
    world.take(StepDone(number, 0, "late"))
    assert len(world.jobs) == jobs, "a late report does not go on with it"


@pytest.mark.parametrize("name", [StepName.TERMINATE, StepName.EXIT, StepName.START, StepName.UP, StepName.WARM])
def test_aborted_after_it_was_told_to_stop_a_server_is_brought_up_again_and_the_next_is_left_alone(
    name: StepName,
) -> None:
    world = World().configure()
    number = world.wish(ChangeKind.ROLLOUT)
    for _ in range(100):
        if running(world, number) == [(A, name)]:
            break
        world.pass_time(0.5)
        if name not in [job.name for job in world.jobs]:
            world.answer()
        if name is StepName.WARM:
            world.probe(A)
    steer(world, number, Steer.ABORT)
    assert world.change(number).status is (ChangeStatus.ABORTED if name is StepName.WARM else ChangeStatus.ABORTING)
    world.live(60)
    assert world.change(number).status is ChangeStatus.ABORTED
    assert done(world, number, A)[-1] == "up"
    assert done(world, number, B) == []
    assert world.serving() == (A, B, C)


def test_an_aborted_deploy_starts_what_was_there_before_the_command_ran() -> None:
    world = World().configure(upstream(policy=DEPLOYING))
    number = world.wish(ChangeKind.DEPLOY, A)
    steer(until(world, number, StepName.EXIT), number, Steer.ABORT).live(60)
    assert world.change(number).status is ChangeStatus.ABORTED
    assert "deploy" not in done(world, number, A)
    assert done(world, number, A)[-2:] == ["start", "up"]


def test_an_aborted_stop_that_cannot_be_taken_back_ends_as_a_stop() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.STOP, A)
    until(world, number, StepName.EXIT)
    steer(world, number, Steer.ABORT).answer()
    assert world.change(number).status is ChangeStatus.ABORTED
    assert world.peer(A).admin is Admin.MAINT


def test_an_aborted_drain_gives_the_place_back() -> None:
    world = World(in_flight={A: 1}).configure()
    number = world.wish(ChangeKind.DRAIN, A)
    steer(world, number, Steer.ABORT)
    assert world.change(number).status is ChangeStatus.ABORTED
    assert world.entry(A)["state"] == "up"


def test_only_what_runs_can_be_steered_and_only_as_it_stands() -> None:
    world = World().configure()
    for wish in Steer:
        with pytest.raises(Refused, match="there is no change 7"):
            steer(world, 7, wish)
    number = world.wish(ChangeKind.ROLLOUT)
    with pytest.raises(Refused, match=f"change {number} is running: it cannot resume"):
        steer(world, number, Steer.RESUME)
    steer(world, number, Steer.PAUSE)
    with pytest.raises(Refused, match="is paused: it cannot pause"):
        steer(world, number, Steer.PAUSE)
    steer(world, number, Steer.ABORT)
    with pytest.raises(Refused) as refused:
        steer(world, number, Steer.ABORT)
    assert refused.value.code == "not_found"


def test_a_paused_and_an_aborted_change_survive_the_daemon() -> None:
    for wish, kept, last in (
        (Steer.PAUSE, ChangeStatus.PAUSED, ChangeStatus.PAUSED),
        (Steer.ABORT, ChangeStatus.ABORTING, ChangeStatus.ABORTED),
    ):
        world = World().configure()
        number = world.wish(ChangeKind.ROLLOUT)
        steer(until(world, number, StepName.EXIT), number, wish)
        assert world.change(number).status is kept
        old = world.state
        again = World(now=world.now + 50)
        peers = {("app", key): peer for key, peer in old.groups["app"].peers.items()}
        again.take(Restored(old.revision, old.next_change, old.next_epoch, peers, dict(old.changes), away=50))
        again.take(PlaneSeen("boot", old.revision))
        again.take(ConfigRead((upstream(),)))
        assert [job.name for job in again.jobs] == [StepName.EXIT]
        again.acknowledge().live(200)
        assert again.change(number).status is last
        assert again.serving() == (A, B, C)


def queue(world: World, kind: ChangeKind, *keys: str) -> int:
    outcome = world.take(ChangeWished(kind, "app", keys, queue=True))
    assert outcome.change is not None
    return outcome.change


def test_queued_changes_begin_in_their_order_when_what_is_in_their_way_has_ended() -> None:
    world = World().configure()
    first = world.wish(ChangeKind.RESTART, A)
    second, third = queue(world, ChangeKind.RESTART, B), queue(world, ChangeKind.RESTART, C)
    assert {world.change(n).status for n in (second, third)} == {ChangeStatus.QUEUED}
    seen = []
    for _ in range(400):
        world.live(0.5)
        seen.append([n for n in (first, second, third) if world.change(n).status is ChangeStatus.RUNNING])
    assert [numbers for at, numbers in enumerate(seen) if numbers != (seen[at - 1] if at else None)] == [
        [first],
        [second],
        [third],
        [],
    ]
    assert {world.change(n).status for n in (first, second, third)} == {ChangeStatus.DONE}


def test_a_queued_change_begins_at_once_where_nothing_is_in_its_way_and_can_be_aborted_before() -> None:
    world = World().configure()
    first = queue(world, ChangeKind.RESTART, A)
    assert world.change(first).status is ChangeStatus.RUNNING
    second = queue(world, ChangeKind.RESTART, B)
    steer(world, second, Steer.ABORT)
    assert world.change(second).status is ChangeStatus.ABORTED
    world.live(100)
    assert world.change(first).status is ChangeStatus.DONE
    assert done(world, second, B) == []


def test_a_queue_does_not_wait_for_guards_and_mistakes() -> None:
    world = World().configure(upstream(1))
    with pytest.raises(Refused, match="no other server"):
        queue(world, ChangeKind.RESTART, A)


def test_no_server_is_taken_away_while_more_than_max_unavailable_would_not_serve() -> None:
    world = World().configure(upstream(4))
    world.probe(B, ok=False, times=3)
    outcome = world.take(ChangeWished(ChangeKind.ROLLOUT, "app", (A, C), 2, max_unavailable=1))
    world.healthy = lambda key: key != B
    number = outcome.change
    assert number is not None
    world.live(30)
    waiting = next(s for s in world.change(number).steps if s.name is StepName.DRAIN)
    assert waiting.detail == "waits: 1 others do not serve, or are not warm yet; at most 1 may be away"
    assert world.peer(A).admin is Admin.READY
    world.healthy = lambda key: True
    out = 0
    for _ in range(300):
        world.live(0.5)
        out = max(out, 4 - len(world.serving()))
    assert world.change(number).status is ChangeStatus.DONE
    assert out == 1, "one at a time, though the batch has two"


def test_a_server_does_not_wait_for_ever_for_others_but_as_long_as_the_change_gets_on() -> None:
    rollout = replace(POLICY.rollout, wait_timeout=25.0)
    world = World().configure(upstream(4, policy=replace(POLICY, rollout=rollout)))
    outcome = world.take(ChangeWished(ChangeKind.ROLLOUT, "app", (A, B, C), 3, max_unavailable=1))
    number = outcome.change
    assert number is not None
    until(world, number, StepName.WARM)
    world.live(20)
    assert not world.change(number).error, "C waits for longer, but A has got on, and B"
    world.probe("127.0.0.1:8004", ok=False, times=3)
    world.healthy = lambda key: key != "127.0.0.1:8004"
    world.live(200)
    change = world.change(number)
    assert change.status is ChangeStatus.FAILED
    said = "drain: waits: 1 others do not serve, or are not warm yet; at most 1 may be away, for 25 s now"
    assert change.error.endswith(said)
    assert world.serving() == (A, B, C)


def test_a_server_that_waits_is_left_alone_once_another_has_failed() -> None:
    world = World().configure(upstream(4))
    outcome = world.take(ChangeWished(ChangeKind.ROLLOUT, "app", (A, B), 2, max_unavailable=1))
    world.answer()
    world.live(3)
    world.healthy = lambda key: key != A
    world.live(100)
    assert outcome.change is not None
    assert world.change(outcome.change).status is ChangeStatus.FAILED
    assert done(world, outcome.change, B) == ["find"]


def test_a_master_that_dies_before_its_probes_passed_fails_the_step_at_once() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESTART, A)
    until(world, number, StepName.UP)
    job = world.jobs.pop()
    assert (job.name, job.master and job.master.pid) == (StepName.UP, 8001)
    world.take(StepDone(number, job.step, "it lives"))
    assert running(world, number) == [(A, "up")], "only probes say that it is up"
    world.take(StepFailed(number, job.step, "its master 8001 has ended"))
    assert world.change(number).error == f"{A}: up: its master 8001 has ended"
