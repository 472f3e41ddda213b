"""Who warms up and who does not: what begins a warm-up, the cap on cold capacity, and ramps that protect nobody."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core import table
from controller.core.events import (
    ConfigRead,
    OfflineNoticed,
    PeerSeen,
    PlaneLost,
    PlaneSeen,
    Restored,
    WarmUpWished,
)
from controller.core.model import (
    Admin,
    ChangeKind,
    ChangeStatus,
    Ejection,
    Health,
    Peer,
    Quarantine,
    Refused,
    StepName,
    Upstream,
    Warmth,
)
from controller.core.policy import Policy
from tests.core.world import POLICY, A, B, C, World, server, upstream

D = "127.0.0.1:8004"
WAITING = replace(POLICY, warm_up=replace(POLICY.warm_up, starts="first-request"))


def warming(policy: Policy = POLICY, **fields: object) -> Policy:
    return replace(policy, warm_up=replace(policy.warm_up, **fields))  # type: ignore[arg-type]


def serving(count: int = 3, policy: Policy = POLICY) -> World:
    """A world whose servers were up and warm before anything happened."""
    world = World().configure(upstream(count, policy=policy))
    for at in range(count):
        world.probe(f"127.0.0.1:{8001 + at}", times=2)
    assert all(world.peer(key).warm_up.phase is Warmth.NONE for key in world.state.groups["app"].peers)
    return world


def grown(world: World, count: int) -> World:
    """The same upstream with more servers, all of them probed well."""
    known = len(world.state.groups["app"].peers)
    world.take(ConfigRead((upstream(count, policy=world.state.groups["app"].upstream.policy),)))
    for at in range(known, count):
        world.probe(f"127.0.0.1:{8001 + at}", times=2)
    return world


def phase(world: World, key: str) -> Warmth:
    return world.peer(key).warm_up.phase


def said(world: World, text: str) -> int:
    return sum(text in note.text for note in world.notes)


def effective(world: World) -> dict[str, float]:
    return table.effective_weights(world.state.groups["app"], world.now)


# --- what begins a warm-up, and what does not -----------------------------------------------------------------------


def test_a_new_server_warms_up() -> None:
    world = grown(serving(2), 3)
    assert (phase(world, C), world.peer(C).warm_up.cause) == (Warmth.RUNNING, "new")
    assert said(world, f"app: {C} warms up over 10 s (new)") == 1


def test_a_server_that_recovers_warms_up_however_long_it_was_down() -> None:
    world = serving().probe(A, ok=False, times=3).pass_time(50_000).probe(A, times=2)
    assert (phase(world, A), world.peer(A).warm_up.cause) == (Warmth.RUNNING, "recovered")
    assert effective(world)[A] == pytest.approx(0.1), "HAProxy gave it all at once"


def test_a_server_that_is_undrained_warms_up() -> None:
    world = serving()
    world.wish(ChangeKind.DRAIN, A)
    world.admin(A, Admin.READY)
    assert (phase(world, A), world.peer(A).warm_up.cause) == (Warmth.RUNNING, "undrained")


def test_a_server_that_nobody_has_probed_yet_warms_up_when_it_is_undrained() -> None:
    world = World().configure()
    world.wish(ChangeKind.DRAIN, A)
    world.admin(A, Admin.READY)
    assert phase(world, A) is Warmth.RUNNING


def test_a_restarted_server_warms_up() -> None:
    world = serving()
    world.wish(ChangeKind.RESTART, A)
    world.live(8)
    assert (phase(world, A), world.peer(A).warm_up.cause) == (Warmth.RUNNING, "restarted")


def test_a_server_back_from_maintenance_warms_up() -> None:
    world = serving().admin(A, Admin.MAINT).admin(A, Admin.READY)
    assert table.serving(world.state.groups["app"]) == (B, C), "not before it is probed"
    world.probe(A, times=2)
    assert (phase(world, A), world.peer(A).warm_up.cause) == (Warmth.RUNNING, "enabled")


def test_a_server_whose_line_is_no_longer_marked_down_warms_up() -> None:
    lines = (server(8001, down=True), server(8002), server(8003))
    world = World().configure(Upstream("app", lines, policy=POLICY)).probe(A, times=2)
    world.take(ConfigRead((upstream(),)))
    assert (phase(world, A), world.peer(A).warm_up.cause) == (Warmth.RUNNING, "enabled")


def test_a_server_back_from_quarantine_warms_up() -> None:
    world = serving()
    world.take(OfflineNoticed("app", A, seconds=30.0))
    world.pass_time(31)
    assert (phase(world, A), world.peer(A).warm_up.cause) == (Warmth.RUNNING, "quarantine ended")


def test_a_server_warms_up_by_hand() -> None:
    world = serving()
    world.take(WarmUpWished("app", A))
    assert (phase(world, A), world.peer(A).warm_up.cause) == (Warmth.RUNNING, "by hand")
    assert effective(world) == pytest.approx({A: 0.1, B: 1.0, C: 1.0})


@pytest.mark.parametrize(
    ("policy", "key", "message"),
    [
        (warming(duration=0.0), A, "app has no warm-up"),
        (POLICY, B, f"{B} gets no traffic now"),
        (POLICY, D, "as much of app is cold already as may be"),
    ],
)
def test_a_warm_up_by_hand_is_refused_where_it_could_not_be(policy: Policy, key: str, message: str) -> None:
    world = serving(4, policy=policy).admin(B, Admin.MAINT)
    if policy is POLICY:
        world.take(WarmUpWished("app", C))
    with pytest.raises(Refused, match=message):
        world.take(WarmUpWished("app", key))


def test_the_start_of_headgate_begins_no_warm_up() -> None:
    world = serving()
    peers = {("app", key): peer for key, peer in world.state.groups["app"].peers.items()}
    again = World(now=5000.0)
    again.take(Restored(world.state.revision, 1, world.state.next_epoch, peers, {}, away=100.0))
    again.configure().probe(A, times=2)
    assert [phase(again, key) for key in (A, B, C)] == [Warmth.NONE] * 3


def test_a_reload_and_a_restart_of_nginx_begin_no_warm_up() -> None:
    world = serving()
    world.take(PlaneLost("gone"))
    world.take(PlaneSeen("another boot", 0))
    world.acknowledge()
    assert [phase(world, key) for key in (A, B, C)] == [Warmth.NONE] * 3


def test_an_edit_elsewhere_begins_no_warm_up() -> None:
    world = serving()
    heavier = Upstream("app", (server(8001, weight=3), server(8002), server(8003)), policy=POLICY)
    world.take(ConfigRead((heavier, upstream(2, name="web"))))
    assert [phase(world, key) for key in (A, B, C)] == [Warmth.NONE] * 3


def test_an_ejection_by_nginx_is_over_without_a_warm_up() -> None:
    world = serving()
    ejected = replace(world.peer(A), ejected=Ejection(world.now + 30, "errors", 1))
    world.state = table.with_peer(world.state, "app", A, ejected)
    world.state = table.with_peer(world.state, "app", A, replace(ejected, ejected=None))
    world.pass_time(1)
    assert phase(world, A) is Warmth.NONE


def test_the_clock_starts_when_the_server_is_first_healthy_and_not_when_it_appears() -> None:
    world = serving(2)
    world.take(ConfigRead((upstream(3),)))
    world.pass_time(500).probe(C, times=2)
    assert effective(world)[C] == pytest.approx(0.1)
    assert effective(world.pass_time(5))[C] == pytest.approx(0.5)


def test_the_clock_starts_with_the_first_business_request_where_that_is_configured() -> None:
    world = grown(serving(2, WAITING), 3)
    assert said(world, f"app: {C} warms up over 10 s from its first request on (new)") == 1
    epoch = world.peer(C).warm_up.epoch
    world.pass_time(500)
    assert effective(world)[C] == pytest.approx(0.1)
    world.take(PeerSeen("app", C, world.state.revision, 0, epoch, 0.0, True))
    assert effective(world.pass_time(5))[C] == pytest.approx(0.5)
    assert world.entry(C)["warm_up"]["elapsed_ms"] == 5000  # type: ignore[index]


def test_a_ramp_outlives_the_daemon_and_a_restart_of_nginx() -> None:
    world = grown(serving(2), 3).pass_time(2)
    peers = {("app", key): peer for key, peer in world.state.groups["app"].peers.items()}
    again = World(now=world.now + 3)
    again.take(Restored(world.state.revision, 1, world.state.next_epoch, peers, {}, away=3.0))
    again.configure()
    again.take(PlaneLost("gone"))
    again.take(PlaneSeen("another boot", 0))
    ramp, known = again.entry(C)["warm_up"], world.pass_time(3).entry(C)["warm_up"]
    assert ramp == known | {"epoch": world.state.next_epoch}, "the other nginx is to take ours"  # type: ignore[operator]
    assert effective(again)[C] == pytest.approx(0.5)


def test_a_ramp_goes_on_where_it_was_when_the_machine_was_rebooted() -> None:
    world = grown(serving(2), 3).pass_time(2)
    peers = {("app", key): peer for key, peer in world.state.groups["app"].peers.items()}
    again = World(now=7.0)
    away = again.now - world.now  # the clock has begun anew
    again.take(Restored(world.state.revision, 1, world.state.next_epoch, peers, {}, away=away, rebooted=True))
    again.configure()
    assert effective(again)[C] == pytest.approx(0.2)


# --- lone servers and cold pools --------------------------------------------------------------------------------------


def test_a_lone_server_does_not_warm_up_and_holds_no_rollout() -> None:
    world = serving(1)
    number = world.wish(ChangeKind.RESTART, A, forced=True)
    world.live(9)
    assert world.change(number).status is ChangeStatus.DONE
    assert next(s.detail for s in world.change(number).steps if s.name is StepName.WARM) == "warm after 0.0 s"
    assert effective(world) == {A: 1.0}
    assert said(world, "warms up") == 0


@pytest.mark.parametrize("other", [server(8002, down=True), server(8002, backup=True)])
def test_a_server_is_alone_beside_one_that_is_marked_down_or_a_backup(other: object) -> None:
    lines = (server(8001), other)
    world = World().configure(Upstream("app", lines, policy=POLICY))  # type: ignore[arg-type]
    world.probe(A, times=2).probe(A, ok=False, times=3).probe(A, times=2)
    assert phase(world, A) is Warmth.NONE


def test_a_server_that_is_left_alone_has_its_full_weight() -> None:
    world = grown(serving(1), 2)
    assert phase(world, B) is Warmth.RUNNING
    world.take(ConfigRead((Upstream("app", (server(8002),), policy=POLICY),)))
    assert phase(world, B) is Warmth.DONE
    assert said(world, "has its full weight: no other server shares its load") == 1


def test_where_all_are_cold_the_ramp_is_ineffective_and_that_is_said_once() -> None:
    world = serving()
    for key in (A, B, C):
        world.probe(key, ok=False, times=3)
    for key in (A, B, C):
        world.probe(key, times=2).pass_time(1)
    assert [phase(world, key) for key in (A, B, C)] == [Warmth.RUNNING] * 3, "nobody waits, there is nobody to protect"
    assert said(world, "ramp ineffective: no warm server in app") == 1
    assert effective(world) == pytest.approx({A: 1.0, B: 2 / 3, C: 1 / 3}), "3, 2 and 1 s old: on a common base"
    world.pass_time(7)
    assert phase(world, A) is Warmth.DONE
    assert said(world, "app: ramps are effective again") == 1
    assert effective(world) == pytest.approx({A: 1.0, B: 0.9, C: 0.8})
    world.pass_time(10)
    assert (said(world, "ineffective"), said(world, "effective again")) == (1, 1)


def test_the_one_cold_server_that_is_left_carries_all() -> None:
    world = grown(serving(1), 2)
    assert effective(world) == pytest.approx({A: 1.0, B: 0.1})
    world.probe(A, ok=False, times=3)
    assert effective(world) == pytest.approx({A: 0.0, B: 1.0})
    assert said(world, "ramp ineffective: no warm server in app") == 1


def test_a_server_that_joins_during_a_ramp_does_not_surge_the_others() -> None:
    """istio.io#12936: two warm, one at half of its ramp, one more comes: the one that warms must not get more by it."""
    world = grown(serving(2), 3).pass_time(5)
    before = effective(world)
    after = effective(grown(world, 4))
    assert [before[key] for key in (A, B, C)] == pytest.approx([after[key] for key in (A, B, C)])
    assert after[D] == pytest.approx(0.1)
    parts = [{key: weight / sum(each.values()) for key, weight in each.items()} for each in (before, after)]
    assert parts[0][C] == pytest.approx(0.2)
    assert parts[1][C] == pytest.approx(0.5 / 2.6)


