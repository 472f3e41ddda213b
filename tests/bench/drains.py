"""Drains under load: how long the call takes, and whether a server gets a new request after the call has answered.

    python -m tests.bench.drains [COUNT]

The second is read where it is decided, in nginx: the count of picks at the moment of the answer, and again when
the others have served a number of requests more.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass

from controller.adapters.nginx.lua import LuaPlane
from tests.bench.house import House, counters, house, total

RATE = 500.0  # requests a second
LATER = 20  # requests that the upstream serves between the two looks
PATIENCE = 10.0  # seconds for these
SETTINGS = '[defaults.warm_up]\nduration = "0s"\n'


@dataclass(frozen=True, slots=True)
class Figures:
    """`late` is how many requests were sent to a server after its drain call had answered; times in milliseconds."""

    drains: int
    late: int
    p50: float
    p99: float
    worst: float
    requests: int
    failed: int


def measure(count: int = 1000) -> Figures:
    """Drain one of three servers and enable it again, `count` times in turn, under load."""
    with house(upstreams=1, servers=3, settings=SETTINGS) as built, built.load(RATE) as load:
        took, late = asyncio.run(_drain(built, count))
        summary = load.finish()
    took.sort()
    return Figures(
        drains=count,
        late=late,
        p50=took[count // 2] * 1000,
        p99=took[int(count * 0.99)] * 1000,
        worst=took[-1] * 1000,
        requests=summary["requests"],
        failed=summary["failed"],
    )


async def _drain(built: House, count: int) -> tuple[list[float], int]:
    plane = LuaPlane(built.nginx.socket, built.nginx.prefix / "unused.json")
    addresses = built.addresses["app0"]
    took, late = [], 0
    try:
        for number in range(count):
            address = addresses[number % len(addresses)]
            began = time.perf_counter()
            await asyncio.to_thread(built.client.set_admin, "app0", address, "drain")
            took.append(time.perf_counter() - began)
            at_answer = await counters(plane)
            deadline = time.monotonic() + PATIENCE
            while total(now := await counters(plane)) < total(at_answer) + LATER:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no {LATER} requests came in {PATIENCE:g} s")
            late += now[address].requests - at_answer[address].requests
            await asyncio.to_thread(built.client.set_admin, "app0", address, "ready")
    finally:
        await plane.close()
    return took, late


if __name__ == "__main__":
    print(measure(*map(int, sys.argv[1:])))
