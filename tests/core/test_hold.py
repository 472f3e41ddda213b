"""A ramp that holds, steps back and goes on by itself, by what nginx counted of the server and of its warm peers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from controller.core import hold, table
from controller.core.events import ChangeWished, ConfigRead, PeerSeen, TrafficSeen
from controller.core.model import ChangeKind, ChangeStatus, StepName, Traffic, Upstream, Warmth
from controller.core.policy import Policy, WarmUpPolicy
from tests.core.world import POLICY, A, B, C, World, server, upstream

RAMP = WarmUpPolicy(duration=100.0, starts="healthy")
SLOW = replace(POLICY, warm_up=RAMP)
FINE = Traffic(requests=100, answered=100, errors=1, seconds=5.0)
ERRS = Traffic(requests=100, answered=90, errors=5, failures=10, seconds=4.5)
LATE = Traffic(requests=100, answered=100, errors=1, seconds=50.0)
SOME = Traffic(requests=12, answered=12, errors=12, seconds=0.6)
FEW = Traffic(requests=3, answered=3, errors=3, seconds=0.15)


@dataclass
class Edge:
    """C warms up beside A and B; nginx's counters grow as told."""

    world: World = field(default_factory=World)
    totals: dict[str, Traffic] = field(default_factory=lambda: dict.fromkeys((A, B, C), Traffic()))
    boot: str = "boot"

    def begin(self, policy: Policy = SLOW, elapsed: float = 42.0) -> Edge:
        self.world.configure(upstream(2, policy=policy)).probe(A, times=2).probe(B, times=2)
        self.world.take(ConfigRead((upstream(3, policy=policy),)))
        self.world.probe(C, times=2).pass_time(elapsed)
        return self.read()

    def read(self) -> Edge:
        self.world.take(TrafficSeen("app", self.boot, dict(self.totals)))
        return self

    def window(self, mine: Traffic, theirs: Traffic = FINE, seconds: float = 5.0, times: int = 1) -> Edge:
        """So many windows in which C's traffic was `mine`, and that of A and B `theirs` each."""
        for _ in range(times):
            self.totals = {key: _sum(was, mine if key == C else theirs) for key, was in self.totals.items()}
            self.world.pass_time(seconds)
            self.read()
        return self

    def phase(self) -> Warmth:
        return self.world.peer(C).warm_up.phase

    def weight(self) -> float:
        return table.effective_weights(self.world.state.groups["app"], self.world.now)[C]

    def ramp(self) -> dict[str, object]:
        entry = self.world.entry(C)["warm_up"]
        assert isinstance(entry, dict)
        return entry

    def said(self) -> list[str]:
        words = ("holds", "steps back", "goes on")
        return [note.text for note in self.world.notes if any(word in note.text for word in words)]


def _sum(a: Traffic, b: Traffic) -> Traffic:
    return Traffic(
        a.requests + b.requests,
        a.answered + b.answered,
        a.errors + b.errors,
        a.failures + b.failures,
        a.timeouts + b.timeouts,
        a.seconds + b.seconds,
    )


@pytest.mark.parametrize(
    ("mine", "theirs", "fields", "wrong"),
    [
        pytest.param(FINE, FINE, {}, "", id="alike"),
        pytest.param(
            ERRS, FINE, {}, "error rate 15.0 % against 1.0 % of its warm peers", id="5xx and tries without an answer"
        ),
        pytest.param(
            LATE, FINE, {}, "mean response time 500 ms against 50 ms of its warm peers", id="ten times slower"
        ),
        pytest.param(Traffic(100, 100, 2), Traffic(100, 100, 1), {}, "", id="not more than twice as many"),
        pytest.param(Traffic(1000, 1000, 10), Traffic(1000, 1000, 1), {}, "", id="less than 1 % more"),
        pytest.param(
            Traffic(100, 100, 1), Traffic(100, 100, 0), {}, "error rate 1.0 % against 0.0 % of its warm peers", id="1 %"
        ),
        pytest.param(Traffic(100, 100, seconds=1.0), Traffic(100, 100, seconds=0.1), {}, "", id="9 ms more"),
        pytest.param(Traffic(100, 100, seconds=15.0), FINE, {}, "", id="three times slower, and not more"),
        pytest.param(Traffic(19, 19, 19, seconds=19.0), FINE, {}, None, id="19 answers"),
        pytest.param(LATE, Traffic(19, 19), {}, None, id="19 answers of the others"),
        pytest.param(
            Traffic(20, failures=20), FINE, {}, "error rate 100.0 % against 1.0 % of its warm peers", id="no answer"
        ),
        pytest.param(ERRS, FINE, {"hold_errors": 0.0}, "", id="errors switched off"),
        pytest.param(LATE, FINE, {"hold_latency": 0.0}, "", id="latency switched off"),
        pytest.param(FEW, FEW, {"hold_errors": 0.0, "hold_latency": 0.0}, "", id="both switched off"),
    ],
)
def test_a_server_is_worse_than_its_warm_peers_or_not(
    mine: Traffic, theirs: Traffic, fields: dict[str, float], wrong: str | None
) -> None:
    assert hold.verdict(replace(RAMP, **fields), mine, theirs) == wrong  # type: ignore[arg-type]


