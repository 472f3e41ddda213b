"""What every data plane does, on a real nginx."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from controller.ports import PlaneRefused, PlaneUnreachable
from tests.lua.house import Backend, eventually, server, warm_up
from tests.support.edge import Edge, lua_edge, reload_edge
from tests.support.nginx import missing_parts


@pytest.fixture(params=["lua", "reload"])
async def edge(request: pytest.FixtureRequest) -> AsyncIterator[Edge]:
    reason = missing_parts()
    if reason is not None:
        pytest.skip(reason)
    made: contextlib.AbstractAsyncContextManager[Edge] = lua_edge() if request.param == "lua" else reload_edge()
    async with made as running:
        yield running


def up(*backends: Backend) -> list[dict[str, object]]:
    return [server(backend.port) for backend in backends]


async def test_a_table_is_acknowledged_with_its_revision_and_seen_in_status_and_counters(edge: Edge) -> None:
    before = await edge.plane.status()
    assert before.revision == 0
    await edge.publish(up(*edge.backends))
    await edge.publish([server(edge.backends[0].port, state="drain"), *up(edge.backends[1])])
    status, counters = await edge.plane.status(), await edge.plane.counters()
    assert (status.revision, status.boot) == (2, before.boot)
    assert (counters.revision, counters.boot) == (2, before.boot)
    assert counters.upstreams["app"].keys() == {backend.key for backend in edge.backends}
    assert set(status.workers) >= set(edge.nginx.workers())


async def test_the_table_that_was_handed_over_last_is_remembered(edge: Edge) -> None:
    assert await edge.plane.remembered() is None
    await edge.publish([server(edge.backends[0].port, state="drain"), *up(edge.backends[1])])
    table = await edge.plane.remembered()
    assert table is not None
    assert table["revision"] == 1
    assert [each["state"] for each in table["upstreams"]["app"]["servers"]] == ["drain", "up"]


async def test_an_older_revision_is_refused_and_the_one_in_force_is_named(edge: Edge) -> None:
    edge.revision = 6
    await edge.publish(up(*edge.backends))
    edge.revision = 4
    with pytest.raises(PlaneRefused) as refused:
        await edge.publish(up(*edge.backends))
    assert (refused.value.code, refused.value.revision) == ("stale_revision", 7)
    assert (await edge.plane.status()).revision == 7


async def test_a_drained_server_gets_nothing_new_after_the_acknowledgement(edge: Edge) -> None:
    first, second = edge.backends
    for drained, other in ((first, second), (second, first), (first, second)):
        await edge.publish(up(first, second))
        stop = asyncio.Event()
        statuses: list[int] = []

        async def load(stop: asyncio.Event = stop, statuses: list[int] = statuses) -> None:
            while not stop.is_set():
                statuses.append((await edge.get())[0])

        clients = [asyncio.create_task(load()) for _ in range(4)]
        await edge.publish([server(drained.port, state="drain"), *up(other)])
        stop.set()
        await asyncio.gather(*clients)
        assert set(statuses) == {200}
        reached = drained.requests
        assert set(await edge.shares(30)) == {other.port}
        assert drained.requests == reached


@pytest.mark.parametrize("path", ["/hold", "/stream"])
async def test_in_flight_falls_to_zero_when_the_requests_of_a_drained_server_end(edge: Edge, path: str) -> None:
    drained, other = edge.backends
    await edge.publish(up(drained))
    await edge.shares(6)  # leaves idle connections in nginx's pools
    asked = [asyncio.create_task(edge.get(path)) for _ in range(2)]
    await eventually(lambda: drained.holding == 2, "both requests to reach the server")
    await edge.publish([server(drained.port, state="drain"), *up(other)])
    assert await edge.in_flight(drained) == 2
    assert set(await edge.shares(10)) == {other.port}
    assert await edge.in_flight(drained) == 2
    drained.release.set()
    assert [status for status, _ in await asyncio.gather(*asked)] == [200, 200]
    await edge.empty(drained)


async def test_a_drained_server_without_requests_is_empty(edge: Edge) -> None:
    drained, other = edge.backends
    await edge.publish(up(drained, other))
    await edge.shares(20)
    await edge.publish([server(drained.port, state="drain"), *up(other)])
    await edge.empty(drained)


async def test_a_request_that_its_client_gave_up_is_no_longer_in_flight(edge: Edge) -> None:
    drained, other = edge.backends
    await edge.publish(up(drained))
    asked = asyncio.create_task(edge.get("/hold"))
    await eventually(lambda: drained.holding, "the request to reach the server")
    await edge.publish([server(drained.port, state="drain"), *up(other)])
    assert await edge.in_flight(drained) == 1
    asked.cancel()
    await edge.empty(drained)


async def test_servers_get_their_shares_by_weight(edge: Edge) -> None:
    first, second = edge.backends
    await edge.publish([server(first.port, weight=3.0), server(second.port, weight=1.0)])
    seen = await edge.shares(80)
    assert seen[first.port] / 80 == pytest.approx(0.75, abs=0.08)


async def test_a_warming_server_gets_more_from_step_to_step_until_it_is_full(edge: Edge) -> None:
    warm, cold = edge.backends
    await edge.publish([*up(warm), server(cold.port, warm_up=warm_up(duration_ms=4000, floor=0.1))])
    first = (await edge.plane.counters("app")).upstreams["app"][cold.key]
    assert (first.warm_epoch, first.warm_started) == (1, True)
    shares = [(await edge.shares(30))[cold.port] / 30]
    assert shares[0] < 0.3

    async def full() -> bool:
        shares.append((await edge.shares(20))[cold.port] / 20)
        return shares[-1] >= 0.5

    await eventually(full, "the full share")
    assert any(shares[0] < share < 0.5 for share in shares), "there were no steps between floor and full"
    second = (await edge.plane.counters("app")).upstreams["app"][cold.key]
    assert second.warm_elapsed > first.warm_elapsed


async def test_servers_that_are_down_serve_only_where_the_upstream_fails_open(edge: Edge) -> None:
    down = [server(backend.port, state="down") for backend in edge.backends]
    await edge.publish(down)
    assert (await edge.get())[0] == 502
    await edge.publish(down, fail_open=True)
    assert set(await edge.shares(10)) == {backend.port for backend in edge.backends}


async def test_everything_can_be_drained_and_come_back(edge: Edge) -> None:
    await edge.publish([server(backend.port, state="drain") for backend in edge.backends], fail_open=True)
    assert (await edge.get())[0] == 502
    await edge.publish(up(*edge.backends))
    assert set(await edge.shares(10)) == {backend.port for backend in edge.backends}


async def test_the_last_server_serves_again_at_once_after_it_failed(edge: Edge) -> None:
    last, other = edge.backends
    await edge.publish([*up(last), server(other.port, state="down")])
    for _ in range(8):  # so that every worker has seen it fail
        assert (await edge.get("/broken"))[0] == 502
    assert set(await edge.shares(8)) == {last.port}


async def test_a_reload_by_somebody_else_changes_neither_boot_nor_table(edge: Edge) -> None:
    drained, other = edge.backends
    await edge.publish([server(drained.port, state="drain"), *up(other)])
    before = await edge.plane.status()
    edge.nginx.reload()
    after = await edge.plane.status()
    assert (after.boot, after.revision) == (before.boot, before.revision)
    assert set(await edge.shares(10)) == {other.port}


async def test_a_restarted_nginx_has_another_boot_id_and_the_same_table(edge: Edge) -> None:
    drained, other = edge.backends
    await edge.publish([server(drained.port, state="drain"), *up(other)])
    before = await edge.plane.status()
    edge.nginx.stop()
    edge.nginx.start()
    after = await edge.plane.status()
    assert after.boot != before.boot
    assert after.revision == before.revision
    assert set(await edge.shares(10)) == {other.port}
    await edge.publish(up(drained, other))
    assert set(await edge.shares(10)) == {drained.port, other.port}


async def test_an_nginx_that_does_not_run_is_unreachable(edge: Edge) -> None:
    await edge.publish(up(*edge.backends))
    edge.nginx.stop()
    for call in (edge.plane.status, edge.plane.counters, lambda: edge.publish(up(edge.backends[0]))):
        with pytest.raises(PlaneUnreachable) as unreachable:
            await call()
        assert unreachable.value.remedy
