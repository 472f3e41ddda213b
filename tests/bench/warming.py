"""The share of a warming server against the formula, cumulative over its warm-up.

    python -m tests.bench.warming [RATE [CURVE]]

Expected is the mean of w(t) / (w(t) + 2) over the warm-up, with w(t) = max(floor, (t / T) ** curve).
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from controller.adapters.nginx.lua import LuaPlane
from tests.bench.house import House, counters, house, total

DURATION, FLOOR = 10.0, 0.1


@dataclass(frozen=True, slots=True)
class Figures:
    """`share` is what was measured, `formula` what was expected; `off` their difference as a part of the latter."""

    curve: float
    requests: int
    share: float
    formula: float

    @property
    def off(self) -> float:
        """How far the measured share lies from the expected one."""
        return abs(self.share / self.formula - 1)


def expected(curve: float, others: int = 2, parts: int = 10_000) -> float:
    """The mean share of one warming server beside `others` warm ones, at a steady rate of requests."""
    weights = [max(FLOOR, ((part + 0.5) / parts) ** curve) for part in range(parts)]
    return sum(weight / (weight + others) for weight in weights) / parts


def measure(rate: float = 200.0, curve: float = 1.0) -> Figures:
    """Drain a server, enable it, and count the picks of its warm-up at `rate` requests a second."""
    settings = f'[defaults.warm_up]\nduration = {DURATION}\ncurve = {curve}\nfloor = {FLOOR}\nstarts = "healthy"\n'
    with house(upstreams=1, servers=3, settings=settings) as built, built.load(rate):
        requests, share = asyncio.run(_warm(built))
    return Figures(curve, requests, share, expected(curve))


async def _warm(built: House) -> tuple[int, float]:
    plane, address = LuaPlane(built.nginx.socket, built.nginx.prefix / "unused.json"), built.addresses["app0"][0]
    try:
        await asyncio.to_thread(built.client.set_admin, "app0", address, "drain")
        await asyncio.to_thread(built.client.set_admin, "app0", address, "ready")
        before = now = await counters(plane)
        while now[address].warm_elapsed < DURATION and now[address].warm_epoch is not None:
            await asyncio.sleep(0.01)
            now = await counters(plane)
    finally:
        await plane.close()
    requests = total(now) - total(before)
    return requests, (now[address].requests - before[address].requests) / requests


if __name__ == "__main__":
    print(measure(*map(float, sys.argv[1:])))
