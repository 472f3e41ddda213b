"""The balancing methods beside round robin: the choice is nginx's own, seen side by side in one nginx."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from controller.adapters.nginx.lua import LuaPlane
from tests.lua.house import Edge, edge, eventually, server, table, warm_up
from tests.support.nginx import Nginx, free_port

pytestmark = pytest.mark.usefixtures("lua_nginx")

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "hash": ("hash $arg_key;", {"method": "hash", "key": "$arg_key"}),
    "hash of a text": ("hash ${request_method}x$arg_key-;", {"method": "hash", "key": "${request_method}x$arg_key-"}),
    "hash of a capture": ("hash $1;", {"method": "hash", "key": "$1"}),
    "consistent": ("hash $arg_key consistent;", {"method": "hash", "key": "$arg_key", "consistent": True}),
    "ip_hash": ("ip_hash;", {"method": "ip_hash"}),
}
CLIENTS = [
    *(f"10.{n % 7}.{n * 37 % 256}.{n % 256}" for n in range(150)),
    *(f"2001:db8::{n:x}:{n * 7:x}" for n in range(50)),
]


@dataclass
class Row:
    """A server of both upstreams: how nginx.conf and the table have it."""

    line: str
    entry: dict[str, Any]


def rows() -> list[Row]:
    """Four servers of different weights."""
    weights = {free_port(): weight for weight in (3, 1, 2, 5)}
    return [Row(f"127.0.0.1:{port} weight={weight}", server(port, weight=weight)) for port, weight in weights.items()]


def out(row: Row) -> Row:
    return Row(f"{row.line} down", row.entry | {"state": "drain"})


async def choices(
    directive: str, method: dict[str, Any], served: Sequence[Row], dead: int = 0
) -> list[tuple[str, str]]:
    """For 200 clients and keys: the servers tried by native nginx, and those tried by the Lua plane.

    The first `dead` servers refuse connections.
    """
    port = free_port()
    lines = " ".join(f"server {row.line} max_fails=0;" for row in served)
    listening = " ".join(
        f"server {{ listen {row.entry['ip']}:{row.entry['port']}; return 200; }}" for row in served[dead:]
    )
    http = f"""
    upstream native {{ {directive} {lines} }}
    upstream app {{ {directive} {lines} balancer_by_lua_block {{ require("headgate").balance("app") }} }}
    {listening}
    server {{
        listen 127.0.0.1:{port};
        set_real_ip_from 127.0.0.1;
        real_ip_header X-Client;
        add_header X-Tried $upstream_addr always;
        location ~ ^/native/(.*) {{ proxy_pass http://native; }}
        location ~ ^/lua/(.*) {{ proxy_pass http://app; }}
    }}"""
    found = []
    with Nginx(http, workers=1) as nginx:
        assert nginx.test().returncode == 0
        plane = LuaPlane(nginx.socket, nginx.snapshot)
        try:
            await plane.publish(table(1, [row.entry for row in served], **method))
            async with aiohttp.ClientSession() as session:
                for n, client in enumerate(CLIENTS):
                    pair = []
                    for place in ("native", "lua"):
                        url = f"http://127.0.0.1:{port}/{place}/{n}?key=user{n}"
                        async with session.get(url, headers={"X-Client": client}) as response:
                            pair.append(response.headers["X-Tried"])
                    found.append((pair[0], pair[1]))
        finally:
            await plane.close()
    return found


@pytest.mark.parametrize("name", METHODS)
async def test_a_hash_maps_every_key_as_nginx_does_with_weights_and_one_server_out(name: str) -> None:
    served = rows()
    pairs = await choices(*METHODS[name], [served[0], served[1], out(served[2]), served[3]])
    assert [lua for _, lua in pairs] == [native for native, _ in pairs]
    assert {lua for _, lua in pairs} == {row.entry["key"] for row in (served[0], served[1], served[3])}


@pytest.mark.parametrize("name", METHODS)
async def test_a_failed_server_is_followed_by_the_one_that_nginx_would_try(name: str) -> None:
    served = rows()
    pairs = await choices(*METHODS[name], served, dead=1)
    assert [lua for _, lua in pairs] == [native for native, _ in pairs]
    assert any(", " in lua for _, lua in pairs)


async def test_a_host_name_has_the_points_of_its_name() -> None:
    addresses = sorted({found[4][0] for found in socket.getaddrinfo("localhost", None, socket.AF_INET)})
    named = [
        Row(f"localhost:{port}", server(port, key=f"localhost:{port}@{ip}", ip=ip, address=f"localhost:{port}"))
        for port in (free_port(), free_port(), free_port())
        for ip in addresses
    ]
    pairs = await choices(*METHODS["consistent"], named)
    ports = [(native.rpartition(":")[2], lua.rpartition(":")[2]) for native, lua in pairs]
    assert [lua for _, lua in ports] == [native for native, _ in ports]
    assert len({lua for _, lua in ports}) == 3


@pytest.mark.parametrize("name", METHODS)
async def test_a_drain_moves_only_the_keys_of_the_drained_server(name: str) -> None:
    served = rows()
    before = [lua for _, lua in await choices(*METHODS[name], served)]
    after = [lua for _, lua in await choices(*METHODS[name], [served[0], served[1], served[2], out(served[3])])]
    drained = served[3].entry["key"]
    assert drained in before
    assert drained not in after
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {old for old, _ in moved} == {drained}


@pytest.mark.parametrize("way", [{}, {"consistent": True}, {"consistent": True, "bound": 1.25}], ids=str)
async def test_requests_without_a_key_go_by_round_robin_and_are_noted_once(way: dict[str, Any]) -> None:
    async with edge(3, workers=1) as app:
        entries = [server(b.port) for b in app.backends]
        await app.publish(entries, method="hash", key="$nosuchvariable", **way)
        assert set((await app.shares(60)).values()) == {20}
        await app.publish([entries[0] | {"state": "drain"}, *entries[1:]], method="hash", key="$nosuchvariable", **way)
        assert sorted((await app.shares(30)).values()) == [15, 15]
        noted = [line for line in app.nginx.errors() if "upstream app" in line]
        assert len(noted) == 1, "not again for each request, nor for each table"
        assert 'the key "$nosuchvariable" of a request is empty' in noted[0]
        await app.publish(entries, method="hash", key="$arg_key", **way)
        assert len({(await app.get("/?key=one"))[1] for _ in range(9)}) == 1
        assert len({(await app.get("/?key="))[1] for _ in range(9)}) == 3
        assert len([line for line in app.nginx.errors() if 'the key "$arg_key"' in line]) == 1


async def test_a_request_without_a_key_is_tried_once_at_each_server() -> None:
    async with edge(3, workers=1) as app:
        for backend in app.backends[:2]:
            await backend.stop()
        await app.publish([server(b.port) for b in app.backends], method="hash", key="$arg_key", consistent=True)
        assert set(await app.shares(12)) == {app.backends[2].port}


BY_LOAD = [{"method": "least_conn"}, {"method": "random", "two": True}]
ALL = [
    *BY_LOAD,
    {"method": "random"},
    {"method": "ip_hash"},
    {"method": "hash", "key": "$request_id"},
    {"method": "hash", "key": "$request_id", "consistent": True},
]


async def held(app: Edge, count: int) -> list[asyncio.Task[tuple[int, str]]]:
    """So many requests that do not end, one after the other."""
    tasks = []
    for number in range(1, count + 1):
        tasks.append(asyncio.create_task(app.get("/hold")))
        await eventually(lambda n=number: sum(b.holding for b in app.backends) == n, f"{number} requests are held")
    return tasks


async def released(app: Edge, tasks: Sequence[asyncio.Task[tuple[int, str]]]) -> None:
    """Those requests have ended well."""
    for backend in app.backends:
        backend.release.set()
    assert {status for status, _ in await asyncio.gather(*tasks)} == {200}


@pytest.mark.parametrize("method", BY_LOAD, ids=lambda method: method["method"])
async def test_the_idle_server_is_preferred_while_the_other_holds_requests(method: dict[str, Any]) -> None:
    async with edge(2, workers=2) as app:
        busy, idle = app.backends
        await app.publish([server(busy.port), server(idle.port, state="drain")], **method)
        tasks = await held(app, 4)
        await app.publish([server(busy.port), server(idle.port)], **method)
        assert set(await app.shares(40, one_shot=True)) == {idle.port}
        await released(app, tasks)
        await app.settled(busy)
        assert set(await app.shares(40)) == {busy.port, idle.port}


async def test_least_conn_holds_in_flight_in_the_proportion_of_the_weights() -> None:
    async with edge(3, workers=1) as app:
        weights = (1, 2, 5)
        entries = [server(b.port, weight=w) for b, w in zip(app.backends, weights, strict=True)]
        await app.publish(entries, method="least_conn")
        tasks = await held(app, 16)
        assert [b.holding for b in app.backends] == [2, 4, 10]
        await released(app, tasks)


async def test_a_warming_server_is_held_to_its_share_by_least_conn() -> None:
    async with edge(2, workers=1) as app:
        warm, cold = app.backends
        ramp = warm_up(held=True, elapsed_ms=30000)
        await app.publish([server(warm.port), server(cold.port, warm_up=ramp)], method="least_conn")
        tasks = await held(app, 20)
        assert (warm.holding, cold.holding) == (16, 4)
        await released(app, tasks)


async def test_random_gives_each_server_its_weight() -> None:
    async with edge(2, workers=1) as app:
        light, heavy = app.backends
        await app.publish([server(light.port), server(heavy.port, weight=3)], method="random")
        shares = await app.shares(600)
        # Six standard deviations of a binomial distribution.
        assert abs(shares[heavy.port] - 450) <= 6 * (600 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("method", ALL, ids=str)
async def test_every_method_leaves_out_what_is_drained_full_or_has_failed(method: dict[str, Any]) -> None:
    async with edge(4, workers=1) as app:
        drained, full, well, backup = app.backends
        others = [server(drained.port, state="drain"), server(full.port, max_conns=1, weight=9), server(free_port())]
        await app.publish([server(full.port)], **method)
        tasks = await held(app, 1)
        await app.publish([*others, server(well.port), server(backup.port, backup=True)], **method)
        assert set(await app.shares(30)) == {well.port}
        await app.publish([*others, server(backup.port, backup=True)], **method)
        assert set(await app.shares(30)) == {backup.port}
        await app.publish(others, **method)
        assert (await app.get())[0] == 502
        await released(app, tasks)
        assert not [line for line in app.nginx.errors() if "lua" in line.lower()]


@pytest.mark.parametrize("method", ALL, ids=str)
async def test_methods_take_over_from_each_other_and_a_ramp_ends_under_each(method: dict[str, Any]) -> None:
    async with edge(2, workers=1) as app:
        first, second = app.backends
        await app.publish([server(first.port), server(second.port)])
        assert len(await app.shares(4)) == 2
        ramp = warm_up(duration_ms=100, starts="first-request")
        await app.publish([server(first.port, warm_up=ramp)], **method)

        async def warm() -> bool:
            assert await app.get() == (200, str(first.port))
            return (await app.peer(first)).warm_elapsed == 0.1

        await eventually(warm, "the ramp has ended")
        await app.publish([server(first.port), server(second.port)])
        assert len(await app.shares(4)) == 2
