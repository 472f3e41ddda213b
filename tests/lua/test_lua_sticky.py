"""Sessions by cookie, in a real nginx: who goes where, and what the cookie says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.lua.house import STICKY, Edge, edge, eventually, server, warm_up
from tests.support.nginx import free_port

pytestmark = pytest.mark.usefixtures("lua_nginx")

METHODS: list[dict[str, Any]] = [
    {"method": "round_robin"},
    {"method": "least_conn"},
    {"method": "ewma"},
    {"method": "random", "two": True},
    {"method": "hash", "key": "$request_id", "consistent": True, "bound": 1.25},
    {"method": "ip_hash"},
]


async def ask(app: Edge, cookie: str | None = None, path: str = "/") -> tuple[int, str, list[str]]:
    """Status, body and all Set-Cookie of a request on a connection of its own."""
    headers = {"Connection": "close"} | ({} if cookie is None else {"Cookie": cookie})
    async with app.session.get(app.base + path, headers=headers) as response:
        return response.status, await response.text(), response.headers.getall("Set-Cookie", [])


async def session_at(app: Edge, port: int) -> str:
    """The cookie of a new session at this server."""
    for _ in range(200):
        status, body, cookies = await ask(app)
        assert status == 200
        if body == str(port):
            return cookies[0].partition(";")[0]
    raise AssertionError(f"no new session came to {port}")


@pytest.mark.parametrize("method", METHODS, ids=str)
async def test_a_session_stays_where_it_began_on_every_worker(method: dict[str, Any]) -> None:
    async with edge(3, workers=2) as app:
        await app.publish([server(b.port) for b in app.backends], sticky=STICKY, **method)
        for _ in range(3):
            status, port, cookies = await ask(app)
            assert status == 200
            assert len(cookies) == 1
            cookie = cookies[0].partition(";")[0]
            for _ in range(15):
                assert await ask(app, f"a=b; {cookie}; c=d") == (200, port, [])


async def test_the_cookie_has_the_attributes_of_the_table_and_nothing_of_the_address() -> None:
    async with edge(1) as app:
        port = app.backends[0].port
        wished = {"secure": True, "same_site": "Strict", "path": "/shop", "max_age": 3600}
        await app.publish([server(port)], sticky=STICKY | wished)
        (cookie,) = (await ask(app))[2]
        value, _, attributes = cookie.partition("; ")
        assert attributes == "Path=/shop; Max-Age=3600; Secure; HttpOnly; SameSite=Strict"
        assert value.startswith("route=")
        assert len(value) == len("route=") + 32
        assert str(port) not in value


@pytest.mark.parametrize(
    "cookie", ["route=", "route=nonsense", "route=127.0.0.1:80", f"route={'x' * 7000}", "route=é", "other=1", ";;="]
)
async def test_a_cookie_of_anothers_making_counts_as_none(cookie: str) -> None:
    async with edge(2) as app:
        await app.publish([server(b.port) for b in app.backends], sticky=STICKY)
        seen = set()
        for _ in range(8):
            status, body, cookies = await ask(app, cookie)
            assert (status, len(cookies)) == (200, 1)
            seen.add(body)
        assert seen == {str(b.port) for b in app.backends}
        assert not [line for line in app.nginx.errors() if "lua" in line.lower()]


async def test_a_server_that_keeps_its_sessions_gets_them_and_no_new_ones_until_it_drains() -> None:
    async with edge(2, workers=2) as app:
        leaving, staying = app.backends
        entries = [server(leaving.port), server(staying.port)]
        await app.publish(entries, sticky=STICKY)
        cookie = await session_at(app, leaving.port)
        await app.publish([server(leaving.port, state="sessions"), entries[1]], sticky=STICKY)
        for _ in range(10):
            assert await ask(app, cookie) == (200, str(leaving.port), [])
            status, body, cookies = await ask(app)
            assert (status, body, len(cookies)) == (200, str(staying.port), 1)
        await app.publish([server(leaving.port, state="drain"), entries[1]], sticky=STICKY)
        before = leaving.requests
        status, body, cookies = await ask(app, cookie)
        assert (status, body, len(cookies)) == (200, str(staying.port), 1)
        assert leaving.requests == before


async def test_a_server_that_keeps_its_sessions_serves_them_though_no_other_server_is_left() -> None:
    async with edge(1) as app:
        port = app.backends[0].port
        await app.publish([server(port)], sticky=STICKY)
        cookie = await session_at(app, port)
        await app.publish([server(port, state="sessions")], sticky=STICKY)
        assert await ask(app, cookie) == (200, str(port), [])
        assert (await ask(app))[0] == 502


@pytest.mark.parametrize("state", ["down", "drain", "maint", "quarantine", "waiting"])
async def test_a_session_whose_server_may_not_serve_moves_and_is_told_so(state: str) -> None:
    async with edge(2) as app:
        gone, other = app.backends
        await app.publish([server(gone.port), server(other.port)], sticky=STICKY)
        cookie = await session_at(app, gone.port)
        await app.publish([server(gone.port, state=state), server(other.port)], sticky=STICKY)
        status, body, cookies = await ask(app, cookie)
        assert (status, body) == (200, str(other.port))
        assert await ask(app, cookies[0].partition(";")[0]) == (200, str(other.port), [])


async def test_a_session_moves_while_its_server_is_full() -> None:
    async with edge(2, workers=2) as app:
        full, other = app.backends
        await app.publish([server(full.port, max_conns=1), server(other.port)], sticky=STICKY)
        cookie = await session_at(app, full.port)
        await app.settled(full)
        held = asyncio.create_task(ask(app, cookie, "/hold"))
        await eventually(lambda: full.holding == 1, "the server is full")
        assert (await ask(app, cookie))[1] == str(other.port)
        full.release.set()
        assert (await held)[:2] == (200, str(full.port))
        await app.settled(full)
        assert await ask(app, cookie) == (200, str(full.port), [])


@pytest.mark.parametrize("named", [True, False])
async def test_after_a_failed_try_the_cookie_names_the_server_that_answered(named: bool) -> None:
    async with edge(2) as app:
        dead, alive = app.backends
        await app.publish([server(dead.port), server(alive.port)], sticky=STICKY)
        cookie = await session_at(app, dead.port)
        mine = await session_at(app, alive.port)
        await dead.stop()
        for _ in range(6):
            status, body, cookies = await ask(app, cookie if named else None)
            assert (status, body) == (200, str(alive.port))
            assert [each.partition(";")[0] for each in cookies] == [mine]


async def test_cookies_of_the_application_and_of_nginx_stay() -> None:
    plain = free_port()
    async with edge(1, location='add_header Set-Cookie "nginx=3";') as app:
        app.nginx.http += f"""
        server {{ listen 127.0.0.1:{plain};
            add_header Set-Cookie "app=1"; add_header Set-Cookie "router=2"; return 200 {plain}; }}"""
        app.nginx.write()
        app.nginx.reload()
        await app.publish([server(free_port(), weight=5), server(plain)], sticky=STICKY)
        for _ in range(6):
            status, body, cookies = await ask(app)
            assert (status, body) == (200, str(plain))
            names = [cookie.partition("=")[0] for cookie in cookies]
            assert sorted(names) == ["app", "nginx", "route", "router"]


async def test_hiding_the_applications_cookies_leaves_that_of_the_session() -> None:
    plain = free_port()
    async with edge(1, location="proxy_hide_header Set-Cookie;") as app:
        app.nginx.http += f'server {{ listen 127.0.0.1:{plain}; add_header Set-Cookie "app=1"; return 200 {plain}; }}'
        app.nginx.write()
        app.nginx.reload()
        await app.publish([server(plain)], sticky=STICKY)
        assert [cookie.partition("=")[0] for cookie in (await ask(app))[2]] == ["route"]


async def test_a_response_from_the_cache_names_no_server() -> None:
    def with_cache(include: str) -> str:
        return include + "proxy_cache_path cache keys_zone=here:1m;"

    async with edge(2, location="proxy_cache here; proxy_cache_valid 1m;", edit=with_cache) as app:
        await app.publish([server(b.port) for b in app.backends], sticky=STICKY)
        _, _, cookies = await ask(app)
        assert len(cookies) == 1

        async def cached() -> str | None:  # the response is in the cache a moment after its client has it
            _, port, cookies = await ask(app)
            return None if cookies else port

        port = await eventually(cached, "a response without a cookie, from the cache")
        for _ in range(4):
            assert await ask(app) == (200, port, [])


async def test_a_response_without_an_answer_names_the_server_that_was_tried_last() -> None:
    async with edge(1) as app:
        await app.publish([server(free_port()), server(free_port(), weight=3)], sticky=STICKY)
        status, _, cookies = await ask(app)
        assert (status, len(cookies)) == (502, 1)


async def test_a_response_that_is_redirected_internally_has_one_cookie() -> None:
    async with edge(2, extra='location = /static { internal; return 200 "static"; }') as app:
        await app.publish([server(b.port) for b in app.backends], sticky=STICKY)
        status, body, cookies = await ask(app, path="/accel")
        assert (status, body, len(cookies)) == (200, "static", 1)


async def test_sessions_outlive_a_restart_and_a_reload_of_nginx() -> None:
    async with edge(3, workers=2) as app:
        await app.publish([server(b.port) for b in app.backends], sticky=STICKY)
        cookies = {b.port: await session_at(app, b.port) for b in app.backends}
        app.nginx.reload()
        for port, cookie in cookies.items():
            assert await ask(app, cookie) == (200, str(port), [])
        app.nginx.stop()
        app.nginx.start()
        for port, cookie in cookies.items():
            assert await ask(app, cookie) == (200, str(port), [])


async def test_a_backup_keeps_a_session_and_gets_no_new_one_while_a_primary_serves() -> None:
    async with edge(2) as app:
        primary, backup = app.backends
        out = [server(primary.port, state="down"), server(backup.port, backup=True)]
        await app.publish(out, sticky=STICKY)
        cookie = await session_at(app, backup.port)
        await app.publish([server(primary.port), out[1]], sticky=STICKY)
        assert await ask(app, cookie) == (200, str(backup.port), [])
        assert (await ask(app))[1] == str(primary.port)


async def test_a_sessions_request_reaches_a_server_that_warms_up() -> None:
    async with edge(2) as app:
        warm, cold = app.backends
        await app.publish([server(warm.port), server(cold.port)], sticky=STICKY)
        cookie = await session_at(app, cold.port)
        ramp = warm_up(held=True, elapsed_ms=1000, floor=0.01)
        await app.publish([server(warm.port), server(cold.port, warm_up=ramp)], sticky=STICKY)
        for _ in range(5):
            assert await ask(app, cookie) == (200, str(cold.port), [])