def test_a_weight_of_one_ramps_like_any_other() -> None:
    """tengine#497: integer weights cannot."""
    world = grown(serving(2), 3)
    found = []
    for _ in range(10):
        found.append(effective(world)[C])
        world.pass_time(1)
    assert found == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


# --- the cap on cold capacity ----------------------------------------------------------------------------------------


def test_half_of_an_upstream_may_be_cold_and_further_servers_wait_in_the_order_they_came() -> None:
    world = grown(serving(2), 4)
    first, second, third, fourth = (f"127.0.0.1:{8001 + at}" for at in range(4, 8))
    grown(world.pass_time(1), 5)
    assert phase(world, first) is Warmth.QUEUED
    assert world.entry(first)["state"] == "waiting"
    assert "warm_up" not in world.entry(first)
    assert effective(world)[first] == 0
    assert said(world, f"app: {first} waits: 40 % of app is cold already") == 1
    grown(world, 8)
    cold = [phase(world, key) for key in (C, D, first, second, third, fourth)]
    assert cold == [Warmth.RUNNING] * 4 + [Warmth.QUEUED] * 2, "4 of the 8 that could serve"
    world.pass_time(9)
    assert [phase(world, key) for key in (C, D, third, fourth)] == [Warmth.DONE] * 2 + [Warmth.RUNNING] * 2
    assert world.entry(third)["warm_up"]["elapsed_ms"] == 0, "its clock starts when it is let in"  # type: ignore[index]
    assert [note.server for note in world.notes if "warms up over" in note.text] == [C, D, first, second, third, fourth]