def test_a_ramp_holds_with_numbers_and_its_clock_stands() -> None:
    edge = Edge().begin()
    revision = edge.world.state.revision
    edge.window(ERRS)
    assert edge.phase() is Warmth.HELD
    assert edge.said() == [
        f"app: {C} holds at 47 % of its weight: error rate 15.0 % against 1.0 % of its warm peers",
    ]
    assert edge.world.state.revision == revision + 1
    assert (edge.ramp()["held"], edge.ramp()["elapsed_ms"]) == (True, 47_000)
    edge.window(ERRS, times=2)
    assert edge.weight() == pytest.approx(0.47)
    assert edge.world.peer(C).warm_up.why == "error rate 15.0 % against 1.0 % of its warm peers"


def test_a_ramp_that_holds_for_long_steps_back_again_and_again_to_the_floor_and_no_further() -> None:
    edge = Edge().begin(elapsed=10.0).window(LATE)
    edge.window(LATE, times=5)
    assert edge.ramp()["elapsed_ms"] == 15_000
    revision = edge.world.state.revision
    edge.window(LATE)
    assert (edge.ramp()["held"], edge.ramp()["elapsed_ms"]) == (True, 5_000)
    assert edge.world.state.revision == revision + 1, "nginx is told"
    edge.window(LATE, times=6)
    assert edge.ramp()["elapsed_ms"] == 0
    before = edge.world.state.groups["app"].peers
    edge.window(LATE, times=12)
    assert edge.world.state.groups["app"].peers == before
    late = "mean response time 500 ms against 50 ms of its warm peers"
    assert edge.said() == [
        f"app: {C} holds at 15 % of its weight: {late}",
        f"app: {C} steps back to 10 % of its weight: {late}",
        f"app: {C} steps back to 10 % of its weight: {late}",
    ]


def test_a_ramp_goes_on_by_itself_after_a_good_window_from_where_it_stood() -> None:
    edge = Edge().begin().window(ERRS).window(FINE)
    assert edge.phase() is Warmth.RUNNING
    assert (edge.ramp()["held"], edge.ramp()["elapsed_ms"]) == (False, 47_000)
    assert edge.said()[-1] == f"app: {C} goes on to warm up: it does as well as its warm peers"
    edge.window(FINE)
    assert edge.weight() == pytest.approx(0.52)


def test_a_ramp_goes_on_when_nobody_could_judge_it_for_the_time_of_a_step_back() -> None:
    edge = Edge().begin().window(ERRS).window(FEW, times=5)
    assert edge.phase() is Warmth.HELD
    edge.window(FEW)
    assert edge.phase() is Warmth.RUNNING
    assert edge.said()[-1] == f"app: {C} goes on to warm up: too few answers to judge it"


def test_windows_with_few_answers_are_judged_together() -> None:
    edge = Edge().begin().window(SOME)
    assert edge.phase() is Warmth.RUNNING
    edge.window(SOME)
    assert edge.phase() is Warmth.HELD
    assert edge.said() == [f"app: {C} holds at 52 % of its weight: error rate 100.0 % against 1.0 % of its warm peers"]
    edge.window(replace(SOME, errors=0)).window(replace(SOME, errors=0))
    assert edge.phase() is Warmth.RUNNING


