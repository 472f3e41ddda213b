"""The share of a warming server against the formula, cumulative over its warm-up.

    python -m tests.bench.warming [RATE [CURVE [DURATION [STEPS]]]]

Expected is the mean of w(t) / (w(t) + 2) over the warm-up, with w(t) = max(floor, (t / T) ** curve); in stairs t / T is
(floor(steps * t / T) + 1) / steps.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from dataclasses import dataclass, replace

from controller.adapters.nginx.lua import LuaPlane
from tests.bench.haproxy import haproxy
from tests.bench.house import House, counters, house, total

DURATION, FLOOR = 10.0, 0.1


@dataclass(frozen=True, slots=True)
class Figures:
    """`share` is what was measured, `formula` what was expected; `off` their difference as a part of the latter."""

    curve: float
    steps: int
    requests: int
    share: float
    formula: float

    @property
    def off(self) -> float:
        """How far the measured share lies from the expected one."""
        return abs(self.share / self.formula - 1)


def expected(curve: float, steps: int = 0, others: int = 2, parts: int = 10_000) -> float:
    """The mean share of one warming server beside `others` warm ones, at a steady rate of requests."""
    times = ((part + 0.5) / parts for part in range(parts))
    weights = [max(FLOOR, ((math.floor(steps * t) + 1) / steps if steps else t) ** curve) for t in times]
    return sum(weight / (weight + others) for weight in weights) / parts


def measure(rate: float = 200.0, curve: float = 1.0, duration: float = DURATION, steps: float = 0) -> Figures:
    """Drain a server, enable it, and count the picks of its warm-up at `rate` requests a second."""
    settings = f'[defaults.warm_up]\nduration = {duration}\ncurve = {curve}\nfloor = {FLOOR}\nstarts = "healthy"\n'
    settings += f"steps = {int(steps)}\n"
    with house(upstreams=1, servers=3, settings=settings) as built, built.load(rate):
        requests, share = asyncio.run(_warm(built, duration))
    return Figures(curve, int(steps), requests, share, expected(curve, int(steps)))


def haproxy_slow_start(rate: float = 200.0) -> Figures:
    """The same with HAProxy's slowstart, against its own formula: floor((16 t + T) / T) sixteenths, t whole seconds."""
    with house(upstreams=1, servers=3) as built:
        servers = "\n".join(
            f"  server s{at} {address} weight 16 slowstart {DURATION:g}s"
            for at, address in enumerate(built.addresses["app0"])
        )
        with haproxy(f"  balance roundrobin\n{servers}") as proxy, replace(built, url=proxy.url).load(rate):
            proxy.command("set server app/s0 state maint")
            proxy.command("set server app/s0 state ready")
            began, before = time.monotonic(), proxy.stat("stot")
            time.sleep(DURATION)  # the warm-up itself, by HAProxy's own clock
            now = proxy.stat("stot")
            if (late := time.monotonic() - began - DURATION) > 0.5:
                raise RuntimeError(f"HAProxy's counters were read {late:.1f} s late")
    requests = sum(now.values()) - sum(before.values())
    shares = [min(1.0, (16 * t + DURATION) // DURATION / 16) for t in range(int(DURATION))]
    formula = sum(share / (share + 2) for share in shares) / len(shares)
    return Figures(1.0, 16, requests, (now["s0"] - before["s0"]) / requests, formula)


async def _warm(built: House, duration: float) -> tuple[int, float]:
    plane, address = LuaPlane(built.nginx.socket, built.nginx.prefix / "unused.json"), built.addresses["app0"][0]
    try:
        await asyncio.to_thread(built.client.set_admin, "app0", address, "drain")
        await asyncio.to_thread(built.client.set_admin, "app0", address, "ready")
        before = now = await counters(plane)
        while now[address].warm_elapsed < duration and now[address].warm_epoch is not None:
            await asyncio.sleep(0.01)
            now = await counters(plane)
    finally:
        await plane.close()
    requests = total(now) - total(before)
    return requests, (now[address].requests - before[address].requests) / requests


if __name__ == "__main__":
    print(measure(*map(float, sys.argv[1:])))
