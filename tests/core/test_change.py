"""Operations step by step: their order, their guards, their deadlines, and going on after a crash."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core.events import (
    ChangeWished,
    ConfigRead,
    OfflineNoticed,
    PeerSeen,
    PlaneLost,
    PlaneSeen,
    Restored,
    RunStep,
    StepDone,
    StepFailed,
)
from controller.core.model import Admin, ChangeKind, ChangeStatus, Health, Refused, StepName, StepState, Warmth
from controller.core.policy import DrainPolicy, Policy, WarmUpPolicy
from tests.core.world import POLICY, A, B, C, World, upstream


def states(world: World, number: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for step in world.change(number).steps:
        found.setdefault(step.server, []).append(f"{step.name} {step.state}")
    return found


def running(world: World, number: int) -> list[tuple[str, str]]:
    return [(s.server, s.name.value) for s in world.change(number).steps if s.state is StepState.RUNNING]


def test_a_restart_goes_offline_and_online_in_the_order_of_the_design() -> None:
    world = World().configure().probe(A, times=2)
    number = world.wish(ChangeKind.RESTART, A)
    world.live(60)
    begun = [note.text.rsplit(" ", 1)[1] for note in world.notes if note.kind == "step"]
    assert begun == ["find", "drain", "empty", "settle", "terminate", "exit", "start", "up", "warm", "hold"]
    assert [s.name.value for s in world.change(number).steps] == [
        "find", "drain", "empty", "settle", "terminate", "exit", "kill", "start", "up", "warm", "hold",
    ]  # fmt: skip
    assert world.change(number).status is ChangeStatus.DONE
    assert states(world, number)[A][6] == "kill skipped"
    assert world.peer(A).admin is Admin.READY
    assert world.peer(A).health is Health.UP


def test_traffic_is_taken_away_only_after_the_process_was_found() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESTART, A)
    assert running(world, number) == [(A, "find")]
    assert world.entry(A)["state"] == "up"
    world.take(StepFailed(number, 0, "/run/a.pid holds pid 1, which is init: remove the file"))
    assert world.change(number).status is ChangeStatus.FAILED
    assert world.change(number).error == f"{A}: find: /run/a.pid holds pid 1, which is init: remove the file"
    assert world.entry(A)["state"] == "up"


def test_the_process_is_told_to_stop_only_when_the_server_is_proved_empty() -> None:
    world = World(in_flight={A: 2}).configure()
    number = world.wish(ChangeKind.RESTART, A)
    world.answer()
    revision = world.state.revision
    assert running(world, number) == [(A, "empty")]
    world.take(PeerSeen("app", A, revision - 1, 0))
    assert running(world, number) == [(A, "empty")], "a count from before the drain proves nothing"
    world.in_flight[A] = 0
    world.acknowledge()
    assert running(world, number) == [(A, "settle")]
    world.pass_time(2.9)
    assert running(world, number) == [(A, "settle")]
    world.pass_time(0.2)
    assert running(world, number) == [(A, "terminate")]
    assert [job.name for job in world.jobs] == [StepName.TERMINATE]


def test_a_drain_past_its_deadline_is_aborted_and_the_server_gets_its_place_back() -> None:
    world = World(in_flight={A: 1}).configure().probe(A, times=2)
    number = world.wish(ChangeKind.RESTART, A)
    world.answer().pass_time(29)
    assert running(world, number) == [(A, "empty")]
    world.pass_time(2)
    assert world.change(number).status is ChangeStatus.FAILED
    assert world.change(number).error == f"{A}: empty: 1 request still in flight after 30 s"
    assert world.peer(A).admin is Admin.READY
    assert world.jobs == [], "nothing was signalled"


def test_a_drain_past_its_deadline_proceeds_where_the_policy_says_so() -> None:
    policy = replace(POLICY, drain=DrainPolicy(30.0, "proceed", 3.0))
    world = World(in_flight={A: 1}).configure(upstream(policy=policy))
    number = world.wish(ChangeKind.RESTART, A)
    world.answer().pass_time(31)
    assert running(world, number) == [(A, "terminate")], "the wait after deregistration has passed as well"
    assert "1 request still in flight" in world.change(number).steps[2].detail
    world = World(in_flight={A: 2}).configure(upstream(policy=policy))
    number = world.wish(ChangeKind.RESTART, A)
    world.answer().pass_time(31)
    assert "2 requests still in flight" in world.change(number).steps[2].detail


def test_a_drain_ends_even_when_nginx_no_longer_answers() -> None:
    world = World(in_flight={A: 1}).configure()
    number = world.wish(ChangeKind.RESTART, A)
    world.answer()
    world.nginx = False
    world.take(PlaneLost("nginx is gone"))
    world.pass_time(31)
    assert world.change(number).status is ChangeStatus.RUNNING, "nginx gets a moment to say that the server is empty"
    world.pass_time(5)
    assert world.change(number).error == f"{A}: empty: requests in flight unknown: nginx does not answer after 30 s"


def test_a_table_that_nginx_does_not_take_ends_at_the_deadline_too() -> None:
    world = World().configure()
    world.nginx = False
    world.take(PlaneLost("nginx is gone"))
    number = world.wish(ChangeKind.RESTART, A)
    world.answer().pass_time(31)
    assert "nginx did not take the table within 30 s: nginx is gone" in world.change(number).error
    assert world.peer(A).admin is Admin.READY


def test_an_operators_own_drain_stays_when_its_wait_ends() -> None:
    world = World(in_flight={A: 1}).configure()
    number = world.wish(ChangeKind.DRAIN, A)
    world.pass_time(31)
    assert world.change(number).status is ChangeStatus.FAILED
    assert world.entry(A)["state"] == "drain"


def test_a_process_that_does_not_end_is_killed() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.STOP, A)
    world.answer().pass_time(3).answer()
    job = world.jobs.pop()
    assert job.name is StepName.EXIT
    world.take(StepDone(number, job.step, "still there", gone=False))
    assert [j.name for j in world.jobs] == [StepName.KILL]
    world.answer()
    assert world.change(number).status is ChangeStatus.DONE
    assert world.peer(A).admin is Admin.MAINT, "a stopped server is not probed"


def test_a_stopped_server_starts_again_and_warms_up() -> None:
    world = World().configure()
    world.wish(ChangeKind.STOP, A)
    world.live(10)
    number = world.wish(ChangeKind.START, A)
    world.answer()
    assert world.entry(A)["state"] == "down", "not before its probes rose"
    world.probe(A, times=2)
    assert running(world, number) == [(A, "warm")]
    assert world.peer(A).warm_up.phase is Warmth.RUNNING
    world.live(12)
    assert world.change(number).status is ChangeStatus.DONE


def test_starting_a_server_that_serves_takes_nothing_away_from_it() -> None:
    world = World().configure().probe(A, times=2)
    number = world.wish(ChangeKind.START, A)
    state = world.entry(A)["state"]
    world.answer().live(3)
    assert state == world.entry(A)["state"] == "up"
    assert world.change(number).status is ChangeStatus.DONE


def test_a_restart_of_what_is_not_running_skips_the_signals() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESTART, A)
    world.take(StepDone(number, 0, "no process is running"))
    world.acknowledge().pass_time(3.1)
    assert states(world, number)[A][4:8] == ["terminate skipped", "exit skipped", "kill skipped", "start running"]


def test_a_rollout_takes_one_batch_after_the_other_and_waits_for_the_warm_up() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.ROLLOUT)
    fewest = 3
    for _ in range(400):
        world.live(0.5)
        fewest = min(fewest, len(world.serving()))
        cold = [key for key in (A, B, C) if world.peer(key).warm_up.phase is Warmth.RUNNING]
        out = [key for key in (A, B, C) if world.peer(key).admin is not Admin.READY]
        assert len(cold) + len(out) <= 1, "the next one waits until the last one is warm"
        if world.change(number).status is not ChangeStatus.RUNNING:
            break
    assert world.change(number).status is ChangeStatus.DONE
    assert fewest == 2
    ended = {s.server: s.ended for s in world.change(number).steps if s.name is StepName.HOLD}
    assert ended[A] < ended[B] < ended[C]  # type: ignore[operator]


def test_a_rollout_in_batches_restarts_those_of_a_batch_together() -> None:
    world = World().configure(upstream(4))
    number = world.wish(ChangeKind.ROLLOUT, batch=2)
    assert [server for server, _ in running(world, number)] == [A, B]
    world.live(60)
    assert world.change(number).status is ChangeStatus.DONE


def test_a_rollout_stops_at_the_first_server_that_does_not_come_up() -> None:
    world = World().configure()
    world.healthy = lambda key: key != A
    number = world.wish(ChangeKind.ROLLOUT)
    world.live(60)
    assert world.change(number).status is ChangeStatus.FAILED
    assert world.change(number).error == f"{A}: up: not up within 20 s: refused"
    assert set(states(world, number)[B]) == {f"{step.name} skipped" for step in world.change(number).steps}
    assert world.serving() == (B, C)


def test_in_a_failing_batch_the_other_servers_still_come_back() -> None:
    world = World().configure(upstream(4))
    world.healthy = lambda key: key != A
    number = world.wish(ChangeKind.ROLLOUT, batch=2)
    world.live(60)
    assert world.change(number).status is ChangeStatus.FAILED
    assert states(world, number)[B][-1] == "hold done"
    assert len(world.serving()) == 3


def test_a_server_that_goes_down_while_it_warms_fails_the_rollout() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.ROLLOUT)
    world.live(12)
    assert running(world, number) == [(A, "warm")]
    world.probe(A, ok=False, times=3, reason="status: 500")
    assert world.change(number).error == f"{A}: warm: went down while warming: status: 500"


def test_a_warm_up_that_waits_for_requests_that_do_not_come_does_not_hold_a_rollout_for_ever() -> None:
    policy = replace(POLICY, warm_up=WarmUpPolicy(duration=10.0, starts="first-request"))
    world = World().configure(upstream(policy=policy))
    number = world.wish(ChangeKind.RESTART, A)
    world.live(40)
    assert world.change(number).status is ChangeStatus.DONE
    assert next(s.detail for s in world.change(number).steps if s.name is StepName.WARM) == "no request came in 10 s"


def test_the_last_server_is_not_drained_unless_forced() -> None:
    world = World().configure(upstream(1))
    with pytest.raises(Refused) as refused:
        world.wish(ChangeKind.DRAIN, A)
    assert refused.value.code == "guard"
    assert "no other server of app serves" in refused.value.message
    with pytest.raises(Refused):
        world.admin(A, Admin.MAINT)
    with pytest.raises(Refused):
        world.wish(ChangeKind.ROLLOUT)
    world.wish(ChangeKind.DRAIN, A, forced=True)
    assert world.entry(A)["state"] == "drain"


def test_a_batch_of_all_servers_is_refused() -> None:
    with pytest.raises(Refused, match="no other server"):
        World().configure().wish(ChangeKind.ROLLOUT, batch=3)


def test_stopping_every_server_is_refused_before_the_first_one_is_touched() -> None:
    world = World().configure()
    with pytest.raises(Refused, match="no other server"):
        world.wish(ChangeKind.STOP, A, B, C)
    assert world.state.changes == {}


def test_where_no_server_passes_its_probes_the_last_that_gets_traffic_all_the_same_is_not_taken_away() -> None:
    """A wrong path of the check, most often: the upstream fails open, and all of its traffic goes on."""
    world = World().configure()
    for key in (A, B, C):
        world.probe(key, ok=False, times=3)
    assert world.serving() == ()
    for kind in (ChangeKind.DRAIN, ChangeKind.STOP):
        with pytest.raises(Refused, match="no other server"):
            world.wish(kind, A, B, C)
    with pytest.raises(Refused, match="no other server"):
        world.wish(ChangeKind.ROLLOUT, batch=3)
    world.admin(A, Admin.MAINT)
    world.wish(ChangeKind.DRAIN, B)
    with pytest.raises(Refused, match="no other server"):
        world.admin(C, Admin.MAINT)
    with pytest.raises(Refused, match="no other server"):
        world.take(OfflineNoticed("app", C))
    world.admin(C, Admin.MAINT, forced=True)


def test_several_servers_are_drained_together() -> None:
    world = World(in_flight={A: 1}).configure()
    number = world.wish(ChangeKind.DRAIN, A, B)
    assert (world.entry(A)["state"], world.entry(B)["state"]) == ("drain", "drain")
    assert running(world, number) == [(A, "empty")]


def test_a_rollout_stops_when_the_others_went_down_meanwhile() -> None:
    world = World().configure(upstream(2))
    number = world.wish(ChangeKind.ROLLOUT)
    world.healthy = lambda key: key != B
    world.live(60)
    assert world.change(number).status is ChangeStatus.DONE or B not in world.serving()
    assert A in world.serving(), "the one that is left is not taken away"


def test_a_second_process_change_of_the_upstream_is_refused_while_one_runs() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESTART, A)
    for wish in (lambda: world.wish(ChangeKind.RESTART, B), lambda: world.admin(A, Admin.READY)):
        with pytest.raises(Refused) as refused:
            wish()
        assert refused.value.code == "busy"
        assert f"change {number}" in refused.value.message
    world.admin(C, Admin.MAINT)


def test_enable_ends_a_drain_that_still_waits() -> None:
    world = World(in_flight={A: 1}).configure().probe(A, times=2)
    number = world.wish(ChangeKind.DRAIN, A)
    world.admin(A, Admin.READY)
    assert world.change(number).status is ChangeStatus.SUPERSEDED
    assert world.change(number).error == "another wish took its place"
    assert world.peer(A).warm_up.cause == "undrained"


def test_unknown_names_are_refused_with_those_that_there_are() -> None:
    world = World().configure()
    with pytest.raises(Refused) as refused:
        world.wish(ChangeKind.DRAIN, "127.0.0.1:9")
    assert (refused.value.code, refused.value.remedy) == ("not_found", f"its servers: {A}, {B}, {C}")
    with pytest.raises(Refused, match="no upstream 'web'"):
        world.take(ChangeWished(ChangeKind.DRAIN, "web", (A,)))


def test_without_process_settings_only_traffic_can_be_changed() -> None:
    world = World().configure(upstream(policy=Policy()))
    with pytest.raises(Refused, match="does not know the processes of app"):
        world.wish(ChangeKind.RESTART, A)
    world.wish(ChangeKind.DRAIN, A)


def test_a_server_that_leaves_the_configuration_ends_its_change() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESTART, C)
    world.take(ConfigRead((upstream(2),)))
    assert world.change(number).error == f"{C}: find: {C} is gone from nginx.conf"


def test_old_reports_change_nothing() -> None:
    world = World().configure()
    number = world.wish(ChangeKind.RESTART, A)
    world.answer()
    state = world.state
    world.take(StepDone(number, 0, "again"))
    world.take(StepFailed(number, 0, "again"))
    world.take(StepDone(99, 0))
    assert world.state is state


@pytest.mark.parametrize("at", range(60))
def test_a_daemon_that_dies_goes_on_where_it_was(at: int) -> None:
    """Kill it after `at` half seconds of a restart, keep only what was stored, and let a new one go on."""
    world = World().configure().probe(A, times=2).probe(B, times=2).probe(C, times=2)
    number = world.wish(ChangeKind.RESTART, A)
    for _ in range(at):
        world.live(0.5)
    old = world.state
    again = World(now=world.now + 100)
    again.take(
        Restored(
            old.revision,
            old.next_change,
            old.next_epoch,
            {("app", key): peer for key, peer in old.groups["app"].peers.items()},
            {n: c for n, c in old.changes.items() if c.status is ChangeStatus.RUNNING},
            away=100,
        )
    )
    again.take(PlaneSeen("boot", old.revision))
    outcome = again.take(ConfigRead((upstream(),)))
    resumed = [e.name for e in outcome.effects if isinstance(e, RunStep)]
    in_hand = [s.name for s in old.changes[number].steps if s.state is StepState.RUNNING]
    assert resumed == [
        name
        for name in in_hand
        if name in (StepName.FIND, StepName.TERMINATE, StepName.EXIT, StepName.START, StepName.UP)
    ]
    again.acknowledge().live(60)
    if old.changes[number].status is ChangeStatus.RUNNING:
        assert again.change(number).status is ChangeStatus.DONE
        assert sum(job.name is StepName.START for job in again.jobs) == 0
    assert again.serving() == (A, B, C)


def test_a_drain_asked_before_a_foreign_table_waits_for_ours() -> None:
    """A store that was lost counts revisions from 1, while nginx serves revision 500 of an earlier life."""
    world = World(nginx=False).configure()
    number = world.wish(ChangeKind.DRAIN, A)
    world.take(PlaneSeen("boot", 500))
    assert running(world, number) == [(A, "drain")]
    assert world.state.revision == 501
    world.take(PlaneSeen("boot", 501))
    assert running(world, number) == [(A, "empty")]