def test_answers_of_long_ago_judge_nobody() -> None:
    edge = Edge().begin(elapsed=10.0).window(FEW, times=6)
    assert edge.phase() is Warmth.RUNNING
    edge.window(replace(FEW, errors=0), times=5)
    assert edge.phase() is Warmth.RUNNING
    edge.window(replace(FEW, errors=0, requests=5, answered=5))
    assert edge.phase() is Warmth.RUNNING, "20 answers since, and all are well"


def test_a_ramp_goes_on_when_nginx_tells_nothing_any_more() -> None:
    edge = Edge().begin().window(ERRS)
    edge.world.pass_time(29.0)
    assert edge.phase() is Warmth.HELD
    edge.world.pass_time(1.0)
    assert edge.phase() is Warmth.RUNNING
    assert edge.said()[-1] == f"app: {C} goes on to warm up: nobody could judge it"


def test_a_ramp_that_was_stepped_back_to_its_beginning_does_not_wait_for_a_first_request() -> None:
    edge = Edge().begin(replace(SLOW, warm_up=replace(RAMP, starts="first-request")), elapsed=0.0)
    edge.world.take(PeerSeen("app", C, 1, 0, edge.world.peer(C).warm_up.epoch, 0.0, True))
    edge.window(LATE, times=8).window(FINE)
    assert edge.phase() is Warmth.RUNNING
    assert edge.ramp()["elapsed_ms"] == 1


def test_within_a_window_nothing_changes() -> None:
    edge = Edge().begin()
    before = edge.world.state
    edge.window(ERRS, seconds=0.0)
    assert edge.world.state is before


def test_readings_are_kept_only_while_somebody_warms_up() -> None:
    world = World().configure().probe(A, times=2)
    world.take(TrafficSeen("app", "boot", {A: FINE}))
    assert not world.state.groups["app"].weighed
    edge = Edge().begin().window(FINE)
    assert edge.world.state.groups["app"].weighed.keys() == {C}
    edge.world.pass_time(100)
    assert not edge.read().world.state.groups["app"].weighed


def test_counters_of_another_nginx_judge_nobody() -> None:
    edge = Edge().begin()
    edge.boot = "another"
    edge.window(LATE)
    assert edge.phase() is Warmth.RUNNING
    edge.window(LATE)
    assert edge.phase() is Warmth.HELD


def test_a_ramp_that_waits_for_its_first_request_is_not_judged() -> None:
    edge = Edge().begin(replace(SLOW, warm_up=replace(RAMP, starts="first-request"))).window(LATE, times=2)
    assert edge.phase() is Warmth.WAITING


def test_who_is_cold_itself_or_a_backup_is_no_measure() -> None:
    edge = Edge().begin(replace(SLOW, warm_up=replace(RAMP, max_cold=1.0)))
    for key in (A, B):
        edge.world.probe(key, ok=False, times=3).probe(key, times=2)
    assert edge.read().window(LATE, times=2).phase() is Warmth.RUNNING
    edge = Edge().begin()
    backups = (server(8001, backup=True), server(8002, backup=True))
    edge.world.take(ConfigRead((Upstream("app", (*backups, server(8003), server(8004)), policy=SLOW),)))
    assert edge.window(LATE, times=2).phase() is Warmth.RUNNING


def test_two_ramps_are_judged_apart() -> None:
    edge = Edge().begin(replace(SLOW, warm_up=replace(RAMP, max_cold=1.0)))
    edge.world.probe(B, ok=False, times=3).probe(B, times=2)
    edge.read().window(ERRS)
    assert edge.phase() is Warmth.HELD
    assert edge.world.peer(B).warm_up.phase is Warmth.RUNNING


def test_switching_the_hold_off_lets_the_ramp_go_on() -> None:
    edge = Edge().begin().window(ERRS)
    off = replace(SLOW, warm_up=replace(RAMP, hold_errors=0.0, hold_latency=0.0))
    edge.world.take(ConfigRead((upstream(3, policy=off),)))
    assert edge.window(ERRS).phase() is Warmth.RUNNING


def test_switching_warm_ups_off_ends_a_ramp_that_holds() -> None:
    edge = Edge().begin().window(ERRS)
    edge.world.take(ConfigRead((upstream(3, policy=replace(SLOW, warm_up=WarmUpPolicy(duration=0.0))),)))
    assert (edge.phase(), edge.weight()) == (Warmth.DONE, 1.0)


