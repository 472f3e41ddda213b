"""A server says in a response that it goes offline: believed at once by all workers, of itself only, within bounds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.lua.house import Backend, Edge, edge, eventually, server
from tests.support.nginx import free_port

pytestmark = pytest.mark.usefixtures("lua_nginx")

OFFLINE = "X-Headgate-Offline"
SERMANT = "sermant.grace.mark.shutdown.service."
LONG = 600_000


async def publish(app: Edge, quarantine_ms: int = LONG, forgive: int = 0, **options: Any) -> None:
    servers = [server(backend.port, forgive=forgive) for backend in app.backends]
    await app.publish(servers, quarantine_ms=quarantine_ms, **options)


async def until_marked(app: Edge, backend: Backend) -> dict[str, str]:
    """Requests until the marked server has answered one; that answer's headers."""
    while True:
        async with app.session.get(app.base + "/", headers={"Connection": "close"}) as response:
            if await response.text() == str(backend.port):
                return dict(response.headers)


async def until_refused(app: Edge, backend: Backend, more_than: int = 0) -> int:
    async def refused() -> int:
        await app.shares(1, one_shot=True)
        count = int((await app.said(backend))["refused_marks"])
        return count if count > more_than else 0

    return int(await eventually(refused, "a mark is refused"))


def own(backend: Backend) -> dict[str, dict[str, str]]:
    """Each way to say that this server goes offline."""
    return {
        "a word": {OFFLINE: "1"},
        "nothing": {OFFLINE: ""},
        "its address": {OFFLINE: backend.key},
        "Sermant's": {SERMANT + "name": "app", SERMANT + "endpoint": backend.key},
    }


@pytest.mark.parametrize("kind", ["a word", "nothing", "its address", "Sermant's"])
async def test_a_marked_server_gets_nothing_more_from_any_worker_and_clients_do_not_see_the_mark(kind: str) -> None:
    async with edge(3, workers=3) as app:
        await publish(app)
        leaving = app.backends[0]
        leaving.headers = own(leaving)[kind]
        headers = await until_marked(app, leaving)
        assert not {name.lower() for name in headers} & {OFFLINE.lower(), SERMANT + "name", SERMANT + "endpoint"}
        # The client may have its answer before the log phase; the count ends there, behind the mark.
        await app.settled(leaving)
        said = await app.said(leaving)
        assert (said["ejected"]["reason"], said["ejected"]["times"], said["refused_marks"]) == ("mark", 1, 0)
        assert LONG - 20_000 < said["ejected"]["remaining_ms"] <= LONG
        assert leaving.port not in await app.shares(60, one_shot=True)
        assert leaving.requests == 1


async def test_a_mark_on_a_503_that_is_tried_elsewhere_counts_and_no_client_sees_either() -> None:
    async with edge(2, options="proxy_next_upstream error timeout http_503 non_idempotent;") as app:
        await publish(app)
        leaving = app.backends[0]
        leaving.fault, leaving.headers = "/fail", {OFFLINE: "1"}
        for _ in range(8):
            async with app.session.post(app.base + "/") as response:
                assert response.status == 200
                assert OFFLINE not in response.headers
        assert leaving.requests == 1
        assert (await app.said(leaving))["ejected"]["reason"] == "mark"


async def test_a_mark_is_not_held_against_the_server_of_the_next_try() -> None:
    async with edge(1, options="proxy_next_upstream error timeout http_503;") as app:
        (leaving,) = app.backends
        leaving.fault, leaving.headers = "/fail", {OFFLINE: "1"}
        # A socket that is missing fails at once, while nginx still has the answer of the try before.
        gone = server(0, key="gone", ip=f"unix:{app.nginx.prefix}/gone.sock", backup=True)
        await app.publish([server(leaving.port), gone], quarantine_ms=LONG)
        assert (await app.get())[0] == 502
        servers = (await app.plane._call("GET", "/v1/counters"))["upstreams"]["app"]
        assert [servers["gone"][name] for name in ("failures", "ejected", "refused_marks")] == [1, None, 0]
        assert servers[leaving.key]["ejected"]["reason"] == "mark"


async def test_a_mark_from_the_cache_is_not_believed_of_the_server_that_was_asked_now() -> None:
    async with edge(2, workers=1) as app:
        first, second = app.backends
        cache = f'proxy_cache_path "{app.nginx.prefix}/cache" keys_zone=kept:1m;\n'
        use = "proxy_cache kept; proxy_cache_valid 200 1s; proxy_cache_use_stale error timeout updating http_503;"
        app.nginx.http = cache + app.nginx.http.replace("proxy_pass http://app;", use + "proxy_pass http://app;")
        app.nginx.write()
        app.nginx.reload()
        await app.publish([server(first.port)], quarantine_ms=LONG)
        first.headers = {OFFLINE: "1", "Cache-Control": "max-age=1", "ETag": '"1"'}
        assert (await app.get())[1] == str(first.port)
        await app.publish([server(second.port), server(free_port(), backup=True)], quarantine_ms=LONG)
        second.fault = "/fail"

        async def stale() -> bool:
            await app.get()
            return second.requests > 0

        await eventually(stale, "the cached answer is old")
        assert (await app.get())[1] == str(first.port), "the cache answers"
        await app.settled(second)
        said = await app.said(second)
        assert (said["ejected"], said["refused_marks"]) == (None, 0)