def test_one_may_always_warm_up() -> None:
    world = grown(serving(2, warming(max_cold=0.01)), 4)
    assert (phase(world, C), phase(world, D)) == (Warmth.RUNNING, Warmth.QUEUED)


def test_who_waits_is_let_in_when_one_that_warms_up_goes_down() -> None:
    world = grown(serving(2, warming(max_cold=0.01)), 4)
    world.probe(C, ok=False, times=3)
    assert phase(world, D) is Warmth.RUNNING
    world.probe(C, times=2)
    assert phase(world, C) is Warmth.QUEUED


def test_all_who_wait_are_let_in_at_once_when_no_warm_server_serves() -> None:
    world = grown(serving(1, warming(max_cold=0.01)), 4)
    assert [phase(world, key) for key in (B, C, D)] == [Warmth.RUNNING, Warmth.QUEUED, Warmth.QUEUED]
    world.probe(A, ok=False, times=3)
    assert [phase(world, key) for key in (B, C, D)] == [Warmth.RUNNING] * 3
    assert said(world, "fails open") == 0


def test_who_waits_and_goes_down_has_lost_its_place() -> None:
    world = grown(serving(2, warming(max_cold=0.01)), 5)
    last = "127.0.0.1:8005"
    world.probe(D, ok=False, times=3)
    assert phase(world, D) is Warmth.NONE
    world.probe(D, times=2).pass_time(10)
    assert (phase(world, D), phase(world, last)) == (Warmth.QUEUED, Warmth.RUNNING)


