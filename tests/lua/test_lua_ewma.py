"""Method ewma in a real nginx: slow servers are avoided, and what is measured is known to all workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from controller.adapters.nginx.lua import LuaPlane
from tests.lua.house import Edge, edge, eventually, server, table, warm_up
from tests.support.nginx import Nginx, free_port

pytestmark = pytest.mark.usefixtures("lua_nginx")

EWMA = {"method": "ewma"}
# Seconds. Far above what a busy machine adds to an answer, far below what a test may take.
SLOW = 0.25


async def told(nginx: Nginx) -> dict[str, Any]:
    """The counters of upstream `app` as nginx gives them, by server."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(nginx.socket))) as session,
        session.get("http://nginx/v1/counters") as response,
    ):
        return dict((await response.json())["upstreams"]["app"])


@asynccontextmanager
async def three(workers: int = 2) -> AsyncIterator[tuple[Nginx, LuaPlane, str, list[int]]]:
    """An edge over three servers, the first of which takes SLOW seconds for `/` and fails at once at `/fail`."""
    ports, front = [free_port() for _ in range(3)], free_port()
    servers = "".join(
        f"server {{ listen 127.0.0.1:{port}; location / {{ content_by_lua_block {{ "
        f"ngx.sleep({wait}) ngx.print({port}) }} }} location /fail {{ return 500; }} }}"
        for port, wait in zip(ports, (SLOW, 0, 0), strict=True)
    )
    lines = " ".join(f"server 127.0.0.1:{port};" for port in ports)
    hook = 'balancer_by_lua_block { require("headgate").balance("app") }'
    http = f"upstream app {{ {lines} {hook} }} {servers} server {{ listen 127.0.0.1:{front}; "
    with Nginx(http + "location / { proxy_pass http://app; } }", workers=workers) as nginx:
        plane = LuaPlane(nginx.socket, nginx.snapshot)
        try:
            yield nginx, plane, f"http://127.0.0.1:{front}", ports
        finally:
            await plane.close()


async def ask(url: str, requests: int) -> Counter[int]:
    """Who answered that many requests, one after the other, on a connection each."""
    seen: Counter[int] = Counter()
    async with aiohttp.ClientSession() as session:
        for _ in range(requests):
            async with session.get(url, headers={"Connection": "close"}) as response:
                seen[int(await response.text()) if response.status == 200 else response.status] += 1
    return seen


async def measure_all(nginx: Nginx, url: str) -> None:
    """Ask until every server has been measured: one without a measure counts as the mean of the others."""

    async def done() -> bool:
        await ask(url, 1)
        return all(each["ewma_ms"] is not None for each in (await told(nginx)).values())

    await eventually(done, "every server is measured")


async def test_a_slow_server_is_avoided_by_every_worker_once_it_has_answered() -> None:
    async with three(workers=3) as (nginx, plane, url, (slow, *quick)):
        await plane.publish(table(1, [server(slow)], **EWMA))
        await ask(url, 1)
        await plane.publish(table(2, [server(port) for port in (slow, *quick)], **EWMA))
        await measure_all(nginx, url)
        assert set(await ask(url, 60)) == set(quick)
        found = await told(nginx)
        for port in quick:
            assert 0 < found[f"127.0.0.1:{port}"]["ewma_ms"] < found[f"127.0.0.1:{slow}"]["ewma_ms"]


async def test_measures_outlive_a_reload_and_end_with_the_server() -> None:
    async with three() as (nginx, plane, url, (slow, quick, _)):
        await plane.publish(table(1, [server(slow), server(quick)], **EWMA))
        await measure_all(nginx, url)
        nginx.reload()
        assert set(await ask(url, 20)) == {quick}
        assert (await told(nginx))[f"127.0.0.1:{slow}"]["ewma_ms"] > 0
        await plane.publish(table(2, [server(quick)], **EWMA))
        await plane.publish(table(3, [server(quick)], **EWMA))
        await plane.publish(table(4, [server(slow), server(quick)], **EWMA))
        assert (await told(nginx))[f"127.0.0.1:{slow}"]["ewma_ms"] is None


async def test_nothing_is_measured_under_another_method() -> None:
    async with three() as (nginx, plane, url, ports):
        await plane.publish(table(1, [server(port) for port in ports[1:]]))
        await ask(url, 10)
        assert {each["ewma_ms"] for each in (await told(nginx)).values()} == {None}


async def test_errors_that_come_fast_do_not_make_a_server_look_quick() -> None:
    async with three() as (nginx, plane, url, (slow, quick, _)):
        await plane.publish(table(1, [server(slow)], **EWMA))
        await ask(url, 1)
        before = (await told(nginx))[f"127.0.0.1:{slow}"]["ewma_ms"]
        assert await ask(url + "/fail", 20) == {500: 20}
        assert (await told(nginx))[f"127.0.0.1:{slow}"]["ewma_ms"] > before / 2
        await plane.publish(table(2, [server(slow), server(quick)], **EWMA))
        await measure_all(nginx, url)
        assert set(await ask(url, 20)) == {quick}


async def test_a_server_that_refuses_connections_is_not_measured_by_it() -> None:
    async with three() as (nginx, plane, url, (_, quick, other)):
        dead = free_port()
        await plane.publish(table(1, [server(port) for port in (dead, quick, other)], **EWMA))
        assert set(await ask(url, 30)) == {quick, other}
        assert (await told(nginx))[f"127.0.0.1:{dead}"]["ewma_ms"] is None


async def test_what_is_in_flight_at_a_quick_server_counts_against_it() -> None:
    async with edge(2, workers=2) as app:
        held = await _holding(app, 30)
        assert all(backend.holding >= 5 for backend in app.backends)
        for backend in app.backends:
            backend.release.set()
        assert {status for status, _ in await asyncio.gather(*held)} == {200}


async def _holding(app: Edge, count: int) -> list[asyncio.Task[tuple[int, str]]]:
    await app.publish([server(b.port) for b in app.backends], **EWMA)
    tasks = []
    for number in range(1, count + 1):
        tasks.append(asyncio.create_task(app.get("/hold")))
        await eventually(lambda n=number: sum(b.holding for b in app.backends) == n, f"{number} requests are held")
    return tasks


async def test_a_quick_server_that_warms_gets_at_most_twice_its_share() -> None:
    async with three() as (_, plane, url, (slow, cold, _other)):
        await plane.publish(table(1, [server(slow)], **EWMA))
        await ask(url, 1)
        ramp = warm_up(held=True, elapsed_ms=12000)
        await plane.publish(table(2, [server(slow), server(cold, warm_up=ramp)], **EWMA))
        shares = await ask(url, 24)
        # Twice 1/11 of 24, and six standard deviations.
        assert 1 <= shares[cold] <= 24 * 2 / 11 + 6 * (24 * 2 / 11 * 9 / 11) ** 0.5