@pytest.mark.parametrize("forged", [OFFLINE, SERMANT + "endpoint"])
async def test_a_server_cannot_take_another_one_out(forged: str) -> None:
    async with edge(3, workers=2) as app:
        await publish(app)
        liar, victim, _ = app.backends
        liar.headers = {forged: victim.key}
        await until_refused(app, liar)
        assert [await app.ejected(backend) for backend in app.backends] == [None] * 3
        assert (await app.said(victim))["refused_marks"] == 0


@pytest.mark.parametrize("named", ["127.0.0.1:1", "no address at all", "x" * 2000])
async def test_marks_for_unknown_servers_are_refused(named: str) -> None:
    async with edge(2, workers=2) as app:
        await publish(app)
        app.backends[0].headers = {OFFLINE: named}
        await until_refused(app, app.backends[0])
        assert await app.ejected(app.backends[0]) is None


async def test_at_most_half_of_the_servers_are_out_by_their_own_marks() -> None:
    async with edge(4, workers=2) as app:
        await publish(app)
        for backend in app.backends:
            backend.headers = {OFFLINE: "1"}
        await app.shares(40, one_shot=True)
        out = [backend for backend in app.backends if await app.ejected(backend)]
        assert len(out) == 2
        assert len(await app.shares(12, one_shot=True)) == 2


async def test_the_last_server_that_serves_is_not_believed() -> None:
    async with edge(2, workers=2) as app:
        stays, drained = app.backends
        await app.publish([server(stays.port), server(drained.port, state="drain")], quarantine_ms=LONG)
        stays.headers = {OFFLINE: "1"}
        await until_refused(app, stays)
        assert set(await app.shares(4)) == {stays.port}


@pytest.mark.parametrize("options", [{"quarantine_ms": 0}, {"fail_open": True}])
async def test_marks_that_are_not_wanted_are_refused_and_still_hidden(options: dict[str, Any]) -> None:
    async with edge(2, workers=1) as app:
        await publish(app, **options)
        leaving = app.backends[0]
        leaving.headers = {OFFLINE: "1"}
        assert OFFLINE not in await until_marked(app, leaving)
        await until_refused(app, leaving)
        assert await app.ejected(leaving) is None


async def test_a_quarantine_ends_by_itself_and_a_mark_that_is_repeated_then_is_a_lie() -> None:
    async with edge(2, workers=2) as app:
        await publish(app, quarantine_ms=400)
        liar = app.backends[0]
        liar.headers = {OFFLINE: "1"}
        await until_marked(app, liar)
        await app.settled(liar)
        assert liar.port not in await app.shares(2)

        async def over() -> bool:
            return await app.ejected(liar) is None

        await eventually(over, "the quarantine ends")
        await publish(app, quarantine_ms=LONG)
        await until_marked(app, liar)
        await until_refused(app, liar)
        assert await app.ejected(liar) is None
        # Forgiven, as after a restart, it is believed again.
        await publish(app, quarantine_ms=LONG, forgive=1)
        await until_marked(app, liar)
        await app.settled(liar)
        assert (await app.said(liar))["ejected"]["times"] == 1


async def test_a_late_answer_of_the_process_before_a_restart_does_not_mark_its_successor() -> None:
    async with edge(2, workers=1) as app:
        await publish(app)
        backend = app.backends[0]
        held = [asyncio.create_task(app.get("/stream")) for _ in range(2)]
        await eventually(lambda: backend.holding == 1, "a stream runs")
        backend.headers = {OFFLINE: "1"}
        slow = [asyncio.create_task(app.get("/hold")) for _ in range(2)]
        await eventually(lambda: backend.holding == 2, "an answer with a mark is on its way")
        await publish(app, forgive=1)
        for each in app.backends:
            each.release.set()
        await asyncio.gather(*held, *slow)
        await app.settled(backend)
        said = await app.said(backend)
        assert (said["ejected"], said["refused_marks"]) == (None, 1)


async def test_a_mark_reaches_over_to_a_server_that_is_ejected_for_failures() -> None:
    limits = {"errors": 0, "timeouts": 0, "server_errors": 1, "base_ms": LONG, "cap_ms": LONG, "max_ejected": 1}
    async with edge(2, workers=1) as app:
        await publish(app, outlier=limits)
        leaving = app.backends[0]
        held = [asyncio.create_task(app.get("/hold")) for _ in range(2)]
        await eventually(lambda: leaving.holding == 1, "a request is held")
        leaving.fault, leaving.headers = "/fail", {OFFLINE: "1"}
        while not await app.ejected(leaving):
            await app.get()
        await app.publish([server(each.port) for each in app.backends], quarantine_ms=LONG, outlier=limits)
        for each in app.backends:
            each.release.set()
        await asyncio.gather(*held)
        await app.settled(leaving)
        found = await app.ejected(leaving)
        assert found is not None
        assert found["reason"] == "mark"