def test_a_rollout_shows_that_a_ramp_holds_and_goes_on_with_it() -> None:
    edge = Edge().begin(elapsed=200.0)
    number = edge.world.wish(ChangeKind.RESTART, C)
    edge.world.live(10)
    edge.read().window(ERRS)

    def detail() -> str:
        return next(s.detail for s in edge.world.change(number).steps if s.name is StepName.WARM)

    assert detail() == "held: error rate 15.0 % against 1.0 % of its warm peers"
    edge.window(FINE)
    assert detail() == ""
    edge.world.live(110)
    assert edge.world.change(number).status is ChangeStatus.DONE


def test_a_rollout_stops_at_a_server_that_does_worse_even_with_the_least_traffic() -> None:
    edge = Edge().begin(elapsed=200.0)
    number = edge.world.wish(ChangeKind.RESTART, C)
    edge.world.live(10)
    edge.read().window(ERRS, times=30)
    assert edge.world.change(number).status is ChangeStatus.FAILED
    assert edge.world.change(number).error == (
        f"{C}: warm: does not warm up: error rate 15.0 % against 1.0 % of its warm peers"
    )


@pytest.mark.parametrize(("timeout", "limit"), [(None, 800.0), (150.0, 150.0)])
def test_a_warm_up_that_holds_and_goes_on_by_turns_has_its_limit(timeout: float | None, limit: float) -> None:
    edge = Edge().begin(replace(SLOW, rollout=replace(SLOW.rollout, warm_timeout=timeout)), elapsed=200.0)
    number = edge.world.wish(ChangeKind.RESTART, C)
    edge.world.live(10)
    edge.read()
    step = next(s for s in edge.world.change(number).steps if s.name is StepName.WARM)
    began = step.started or 0.0
    while not edge.world.change(number).status.ended:
        edge.window(ERRS, times=7).window(FINE)
        assert edge.world.now < began + limit + 50, "and never without end"
    change = edge.world.change(number)
    step = next(s for s in change.steps if s.name is StepName.WARM)
    assert (step.ended or 0.0) - began >= limit
    assert change.status is ChangeStatus.FAILED
    assert change.error.startswith(f"{C}: warm: not warm within {limit:g} s")


def test_waiting_for_its_turn_does_not_count_to_a_warm_up() -> None:
    slow = replace(SLOW, rollout=replace(SLOW.rollout, warm_timeout=101.0, wait_timeout=300.0))
    world = World().configure(upstream(3, policy=slow))
    for key in (A, B, C):
        world.probe(key, times=2)
    outcome = world.take(ChangeWished(ChangeKind.ROLLOUT, "app", (A, B), 2, forced=True))
    assert outcome.change is not None
    world.live(60)
    assert world.peer(A).warm_up.phase is Warmth.RUNNING
    waits = [s.detail for s in world.change(outcome.change).steps if s.server == B and s.name is StepName.WARM]
    assert waits == ["waits until others are warm"]
    world.live(300)
    assert world.change(outcome.change).status is ChangeStatus.DONE


def test_a_turn_that_never_comes_has_its_limit() -> None:
    slow = replace(SLOW, rollout=replace(SLOW.rollout, wait_timeout=50.0))
    world = World().configure(upstream(3, policy=slow))
    for key in (A, B, C):
        world.probe(key, times=2)
    world.probe(A, ok=False, times=3).probe(A, times=2)
    assert world.peer(A).warm_up.phase is Warmth.RUNNING
    number = world.wish(ChangeKind.RESTART, B)
    world.live(80)
    change = world.change(number)
    assert change.error == f"{B}: warm: not warm within 50 s: waits until others are warm"


def test_a_ramp_that_came_back_to_its_beginning_makes_nobody_wait() -> None:
    edge = Edge().begin(elapsed=5.0).window(ERRS)
    edge.world.probe(B, ok=False, times=3).probe(B, times=2)
    assert edge.world.peer(B).warm_up.phase is Warmth.QUEUED
    edge.window(ERRS, times=6)
    assert edge.ramp()["elapsed_ms"] == 0
    assert edge.world.peer(B).warm_up.phase is Warmth.RUNNING
