"""The slow-start formula, by the numbers that the peers publish or produce."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core import warmup
from controller.core.model import Warmth, WarmUp, WarmUpPolicy

RUNNING = WarmUp(Warmth.RUNNING, 0.0, 0.0, epoch=1)


@pytest.mark.parametrize(
    ("duration", "curve", "floor", "t", "share"),
    [
        pytest.param(60, 1.0, 0.1, 12, 0.20, id="envoy at 12 s of 60"),
        pytest.param(60, 1.0, 0.1, 20, 0.333, id="envoy at 20 s of 60"),
        pytest.param(60, 1 / 2, 0.1, 5, 0.288, id="envoy aggression 2 at 5 s"),
        pytest.param(60, 1 / 2, 0.1, 26, 0.658, id="envoy aggression 2 at 26 s"),
        pytest.param(10, 1 / 1.5, 0.1, 9, 0.932, id="envoy aggression 1.5 at 9 s of 10"),
        pytest.param(60, 1.0, 0.35, 12, 0.35, id="envoy floor 35 % at 12 s"),
        pytest.param(60, 1.0, 0.35, 30, 0.5, id="envoy floor 35 % at 30 s"),
        pytest.param(120, 2.0, 0.01, 60, 0.25, id="sermant at 60 s of 120"),
        pytest.param(120, 2.0, 0.01, 0, 0.01, id="sermant starts at 1 %"),
        pytest.param(600, 1.0, 0.01, 60, 0.10, id="dubbo at 1 min of 10"),
        pytest.param(600, 1.0, 0.01, 6, 0.01, id="dubbo at 6 s of 10 min"),
        pytest.param(60, 1.0, 0.1, 60, 1.0, id="full at the end"),
        pytest.param(60, 1.0, 0.1, 6000, 1.0, id="full long after the end"),
    ],
)
def test_share_is_that_of_the_peers(duration: float, curve: float, floor: float, t: float, share: float) -> None:
    policy = WarmUpPolicy(duration, curve, floor, "healthy")
    assert warmup.share(policy, RUNNING, t) == pytest.approx(share, abs=0.001)


@given(
    st.floats(0.1, 1000),
    st.floats(0.1, 5),
    st.floats(0.01, 1),
    st.floats(0, 2000),
    st.floats(0, 2000),
)
def test_share_never_falls_and_stays_between_floor_and_full(
    duration: float, curve: float, floor: float, t: float, u: float
) -> None:
    policy = WarmUpPolicy(duration, curve, floor, "healthy")
    early, late = (warmup.share(policy, RUNNING, x) for x in sorted((t, u)))
    assert floor <= early <= late <= 1.0


def test_a_waiting_warm_up_stays_at_the_floor_until_nginx_saw_the_first_request() -> None:
    policy = WarmUpPolicy(60, 1.0, 0.1, "first-request")
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
    assert warmup.share(WarmUpPolicy(duration=0.0), warm, 0.0) == 1.0


def test_a_warm_up_ends_when_its_duration_has_passed() -> None:
    policy = WarmUpPolicy(60, 1.0, 0.1, "healthy")
    assert warmup.advance(policy, RUNNING, 59.9) is RUNNING
    assert warmup.advance(policy, RUNNING, 60.0).phase is Warmth.DONE


def test_nginx_is_followed_when_its_count_differs_from_ours() -> None:
    assert warmup.follow(RUNNING, 1, 30.0, started=True, now=29.5) is RUNNING
    followed = warmup.follow(RUNNING, 1, 30.0, started=True, now=10.0)
    assert math.isclose(warmup.elapsed(followed, 12.0), 32.0)
