"""A warming server's first pick in time, in a real nginx with several workers."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from tests.lua.house import Edge, edge, eventually, server, warm_up

pytestmark = pytest.mark.usefixtures("lua_nginx")

METHODS: list[dict[str, Any]] = [
    {"method": "round_robin"},
    {"method": "least_conn"},
    {"method": "ewma"},
    {"method": "random"},
    {"method": "random", "two": True},
]
KEYS = "location = /keys { content_by_lua_block { ngx.say(table.concat(ngx.shared.headgate_state:get_keys(0), ' ')) } }"


async def order(app: Edge, requests: int) -> list[int]:
    """The ports that answered, in the order of the requests, each on a connection of its own."""
    ports = []
    for _ in range(requests):
        async with app.session.get(app.base + "/", headers={"Connection": "close"}) as response:
            ports.append(int(await response.text()))
    return ports


def cold(port: int, share: float, **fields: Any) -> dict[str, Any]:
    """A server that stands at this part of a weight of 100."""
    return server(port, weight=100, warm_up=warm_up(floor=share, held=True, **fields))


async def keys(app: Edge) -> list[str]:
    """What nginx remembers of ramps and first picks."""
    found = (await app.get("/keys"))[1].split()
    return sorted(key for key in found if key.startswith(("first:", "picks:", "start:")))


async def picked(app: Edge) -> dict[str, bool | None]:
    """What the counters say of first picks, by server; None without a warm-up."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(app.nginx.socket))) as session,
        session.get("http://nginx/v1/counters") as response,
    ):
        servers = (await response.json())["upstreams"]["app"]
    return {key: each["warm_up"] and each["warm_up"]["picked"] for key, each in servers.items()}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("share", "bound"), [(0.1, 31), (0.01, 301)])
async def test_the_first_pick_beside_three_of_weight_100_comes_in_time(
    method: dict[str, Any], share: float, bound: int
) -> None:
    async with edge(4, workers=3) as app:
        *warm, one = app.backends
        entries = [server(b.port, weight=100) for b in warm]
        for epoch in range(1, 1 + 62 // bound + 1):
            await app.publish([*entries, cold(one.port, share, epoch=epoch)], **method)
            assert one.port in await order(app, bound)


async def test_every_server_that_warms_is_picked_by_its_own_deadline() -> None:
    async with edge(4, workers=3) as app:
        warm, *rest = app.backends
        shares = (0.05, 0.1, 0.2)
        entries = [cold(b.port, share) for b, share in zip(rest, shares, strict=True)]
        await app.publish([server(warm.port, weight=100), *entries])
        ports = await order(app, 27)
        for backend, bound in zip(rest, (27, 14, 7), strict=True):
            assert backend.port in ports[:bound]


async def test_a_risen_weight_brings_the_first_pick_at_once() -> None:
    async with edge(2, workers=2) as app:
        warm, one = app.backends
        for epoch in range(1, 21):
            await app.publish([server(warm.port, weight=100), cold(one.port, 0.0001, epoch=epoch)])
            before = await order(app, 10)
            await app.publish([server(warm.port, weight=100), cold(one.port, 0.2, epoch=epoch)])
            assert one.port in before + await order(app, 1)


async def test_concurrent_requests_are_counted_together() -> None:
    async with edge(4, workers=3) as app:
        *warm, one = app.backends
        entries = [server(b.port, weight=100) for b in warm]
        for epoch in range(1, 11):
            await app.publish([*entries, cold(one.port, 0.1, epoch=epoch)])
            before = one.requests
            await asyncio.gather(*(order(app, 1) for _ in range(31)))
            assert one.requests > before


async def test_first_picks_are_remembered_for_as_long_as_their_ramp_and_cost_nothing_after_it() -> None:
    async with edge(2, workers=2, extra=KEYS) as app:
        warm, one = app.backends
        entry = server(warm.port, weight=100)
        await app.publish([entry, server(one.port)])
        await order(app, 4)
        assert await keys(app) == []
        await app.publish([entry, cold(one.port, 0.1)])
        assert await picked(app) == {warm.key: None, one.key: False}
        assert (await app.peer(one)).warm_picked is False
        await order(app, 11)
        assert await picked(app) == {warm.key: None, one.key: True}
        assert (await app.peer(one)).warm_picked is True
        assert (await app.peer(warm)).warm_picked is False
        assert await keys(app) == [f"first:3:app:{one.key}:1", "picks:app"]
        await app.publish([entry, cold(one.port, 0.2)])
        assert f"first:3:app:{one.key}:1" in await keys(app)
        await app.publish([entry, cold(one.port, 0.1, epoch=2)])
        assert await keys(app) == ["picks:app"]
        assert (await picked(app))[one.key] is False
        await app.publish([entry, server(one.port)])
        assert await keys(app) == []


@pytest.mark.parametrize("method", [{"method": "hash", "key": "$request_id"}, {"method": "ip_hash"}], ids=str)
async def test_where_a_key_decides_first_picks_are_noted_and_not_forced(method: dict[str, Any]) -> None:
    async with edge(1, workers=2, extra=KEYS) as app:
        one = app.backends[0]
        await app.publish([cold(one.port, 0.1)], **method)
        assert await picked(app) == {one.key: False}
        await order(app, 1)
        assert await picked(app) == {one.key: True}
        assert await keys(app) == [f"first:3:app:{one.key}:1"]


async def test_what_was_picked_under_an_earlier_table_of_the_ramp_counts() -> None:
    async with edge(2, workers=2) as app:
        warm, one = app.backends
        entries = [server(warm.port, weight=100), cold(one.port, 0.01)]
        await app.publish(entries)
        for _ in range(4):
            if one.port in await order(app, 25):
                break
            await app.publish(entries)
        else:
            assert one.port in await order(app, 1)


async def test_a_server_that_is_full_is_passed_over_and_picked_when_it_has_room() -> None:
    async with edge(2, workers=1) as app:
        warm, one = app.backends
        await app.publish([server(one.port)])
        held = asyncio.create_task(app.get("/hold"))
        await eventually(lambda: one.holding == 1, "the server is full")
        await app.publish([server(warm.port, weight=100), cold(one.port, 0.1, epoch=2) | {"max_conns": 1}])
        assert set(await order(app, 30)) == {warm.port}
        one.release.set()
        await held
        await app.settled(one)
        assert await order(app, 1) == [one.port]