def test_who_waits_for_requests_that_do_not_come_makes_nobody_wait_for_ever() -> None:
    world = grown(serving(2, warming(WAITING, max_cold=0.01)), 4)
    world.pass_time(9)
    assert phase(world, D) is Warmth.QUEUED
    world.pass_time(1)
    assert (phase(world, C), phase(world, D)) == (Warmth.WAITING, Warmth.WAITING)


def test_a_rollout_in_batches_ends_though_no_request_comes() -> None:
    world = serving(3, WAITING)
    number = world.wish(ChangeKind.RESTART, A, B, batch=2)
    world.live(50)
    assert world.change(number).status is ChangeStatus.DONE


def test_weights_count_and_a_heavy_server_is_not_overtaken() -> None:
    lines = (server(8001, weight=4), server(8002), server(8003, weight=8), server(8004))
    world = serving(1)
    world.take(ConfigRead((Upstream("app", lines, policy=POLICY),)))
    for key in (B, C, D):
        world.probe(key, times=2)
    assert [phase(world, key) for key in (B, C, D)] == [Warmth.RUNNING, Warmth.QUEUED, Warmth.QUEUED]
    world.pass_time(10)
    assert [phase(world, key) for key in (B, C, D)] == [Warmth.DONE, Warmth.RUNNING, Warmth.QUEUED]


def test_backups_do_not_count_among_primaries() -> None:
    lines = (server(8001), server(8002), server(8003, backup=True), server(8004, backup=True))
    world = World().configure(Upstream("app", lines, policy=warming(max_cold=0.01)))
    for key in (B, C):
        world.probe(key, times=2).probe(key, ok=False, times=3).probe(key, times=2)
    assert (phase(world, B), phase(world, C)) == (Warmth.RUNNING, Warmth.RUNNING)


