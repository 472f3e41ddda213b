"""Servers that are added and removed as a change, and what becomes of them when that fails, is killed or aborted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from controller.core.events import ChangeWished, ConfigRead, Restored, RunStep, SteerWished, StepDone, StepFailed
from controller.core.model import Admin, ChangeKind, ChangeStatus, Refused, Server, Steer, StepName, StepState, Warmth
from controller.core.plan import Observed, simulate
from controller.core.policy import Hook, HookPolicy, RolloutPolicy
from tests.core.test_steering import done
from tests.core.world import POLICY, A, B, C, World, server, upstream

D, E = "127.0.0.1:8004", "127.0.0.1:8005"


class Editing(World):
    """A world whose nginx.conf is edited: a job to do so is done by reading the new configuration."""

    def edit(self, job: RunStep) -> None:
        group = self.state.groups["app"].upstream
        others = tuple(each for each in group.servers if each.key != job.server)
        if job.name is StepName.ADD:
            others += (server(int(job.server.rpartition(":")[2]), weight=job.weight),)
        self.take(ConfigRead((replace(group, servers=others),)))

    def answer(self) -> Editing:
        for job in self.jobs:
            if job.name in (StepName.ADD, StepName.REMOVE):
                self.edit(job)
        super().answer()
        return self

    def until(self, number: int, holds: Callable[[], bool]) -> None:
        def look() -> None:
            for key in self.state.groups["app"].peers:
                self.probe(key, ok=self.healthy(key))

        for _ in range(400):
            for pause in (lambda: self.pass_time(0.25), self.answer, look):
                if holds():
                    return
                pause()
        raise AssertionError(self.change(number).steps)

    def at(self, number: int, key: str, name: StepName) -> None:
        """Live until this step is under way."""
        self.until(number, lambda: (key, name) in running(self, number))

    def to_the_end(self, number: int) -> ChangeStatus:
        self.until(number, lambda: self.change(number).status.ended)
        return self.change(number).status


def running(world: World, number: int) -> list[tuple[str, StepName]]:
    return [(s.server, s.name) for s in world.change(number).steps if s.state is StepState.RUNNING]


def world(**parts: object) -> Editing:
    made = Editing(**parts)  # type: ignore[arg-type]
    made.configure()
    for key in (A, B, C):
        made.probe(key, times=2)
    return made


def out(world: World, *keys: str, **parts: object) -> int:
    outcome = world.take(ChangeWished(ChangeKind.SCALE_OUT, "app", keys, **parts))  # type: ignore[arg-type]
    assert outcome.change is not None
    return outcome.change


# --- out ----------------------------------------------------------------------------------------------------------


def test_a_new_server_is_written_down_started_probed_and_warmed_up() -> None:
    it = world()
    number = out(it, D, weight=3)
    assert [(job.name, job.server, job.weight) for job in it.jobs] == [(StepName.ADD, D, 3)]
    assert it.serving() == (A, B, C)
    it.at(number, D, StepName.START)
    assert it.entry(D)["weight"] == 3
    assert it.entry(D)["state"] != "up", "it stands there, and gets nothing before its probes pass"
    it.at(number, D, StepName.WARM)
    assert it.peer(D).warm_up.phase is Warmth.RUNNING
    assert it.to_the_end(number) is ChangeStatus.DONE
    assert done(it, number, D) == ["add", "start", "up", "warm", "hold"]
    assert it.serving() == (A, B, C, D)


def test_several_come_at_once_or_in_batches() -> None:
    it = world()
    number = out(it, D, E)
    assert [job.server for job in it.jobs] == [D, E]
    assert it.to_the_end(number) is ChangeStatus.DONE
    it = world()
    number = out(it, D, E, batch=1)
    assert [job.server for job in it.jobs] == [D]
    assert it.to_the_end(number) is ChangeStatus.DONE
    assert it.serving() == (A, B, C, D, E)


def test_one_that_never_becomes_healthy_is_stopped_and_taken_out_again() -> None:
    it = world(healthy=lambda key: key != D)
    number = out(it, D, E)
    assert it.to_the_end(number) is ChangeStatus.FAILED
    assert it.change(number).error == f"{D}: up: not up within 20 s: refused; taken out again"
    assert done(it, number, D) == [
        *("add", "start", "find", "drain", "empty", "settle", "terminate", "exit", "remove"),
    ]  # fmt: skip
    assert it.serving() == (A, B, C, E), "the others of its batch stay"
    assert D not in it.state.groups["app"].peers


def test_one_whose_process_does_not_start_is_taken_out_again() -> None:
    it = world()
    number = out(it, D)
    it.answer()
    it.take(StepFailed(number, it.jobs.pop().step, "it does not listen"))
    assert it.to_the_end(number) is ChangeStatus.FAILED
    assert it.change(number).error == f"{D}: start: it does not listen; taken out again"
    assert [job for job in it.jobs if job.name is StepName.TERMINATE] == []
    assert D not in it.state.groups["app"].peers


def test_a_line_that_cannot_be_written_fails_the_change_and_whatever_was_written_goes() -> None:
    it = world()
    number = out(it, D)
    it.take(StepFailed(number, it.jobs.pop().step, "nginx does not take it"))
    assert [job.name for job in it.jobs] == [StepName.REMOVE]
    assert it.to_the_end(number) is ChangeStatus.FAILED
    assert it.change(number).error == f"{D}: add: nginx does not take it; taken out again"


def test_one_that_serves_and_cannot_be_registered_elsewhere_stays() -> None:
    hook = Hook((("POST", "http://127.0.0.1:1/"),))
    it = Editing().configure(upstream(policy=replace(POLICY, hooks=HookPolicy(after_up=(hook,)))))
    assert isinstance(it, Editing)
    it.probe(A, times=2)
    number = out(it, D)
    it.at(number, D, StepName.AFTER_UP)
    it.take(StepFailed(number, it.jobs.pop().step, "503"))
    assert it.to_the_end(number) is ChangeStatus.FAILED
    assert D in it.serving()


@pytest.mark.parametrize("name", [StepName.ADD, StepName.START, StepName.UP, StepName.WARM])
def test_an_aborted_scale_out_takes_the_new_server_out_again(name: StepName) -> None:
    it = world()
    number = out(it, D, E, batch=1)
    it.at(number, D, name)
    it.take(SteerWished(number, Steer.ABORT))
    assert it.to_the_end(number) is ChangeStatus.ABORTED
    assert done(it, number, D)[-1] == "remove"
    assert ("terminate" in done(it, number, D)) is (name is not StepName.ADD)
    assert done(it, number, E) == []
    assert set(it.state.groups["app"].peers) == {A, B, C}


# --- in -----------------------------------------------------------------------------------------------------------


def test_a_server_goes_offline_in_order_and_then_its_line_goes() -> None:
    it = world()
    number = it.wish(ChangeKind.SCALE_IN, A)
    it.at(number, A, StepName.TERMINATE)
    assert A not in it.serving()
    it.at(number, A, StepName.EXIT)
    assert A in it.state.groups["app"].peers, "its line stands until its process has ended"
    assert it.to_the_end(number) is ChangeStatus.DONE
    assert done(it, number, A) == ["find", "drain", "empty", "settle", "terminate", "exit", "remove"]
    assert set(it.state.groups["app"].peers) == {B, C}
    it.take(ConfigRead((upstream(),)))
    assert it.peer(A).admin is Admin.READY, "one that comes back at once is a new one, which nobody has drained"


def test_several_go_in_batches() -> None:
    it = Editing().configure(upstream(4))
    assert isinstance(it, Editing)
    number = it.wish(ChangeKind.SCALE_IN, A, B, C, batch=2)
    assert [job.server for job in it.jobs] == [A, B]
    it.at(number, C, StepName.FIND)
    assert set(it.state.groups["app"].peers) == {C, "127.0.0.1:8004"}
    assert it.to_the_end(number) is ChangeStatus.DONE


def test_one_that_cannot_be_emptied_gets_its_place_back_and_no_batch_follows() -> None:
    it = world(in_flight={A: 1})
    number = it.wish(ChangeKind.SCALE_IN, A, B, batch=1)
    assert it.to_the_end(number) is ChangeStatus.FAILED
    assert it.change(number).error == f"{A}: empty: 1 request still in flight after 30 s"
    assert it.serving() == (A, B, C)


def test_one_whose_line_cannot_be_taken_out_stays_under_maintenance() -> None:
    it = world()
    number = it.wish(ChangeKind.SCALE_IN, A)
    it.at(number, A, StepName.REMOVE)
    it.take(StepFailed(number, it.jobs.pop().step, "the daemon may not write /etc/nginx"))
    assert it.change(number).error == f"{A}: remove: the daemon may not write /etc/nginx"
    assert it.peer(A).admin is Admin.MAINT, "its process has ended"


def test_a_line_that_somebody_has_taken_out_meanwhile_is_gone_all_the_same() -> None:
    it = world()
    number = it.wish(ChangeKind.SCALE_IN, A)
    it.at(number, A, StepName.REMOVE)
    job = it.jobs.pop()
    it.edit(job)
    assert running(it, number) == [(A, StepName.REMOVE)]
    it.take(StepDone(number, job.step, "it is gone already"))
    assert it.change(number).status is ChangeStatus.DONE


def test_an_aborted_scale_in_gives_the_place_back_only_before_the_process_was_told_to_stop() -> None:
    it = world(in_flight={A: 1})
    number = it.wish(ChangeKind.SCALE_IN, A)
    it.at(number, A, StepName.EMPTY)
    it.take(SteerWished(number, Steer.ABORT))
    assert it.to_the_end(number) is ChangeStatus.ABORTED
    assert it.serving() == (A, B, C)
    it.in_flight = {}
    number = it.wish(ChangeKind.SCALE_IN, A)
    it.at(number, A, StepName.EXIT)
    it.take(SteerWished(number, Steer.ABORT))
    assert it.to_the_end(number) is ChangeStatus.ABORTED
    assert set(it.state.groups["app"].peers) == {B, C}


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"), [(ChangeKind.SCALE_OUT, StepName.ADD), (ChangeKind.SCALE_IN, StepName.REMOVE)]
)
def test_an_edit_that_was_under_way_when_the_daemon_was_killed_is_repeated(
    kind: ChangeKind, name: StepName, edited: bool
) -> None:
    before = world()
    key = D if kind is ChangeKind.SCALE_OUT else A
    number = before.take(ChangeWished(kind, "app", (key,))).change or 0
    before.at(number, key, name)
    if edited:
        before.edit(before.jobs[-1])
    config, state = before.state.groups["app"], before.state
    after = Editing(now=5000.0)
    peers = {("app", key): peer for key, peer in config.peers.items()}
    after.take(Restored(state.revision, state.next_change, state.next_epoch, peers, state.changes, away=10.0))
    after.take(ConfigRead((config.upstream,)))
    assert [(job.name, job.server) for job in after.jobs] == [(name, key)]
    after.acknowledge()
    assert after.to_the_end(number) is ChangeStatus.DONE
    assert (key in after.state.groups["app"].peers) is (kind is ChangeKind.SCALE_OUT)


@pytest.mark.parametrize("kind", [ChangeKind.SCALE_OUT, ChangeKind.SCALE_IN])
def test_an_upstream_without_process_settings_has_its_lines_and_its_traffic_scaled(kind: ChangeKind) -> None:
    it = Editing().configure(upstream(policy=replace(POLICY, process=None)))
    assert isinstance(it, Editing)
    number = it.take(ChangeWished(kind, "app", (D,) if kind is ChangeKind.SCALE_OUT else (A,))).change or 0
    assert it.to_the_end(number) is ChangeStatus.DONE
    names = {step.name.value for step in it.change(number).steps}
    assert names & {"find", "terminate", "exit", "kill", "start"} == set()


NAMED = Server("web:80@10.0.0.1", "web:80", "10.0.0.1", 80)


@pytest.mark.parametrize(
    ("kind", "servers", "code", "said"),
    [
        (ChangeKind.SCALE_OUT, (), "invalid", "needs the servers that are to come"),
        (ChangeKind.SCALE_OUT, (A,), "invalid", "has the server 127.0.0.1:8001 already"),
        (ChangeKind.SCALE_OUT, (D, D), "invalid", "has the server 127.0.0.1:8004 already"),
        (ChangeKind.SCALE_OUT, ("web.internal:80",), "invalid", "is no IP address"),
        (ChangeKind.SCALE_OUT, ("127.0.0.1:70000",), "invalid", "is no IP address"),
        (ChangeKind.SCALE_OUT, ("127.0.0.1:0",), "invalid", "is no IP address"),
        (ChangeKind.SCALE_OUT, ("127.0.0.256:1",), "invalid", "is no IP address"),
        (ChangeKind.SCALE_OUT, ("a; }",), "invalid", "is no IP address"),
        (ChangeKind.SCALE_IN, (), "invalid", "needs the servers that are to go"),
        (ChangeKind.SCALE_IN, (D,), "not_found", "has no server '127.0.0.1:8004'"),
        (ChangeKind.SCALE_IN, ("web:80",), "invalid", "web:80 is a host name"),
        (ChangeKind.SCALE_IN, (A, B), "guard", "no other server of app serves"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(
    kind: ChangeKind, servers: tuple[str, ...], code: str, said: str
) -> None:
    it = World().configure(replace(upstream(2), servers=(*upstream(2).servers, replace(NAMED, down=True))))
    with pytest.raises(Refused, match=said) as refused:
        it.take(ChangeWished(kind, "app", servers))
    assert refused.value.code == code
    assert it.state.changes == {}


def test_the_last_line_cannot_go_even_by_force_and_the_last_that_serves_can() -> None:
    it = World().configure()
    with pytest.raises(Refused, match="would have no server, which nginx refuses"):
        it.wish(ChangeKind.SCALE_IN, A, B, C, forced=True)
    it.probe(C, ok=False, times=3)
    with pytest.raises(Refused, match="no other server of app serves"):
        it.wish(ChangeKind.SCALE_IN, A, B, batch=1)
    it.wish(ChangeKind.SCALE_IN, A, B, forced=True)


@pytest.mark.parametrize("address", ["10.0.0.1", "[::1]:8000", "[::1]", "unix:/run/app.sock"])
def test_addresses_are_taken_as_nginx_takes_them(address: str) -> None:
    it = World().configure()
    number = it.take(ChangeWished(ChangeKind.SCALE_OUT, "app", (address,))).change or 0
    assert it.change(number).steps[0].server == address


def test_a_scale_in_obeys_max_load_with_all_that_go_however_small_its_batches() -> None:
    it = World().configure(upstream(4, policy=replace(POLICY, rollout=RolloutPolicy(max_load=2.0))))
    with pytest.raises(Refused, match=r"each other server of app gets 4\.00 times its usual share"):
        it.wish(ChangeKind.SCALE_IN, A, B, C, batch=1)
    it.wish(ChangeKind.SCALE_IN, A, B, batch=1)


def test_what_is_queued_behind_a_scale_in_is_judged_without_the_servers_that_go() -> None:
    it = World().configure(upstream(4, policy=replace(POLICY, rollout=RolloutPolicy(max_load=2.0))))
    it.wish(ChangeKind.SCALE_IN, A, B)
    with pytest.raises(Refused, match=r"gets 4\.00 times its usual share"):
        it.take(ChangeWished(ChangeKind.SCALE_IN, "app", (C,), queue=True))
    it.take(ChangeWished(ChangeKind.SCALE_IN, "app", (C,), queue=True, forced=True))


def test_a_scale_in_can_be_planned_and_a_scale_out_takes_nothing_away() -> None:
    it = World().configure()
    plan = simulate(it.state, ChangeWished(ChangeKind.SCALE_IN, "app", (A,)), Observed(), it.now)
    assert (plan.error, round(plan.load, 2)) == ("", 1.5)
    with pytest.raises(Refused, match="nothing to plan"):
        simulate(it.state, ChangeWished(ChangeKind.SCALE_OUT, "app", (D,)), Observed(), it.now)


# --- several servers at once ----------------------------------------------------------------------------------------


def test_servers_are_stopped_in_batches_and_the_guard_minds_all_of_them() -> None:
    it = World().configure()
    with pytest.raises(Refused, match="no other server of app serves"):
        it.wish(ChangeKind.STOP, A, B, C, batch=1)
    number = it.wish(ChangeKind.STOP, A, B, batch=1)
    assert [job.server for job in it.jobs] == [A]
    it.live(30)
    assert it.change(number).status is ChangeStatus.DONE
    assert [it.peer(key).admin for key in (A, B, C)] == [Admin.MAINT, Admin.MAINT, Admin.READY]


@pytest.mark.parametrize("kind", [ChangeKind.STOP, ChangeKind.START, ChangeKind.DRAIN])
def test_without_a_batch_they_go_and_come_at_once(kind: ChangeKind) -> None:
    it = World().configure()
    number = it.wish(kind, A, B)
    assert {step.batch for step in it.change(number).steps} == {0}
    assert it.change(number).batch == 2


def test_a_drain_goes_in_batches_where_that_is_asked() -> None:
    it = World(in_flight={A: 1}).configure()
    it.wish(ChangeKind.DRAIN, A, B, batch=1)
    assert [it.peer(key).admin for key in (A, B)] == [Admin.DRAIN, Admin.READY]
    it.in_flight = {}
    it.acknowledge()
    assert [it.peer(key).admin for key in (A, B)] == [Admin.DRAIN, Admin.DRAIN]
