"""What is counted for each server, and that every count ends, in a real nginx."""

from __future__ import annotations

import asyncio
import os
import signal

import aiohttp
import pytest

from tests.lua.house import Backend, Edge, edge, eventually, server
from tests.support.nginx import free_port

pytestmark = pytest.mark.usefixtures("lua_nginx")


async def publish_all(app: Edge, *others: int) -> None:
    await app.publish([server(port) for port in [*(backend.port for backend in app.backends), *others]])


async def test_a_request_is_in_flight_until_it_ends() -> None:
    async with edge(1) as app:
        await publish_all(app)
        backend = app.backends[0]
        held = [asyncio.create_task(app.get(path)) for path in ("/hold", "/stream", "/hold")]
        await eventually(lambda: backend.holding == 3, "requests are held")
        assert (await app.peer(backend)).in_flight == 3
        backend.release.set()
        assert {status for status, _ in await asyncio.gather(*held)} == {200}
        counted = await app.settled(backend)
        assert (counted.requests, counted.failures) == (3, 0)


async def test_a_websocket_is_in_flight_while_it_is_open() -> None:
    async with edge(1) as app:
        await publish_all(app)
        backend = app.backends[0]
        async with app.session.ws_connect(app.base + "/websocket") as socket:
            await socket.send_str("hello")
            assert (await socket.receive()).data == f"{backend.port} hello"
            assert (await app.peer(backend)).in_flight == 1
        assert (await app.settled(backend)).requests == 1


async def test_a_failed_try_is_released_at_once_and_that_server_not_tried_again() -> None:
    async with edge(1, options="proxy_next_upstream_tries 0;") as app:
        good, dead = app.backends[0], free_port()
        await publish_all(app, dead)
        held = [asyncio.create_task(app.get("/hold")) for _ in range(8)]
        await eventually(lambda: good.holding == 8, "every request has come to the good server")
        counted = (await app.counters()).upstreams["app"][f"127.0.0.1:{dead}"]
        assert counted.in_flight == 0
        assert counted.requests == counted.failures >= 3
        assert (await app.peer(good)).in_flight == 8
        good.release.set()
        statuses = {status for status, _ in await asyncio.gather(*held)}
        assert statuses == {200}
        assert (await app.settled(good)).requests == 8


async def test_a_dead_server_is_tried_first_at_its_share_of_the_requests() -> None:
    """A retry is no turn of the server that failed, else the same one would be the next again, for every request."""
    async with edge(1, workers=1, options="proxy_next_upstream_tries 0;") as app:
        dead = free_port()
        await publish_all(app, dead)
        assert await app.shares(100) == {app.backends[0].port: 100}
        tried = (await app.counters()).upstreams["app"][f"127.0.0.1:{dead}"].failures
        assert 49 <= tried <= 51


async def test_no_server_is_tried_twice_when_all_fail() -> None:
    async with edge(3, options="proxy_next_upstream error timeout http_503;") as app:
        await publish_all(app)
        for expected in (1, 2, 3):
            assert (await app.get("/broken"))[0] == 502
            assert [backend.requests for backend in app.backends] == [expected] * 3
        for backend in app.backends:
            counted = await app.settled(backend)
            assert (counted.requests, counted.failures) == (3, 3)


async def test_retries_reach_servers_beyond_the_blocks_own_lines() -> None:
    async with edge(1) as app:
        line = f"server {app.backends[0].key} max_fails=0;"
        assert line in app.nginx.http
        app.nginx.http = app.nginx.http.replace(line, f"server 127.0.0.1:{free_port()};")
        app.nginx.write()
        app.nginx.reload()
        await publish_all(app, free_port(), free_port())
        assert await asyncio.gather(*(app.get() for _ in range(6))) == [(200, str(app.backends[0].port))] * 6


async def test_the_limit_of_tries_holds() -> None:
    async with edge(3, options="proxy_next_upstream_tries 2;") as app:
        await publish_all(app)
        assert (await app.get("/broken"))[0] == 502
        assert sum(backend.requests for backend in app.backends) == 2


async def test_the_last_try_counts_as_failed_when_nginx_got_no_response() -> None:
    async with edge(1) as app:
        await publish_all(app)
        assert (await app.get("/broken"))[0] == 502
        counted = await app.settled(app.backends[0])
        assert (counted.requests, counted.failures) == (1, 1)


