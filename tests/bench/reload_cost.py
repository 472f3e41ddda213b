"""What reloads cost the clients: failed requests over ten publishes on both data planes.

`python -m tests.bench.reload_cost`. The client does not repeat a request whose kept connection was closed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import aiohttp

from controller.core.quantise import Pace
from tests.lua.house import server
from tests.support.edge import Edge, lua_edge, reload_edge

PUBLISHES = 10
CLIENTS = 16
THINK = 0.005  # seconds between an answer and the next request of a client


@dataclass(frozen=True, slots=True)
class Row:
    """One run: requests that were answered with 200, and all others."""

    plane: str
    connections: str
    method: str
    answered: int
    failed: int


async def measure() -> list[Row]:
    """Both planes, both kinds of connections, GET and POST."""
    rows = []
    for plane, made in (("reload", reload_edge(pace=Pace(interval=0.3))), ("lua", lua_edge())):
        async with made as edge:
            await _publish(edge, 1)
            for kept in (False, True):
                for method in ("GET", "POST"):
                    answered, failed = await _run(edge, kept, method)
                    rows.append(Row(plane, "keep-alive" if kept else "one-shot", method, answered, failed))
    return rows


async def _run(edge: Edge, kept: bool, method: str) -> tuple[int, int]:
    answered = failed = 0
    stop = asyncio.Event()
    connector = aiohttp.TCPConnector(limit=0, force_close=not kept)
    async with aiohttp.ClientSession(connector=connector) as session:
        session._retry_connection = False

        async def client() -> None:
            nonlocal answered, failed
            while not stop.is_set():
                body = b"x" * 100 if method == "POST" else None
                try:
                    async with session.request(method, f"http://127.0.0.1:{edge.port}/", data=body) as response:
                        await response.read()
                        good = response.status == 200
                except aiohttp.ClientError:
                    good = False
                answered, failed = answered + good, failed + (not good)
                await asyncio.sleep(THINK)

        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        for number in range(PUBLISHES):
            await _publish(edge, number % 2)
            await asyncio.sleep(0.3)
        stop.set()
        await asyncio.gather(*clients)
    return answered, failed


async def _publish(edge: Edge, drained: int) -> None:
    first, second = edge.backends
    await edge.publish([server(first.port, state="drain" if drained else "up"), server(second.port)])


def main() -> None:
    print(f"{PUBLISHES} publishes, {CLIENTS} clients, {THINK * 1000:g} ms between requests")
    for row in asyncio.run(measure()):
        print(f"{row.plane:7} {row.connections:11} {row.method:5} {row.answered:7} answered {row.failed:4} failed")


if __name__ == "__main__":
    main()
