"""The budget of a change: the errors and the response time of its whole upstream, by nginx's counters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from controller.core.events import ChangeWished, ConfigRead, PlaneSeen, Restored, SteerWished, TrafficSeen
from controller.core.model import Admin, ChangeKind, ChangeStatus, Steer, StepName, StepState, Traffic
from controller.core.policy import Policy, RolloutPolicy
from tests.core.test_steering import DEPLOYING, done, until
from tests.core.world import POLICY, A, B, C, World, upstream

GOOD = Traffic(requests=100, answered=100, errors=1, seconds=5.0)
ERRS = Traffic(requests=100, answered=90, errors=20, failures=10, seconds=4.5)
SLOW = Traffic(requests=100, answered=100, errors=1, seconds=16.0)
STRICT = replace(POLICY, rollout=RolloutPolicy(up_timeout=20.0, max_latency=3.0))
SAID = "30.0 % of 300 tries of app failed or were answered 5xx, and max_errors is 20 %"


@dataclass
class Site:
    """An upstream of three; nginx's counters grow as told."""

    world: World = field(default_factory=World)
    totals: dict[str, Traffic] = field(default_factory=lambda: dict.fromkeys((A, B, C), Traffic()))
    boot: str = "boot"

    def begin(self, policy: Policy = STRICT, usual: Traffic | None = GOOD) -> Site:
        self.world.configure(upstream(policy=policy))
        self.read()
        return self.window(usual) if usual else self

    def read(self) -> Site:
        self.world.take(TrafficSeen("app", self.boot, dict(self.totals)))
        return self

    def window(self, counts: Traffic, seconds: float = 10.0) -> Site:
        """A window in which the traffic of each server was this."""
        self.totals = {
            key: Traffic(
                was.requests + counts.requests,
                was.answered + counts.answered,
                was.errors + counts.errors,
                was.failures + counts.failures,
                seconds=was.seconds + counts.seconds,
            )
            for key, was in self.totals.items()
        }
        self.world.pass_time(seconds)
        return self.read()

    def rollout(self, kind: ChangeKind = ChangeKind.ROLLOUT, **parts: object) -> int:
        number = self.world.take(ChangeWished(kind, "app", **parts)).change  # type: ignore[arg-type]
        assert number is not None
        self.read()
        return number

    def error(self, number: int) -> str:
        return self.world.change(number).error

    def reborn(self) -> Site:
        """The daemon was killed, and there is a new one."""
        old = self.world.state
        self.world.state = World().state
        peers = {("app", key): peer for key, peer in old.groups["app"].peers.items()}
        self.world.take(Restored(old.revision, old.next_change, old.next_epoch, peers, dict(old.changes), away=1.0))
        self.world.take(PlaneSeen("boot", old.revision))
        self.world.take(ConfigRead((old.groups["app"].upstream,)))
        return self.read()


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (ChangeKind.ROLLOUT, {}),
        (ChangeKind.RESTART, {}),
        (ChangeKind.RELOAD, {}),
        (ChangeKind.UPGRADE, {}),
        (ChangeKind.DEPLOY, {}),
        (ChangeKind.ROLL_BACK, {}),
        (ChangeKind.SCALE, {"workers": 1}),
    ],
)
def test_a_change_stops_when_its_upstream_errs_and_the_server_under_way_comes_back(
    kind: ChangeKind, parts: dict[str, int]
) -> None:
    site = Site().begin(replace(DEPLOYING, rollout=STRICT.rollout))
    number = site.rollout(kind, **parts)
    until(site.world, number, StepName.UP)
    site.window(ERRS)
    first = site.world.change(number).steps[0].server
    assert site.error(number) == SAID
    assert [n.text for n in site.world.notes if "stops" in n.text] == [f"change {number}: {kind} of app stops: {SAID}"]
    site.world.live(200)
    assert site.world.change(number).status is ChangeStatus.FAILED
    assert done(site.world, number, first)[-1] == "hold"
    assert {s.server for s in site.world.change(number).steps if s.state is StepState.DONE} == {first}
    assert site.world.serving() == (A, B, C)


def test_a_server_that_only_drains_gets_its_place_back_at_once() -> None:
    site = Site(World(in_flight={A: 1})).begin()
    number = site.rollout()
    until(site.world, number, StepName.EMPTY)
    assert site.world.peer(A).admin is Admin.DRAIN
    site.window(ERRS)
    assert (site.world.change(number).status, site.error(number)) == (ChangeStatus.FAILED, SAID)
    assert site.world.peer(A).admin is Admin.READY


def test_a_server_that_was_told_to_stop_does_not_get_the_new_version() -> None:
    site = Site().begin(replace(DEPLOYING, rollout=STRICT.rollout))
    number = site.rollout(ChangeKind.DEPLOY)
    until(site.world, number, StepName.EXIT)
    site.window(ERRS).world.live(60)
    assert site.world.change(number).status is ChangeStatus.FAILED
    assert "deploy" not in done(site.world, number, A)
    assert site.world.serving() == (A, B, C)


