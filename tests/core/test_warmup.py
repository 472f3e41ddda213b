"""The slow-start formula, by the numbers that the peers publish or produce."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core import warmup
from controller.core.model import Warmth, WarmUp
from controller.core.policy import WarmUpPolicy

RUNNING = WarmUp(Warmth.RUNNING, 0.0, 0.0, epoch=1)


@pytest.mark.parametrize(
    ("duration", "curve", "floor", "steps", "shares"),
    [
        pytest.param(60, 1.0, 0.1, 0, {0: 0.1, 12: 0.20, 20: 0.333, 60: 1.0, 6000: 1.0}, id="envoy"),
        pytest.param(60, 1 / 2, 0.1, 0, {5: 0.288, 26: 0.658}, id="envoy with aggression 2"),
        pytest.param(10, 1 / 1.5, 0.1, 0, {9: 0.932}, id="envoy with aggression 1.5"),
        pytest.param(60, 1.0, 0.35, 0, {12: 0.35, 30: 0.5}, id="envoy with a floor of 35 %"),
        pytest.param(
            60,
            1.0,
            1 / 16,
            16,
            {0: 1, 3: 1, 4: 2, 7: 2, 8: 3, 15: 5, 30: 9, 45: 13, 56: 15, 57: 16, 60: 16},
            id="haproxy in sixteenths",
        ),
        pytest.param(120, 2.0, 0.01, 0, {0: 0.01, 30: 0.06, 60: 0.25, 90: 0.56, 110: 0.84, 119: 0.98}, id="sermant"),
        pytest.param(600, 1.0, 0.01, 0, {0: 0.01, 6: 0.01, 60: 0.10, 180: 0.30, 360: 0.60}, id="dubbo"),
        pytest.param(100, 1.0, 0.01, 10, {0: 0.1, 9.9: 0.1, 10: 0.2, 55: 0.6, 90: 1.0}, id="+10 % every period"),
        pytest.param(300, 1.0, 0.01, 0, {30: 0.1, 150: 0.5, 299: 0.997}, id="aws, linear"),
    ],
)
def test_shares_are_those_of_the_peers(
    duration: float, curve: float, floor: float, steps: int, shares: dict[float, float]
) -> None:
    policy = WarmUpPolicy(duration, curve, floor, steps, "healthy")
    whole = 16 if steps == 16 else 1
    found = {t: warmup.share(policy, RUNNING, t) * whole for t in shares}
    assert found == pytest.approx(shares, abs=0.006 if curve == 2 else 0.001), "Sermant rounds to whole per cents"


def test_stairs_have_the_shares_of_haproxys_whole_numbers_at_each_second() -> None:
    for duration in range(1, 200):
        policy = WarmUpPolicy(duration, 1.0, 1 / 16, 16, "healthy")
        for t in range(duration):
            assert warmup.share(policy, RUNNING, t) == ((16 * t + duration) // duration) / 16


@given(
    st.floats(0.1, 1000),
    st.floats(0.1, 5),
    st.floats(0.01, 1),
    st.integers(0, 40),
    st.floats(-100, 2000),
    st.floats(-100, 2000),
)
def test_share_never_falls_and_stays_between_floor_and_full(
    duration: float, curve: float, floor: float, steps: int, t: float, u: float
) -> None:
    policy = WarmUpPolicy(duration, curve, floor, steps, "healthy")
    early, late = (warmup.share(policy, RUNNING, x) for x in sorted((t, u)))
    assert floor <= early <= late <= 1.0


def test_a_waiting_warm_up_stays_at_the_floor_until_nginx_saw_the_first_request() -> None:
    policy = WarmUpPolicy(60, starts="first-request")
    waiting = warmup.begin(policy, 7, "new", 100.0)
    assert waiting.phase is Warmth.WAITING
    assert warmup.share(policy, waiting, 5000.0) == 0.1
    assert warmup.follow(waiting, 7, 0.0, started=False, now=200.0) is waiting
    assert warmup.follow(waiting, 6, 9.0, started=True, now=200.0) is waiting, "another warm-up's count is not ours"
    running = warmup.follow(waiting, 7, 2.0, started=True, now=200.0)
    assert warmup.share(policy, running, 228.0) == pytest.approx(0.5)


def test_a_duration_of_zero_means_no_warm_up() -> None:
    warm = warmup.begin(WarmUpPolicy(duration=0.0), 1, "new", 0.0)
    assert not warmup.active(warm)
    assert not warmup.ramping(warm)
    assert warmup.share(WarmUpPolicy(duration=0.0), warm, 0.0) == 1.0


def test_a_warm_up_ends_when_its_duration_has_passed() -> None:
    policy = WarmUpPolicy(60, starts="healthy")
    assert warmup.advance(policy, RUNNING, 59.9) is RUNNING
    assert warmup.advance(policy, RUNNING, 60.0).phase is Warmth.DONE


def test_nginx_is_followed_when_its_count_differs_from_ours() -> None:
    assert warmup.follow(RUNNING, 1, 30.0, started=True, now=29.5) is RUNNING
    followed = warmup.follow(RUNNING, 1, 30.0, started=True, now=10.0)
    assert math.isclose(warmup.elapsed(followed, 12.0), 32.0)


def test_while_a_ramp_is_held_ours_is_the_count_that_nginx_follows() -> None:
    held = WarmUp(Warmth.HELD, 20.0, 0.0, epoch=1)
    assert warmup.elapsed(held, 500.0) == 20.0
    assert warmup.follow(held, 1, 50.0, started=True, now=500.0) is held
    assert warmup.advance(WarmUpPolicy(60), held, 500.0) is held


def test_a_server_that_waits_for_its_turn_has_no_share() -> None:
    queued = WarmUp(Warmth.QUEUED, 0.0, 0.0, epoch=1)
    assert warmup.share(WarmUpPolicy(60), queued, 500.0) == 0.0
    assert warmup.active(queued)
    assert not warmup.ramping(queued)
