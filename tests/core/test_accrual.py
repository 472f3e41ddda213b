"""Phi accrual: the peers' numbers, and what the suspicion does to a verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core import accrual
from controller.core.events import ConfigRead, ProbeResult, Ticked
from controller.core.model import Health
from controller.core.policy import HealthPolicy
from tests.core.world import POLICY, A, B, World, upstream

ACCRUAL = replace(POLICY, health=HealthPolicy(rise=2, fall=3, detector="accrual", flaps=0))


@pytest.mark.parametrize(
    ("silence", "phi"),
    [(0, 0.0), (500, 0.1), (1000, 0.3), (1200, 1.6), (1400, 4.7), (1600, 10.8), (1700, 15.3)],
)
def test_akka_phi_with_a_mean_of_1000_ms_and_a_deviation_of_100_ms(silence: float, phi: float) -> None:
    assert accrual.phi(silence, 1000.0, 100.0) == pytest.approx(phi, abs=0.1)


@pytest.mark.parametrize(
    ("intervals", "phi"), [(1, 0.3), (1.5, 1.6), (2, 4.7), (2.25, 7.3), (2.31, 8.0), (2.5, 10.8), (3, 21.2)]
)
def test_the_documented_suspicion_of_a_steady_server(intervals: float, phi: float) -> None:
    steady = tuple(float(at) for at in range(20))
    assert accrual.suspicion(steady, 19 + intervals) == pytest.approx(phi, abs=0.05)


@pytest.mark.parametrize(("phi", "deviations"), [(1, 1.2816), (2, 2.3263), (3, 3.0902)])
def test_hayashibara_one_wrong_suspicion_in_ten_to_the_phi(phi: float, deviations: float) -> None:
    assert accrual.phi(10.0 + deviations, 10.0, 1.0) == pytest.approx(phi, rel=0.03)


def test_a_greater_deviation_suspects_later_and_no_silence_overflows() -> None:
    assert accrual.phi(1100, 1000, 500) < accrual.phi(1100, 1000, 100)
    assert 1e9 < accrual.phi(1e9, 1.0, 0.25) < float("inf")
    assert accrual.phi(-1e9, 1.0, 0.25) == 0.0


def test_heartbeats_are_bounded_and_a_few_prove_nothing() -> None:
    heartbeats: tuple[float, ...] = ()
    for now in range(accrual.ENOUGH - 1):
        heartbeats = accrual.beat(heartbeats, float(now))
    assert accrual.suspicion(heartbeats, 1e6) is None
    for now in range(1000):
        heartbeats = accrual.beat(heartbeats, 2.0 * now)
    assert heartbeats == tuple(2.0 * now for now in range(900, 1000))


def test_of_steady_heartbeats_one_may_be_missing_and_the_silence_of_two_takes_the_server_down() -> None:
    world = steady()
    world.now += 2
    world.probe(A, ok=False)
    world.now += 2
    world.probe(A)
    assert world.peer(A).health is Health.UP
    for _ in range(10):
        world.now += 2
        world.probe(A)
    silent = world.now
    world.now += 2
    world.probe(A, ok=False, reason="timeout")
    while world.peer(A).health is Health.UP:
        world.pass_time(0.1)
        assert world.now < silent + 10
    assert 4.0 < world.now - silent < 6.0
    assert world.notes[-1].text == "app: 127.0.0.1:8001 is down with phi 8.2 (timeout); 2 of 3 servers serving"


def test_silence_without_a_failed_probe_takes_nobody_down() -> None:
    world = steady().pass_time(3600)
    assert world.peer(A).health is Health.UP


def test_lossy_heartbeats_are_believed_for_longer_than_steady_ones() -> None:
    world = steady()
    for at in range(40):
        world.now += 2
        world.probe(A, ok=at % 2 == 1)
    assert world.peer(A).health is Health.UP
    world.now += 4
    world.probe(A, ok=False)
    assert world.peer(A).health is Health.UP


def test_a_server_comes_up_by_rise_and_its_history_begins_anew() -> None:
    world = steady()
    world.now += 60
    world.probe(A, ok=False)
    assert world.peer(A).health is Health.DOWN
    world.now += 600
    world.probe(A)
    assert world.peer(A).health is Health.DOWN
    world.probe(A)
    assert world.peer(A).health is Health.UP
    assert world.state.heartbeats["app", A] == (world.now,)
    world.now += 600
    world.probe(A, ok=False, times=2)
    assert world.peer(A).health is Health.UP, "without a history, fall counts"
    world.probe(A, ok=False)
    assert world.peer(A).health is Health.DOWN


def test_heartbeats_change_no_peer_no_group_and_no_table() -> None:
    world = steady()
    before = world.state
    world.now += 2
    world.take(ProbeResult("app", A, True, "ok"))
    world.take(Ticked())
    assert world.state.revision == before.revision
    assert world.state.groups is before.groups


def test_another_configuration_may_have_another_interval_so_histories_begin_anew() -> None:
    world = steady()
    world.take(ConfigRead((upstream(policy=ACCRUAL),)))
    assert world.state.heartbeats == {}


def steady() -> World:
    """Twenty probes, one every two seconds."""
    world = World().configure(upstream(policy=ACCRUAL))
    for _ in range(20):
        world.now += 2
        world.probe(A).probe(B)
    return world
