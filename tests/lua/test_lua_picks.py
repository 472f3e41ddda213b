"""Which server a request goes to, in a real nginx."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.lua.house import edge, eventually, server, warm_up
from tests.support.nginx import free_port

pytestmark = pytest.mark.usefixtures("lua_nginx")


async def test_without_a_table_nginx_balances_over_its_own_lines() -> None:
    async with edge(2) as app:
        shares = await app.shares(40)
        assert set(shares) == {backend.port for backend in app.backends}
        assert (await app.plane.status()).revision == 0
        assert (await app.counters()).upstreams == {}


async def test_an_upstream_that_the_table_does_not_know_is_balanced_natively() -> None:
    async with edge(2) as app:
        await app.publish([server(free_port())], name="other")
        assert set(await app.shares(20)) == {backend.port for backend in app.backends}


async def test_requests_are_shared_by_weight_on_every_worker() -> None:
    async with edge(3, workers=3) as app:
        weights = (5.0, 2.5, 0.5)
        await app.publish([server(b.port, weight=weight) for b, weight in zip(app.backends, weights, strict=True)])
        shares = await app.shares(640, one_shot=True)
        for backend, weight in zip(app.backends, weights, strict=True):
            # A worker's share is off by its phase, less than two picks.
            assert abs(shares[backend.port] - 640 * weight / 8) <= 6
            assert (await app.settled(backend)).requests == shares[backend.port]


@pytest.mark.parametrize("state", ["down", "drain", "maint", "quarantine"])
async def test_only_servers_that_are_up_are_picked(state: str) -> None:
    async with edge(2) as app:
        first, second = app.backends
        await app.publish([server(first.port), server(second.port, state=state)])
        assert set(await app.shares(20)) == {first.port}


async def test_an_upstream_that_fails_open_uses_down_servers_but_none_that_was_taken_out() -> None:
    async with edge(4) as app:
        states = ("down", "drain", "maint", "quarantine")
        await app.publish([server(b.port, state=s) for b, s in zip(app.backends, states, strict=True)], fail_open=True)
        assert set(await app.shares(20)) == {app.backends[0].port}


async def test_with_no_server_to_pick_the_answer_is_502_and_no_server_is_touched() -> None:
    async with edge(2) as app:
        await app.publish([server(b.port, state="drain") for b in app.backends])
        assert (await app.get())[0] == 502
        assert [backend.requests for backend in app.backends] == [0, 0]
        assert not [line for line in app.nginx.errors() if "lua" in line.lower()]


async def test_backups_serve_only_while_no_primary_can() -> None:
    async with edge(3) as app:
        primary, *spare = app.backends
        await app.publish([server(primary.port), *(server(b.port, backup=True) for b in spare)])
        assert set(await app.shares(20)) == {primary.port}
        await app.publish([server(primary.port, state="drain"), *(server(b.port, backup=True) for b in spare)])
        assert set(await app.shares(20)) == {b.port for b in spare}


async def test_a_backup_takes_the_retry_when_the_last_primary_fails() -> None:
    async with edge(1) as app:
        await app.publish([server(free_port()), server(app.backends[0].port, backup=True)])
        assert await app.get() == (200, str(app.backends[0].port))


async def test_max_conns_limits_what_is_in_flight_over_all_workers() -> None:
    async with edge(2, workers=3) as app:
        small, large = app.backends
        await app.publish([server(small.port, max_conns=2, weight=10.0), server(large.port)])
        held = [asyncio.create_task(app.get("/hold")) for _ in range(12)]
        await eventually(lambda: small.holding + large.holding == 12, "all requests are held")
        # Workers look and count at the same instant at worst: one more for each of the others.
        assert 2 <= small.holding <= 4
        assert set(await app.shares(5)) == {large.port}
        small.release.set()
        await app.settled(small)
        assert small.port in await app.shares(20)
        large.release.set()
        assert {status for status, _ in await asyncio.gather(*held)} == {200}


@pytest.mark.parametrize("curve", [1.0, 2.0])
async def test_a_warming_server_gets_the_share_of_the_formula(curve: float) -> None:
    async with edge(2) as app:
        warm, cold = app.backends
        duration, floor = 2.5, 0.1
        ramp = warm_up(duration_ms=duration * 1000, curve=curve, floor=floor)
        await app.publish([server(warm.port), server(cold.port, warm_up=ramp)])
        elapsed = (await app.peer(cold)).warm_elapsed
        assert elapsed is not None
        began = time.monotonic() - elapsed
        expected, picked, requests = 0.0, 0, 0
        while (at := time.monotonic() - began) < duration:
            share = max(floor, (at / duration) ** curve)
            expected += share / (1 + share)
            picked += (await app.get())[1] == str(cold.port)
            requests += 1
        assert requests >= 50 * duration
        assert abs(picked - expected) <= 0.02 * expected + 2
        shares = await app.shares(100)
        assert abs(shares[cold.port] - 50) <= 2
        counted = await app.peer(cold)
        assert counted.warm_elapsed == duration


async def test_a_warm_up_from_the_first_request_waits_for_it_whichever_worker_it_comes_to() -> None:
    async with edge(1, workers=2) as app:
        backend = app.backends[0]
        await app.publish([server(backend.port, warm_up=warm_up(starts="first-request"))])
        published = time.monotonic()
        await eventually(lambda: time.monotonic() - published > 0.1, "time passes")
        waiting = await app.peer(backend)
        assert (waiting.warm_started, waiting.warm_elapsed) == (False, 0.0)
        sent = time.monotonic()
        await app.get()
        started = await app.peer(backend)
        assert started.warm_started
        assert started.warm_elapsed is not None
        assert started.warm_elapsed <= time.monotonic() - sent
        await app.shares(10, one_shot=True)
        await app.publish([server(backend.port, warm_up=warm_up(starts="first-request"))])
        again = await app.peer(backend)
        assert again.warm_started
        assert again.warm_elapsed is not None
        assert started.warm_elapsed < again.warm_elapsed <= time.monotonic() - sent


async def test_ignored_paths_do_not_begin_a_warm_up() -> None:
    async with edge(1, workers=2, location="rewrite ^/old/ /app break;") as app:
        backend = app.backends[0]
        late = [server(backend.port, warm_up=warm_up(starts="first-request"))]
        await app.publish(late, ignore_paths=["/healthz", "/old/healthz"])
        for path in ("/healthz", "/healthz?full=1", "/old/healthz"):
            await app.get(path)
            assert not (await app.peer(backend)).warm_started
        await app.get("/healthz/")
        assert (await app.peer(backend)).warm_started


async def test_a_warm_up_in_steps_is_a_stair() -> None:
    async with edge(2) as app:
        warm, cold = app.backends
        stair = warm_up(duration_ms=600_000, elapsed_ms=290_000, steps=2, floor=0.01)
        await app.publish([server(warm.port), server(cold.port, warm_up=stair)])
        assert (await app.shares(90))[cold.port] in (29, 30, 31)


@pytest.mark.parametrize("fail_open", [True, False])
@pytest.mark.parametrize("state", ["waiting", "sessions"])
async def test_servers_that_wait_or_keep_only_sessions_get_no_new_clients(state: str, fail_open: bool) -> None:
    async with edge(2) as app:
        up, other = app.backends
        await app.publish([server(up.port), server(other.port, state=state)], fail_open=fail_open)
        assert set(await app.shares(6)) == {up.port}
        await app.publish([server(other.port, state=state)], fail_open=fail_open)
        assert (await app.get())[0] == 502
        assert other.requests == 0


async def test_a_running_warm_up_is_not_set_back_by_a_table_unless_its_hold_or_epoch_changes() -> None:
    async with edge(1) as app:
        backend = app.backends[0]

        async def elapsed_after(**ramp: object) -> float:
            await app.publish([server(backend.port, warm_up=warm_up(**ramp))])
            elapsed = (await app.peer(backend)).warm_elapsed
            assert elapsed is not None
            return elapsed

        assert await elapsed_after(elapsed_ms=10_000) >= 10
        assert await elapsed_after(elapsed_ms=0) > 10
        assert await elapsed_after(elapsed_ms=4_000, held=True) == 4
        assert await elapsed_after(elapsed_ms=2_000, held=True) == 2
        assert 3 <= await elapsed_after(elapsed_ms=3_000) < 9
        assert await elapsed_after(epoch=2) < 3


async def test_ipv6_and_unix_servers_are_reached() -> None:
    port = free_port()
    async with edge(1) as app:
        path = app.nginx.prefix / "backend.sock"
        app.nginx.http += f"""
        server {{ listen [::1]:{port}; return 200 "6"; }}
        server {{ listen "unix:{path}"; return 200 "7"; }}"""
        app.nginx.write()
        app.nginx.reload()
        await app.publish([
            server(port, key="six", ip="::1"),
            server(0, key="unix", ip=f"unix:{path}"),
        ])  # fmt: skip
        assert await app.shares(10, one_shot=True) in ({6: 5, 7: 5}, {6: 6, 7: 4}, {6: 4, 7: 6})