async def test_a_response_of_5xx_from_the_application_is_no_failed_try() -> None:
    async with edge(1) as app:
        await publish_all(app)
        assert (await app.get("/fail"))[0] == 503
        counted = await app.settled(app.backends[0])
        assert (counted.requests, counted.failures) == (1, 0)


async def test_a_client_that_goes_away_ends_its_count_without_a_failure() -> None:
    async with edge(1) as app:
        await publish_all(app)
        backend = app.backends[0]
        request = asyncio.create_task(app.get("/hold"))
        await eventually(lambda: backend.holding == 1, "the request is held")
        request.cancel()
        counted = await app.settled(backend)
        assert (counted.requests, counted.failures) == (1, 0)


async def test_error_pages_end_the_count_of_the_failed_server_and_keep_its_failure() -> None:
    pages = """
        location = /sorry { internal; return 200 sorry; }
        location /again { error_page 502 = @second; proxy_pass http://app; }
        location @second { rewrite ^ / break; proxy_pass http://app; }"""
    async with edge(1, options="error_page 502 =200 /sorry; proxy_next_upstream off;", extra=pages) as app:
        good, dead = app.backends[0], free_port()
        await publish_all(app, dead)
        for _ in range(4):
            status, text = await app.get()
            assert (status, text) in ((200, "sorry"), (200, str(good.port)))
        at_dead = (await app.counters()).upstreams["app"][f"127.0.0.1:{dead}"]
        assert (at_dead.in_flight, at_dead.requests) == (0, at_dead.failures)
        assert at_dead.failures >= 1
        for _ in range(4):
            assert (await app.get("/again"))[0] == 200
        after = (await app.counters()).upstreams["app"][f"127.0.0.1:{dead}"]
        assert after.in_flight == 0
        assert after.requests == after.failures > at_dead.failures
        assert (await app.settled(good)).failures == 0


async def test_an_accelerated_redirect_ends_the_count() -> None:
    async with edge(1, extra="location = /static { internal; return 200 static; }") as app:
        await publish_all(app)
        for _ in range(3):
            assert await app.get("/accel") == (200, "static")
        counted = await app.settled(app.backends[0])
        assert (counted.requests, counted.failures) == (3, 0)


@pytest.mark.parametrize("logged", ["on", "off"])
async def test_subrequests_are_released_with_their_own_log_phase_or_the_main_requests(logged: str) -> None:
    check = f"location = /check {{ internal; log_subrequest {logged}; proxy_pass http://app/check; }}"
    async with edge(1, location="auth_request /check;", extra=check) as app:
        await publish_all(app)
        backend = app.backends[0]
        request = asyncio.create_task(app.get("/hold"))
        await eventually(lambda: backend.holding == 1, "the main request is held")
        assert backend.requests == 2
        assert (await app.peer(backend)).in_flight == (1 if logged == "on" else 2)
        backend.release.set()
        assert (await request)[0] == 200
        counted = await app.settled(backend)
        assert (counted.requests, counted.failures) == (2, 0)


async def test_a_killed_workers_requests_are_dropped_and_its_totals_kept() -> None:
    async with edge(1, workers=1) as app:
        await publish_all(app)
        backend = app.backends[0]
        await app.shares(5)
        # A client may repeat a GET by itself, which would be counted.
        held = [asyncio.create_task(app.session.post(app.base + "/hold").__aenter__()) for _ in range(3)]
        await eventually(lambda: backend.holding == 3, "requests are held")
        before = await app.peer(backend)
        assert (before.in_flight, before.requests) == (3, 8)
        (worker,) = app.nginx.workers()
        os.kill(worker, signal.SIGKILL)
        await eventually(lambda: app.nginx.workers() not in ([], [worker]), "nginx replaces the worker")
        for request in held:
            with pytest.raises(aiohttp.ClientError):
                await request
        after = await app.peer(backend)
        assert (after.in_flight, after.requests) == (0, 8)
        assert (await app.plane.status()).workers == tuple(app.nginx.workers())
        await app.shares(2)
        assert (await app.settled(backend)).requests == 10