def test_a_rollout_waits_for_a_server_that_waits_for_its_turn() -> None:
    world = grown(serving(3, warming(max_cold=0.01)), 4)
    number = world.wish(ChangeKind.RESTART, A)
    world.live(6)
    step = next(s for s in world.change(number).steps if s.name is StepName.WARM)
    assert (phase(world, A), step.detail) == (Warmth.QUEUED, "waits until others are warm")
    world.live(30)
    assert world.change(number).status is ChangeStatus.DONE
    assert phase(world, A) is Warmth.DONE


# --- a policy that changes -------------------------------------------------------------------------------------------


def reconfigured(world: World, **fields: object) -> World:
    known = world.state.groups["app"].upstream
    world.take(ConfigRead((replace(known, policy=warming(known.policy, **fields)),)))
    return world.acknowledge()


def test_a_ramp_goes_on_by_a_new_formula() -> None:
    world = grown(serving(2), 3).pass_time(5)
    before, revision = world.entry(C)["warm_up"], world.state.revision
    reconfigured(world, duration=100.0, curve=2.0, floor=0.2, steps=10)
    after = world.entry(C)["warm_up"]
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert (after["epoch"], after["elapsed_ms"]) == (before["epoch"], before["elapsed_ms"])
    assert (after["duration_ms"], after["curve"], after["floor"], after["steps"]) == (100_000, 2.0, 0.2, 10)
    assert world.state.revision == revision + 1
    assert effective(world.pass_time(50))[C] == pytest.approx(0.36)


def test_a_shorter_duration_may_end_a_ramp() -> None:
    world = reconfigured(grown(serving(2), 3).pass_time(5), duration=4.0)
    assert effective(world)[C] == 1.0
    assert phase(world.pass_time(0.1), C) is Warmth.DONE


def test_what_does_not_reach_nginx_is_not_published() -> None:
    world = grown(serving(2), 3)
    revision = world.state.revision
    assert reconfigured(world, hold_errors=9.0, step_back=60.0).state.revision == revision


@pytest.mark.parametrize("policy", [POLICY, WAITING], ids=["running", "waiting for a request"])
def test_switching_off_ends_every_ramp_at_once(policy: Policy) -> None:
    world = grown(serving(2, warming(policy, max_cold=0.01)), 4)
    assert phase(world, D) is Warmth.QUEUED
    reconfigured(world, duration=0.0)
    assert (phase(world, C), phase(world, D)) == (Warmth.DONE, Warmth.DONE)
    assert said(world, f"app: {D} has its full weight: warm-up is switched off") == 1
    assert effective(world) == {A: 1.0, B: 1.0, C: 1.0, D: 1.0}
    assert (world.entry(D)["state"], "warm_up" in world.entry(C)) == ("up", False)


def test_switching_on_begins_no_ramp_for_servers_that_serve() -> None:
    world = reconfigured(serving(3, warming(duration=0.0)), duration=10.0)
    assert [phase(world, key) for key in (A, B, C)] == [Warmth.NONE] * 3
    world.probe(A, ok=False, times=3).probe(A, times=2)
    assert phase(world, A) is Warmth.RUNNING


def test_a_ramp_that_waits_for_a_request_begins_when_it_need_not_any_longer() -> None:
    world = grown(serving(2, WAITING), 3)
    epoch = world.peer(C).warm_up.epoch
    reconfigured(world, starts="healthy")
    assert phase(world, C) is Warmth.RUNNING
    assert world.peer(C).warm_up.epoch > epoch, "nginx would go on waiting in a ramp that it knows"


def test_a_higher_cap_lets_in_who_waits() -> None:
    world = grown(serving(2, warming(max_cold=0.01)), 4)
    assert phase(reconfigured(world, max_cold=0.5), D) is Warmth.RUNNING


def test_a_server_that_left_traffic_is_not_said_to_be_warm() -> None:
    world = grown(serving(2), 3).probe(C, ok=False, times=3).pass_time(20)
    assert said(world, f"{C} is warm") == 0


def test_a_quarantine_that_ends_in_a_later_life_is_followed_by_a_warm_up() -> None:
    up, world = Peer(health=Health.UP), World()
    away = replace(up, quarantine=(Quarantine(world.now + 5, "outlier", "outlier"),))
    world.take(Restored(1, 1, 1, {("app", A): away, ("app", B): up, ("app", C): up}, {}))
    world.configure().pass_time(6)
    assert (phase(world, A), phase(world, B)) == (Warmth.RUNNING, Warmth.NONE)
