"""Slow start: the weight of a warming peer at a time, and how one ramp goes from phase to phase.

Which servers warm up, and when, stands in cold.py; what makes a ramp hold, in hold.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

from controller.core.model import Warmth, WarmUp
from controller.core.policy import WarmUpPolicy

_DRIFT = 1.0  # seconds by which our reckoning may differ from nginx's before we follow it
_RAMPING = frozenset({Warmth.WAITING, Warmth.RUNNING, Warmth.HELD})


def ramping(warm_up: WarmUp) -> bool:
    """Whether the peer is let into traffic with less than its full weight."""
    return warm_up.phase in _RAMPING


def active(warm_up: WarmUp) -> bool:
    """Whether the peer is not warm yet: its ramp goes on, or has still to begin."""
    return warm_up.phase in _RAMPING or warm_up.phase is Warmth.QUEUED


def elapsed(warm_up: WarmUp, now: float) -> float:
    """Seconds that the warm-up has run."""
    return warm_up.elapsed + (now - warm_up.since if warm_up.phase is Warmth.RUNNING else 0.0)


def formula(progress: float, curve: float, floor: float, steps: int = 0) -> float:
    """The share of the full weight, in floor..1, when the part `progress` of the duration has passed.

    Smooth: `max(floor, progress ** curve)`, which is Envoy's slow start with curve = 1 / aggression, Sermant's with
    curve 2 and Dubbo's with curve 1. In n steps progress counts as `(floor(n * progress) + 1) / n`: HAProxy's slow
    start is n = 16, floor 1/16. Full from the end on.
    """
    if progress >= 1.0:
        return 1.0
    progress = max(0.0, progress)
    if steps:
        progress = min(1.0, (math.floor(steps * progress + 1e-9) + 1) / steps)
    return max(floor, math.pow(progress, curve))


def share(policy: WarmUpPolicy, warm_up: WarmUp, now: float) -> float:
    """The part of its full weight that the peer has now, in 0..1; 0 only while it waits for its turn."""
    if warm_up.phase is Warmth.QUEUED:
        return 0.0
    if not ramping(warm_up) or policy.duration <= 0:
        return 1.0
    return formula(elapsed(warm_up, now) / policy.duration, policy.curve, policy.floor, policy.steps)


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
    """The warm-up after nginx said how far it is: nginx counts while we are away, and sees the first request.

    While a ramp is held our reckoning counts, for nginx has it from us.
    """
    if epoch != warm_up.epoch or not started or warm_up.phase not in (Warmth.WAITING, Warmth.RUNNING):
        return warm_up
    if warm_up.phase is Warmth.RUNNING and abs(seen - elapsed(warm_up, now)) < _DRIFT:
        return warm_up
    return replace(warm_up, phase=Warmth.RUNNING, elapsed=seen, since=now)
