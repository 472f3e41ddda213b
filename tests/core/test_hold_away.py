"""A server that its traffic takes out while it warms up, or proves itself, does not pass for a good one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from controller.core.events import ConfigRead, PeerSeen, PlaneSeen, Restored, TrafficSeen
from controller.core.model import ChangeKind, ChangeStatus, Ejection, Quarantine, StepName, StepState, Traffic, Warmth
from controller.core.policy import OutlierPolicy, RolloutPolicy, WarmUpPolicy
from tests.core.test_hold import ERRS, FEW, FINE, SLOW, Edge
from tests.core.world import POLICY, A, B, C, World, upstream

WHY = "nginx ejected it after 5 answers with status 5xx in a row"
PROVING = replace(POLICY, warm_up=WarmUpPolicy(duration=0.0), rollout=RolloutPolicy(ready_time=30.0, max_load=0.0))


@dataclass
class Ejecting(Edge):
    """nginx ejects C as told."""

    ejections: int = 0
    ejected: Ejection | None = None

    def read(self) -> Ejecting:
        """nginx tells of an ejection as long as it lasts."""
        self.world.take(
            TrafficSeen("app", self.boot, {**self.totals, C: replace(self.totals[C], ejected=self.ejected)})
        )
        return self

    def eject(self, seconds: float = 30.0) -> Ejecting:
        self.ejections += 1
        self.ejected = Ejection(self.world.now + seconds, "server_errors", self.ejections)
        self.read()
        self.world.acknowledge()
        return self

    def back(self, seconds: float = 30.0) -> Ejecting:
        """C is let in again after so many seconds, in which A and B go on."""
        for _ in range(int(seconds / 5)):
            self.window(Traffic())
        self.ejected = None
        self.read()
        self.world.acknowledge()
        return self

    def held(self) -> list[str]:
        return [text.removeprefix(f"app: {C} ") for text in self.said()]

    def restart(self) -> int:
        """A restart of C that has come to its warm-up."""
        number = self.world.wish(ChangeKind.RESTART, C)
        self.world.live(10)
        self.read()
        return number

    def step(self, number: int, name: StepName) -> tuple[StepState, str]:
        found = next(s for s in self.world.change(number).steps if s.name is name)
        return found.state, found.detail


def test_a_ramp_holds_while_nginx_keeps_its_server_away_and_goes_on_after_a_good_window() -> None:
    edge = Ejecting()
    edge.begin()
    edge.eject()
    assert edge.phase() is Warmth.HELD
    assert edge.world.peer(C).warm_up.why == WHY
    assert (edge.ramp()["held"], edge.ramp()["elapsed_ms"]) == (True, 42_000)
    assert edge.world.state.plane.revision == edge.world.state.revision, "nginx is told"
    edge.back()
    assert (edge.phase(), edge.ramp()["elapsed_ms"]) == (Warmth.HELD, 42_000), "nobody has seen it do well yet"
    edge.window(replace(FEW, errors=0), times=4)
    assert edge.phase() is Warmth.HELD
    edge.window(FINE)
    assert edge.phase() is Warmth.RUNNING
    assert edge.held() == [
        f"holds at 42 % of its weight: {WHY}",
        "goes on to warm up: it does as well as its warm peers",
    ]


def test_time_away_is_no_time_in_which_nobody_could_judge() -> None:
    edge = Ejecting()
    edge.begin()
    edge.eject(300.0)
    edge.back(300.0)
    edge.world.pass_time(4.0)
    assert edge.phase() is Warmth.HELD
    edge.window(FEW, times=4)
    assert edge.phase() is Warmth.HELD
    edge.window(FEW, times=2)
    assert edge.phase() is Warmth.RUNNING
    assert edge.held()[-1] == "goes on to warm up: too few answers to judge it"


def test_an_ejection_without_readings_ends_and_the_ramp_goes_on_for_lack_of_a_judge() -> None:
    edge = Ejecting()
    edge.begin()
    edge.eject(60.0)
    edge.world.pass_time(59.0)
    assert edge.phase() is Warmth.HELD
    edge.world.pass_time(1.0)
    edge.world.pass_time(29.0)
    assert edge.phase() is Warmth.HELD
    edge.world.pass_time(1.0)
    assert edge.phase() is Warmth.RUNNING


def test_a_ramp_whose_first_request_nginx_tells_of_after_the_ejection_holds_as_well() -> None:
    edge = Ejecting()
    edge.begin(replace(SLOW, warm_up=WarmUpPolicy(duration=100.0, starts="first-request")), elapsed=0.0)
    edge.eject()
    assert edge.phase() is Warmth.WAITING
    edge.world.take(PeerSeen("app", C, 1, 0, edge.world.peer(C).warm_up.epoch, 2.0, True))
    assert edge.phase() is Warmth.HELD
    assert edge.ramp()["elapsed_ms"] == 2_000


def test_the_ramp_of_an_outlier_holds_too() -> None:
    policy = replace(SLOW, outlier=OutlierPolicy(hosts=3, requests=50, success_rate=1.0))
    edge = Edge().begin(policy)
    edge.window(replace(FINE, errors=100), seconds=10.0)
    why = "success rate 0.0 % against 99.0 % of its peers"
    assert (edge.phase(), edge.world.peer(C).warm_up.why) == (Warmth.HELD, why)


def test_a_ramp_whose_ejection_ended_with_its_nginx_goes_on_after_a_good_window() -> None:
    edge = Ejecting()
    edge.begin()
    edge.eject()
    edge.world.take(PlaneSeen("another", edge.world.state.revision))
    edge.boot, edge.ejected = "another", None
    edge.read()
    assert edge.phase() is Warmth.HELD
    edge.window(FINE)
    assert edge.phase() is Warmth.RUNNING


def test_a_restart_waits_for_an_ejected_server_and_fails_when_it_is_ejected_again() -> None:
    edge = Ejecting()
    edge.begin(elapsed=200.0)
    number = edge.restart()
    edge.eject()
    assert edge.step(number, StepName.WARM) == (StepState.RUNNING, f"held: {WHY}")
    edge.back()
    edge.world.live(5)
    assert edge.step(number, StepName.WARM) == (StepState.RUNNING, f"held: {WHY}")
    edge.eject(60.0)
    assert edge.world.change(number).status is ChangeStatus.FAILED
    assert edge.world.change(number).error == f"{C}: warm: taken out of traffic again while warming: {WHY}"


def test_a_restart_goes_on_over_a_single_ejection() -> None:
    edge = Ejecting()
    edge.begin(elapsed=200.0)
    number = edge.restart()
    edge.eject()
    edge.back()
    edge.window(FINE)
    assert edge.step(number, StepName.WARM) == (StepState.RUNNING, "")
    edge.world.live(110)
    assert edge.world.change(number).status is ChangeStatus.DONE


def test_an_outlier_that_nginx_ejects_as_well_was_taken_out_once() -> None:
    policy = replace(SLOW, outlier=OutlierPolicy(hosts=3, requests=50, success_rate=1.0))
    edge = Ejecting()
    edge.begin(policy)
    edge.window(replace(FINE, errors=100), seconds=10.0)
    edge.eject()
    assert edge.world.peer(C).taken_out == 1


def test_ejections_before_the_step_do_not_count() -> None:
    edge = Ejecting()
    edge.begin(elapsed=200.0)
    for _ in range(3):
        edge.eject()
        edge.back()
    number = edge.restart()
    edge.eject()
    assert edge.step(number, StepName.WARM)[0] is StepState.RUNNING


def test_a_server_in_quarantine_is_not_warm() -> None:
    edge = Ejecting()
    edge.begin(elapsed=200.0)
    number = edge.restart()
    edge.ejected = Ejection(edge.world.now + 150.0, "mark", 1)
    edge.read()
    edge.world.live(140)
    assert edge.step(number, StepName.WARM) == (
        StepState.RUNNING,
        "held: it said in a response that it goes offline",
    )


def test_the_minimum_ready_time_begins_anew_after_an_ejection_and_fails_at_the_second() -> None:
    edge = Ejecting()
    edge.begin(PROVING, elapsed=10.0)
    number = edge.restart()
    assert edge.step(number, StepName.HOLD) == (StepState.RUNNING, "")
    edge.eject()
    assert edge.step(number, StepName.HOLD) == (StepState.RUNNING, f"held: {WHY}")
    edge.back()
    edge.world.live(29)
    assert edge.step(number, StepName.HOLD) == (StepState.RUNNING, "")
    edge.eject()
    assert edge.world.change(number).error == (
        f"{C}: hold: taken out of traffic again within its minimum ready time: {WHY}"
    )


def test_the_minimum_ready_time_ends_when_the_server_was_in_traffic_for_all_of_it() -> None:
    edge = Ejecting()
    edge.begin(PROVING, elapsed=10.0)
    number = edge.restart()
    edge.eject()
    edge.back()
    edge.world.live(31)
    assert edge.world.change(number).status is ChangeStatus.DONE


def test_a_server_that_does_worse_in_its_minimum_ready_time_fails_after_the_time_of_a_step_back() -> None:
    edge = Edge().begin(PROVING, elapsed=10.0)
    number = edge.world.wish(ChangeKind.RESTART, C)
    edge.world.live(10)
    edge.read().window(ERRS, times=6)
    hold = next(s for s in edge.world.change(number).steps if s.name is StepName.HOLD)
    why = "error rate 15.0 % against 1.0 % of its warm peers"
    assert (hold.state, hold.detail) == (StepState.RUNNING, f"held: {why}")
    edge.window(ERRS)
    assert edge.world.change(number).error == f"{C}: hold: does worse within its minimum ready time: {why}"


def test_a_good_window_ends_the_minimum_ready_time_that_a_bad_one_held() -> None:
    edge = Edge().begin(PROVING, elapsed=10.0)
    number = edge.world.wish(ChangeKind.RESTART, C)
    edge.world.live(10)
    edge.read().window(FINE, times=3).window(ERRS, times=4)
    assert edge.world.change(number).status is ChangeStatus.RUNNING
    edge.window(FINE)
    assert edge.world.change(number).status is ChangeStatus.DONE


def test_silence_ends_a_minimum_ready_time_that_a_bad_window_held() -> None:
    edge = Edge().begin(PROVING, elapsed=10.0)
    number = edge.world.wish(ChangeKind.RESTART, C)
    edge.world.live(10)
    edge.read().window(ERRS)
    edge.world.live(29)
    assert edge.world.change(number).status is ChangeStatus.RUNNING
    edge.world.live(1)
    assert edge.world.change(number).status is ChangeStatus.DONE


def test_servers_that_prove_themselves_are_no_measure_for_each_other() -> None:
    edge = Edge().begin(PROVING, elapsed=10.0)
    edge.world.wish(ChangeKind.RESTART, B, C, batch=2)
    edge.world.live(10)
    edge.read().totals[B] = ERRS
    edge.window(ERRS, theirs=FINE)
    weighed = edge.world.state.groups["app"].weighed
    assert weighed.keys() == {B, C}
    assert weighed[C].why == "error rate 15.0 % against 1.0 % of its warm peers"


def test_the_end_of_an_absence_moves_with_the_clock_of_a_machine_that_was_rebooted() -> None:
    edge = Ejecting()
    edge.begin(PROVING, elapsed=10.0)
    number = edge.restart()
    edge.eject()
    state, now = edge.world.state, edge.world.now
    peers = {("app", key): peer for key, peer in state.groups["app"].peers.items()}
    later = World(now=5.0)
    later.take(Restored(9, 9, 9, peers, dict(state.changes), away=5.0 - now, rebooted=True))
    later.take(ConfigRead((upstream(3, policy=PROVING),)))
    later.acknowledge().live(59)
    assert later.change(number).status is ChangeStatus.RUNNING
    later.live(2)
    assert later.change(number).status is ChangeStatus.DONE


@pytest.mark.parametrize("kind", ["notice", "mark"])
def test_a_notice_is_no_judgement_and_holds_no_ramp(kind: str) -> None:
    edge = Edge().begin()
    peer = replace(edge.world.peer(C), quarantine=(Quarantine(edge.world.now + 10, "it goes", kind),))
    group = edge.world.state.groups["app"]
    groups = {"app": replace(group, peers={**group.peers, C: peer})}
    edge.world.state = replace(edge.world.state, groups=groups)
    edge.world.pass_time(1.0)
    assert edge.phase() is Warmth.RUNNING


def test_what_was_seen_of_a_server_is_forgotten_when_nobody_judges_it() -> None:
    world = World().configure(upstream(3, policy=PROVING))
    world.take(TrafficSeen("app", "boot", dict.fromkeys((A, B, C), FINE)))
    assert not world.state.groups["app"].weighed