async def test_requests_of_older_workers_stay_counted_over_a_reload_and_a_drain() -> None:
    async with edge(2) as app:
        await publish_all(app)
        first, second = app.backends
        held = [asyncio.create_task(app.get("/hold")) for _ in range(4)]
        await eventually(lambda: first.holding + second.holding == 4, "requests are held")
        boot = (await app.plane.status()).boot
        old = app.nginx.reload()
        status = await app.plane.status()
        assert (status.boot, status.revision) == (boot, 1)
        assert set(status.workers) & set(old), "workers that shut down are listed while they live"
        assert len(set(status.workers) - set(old)) == 2
        assert (await app.peer(first)).in_flight == first.holding
        await app.publish([server(first.port, state="drain"), server(second.port)])
        assert (await app.peer(first)).in_flight == first.holding > 0
        assert set(await app.shares(10)) == {second.port}
        first.release.set()
        await app.settled(first)
        second.release.set()
        assert {status for status, _ in await asyncio.gather(*held)} == {200}
        await eventually(lambda: not set(app.nginx.workers()) & set(old), "the old workers end")
        assert (await app.peer(second)).requests == second.requests


async def test_a_removed_server_stays_in_the_counters_while_requests_are_in_flight() -> None:
    async with edge(2) as app:
        await publish_all(app)
        gone, stays = app.backends
        held = [asyncio.create_task(app.get("/hold")) for _ in range(2)]
        await eventually(lambda: gone.holding + stays.holding == 2, "requests are held")
        in_flight = gone.holding
        await app.publish([server(stays.port)])
        peers = (await app.counters()).upstreams["app"]
        assert (peers[gone.key].in_flight if gone.key in peers else 0) == in_flight
        gone.release.set()

        async def left() -> bool:
            return gone.key not in (await app.counters()).upstreams["app"]

        await eventually(left, "the removed server leaves the counters")
        stays.release.set()
        await asyncio.gather(*held)
        # Its cell is free now; the next new server starts from zero in it.
        newcomer = free_port()
        await publish_all(app)
        await app.publish([server(stays.port), server(newcomer)])
        counted = (await app.counters()).upstreams["app"][f"127.0.0.1:{newcomer}"]
        assert (counted.in_flight, counted.requests, counted.failures) == (0, 0, 0)


async def more_requests(backends: list[Backend], count: int) -> None:
    goal = sum(backend.requests for backend in backends) + count
    await eventually(lambda: sum(backend.requests for backend in backends) >= goal, "traffic goes on")


async def test_nothing_reaches_a_server_after_its_drain_was_answered() -> None:
    async with edge(3, workers=3) as app:
        stop = asyncio.Event()

        async def load(one_shot: bool) -> int:
            sent = 0
            while not stop.is_set():
                headers = {"Connection": "close"} if one_shot else {}
                async with app.session.get(app.base + "/", headers=headers) as response:
                    assert response.status == 200
                    await response.read()
                    sent += 1
            return sent

        await publish_all(app)
        clients = [asyncio.create_task(load(i % 4 == 0)) for i in range(12)]
        try:
            for turn in range(60):
                drained = app.backends[turn % 3]
                rest = [backend for backend in app.backends if backend is not drained]
                await app.publish([server(drained.port, state="drain"), *(server(backend.port) for backend in rest)])
                picks = (await app.peer(drained)).requests
                await app.settled(drained)
                arrived = drained.requests
                await more_requests(rest, 20)
                assert drained.requests == arrived
                # A pick that is being taken back at the answer's very moment is in the first figure only.
                assert (await app.peer(drained)).requests == arrived <= picks
        finally:
            stop.set()
        assert sum(await asyncio.gather(*clients)) == sum(backend.requests for backend in app.backends)
        assert app.nginx.errors() == []


async def test_requests_that_nginx_balanced_before_the_first_table_are_waited_for() -> None:
    async with edge(2) as app:
        held = [asyncio.create_task(app.get("/hold")) for _ in range(4)]
        await eventually(lambda: sum(backend.holding for backend in app.backends) == 4, "requests are held")
        first, second = app.backends
        await app.publish([server(first.port, state="drain"), server(second.port)])
        counters = await app.counters()
        assert counters.native == {"app": 4}
        assert counters.upstreams["app"][f"127.0.0.1:{first.port}"].in_flight == 0
        for backend in app.backends:
            backend.release.set()
        assert {status for status, _ in await asyncio.gather(*held)} == {200}
        await eventually(app.none_native, "the native requests end")
        await app.shares(4)
        assert (await app.counters()).native == {"app": 0}, "those that the table places are not counted here"
