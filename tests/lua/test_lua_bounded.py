"""Consistent hashing with bounded loads, in a real nginx."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest

from tests.lua.house import Edge, edge, eventually, server, warm_up

pytestmark = pytest.mark.usefixtures("lua_nginx")

METHOD = {"method": "hash", "key": "$arg_key", "consistent": True}


async def held(app: Edge, keys: list[str]) -> list[asyncio.Task[tuple[int, str]]]:
    """A request for each key that does not end, one after the other."""
    tasks = []
    before = sum(b.holding for b in app.backends)
    for number, key in enumerate(keys, before + 1):
        tasks.append(asyncio.create_task(app.get(f"/hold?key={key}")))
        await eventually(lambda n=number: sum(b.holding for b in app.backends) == n, f"{number} requests are held")
    return tasks


async def released(app: Edge, tasks: list[asyncio.Task[tuple[int, str]]]) -> None:
    for backend in app.backends:
        backend.release.set()
    assert {status for status, _ in await asyncio.gather(*tasks)} == {200}


@pytest.mark.parametrize("bound", [1, 1.25, 2])
async def test_one_hot_key_loads_no_server_beyond_the_bound(bound: float) -> None:
    async with edge(3, workers=2) as app:
        weights = (1, 2, 3)
        entries = [server(b.port, weight=w) for b, w in zip(app.backends, weights, strict=True)]
        await app.publish(entries, **METHOD, bound=bound)
        tasks = await held(app, ["hot"] * 24)
        for backend, weight in zip(app.backends, weights, strict=True):
            assert backend.holding <= math.ceil(bound * 24 * weight / 6)
        await released(app, tasks)


async def test_without_a_bound_one_hot_key_loads_one_server() -> None:
    async with edge(3, workers=2) as app:
        await app.publish([server(b.port) for b in app.backends], **METHOD, bound=0)
        tasks = await held(app, ["hot"] * 12)
        assert sorted(b.holding for b in app.backends) == [0, 0, 12]
        await released(app, tasks)


async def test_keys_stay_where_they_are_while_their_server_has_room() -> None:
    async with edge(3, workers=2) as app:
        entries = [server(b.port) for b in app.backends]
        await app.publish(entries, **METHOD)
        plain = {f"key{n}": (await app.get(f"/?key=key{n}"))[1] for n in range(60)}
        await app.publish(entries, **METHOD, bound=1.25)
        assert {key: (await app.get(f"/?key={key}"))[1] for key in plain} == plain
        by_server: Counter[str] = Counter(plain.values())
        busy = max(by_server, key=lambda port: by_server[port])
        tasks = await held(app, [next(key for key, port in plain.items() if port == busy)] * 2)
        others = {key: port for key, port in plain.items() if port != busy}
        assert {key: (await app.get(f"/?key={key}"))[1] for key in others} == others
        await released(app, tasks)


async def test_what_a_drained_server_cannot_take_is_shared_by_the_others() -> None:
    async with edge(3, workers=2) as app:
        drained, *rest = app.backends
        entries = [server(drained.port, state="drain"), *(server(b.port) for b in rest)]
        await app.publish(entries, **METHOD, bound=1)
        tasks = await held(app, ["hot"] * 10)
        assert (drained.holding, *(b.holding for b in rest)) == (0, 5, 5)
        await released(app, tasks)


async def test_a_warming_server_takes_its_keys_up_to_the_share_of_its_ramp() -> None:
    async with edge(2, workers=2) as app:
        warm, cold = app.backends
        ramp = warm_up(held=True, elapsed_ms=30000)
        await app.publish([server(warm.port), server(cold.port, warm_up=ramp)], **METHOD, bound=1.0)
        tasks = await held(app, [f"key{n}" for n in range(40)])
        assert 1 <= cold.holding <= 8
        await released(app, tasks)


async def test_when_every_server_with_room_has_failed_the_others_are_tried() -> None:
    async with edge(2, workers=1) as app:
        dead, alive = app.backends
        await app.publish([server(b.port) for b in app.backends], **METHOD, bound=1)
        tasks = await held(app, ["hot"] * 2)
        await dead.stop()
        for n in range(10):
            assert await app.get(f"/?key=key{n}") == (200, str(alive.port))
        alive.release.set()
        await asyncio.gather(*tasks, return_exceptions=True)