def test_servers_of_the_batch_that_wait_for_their_turn_are_not_begun() -> None:
    site = Site().begin()
    number = site.rollout(batch=2, max_unavailable=1)
    until(site.world, number, StepName.UP)
    site.window(ERRS).world.live(60)
    assert site.world.change(number).status is ChangeStatus.FAILED
    assert done(site.world, number, B) == ["find"]


def test_a_paused_change_is_judged_as_well() -> None:
    site = Site().begin()
    number = site.rollout()
    site.world.take(SteerWished(number, Steer.PAUSE))
    site.world.live(40)
    assert site.world.change(number).status is ChangeStatus.PAUSED
    site.window(ERRS)
    assert (site.world.change(number).status, site.error(number)) == (ChangeStatus.FAILED, SAID)


def test_it_stops_when_the_mean_response_time_is_so_many_times_that_of_before() -> None:
    site = Site().begin()
    number = site.rollout()
    site.window(GOOD)
    assert not site.error(number)
    site.window(SLOW)
    said = "the mean response time of app is 160 ms against 50 ms before, and max_latency is 3"
    assert site.error(number) == said


def test_a_few_milliseconds_more_are_no_reason() -> None:
    site = Site().begin(usual=replace(GOOD, seconds=0.1))
    number = site.rollout()
    site.window(replace(GOOD, seconds=0.9))
    assert not site.error(number)


def test_what_happened_before_it_began_is_not_held_against_a_change() -> None:
    site = Site().begin()
    site.window(ERRS, seconds=5.0)
    number = site.rollout()
    site.window(GOOD, seconds=5.0)
    assert not site.error(number), "the window began with the change"
    site.window(GOOD, seconds=5.0)
    assert not site.error(number)


def test_an_upstream_that_erred_as_much_before_may_be_cured() -> None:
    site = Site().begin(usual=ERRS)
    number = site.rollout()
    site.window(ERRS)
    assert not site.error(number)


def test_what_a_change_did_is_not_what_is_usual_for_the_next_one() -> None:
    site = Site().begin()
    first = site.rollout()
    site.window(ERRS).world.live(60)
    assert site.world.change(first).status is ChangeStatus.FAILED
    site.window(ERRS, seconds=1.0)
    second = site.rollout()
    site.window(ERRS)
    assert site.error(second) == SAID


def test_nor_is_what_an_aborted_one_did() -> None:
    site = Site().begin()
    first = site.rollout()
    until(site.world, first, StepName.EXIT)
    site.world.take(SteerWished(first, Steer.ABORT))
    assert site.window(ERRS).world.change(first).status is ChangeStatus.ABORTING
    assert not site.error(first)
    assert site.world.state.groups["app"].usual == Traffic(answered=300, errors=3, seconds=15.0)


def test_too_few_tries_are_waited_for() -> None:
    site = Site().begin()
    number = site.rollout()
    few = Traffic(requests=20, answered=20, errors=20, seconds=1.0)
    assert not site.window(few).error(number), "60 tries"
    assert site.window(few, seconds=1.0).error(number).startswith("100.0 % of 120 tries")


def test_with_force_or_without_a_budget_nothing_is_judged() -> None:
    site = Site().begin()
    number = site.rollout(forced=True)
    assert not site.window(ERRS).error(number)
    site = Site().begin(replace(POLICY, rollout=RolloutPolicy(max_errors=0.0)))
    number = site.rollout()
    assert not site.window(ERRS).error(number)
    assert site.world.state.groups["app"].measured is None


def test_a_change_that_began_unmeasured_is_compared_with_its_first_window() -> None:
    site = Site().begin(usual=None)
    number = site.rollout()
    assert not site.window(GOOD).error(number)
    assert "mean response time" in site.window(SLOW).error(number)


def test_a_daemon_that_is_killed_goes_on_with_what_it_knew_of_before() -> None:
    site = Site().begin()
    number = site.rollout()
    site.window(GOOD, seconds=8.0).reborn()
    assert site.world.change(number).before == Traffic(answered=300, errors=3, seconds=15.0)
    assert not site.window(SLOW, seconds=8.0).error(number), "a new window has begun"
    assert "160 ms against 50 ms" in site.window(SLOW, seconds=8.0).error(number)


def test_another_nginx_begins_a_new_window() -> None:
    site = Site().begin()
    number = site.rollout()
    site.boot = "another"
    assert not site.window(ERRS).error(number)
    assert site.window(ERRS).error(number) == SAID


def test_a_queued_change_is_compared_with_what_was_before_it_began() -> None:
    site = Site().begin(usual=SLOW)
    first = site.rollout(servers=(A,))
    second = site.rollout(servers=(B,), queue=True)
    assert site.world.change(second).before is None
    site.world.live(60)
    assert site.world.change(first).status is ChangeStatus.DONE
    assert site.world.change(second).before == Traffic(answered=300, errors=3, seconds=48.0)
