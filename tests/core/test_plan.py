"""Plans: what they foresee in known cases, that it is what then happens, and that the guard agrees."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.core import plan
from controller.core.events import ChangeWished, ConfigRead, ProbeResult
from controller.core.model import Admin, ChangeKind, Refused, State, StepName, Upstream
from controller.core.plan import Observed
from controller.core.policy import DrainPolicy, Policy, ProcessPolicy, RolloutPolicy, WarmUpPolicy
from controller.core.step import step
from tests.core import world as plain
from tests.core.world import A, B, C, World, server

POLICY = replace(plain.POLICY, rollout=replace(plain.POLICY.rollout, max_load=2.0))

# Each server: settle 3, exit 1, start 2, up 2, warm 10, ready 1.
SECONDS = {StepName.EXIT: 1.0, StepName.START: 2.0, StepName.UP: 2.0}
EACH = 19.0
QUIET = Observed(seconds=SECONDS)


def upstream(count: int = 3, policy: Policy = POLICY) -> Upstream:
    return plain.upstream(count, policy=policy)


def up(configured: Upstream) -> World:
    world = World().configure(configured)
    for each in configured.servers:
        world.probe(each.key, times=2)
    return world


def rollout(*servers: str, batch: int = 1, forced: bool = False) -> ChangeWished:
    return ChangeWished(ChangeKind.ROLLOUT, "app", servers, batch, forced)


def foreseen(world: World, wish: ChangeWished, observed: Observed = QUIET) -> plan.Plan:
    return plan.simulate(world.state, wish, observed, world.now)


def test_a_rollout_of_three_takes_as_long_as_its_steps_and_loads_the_others_by_half() -> None:
    made = foreseen(up(upstream()), rollout())
    assert made.duration == pytest.approx(3 * EACH, abs=0.01)
    assert [batch.servers for batch in made.batches] == [(A,), (B,), (C,)]
    assert [batch.begins for batch in made.batches] == pytest.approx([0, EACH, 2 * EACH], abs=0.01)
    assert made.loads == pytest.approx({A: 1.5, B: 1.5, C: 1.5})
    assert made.capacity == pytest.approx(2 / 3)
    assert made.spacing == pytest.approx(EACH, abs=0.01)
    assert made.cold == pytest.approx(1 / 3, abs=0.001), "at the end of its ramp"
    assert (made.error, made.outage()) == ("", 0)


def test_what_a_plan_foresees_is_what_then_happens() -> None:
    world = up(upstream())
    made = foreseen(world, rollout(), Observed(seconds={StepName.EXIT: 0.5, StepName.START: 0.5, StepName.UP: 1.0}))
    began = world.now
    number = world.wish(ChangeKind.ROLLOUT)
    while world.change(number).status == "running":
        world.live(0.5)
    assert made.duration == pytest.approx(world.now - began, rel=0.1)


def test_a_plan_changes_nothing() -> None:
    world = up(upstream())
    before = world.state
    foreseen(world, rollout())
    assert world.state is before


def test_the_last_requests_and_the_first_one_take_their_time() -> None:
    world = up(upstream(policy=replace(POLICY, warm_up=WarmUpPolicy(duration=10.0, starts="first-request"))))
    drained = replace(QUIET, seconds={**SECONDS, StepName.EMPTY: 7.0})
    busy = foreseen(world, rollout(A), replace(drained, rate=2100.0))
    assert busy.duration == pytest.approx(EACH + 4, abs=0.1), "settling goes on while it empties"
    rare = foreseen(world, rollout(A), replace(drained, rate=2.1))
    assert rare.duration == pytest.approx(EACH + 4 + 10, abs=0.1), "its first share is one of 21 requests"
    silent = foreseen(world, rollout(A), replace(drained, rate=0.0))
    assert silent.duration == pytest.approx(EACH + 4, abs=0.1), "no request comes in the ramp's time"


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_without_traffic_the_plan_is_the_one_for_traffic_that_comes(rate: float) -> None:
    world = up(upstream(policy=replace(POLICY, warm_up=WarmUpPolicy(duration=10.0, starts="first-request"))))
    silent = replace(QUIET, rate=rate)
    made = foreseen(world, rollout(), silent)
    assert (made.load, made.duration) == (pytest.approx(1.5), pytest.approx(3 * EACH, abs=0.01))
    assert not any("max_load" in warning for warning in plan.warnings(made, POLICY, silent))
    advised = plan.advise(world.state, rollout(), silent, world.now)
    assert (advised.plan.batch, advised.safe) == (1, True)


def test_a_server_that_is_away_already_counts() -> None:
    world = up(upstream())
    world.admin(C, Admin.MAINT)
    made = foreseen(world, rollout())
    assert [batch.servers for batch in made.batches] == [(A,), (B,)]
    assert made.load == pytest.approx(3.0)
    with pytest.raises(Refused, match=r"3\.00 times its usual share"):
        world.take(rollout())


def test_weights_count_and_backups_are_measured_by_a_primary() -> None:
    configured = replace(upstream(), servers=(server(8001, weight=3), server(8002), server(8003, backup=True)))
    made = foreseen(up(configured), rollout(A, B))
    assert made.loads[B] == pytest.approx(4.0)
    assert made.loads[A] == pytest.approx(4 / 3)
    assert C not in made.loads
    assert made.server == B
    both = foreseen(up(configured), rollout(A, B, batch=2))
    assert both.loads[C] == pytest.approx(4.0)


def test_a_forced_plan_shows_the_outage() -> None:
    made = foreseen(up(upstream()), rollout(batch=3, forced=True))
    assert made.outage() == pytest.approx(6.0, abs=0.01), "settle, exit and start; then they are tried"
    assert made.capacity == 0
    assert "every request then fails" in plan.warnings(made, POLICY, QUIET)[0]
    with pytest.raises(Refused, match="no other server"):
        foreseen(up(upstream()), rollout(batch=3))


def test_a_stop_leaves_the_others_with_more_for_good() -> None:
    made = foreseen(up(upstream()), ChangeWished(ChangeKind.STOP, "app", (A,)))
    assert made.samples[-1].load == pytest.approx(1.5)
    assert made.samples[-1].capacity == pytest.approx(2 / 3)


def test_while_a_change_runs_it_is_planned_for_when_that_has_ended_well() -> None:
    world = up(upstream())
    alone = foreseen(world, rollout())
    number = world.wish(ChangeKind.RESTART, A)
    world.answer()
    assert world.serving() == (B, C)
    made = foreseen(world, rollout())
    assert [batch.servers for batch in made.batches] == [(A,), (B,), (C,)]
    assert (made.duration, made.loads) == (pytest.approx(alone.duration), pytest.approx(alone.loads))
    (said,) = plan.awaited(world.state, rollout())
    assert said.startswith(f"change {number} (restart) of app comes first")
    assert plan.advise(world.state, rollout(), QUIET, world.now).safe


def test_after_a_stop_that_runs_its_server_is_not_planned_for() -> None:
    world = up(upstream(4))
    world.wish(ChangeKind.STOP, A)
    assert [batch.servers for batch in foreseen(world, rollout()).batches] == [(B,), (C,), ("127.0.0.1:8004",)]


def test_of_a_batch_no_more_are_away_at_once_than_max_unavailable() -> None:
    world = up(upstream(4, policy=replace(POLICY, rollout=RolloutPolicy(ready_time=1.0, max_load=1.5))))
    wish = replace(rollout(batch=4), max_unavailable=1)
    made = foreseen(world, wish)
    assert made.load == pytest.approx(4 / 3)
    assert (made.error, made.outage()) == ("", 0)
    assert plan.advise(world.state, wish, QUIET, world.now).plan.batch == 4
    with pytest.raises(Refused, match=r"2\.00 times its usual share"):
        world.take(replace(wish, max_unavailable=2))
    with pytest.raises(Refused, match="no other server of app serves"):
        world.take(replace(wish, max_unavailable=4))
    number = world.take(wish).change
    assert number is not None
    least = 4
    while world.change(number).status == "running":
        world.live(0.5)
        least = min(least, len(world.serving()))
    assert (world.change(number).status, least) == ("done", 3)


def test_of_many_batches_the_heaviest_are_simulated_and_the_duration_is_that_of_all() -> None:
    servers = tuple(server(8001 + at, weight=5 if at == 27 else 1) for at in range(30))
    made = foreseen(up(replace(upstream(), servers=servers)), rollout())
    assert (made.count, len(made.batches)) == (30, 8)
    assert made.duration == pytest.approx(30 * EACH, abs=0.1)
    assert servers[27].key in [batch.servers[0] for batch in made.batches]
    assert made.load == pytest.approx(34 / 29)


def test_the_advice_is_the_largest_batch_within_the_limit() -> None:
    def advised(count: int, limit: float, observed: Observed = QUIET) -> tuple[int, bool]:
        policy = replace(POLICY, rollout=RolloutPolicy(ready_time=1.0, max_load=limit))
        world = up(upstream(count, policy=policy))
        advice = plan.advise(world.state, rollout(), observed, world.now)
        return advice.plan.batch, advice.safe

    assert advised(6, 2.0) == (3, True)
    assert advised(6, 1.5) == (2, True)
    assert advised(6, 1.1) == (1, False), "one away makes 1.2"
    assert advised(6, 0.0) == (3, True), "without a limit, twice"
    assert advised(2, 2.0) == (1, True)
    assert advised(6, 2.0, replace(QUIET, rate=600.0, capacity=150.0)) == (2, True), "four servers take it"


def test_the_warnings_say_what_is_wrong_and_nothing_else() -> None:
    world = up(upstream())
    assert plan.warnings(foreseen(world, rollout()), POLICY, QUIET) == ()
    (said,) = plan.warnings(foreseen(world, rollout(batch=2)), replace(POLICY, warm_up=WarmUpPolicy(max_cold=1)), QUIET)
    assert said.startswith(f"{C} gets 3.00 times its usual share; max_load allows 2 times")
    busy = replace(QUIET, rate=300.0, capacity=120.0)
    (said,) = plan.warnings(foreseen(world, rollout()), POLICY, busy)
    assert said == "overload: a server is asked for 125 % of what it can take, at 300 requests/s"
    cold = replace(POLICY, warm_up=WarmUpPolicy(duration=0.0))
    (said,) = plan.warnings(foreseen(up(upstream(policy=cold)), rollout()), cold, QUIET)
    assert "has no warm-up" in said


def test_the_surge_is_told_in_words() -> None:
    made = foreseen(up(upstream()), rollout())
    assert plan.surge(made).startswith(f"the surge: {made.server} gets up to 1.50 times its usual share; for ")


def test_what_a_server_can_take_goes_by_its_weight_and_refuses_what_would_ask_for_more() -> None:
    policy = replace(POLICY, rollout=RolloutPolicy(max_load=0.0, capacity=100.0))
    lines = (server(8001, weight=2), server(8002), server(8003))
    world = up(Upstream("app", lines, policy=policy))
    assert not plan.advise(world.state, rollout(), replace(QUIET, rate=210.0, capacity=100.0), world.now).safe
    assert plan.advise(world.state, rollout(), replace(QUIET, rate=190.0, capacity=100.0), world.now).safe
    with pytest.raises(Refused, match=f"without {A} .* is asked for 105 requests/s by weight 1, and capacity is 100"):
        world.take(replace(rollout(), rate=210.0))
    for granted in (replace(rollout(), rate=190.0), rollout(), replace(rollout(forced=True), rate=900.0)):
        assert up(Upstream("app", lines, policy=policy)).take(granted).change == 1


BATCHED = [ChangeKind.ROLLOUT, ChangeKind.RELOAD, ChangeKind.UPGRADE, ChangeKind.DEPLOY, ChangeKind.ROLL_BACK]


@pytest.mark.parametrize("kind", [*BATCHED, ChangeKind.SCALE, ChangeKind.RESTART])
def test_the_guard_refuses_above_the_limit_unless_forced(kind: ChangeKind) -> None:
    commands = replace(POLICY, process=ProcessPolicy(deploy=("new",), roll_back=("old",)))
    wish = ChangeWished(kind, "app", batch=2, workers=int(kind is ChangeKind.SCALE))
    with pytest.raises(Refused, match=r"3\.00 times its usual share, and max_load is 2") as caught:
        up(upstream(policy=commands)).take(wish)
    assert caught.value.code == "guard"
    assert "headgate plan rollout app" in caught.value.remedy
    for granted in (replace(wish, batch=1), replace(wish, forced=True)):
        assert up(upstream(policy=commands)).take(granted).change == 1


def test_whoever_names_one_server_is_stopped_only_where_no_other_serves() -> None:
    for kind in (ChangeKind.RESTART, ChangeKind.STOP, ChangeKind.DRAIN):
        world = up(upstream())
        world.admin(C, Admin.MAINT)
        assert world.take(ChangeWished(kind, "app", (A,))).change == 1


def test_a_queued_change_is_judged_by_what_will_be_and_again_when_its_turn_has_come() -> None:
    world = up(upstream())
    first = world.wish(ChangeKind.RESTART, A)
    world.answer()
    with pytest.raises(Refused, match=r"3\.00 times its usual share"):
        world.take(replace(rollout(batch=2), queue=True))
    number = world.take(replace(rollout(), queue=True)).change
    assert number is not None
    assert world.change(number).status == "queued"
    assert [s.server for s in world.change(number).steps if s.name is StepName.DRAIN] == [A, B, C]
    world.admin(C, Admin.MAINT)
    while world.change(first).status == "running":
        world.live(0.5)
    change = world.change(number)
    assert (change.status, {s.state for s in change.steps}) == ("failed", {"skipped"})
    assert "3.00 times its usual share, and max_load is 2 (take fewer away at once" in change.error
    assert world.serving() == (A, B)


def test_what_steps_took_is_learned_as_their_median() -> None:
    taken = [("exit", 1.0), ("exit", 9.0), ("exit", 2.0), ("start", 4.0), ("warm", 120.0)]
    assert plan.learned(taken) == {StepName.EXIT: 2.0, StepName.START: 4.0}


POLICIES = st.builds(
    Policy,
    warm_up=st.builds(
        WarmUpPolicy,
        duration=st.sampled_from([0.0, 1.0, 60.0]),
        curve=st.sampled_from([0.5, 1.0, 2.0]),
        floor=st.sampled_from([0.01, 0.1, 1.0]),
        starts=st.sampled_from(["healthy", "first-request"]),
        max_cold=st.sampled_from([0.1, 0.5, 1.0]),
    ),
    drain=st.builds(DrainPolicy, settle=st.sampled_from([0.0, 3.0])),
    rollout=st.builds(RolloutPolicy, ready_time=st.sampled_from([0.0, 5.0]), max_load=st.just(1.0)),
    process=st.just(POLICY.process),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=6),
    st.integers(1, 5),
    POLICIES,
    st.builds(
        Observed,
        rate=st.none() | st.floats(1e5, 1e6),
        seconds=st.dictionaries(st.sampled_from([*SECONDS, StepName.EMPTY]), st.floats(0.01, 20)),
    ),
)
def test_every_plan_ends_well_and_its_peak_is_what_the_guard_reckons(
    weights: list[int], batch: int, policy: Policy, observed: Observed
) -> None:
    batch = min(batch, len(weights) - 1)
    configured = Upstream("app", tuple(server(8001 + at, weight=w) for at, w in enumerate(weights)), policy=policy)
    state, _ = step(State(), ConfigRead((configured,)), 0.0)
    for each in configured.servers:
        for _ in range(policy.health.rise):
            state, _ = step(state, ProbeResult("app", each.key, True, "ok"), 0.0)
    wish = rollout(batch=batch)
    made = plan.simulate(state, wish, observed, 0.0)
    assert made.error == ""
    assert made.outage() == 0
    assert 0 < made.capacity < 1
    assert made.samples[-1].capacity == pytest.approx(1) or policy.warm_up.starts == "first-request"
    times = [each.at for each in made.samples]
    assert times == sorted(times)
    away = max(sum(weights[at : at + batch]) for at in range(0, len(weights), batch))
    assert made.load == pytest.approx(sum(weights) / (sum(weights) - away), rel=0.01)
    with pytest.raises(Refused, match="times its usual share"):
        step(state, wish, 0.0)
