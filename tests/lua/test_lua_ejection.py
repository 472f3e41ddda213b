"""Servers that fail are taken out of traffic by nginx itself, on all workers, within bounds: a real nginx."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Any

import aiohttp
import pytest

from tests.lua.house import Backend, Edge, edge, eventually, server
from tests.support.nginx import free_port

pytestmark = pytest.mark.usefixtures("lua_nginx")

LONG = 600_000


def outlier(**fields: Any) -> dict[str, Any]:
    """Ejects for ten minutes after two failures of any kind, up to half of the servers."""
    limits = {"errors": 2, "timeouts": 2, "server_errors": 2, "base_ms": LONG, "cap_ms": LONG, "max_ejected": 0.5}
    return limits | fields


async def publish(app: Edge, forgive: int = 0, fields: dict[str, Any] | None = None, **options: Any) -> None:
    options = {"outlier": outlier()} | options
    await app.publish([server(backend.port, forgive=forgive, **(fields or {})) for backend in app.backends], **options)


async def ask(app: Edge, requests: int, path: str = "/") -> list[int]:
    """Statuses of requests that come on connections of their own, so that every worker takes part."""
    statuses = []
    for _ in range(requests):
        with contextlib.suppress(aiohttp.ServerDisconnectedError):
            async with app.session.get(app.base + path, headers={"Connection": "close"}) as response:
                statuses.append(response.status)
    return statuses


async def until_ejected(app: Edge, backend: Backend, reason: str) -> dict[str, Any]:
    """Requests until the server is ejected for that reason; what nginx says of it."""

    async def found() -> dict[str, Any] | None:
        await ask(app, 1)
        return await app.ejected(backend)

    said: dict[str, Any] = await eventually(found, f"{backend.key} is ejected")
    assert said["reason"] == reason
    return said


@pytest.mark.parametrize(("fault", "reason"), [("/broken", "errors"), ("/fail", "server_errors")])
async def test_a_failing_server_is_ejected_on_all_workers(fault: str, reason: str) -> None:
    async with edge(3, workers=3) as app:
        await publish(app)
        bad = app.backends[0]
        bad.fault = fault
        said = await until_ejected(app, bad, reason)
        assert said["times"] == 1
        assert LONG - 20_000 < said["remaining_ms"] <= LONG
        tries = bad.requests
        assert set(await ask(app, 60)) == {200}
        assert bad.requests == tries == 2


async def test_outliers_that_the_daemon_found_count_with_what_nginx_ejects() -> None:
    async with edge(4) as app:
        away = {"state": "down", "outlier": True}
        entries = [server(each.port, **(away if at == 0 else {})) for at, each in enumerate(app.backends)]
        await app.publish(entries, outlier=outlier())
        bad, worse = app.backends[1:3]
        bad.fault = "/fail"
        await until_ejected(app, bad, "server_errors")
        worse.fault = "/fail"
        tries = worse.requests
        while worse.requests < tries + 8:
            await ask(app, 3)
        assert await app.ejected(worse) is None, "half of four are away: an outlier, and one that nginx ejected"
        await app.publish([server(each.port) for each in app.backends], outlier=outlier())
        await until_ejected(app, worse, "server_errors")


async def test_a_server_that_does_not_answer_in_time_is_ejected_for_timeouts() -> None:
    async with edge(2, options="proxy_read_timeout 100ms;") as app:
        await publish(app)
        app.backends[0].fault = "/hold"
        await until_ejected(app, app.backends[0], "timeouts")
        said = await app.said(app.backends[0])
        assert (said["timeouts"], said["failures"], said["answered"]) == (2, 2, 0)


async def test_the_counters_tell_answers_from_failures() -> None:
    async with edge(1, options="proxy_next_upstream error timeout http_503;") as app:
        await publish(app, outlier=outlier(errors=0, server_errors=0))
        for path in ("/", "/fail", "/fail", "/broken"):
            await app.get(path)
        await app.settled(app.backends[0])
        said = await app.said(app.backends[0])
        assert (said["requests"], said["answered"], said["errors"], said["failures"], said["timeouts"]) == (
            4,
            3,
            2,
            1,
            0,
        )
        assert 0 < said["seconds"] < 10
        assert (said["ejected"], said["refused_marks"]) == (None, 0)


async def test_a_5xx_that_nginx_answers_by_another_try_counts_as_the_servers_answer() -> None:
    async with edge(2, options="proxy_next_upstream error timeout http_503;") as app:
        await publish(app)
        bad = app.backends[0]
        bad.fault = "/fail"
        assert set(await ask(app, 12)) == {200}
        said = await app.said(bad)
        assert (said["errors"], said["failures"], said["ejected"]["reason"]) == (2, 0, "server_errors")


async def test_a_slow_body_does_not_make_the_answer_slow() -> None:
    async with edge(1) as app:
        await publish(app)
        backend = app.backends[0]
        request = asyncio.create_task(app.get("/stream"))
        await eventually(lambda: backend.holding == 1, "the stream runs")
        loop = asyncio.get_running_loop()
        since = loop.time()
        await eventually(lambda: loop.time() - since > 0.5, "the stream lasts half a second")
        backend.release.set()
        assert (await request)[0] == 200
        await app.settled(backend)
        assert (await app.said(backend))["seconds"] < 0.4


async def test_a_success_ends_a_streak() -> None:
    async with edge(2, workers=2) as app:
        await publish(app, outlier=outlier(server_errors=3))
        for _ in range(10):
            for backend in app.backends:
                backend.fault = "/fail"
            assert await ask(app, 2) == [503, 503]
            for backend in app.backends:
                backend.fault = None
            # Workers pick by themselves: both servers have certainly answered when each has.
            seen = [backend.requests for backend in app.backends]
            while any(backend.requests == before for backend, before in zip(app.backends, seen, strict=True)):
                await ask(app, 1)
        assert [await app.ejected(backend) for backend in app.backends] == [None, None]


async def test_a_client_that_goes_away_is_neither_failure_nor_success() -> None:
    async with edge(2, workers=1) as app:
        await publish(app)
        bad = app.backends[0]
        bad.fault = "/fail"
        while bad.requests == 0:
            await ask(app, 1)
        bad.fault = "/hold"
        for turn in range(3):
            while bad.holding == 0:
                request = asyncio.create_task(app.get("/"))
                await eventually(lambda request=request: bad.holding or request.done(), "the request is somewhere")
            request.cancel()
            await app.settled(bad)
            assert await app.ejected(bad) is None, turn
            bad.release.set()
            await eventually(lambda: bad.holding == 0, "the server lets go")
            bad.release.clear()
        bad.fault = "/fail"
        tries = bad.requests
        await until_ejected(app, bad, "server_errors")
        assert bad.requests == tries + 1, "the streak of one was still there"


async def test_ejections_grow_up_to_the_cap_and_end_by_themselves() -> None:
    async with edge(2, workers=2) as app:
        await publish(app, outlier=outlier(base_ms=300, cap_ms=700))
        bad = app.backends[0]
        bad.fault = "/broken"
        for times, longest in ((1, 300), (2, 600), (3, 700)):
            said = await until_ejected(app, bad, "errors")
            assert said["times"] == times
            assert longest - 300 < said["remaining_ms"] <= longest
            tries = bad.requests

            async def over() -> bool:
                return await app.ejected(bad) is None

            await eventually(over, "the ejection ends")
            assert bad.requests == tries
        bad.fault = None
        tries = bad.requests
        await ask(app, 12)
        assert bad.requests > tries, "it is back in traffic"


async def test_no_more_than_the_given_share_is_ejected() -> None:
    async with edge(5, workers=2) as app:
        await publish(app, outlier=outlier(max_ejected=0.4))
        for backend in app.backends[:4]:
            backend.fault = "/fail"
        await ask(app, 60)
        out = [backend for backend in app.backends if await app.ejected(backend)]
        assert len(out) == 2
        assert app.backends[4] not in out


async def test_the_last_server_that_would_serve_is_never_ejected() -> None:
    async with edge(2, workers=2) as app:
        await publish(app, outlier=outlier(max_ejected=1))
        for backend in app.backends:
            backend.fault = "/fail"
        assert set(await ask(app, 30)) == {503}
        out = [backend for backend in app.backends if await app.ejected(backend)]
        assert len(out) == 1
        served = [backend for backend in app.backends if backend not in out]
        tries = served[0].requests
        await ask(app, 5)
        assert served[0].requests == tries + 5
        # When the table takes the other one away, the ejected one serves rather than none.
        await app.publish([server(out[0].port), server(served[0].port, state="drain")], outlier=outlier())
        out[0].fault = None
        assert await ask(app, 4) == [200] * 4


async def test_the_bounds_hold_when_all_workers_eject_at_the_same_instant() -> None:
    async with edge(4, workers=4) as app:
        for backend in app.backends:
            backend.fault = "/fail"
        for turn in range(15):
            await publish(app, forgive=turn, outlier=outlier(server_errors=1, max_ejected=1 if turn % 2 else 0.5))
            await asyncio.gather(*(ask(app, 2) for _ in range(20)))
            out = [backend for backend in app.backends if await app.ejected(backend)]
            assert len(out) == (3 if turn % 2 else 2)


async def test_a_lone_server_is_not_ejected() -> None:
    async with edge(1) as app:
        await publish(app)
        assert await ask(app, 8, "/fail") == [503] * 8
        assert await app.ejected(app.backends[0]) is None


async def test_backups_are_ejected_and_primaries_leave_traffic_to_them() -> None:
    async with edge(3, workers=2) as app:
        first, spare, other = app.backends
        await app.publish(
            [server(first.port), server(spare.port, backup=True), server(other.port, backup=True)],
            outlier=outlier(max_ejected=1),
        )
        first.fault = spare.fault = "/fail"
        await until_ejected(app, first, "server_errors")
        await until_ejected(app, spare, "server_errors")
        assert set(await app.shares(8, one_shot=True)) == {other.port}


@pytest.mark.parametrize(
    "method",
    [
        {"method": "least_conn"},
        {"method": "random"},
        {"method": "random", "two": True},
        {"method": "ip_hash"},
        {"method": "hash", "key": "$request_id"},
        {"method": "hash", "key": "$request_id", "consistent": True},
    ],
)
async def test_every_method_passes_an_ejected_server_over(method: dict[str, Any]) -> None:
    async with edge(3, workers=2) as app:
        await publish(app, **method)
        bad = app.backends[0]
        if method["method"] == "ip_hash":
            # One client has one server: whichever it is fails.
            await ask(app, 1)
            bad = next(backend for backend in app.backends if backend.requests)
        bad.fault = "/fail"
        await until_ejected(app, bad, "server_errors")
        tries = bad.requests
        assert set(await ask(app, 40)) == {200}
        assert bad.requests == tries


async def test_where_the_upstream_fails_open_nobody_is_ejected_and_ejections_do_not_count() -> None:
    async with edge(2, workers=2) as app:
        await publish(app)
        bad = app.backends[0]
        bad.fault = "/fail"
        await until_ejected(app, bad, "server_errors")
        await publish(app, fail_open=True)
        tries = bad.requests
        assert sorted(await ask(app, 12)).count(503) == bad.requests - tries > 0
        app.backends[1].fault = "/fail"
        await ask(app, 12)
        assert await app.ejected(app.backends[1]) is None


async def test_a_forgiven_server_is_back_at_once_and_starts_anew() -> None:
    async with edge(2, workers=2) as app:
        await publish(app)
        bad = app.backends[0]
        bad.fault = "/fail"
        await until_ejected(app, bad, "server_errors")
        await publish(app)
        assert (await app.ejected(bad)) is not None, "a table alone forgives nobody"
        bad.fault = None
        await publish(app, forgive=1)
        assert await app.ejected(bad) is None
        assert bad.port in await app.shares(12, one_shot=True)
        bad.fault = "/fail"
        assert (await until_ejected(app, bad, "server_errors"))["times"] == 1


async def test_the_limit_is_the_tables_and_a_reload_keeps_ejections() -> None:
    async with edge(2, workers=2) as app:
        await publish(app)
        bad = app.backends[0]
        bad.fault = "/broken"
        await until_ejected(app, bad, "errors")
        old = app.nginx.reload()
        await eventually(lambda: not set(old) & set(app.nginx.workers()), "the old workers end")
        tries = bad.requests
        assert await ask(app, 12) == [200] * 12
        assert bad.requests == tries
        assert (await app.ejected(bad)) is not None


async def test_a_killed_worker_takes_no_counts_and_no_ejections_along() -> None:
    async with edge(2, workers=1) as app:
        await publish(app)
        bad = app.backends[0]
        bad.fault = "/fail"
        await until_ejected(app, bad, "server_errors")
        await app.settled(app.backends[1])

        async def sums() -> list[list[float]]:
            counted = ("requests", "failures", "errors", "timeouts", "answered", "seconds", "refused_marks")
            said = [await app.said(backend) for backend in app.backends]
            return [[each[name] for name in counted] for each in said]

        before = await sums()
        (worker,) = app.nginx.workers()
        os.kill(worker, signal.SIGKILL)
        await eventually(lambda: app.nginx.workers() not in ([], [worker]), "nginx replaces the worker")
        assert await sums() == before
        assert set(await app.shares(6)) == {app.backends[1].port}


async def test_a_server_in_the_cell_of_a_former_one_inherits_nothing() -> None:
    async with edge(2, workers=2) as app:
        await publish(app)
        gone, stays = app.backends
        gone.fault = "/fail"
        await until_ejected(app, gone, "server_errors")
        await app.publish([server(stays.port)], outlier=outlier())
        newcomer = Backend()
        newcomer.port = free_port()
        newcomer.key = f"127.0.0.1:{newcomer.port}"
        await app.publish([server(stays.port)], outlier=outlier())
        await app.publish([server(stays.port), server(newcomer.port)], outlier=outlier())
        said = await app.said(newcomer)
        assert (said["ejected"], said["requests"], said["errors"], round(said["seconds"], 9)) == (None, 0, 0, 0)


async def test_a_thousand_servers_that_flap_at_once_are_bounded_and_lose_no_request() -> None:
    async with edge(1, workers=2, options="proxy_next_upstream_tries 0; proxy_connect_timeout 1s;") as app:
        good = app.backends[0]
        dead = free_port()
        others = [
            server(dead, key=f"127.0.{1 + n // 250}.{1 + n % 250}", ip=f"127.0.{1 + n // 250}.{1 + n % 250}")
            for n in range(1000)
        ]
        await app.publish([server(good.port), *others], outlier=outlier(errors=1, max_ejected=1))
        statuses = await asyncio.gather(*(app.get() for _ in range(40)))
        assert {status for status, _ in statuses} == {200}
        counters = (await app.plane._call("GET", "/v1/counters"))["upstreams"]["app"]
        out = [key for key, each in counters.items() if each["ejected"]]
        assert good.key not in out
        assert len(out) == len({key for key, each in counters.items() if each["failures"]})
        assert sum(each["failures"] for key, each in counters.items()) >= len(out) > 40
        assert app.nginx.errors() == [] or all("connect() failed" in line for line in app.nginx.errors())
