"""Slow start: the weight of a warming peer at a time, and when a warm-up begins and ends.

Formula (Envoy's slow start; HAProxy, Sermant and Dubbo are cases of it):
`weight(t) = weight * max(floor, (t / duration) ** curve)`, full from `duration` on.
"""

from __future__ import annotations

import math
from dataclasses import replace

from controller.core.model import Warmth, WarmUp, WarmUpPolicy

_DRIFT = 1.0  # seconds by which our reckoning may differ from nginx's before we follow it


def active(warm_up: WarmUp) -> bool:
    """Whether the peer still has less than its full weight."""
    return warm_up.phase in (Warmth.WAITING, Warmth.RUNNING)


def elapsed(warm_up: WarmUp, now: float) -> float:
    """Seconds that the warm-up has run."""
    return warm_up.elapsed + (now - warm_up.since if warm_up.phase is Warmth.RUNNING else 0.0)


def share(policy: WarmUpPolicy, warm_up: WarmUp, now: float) -> float:
    """The part of its full weight that the peer has now, in 0..1."""
    if not active(warm_up):
        return 1.0
    t = elapsed(warm_up, now)
    if t >= policy.duration:
        return 1.0
    return max(policy.floor, math.pow(max(t, 0.0) / policy.duration, policy.curve))


def begin(policy: WarmUpPolicy, epoch: int, cause: str, now: float) -> WarmUp:
    """A fresh warm-up, as the policy says: at once, or waiting for the first request."""
    if policy.duration <= 0:
        return WarmUp(Warmth.NONE, 0.0, now, epoch, cause)
    phase = Warmth.RUNNING if policy.starts == "healthy" else Warmth.WAITING
    return WarmUp(phase, 0.0, now, epoch, cause)


def advance(policy: WarmUpPolicy, warm_up: WarmUp, now: float) -> WarmUp:
    """The warm-up at this time: done when its duration has passed."""
    if warm_up.phase is Warmth.RUNNING and elapsed(warm_up, now) >= policy.duration:
        return replace(warm_up, phase=Warmth.DONE, elapsed=policy.duration, since=now)
    return warm_up


def follow(warm_up: WarmUp, epoch: int | None, seen: float, started: bool, now: float) -> WarmUp:
    """The warm-up after nginx said how far it is: nginx counts while we are away, and sees the first request."""
    if epoch != warm_up.epoch or not started or not active(warm_up):
        return warm_up
    if warm_up.phase is Warmth.RUNNING and abs(seen - elapsed(warm_up, now)) < _DRIFT:
        return warm_up
    return replace(warm_up, phase=Warmth.RUNNING, elapsed=seen, since=now)
