"""Phi accrual failure detection (Hayashibara et al., 2004): a suspicion that grows with silence, not a count.

Passing probes are the heartbeats. With the mean and the standard deviation of the last intervals between them,
`y = (silence - mean) / deviation` and `phi = -log10(P(a heartbeat comes still later))`: at phi 1 one server in 10 is
suspected wrongly, at phi 8 one in 10^8. P is the normal distribution's tail in Akka's logistic form (Bowling et al.,
2009), `P = 1 / (1 + e^(y * (1.5976 + 0.070566 * y^2)))`. Cassandra's exponential one suits gossip, which comes at
random; probes are regular, and with it phi 8 would take 18 intervals.
"""

from __future__ import annotations

import math
from itertools import pairwise

KEPT = 100  # heartbeats
ENOUGH = 5  # heartbeats before which failures are counted instead
_LEAST_DEVIATION = 0.25  # of the mean: of steady heartbeats one may be missing (phi 4.7)


def beat(heartbeats: tuple[float, ...], now: float) -> tuple[float, ...]:
    """The times of the last heartbeats with one more."""
    return (*heartbeats[1 - KEPT :], now)


def suspicion(heartbeats: tuple[float, ...], now: float) -> float | None:
    """Phi after the silence since the last of these heartbeats; None where there are too few to tell."""
    if len(heartbeats) < ENOUGH:
        return None
    intervals = [later - earlier for earlier, later in pairwise(heartbeats)]
    mean = sum(intervals) / len(intervals)
    deviation = math.sqrt(sum((interval - mean) ** 2 for interval in intervals) / len(intervals))
    return phi(now - heartbeats[-1], mean, max(deviation, _LEAST_DEVIATION * mean))


def phi(silence: float, mean: float, deviation: float) -> float:
    """The suspicion after so many seconds of silence; grows without bound and never overflows."""
    if deviation <= 0:
        return math.inf if silence > mean else 0.0
    y = (silence - mean) / deviation
    exponent = y * (1.5976 + 0.070566 * y * y)
    return (max(exponent, 0.0) + math.log1p(math.exp(-abs(exponent)))) / math.log(10)
