"""Start, reload, restart and crash of a real nginx with the data plane."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controller.adapters.nginx.lua import LuaPlane
from tests.lua.house import Edge, edge, eventually, server, table, warm_up
from tests.support.nginx import MODULES, ROOT, Nginx, free_port, wait_until

pytestmark = pytest.mark.usefixtures("lua_nginx")


def files(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.name != "error.log"}


async def test_a_reload_keeps_table_counters_ramps_and_boot_id() -> None:
    async with edge(2, workers=2) as app:
        first, second = app.backends
        ramp = warm_up(elapsed_ms=1000, starts="first-request")
        await app.publish([server(first.port, warm_up=ramp), server(second.port, state="drain")])
        await app.shares(6)
        status, before = await app.plane.status(), await app.peer(first)
        app.nginx.snapshot.unlink()
        old = app.nginx.reload()
        wait_until(lambda: not set(old) & set(app.nginx.workers()), "the old workers end")
        assert set(await app.shares(6, one_shot=True)) == {first.port}
        after = await app.peer(first)
        assert ((await app.plane.status()).boot, after.requests) == (status.boot, 12)
        assert before.warm_elapsed is not None
        assert after.warm_elapsed is not None
        assert after.warm_elapsed > before.warm_elapsed >= 1


async def test_a_restarted_nginx_goes_on_from_the_snapshot_with_a_new_boot_id() -> None:
    async with edge(2) as app:
        first, second = app.backends
        await app.publish([server(first.port, warm_up=warm_up(elapsed_ms=60_000)), server(second.port, state="drain")])
        before = await app.plane.status()
        app.nginx.stop()
        app.nginx.start()
        after = await app.plane.status()
        assert (after.revision, after.boot != before.boot) == (1, True)
        assert set(await app.shares(6)) == {first.port}
        elapsed = (await app.peer(first)).warm_elapsed
        assert elapsed is not None
        assert 60 <= elapsed < 70


@pytest.mark.parametrize(
    ("ramp", "same_uptime", "elapsed"),
    [
        pytest.param({"elapsed_ms": 20_000}, True, 80, id="it ran, and goes on"),
        pytest.param({"elapsed_ms": 0}, True, 60, id="from its beginning, too"),
        pytest.param({"elapsed_ms": 20_000, "held": True}, True, 20, id="held"),
        pytest.param({"starts": "first-request"}, True, 0, id="no request had come"),
        pytest.param({"elapsed_ms": 20_000}, False, 20, id="the machine was rebooted"),
    ],
)
async def test_ramps_of_a_snapshot_go_on_by_the_time_since_it_was_written(
    ramp: dict[str, Any], same_uptime: bool, elapsed: int
) -> None:
    async with edge(2) as app:
        first, second = app.backends
        await app.publish([server(first.port, warm_up=warm_up(**ramp)), server(second.port)])
        app.nginx.stop()
        snapshot = json.loads(app.nginx.snapshot.read_text())
        snapshot["written"]["monotonic_ms"] -= 60_000
        if not same_uptime:
            snapshot["written"]["boot_id"] = "another"
        app.nginx.snapshot.write_text(json.dumps(snapshot))
        app.nginx.start()
        seen = await app.peer(first)
        assert elapsed <= seen.warm_elapsed < elapsed + 10
        assert seen.warm_started is (ramp.get("starts") != "first-request")


async def test_a_table_that_is_given_twice_is_the_very_same() -> None:
    async with edge(1) as app:
        given = table(1, [server(app.backends[0].port)])
        before = await app.plane.publish(given)
        assert await app.plane.publish(dict(given)) == before


async def test_a_reload_into_code_with_another_layout_of_memory_begins_from_the_snapshot() -> None:
    async with edge(2, workers=2) as app:
        first, second = app.backends
        await app.publish([server(first.port), server(second.port, state="drain")])
        await app.shares(3)
        before = await app.plane.status()
        code = app.nginx.prefix / "lua"
        shutil.copytree(app.nginx.lua, code)
        stats = code / "headgate" / "stats.lua"
        changed = re.sub(r"(?m)^_M.LAYOUT = .*$", "_M.LAYOUT = 0", stats.read_text())
        assert changed != stats.read_text()
        stats.write_text(changed)
        app.nginx.lua = code
        app.nginx.write()
        old = app.nginx.reload()
        wait_until(lambda: not set(old) & set(app.nginx.workers()), "the old workers end")
        after = await app.plane.status()
        assert (after.revision, after.boot != before.boot) == (before.revision, True)
        assert (await app.peer(first)).requests == 0
        assert set(await app.shares(3)) == {first.port}


@pytest.mark.parametrize("name", ["headgate_table", "headgate_state"])
async def test_a_dict_of_another_size_leaves_the_table_in_force(name: str) -> None:
    async with edge(2, workers=2) as app:
        first, second = app.backends
        await app.publish([server(first.port), server(second.port, state="drain")])
        size = "8m" if name == "headgate_table" else "1m"
        app.nginx.edit = lambda text: text.replace(f"{name} {size}", f"{name} 16m")
        app.nginx.write()
        old = app.nginx.reload()
        await eventually(lambda: not set(old) & set(app.nginx.workers()), "the old workers end")
        assert set(await app.shares(6, one_shot=True)) == {first.port}
        assert (await app.plane.status()).revision == 1
        assert app.nginx.errors() == []
        await app.publish([server(first.port, state="drain"), server(second.port)])
        assert set(await app.shares(6, one_shot=True)) == {second.port}


def enlarge_tables(app: Edge) -> list[int]:
    """Reload into a larger dict for tables; the old workers, which may still have requests."""
    app.nginx.edit = lambda text: text.replace("headgate_table 8m", "headgate_table 16m")
    app.nginx.write()
    return app.nginx.reload()


async def test_a_drain_waits_for_what_was_in_flight_when_the_dict_of_tables_was_enlarged() -> None:
    async with edge(2, workers=1) as app:
        first, second = app.backends
        await app.publish([server(first.port), server(second.port, state="drain")])
        held = asyncio.create_task(app.get("/hold"))
        await eventually(lambda: first.holding, "a request is held")
        boot = (await app.plane.status()).boot
        enlarge_tables(app)
        assert (await app.plane.status()).boot != boot
        assert (await app.counters()).native == {"app": 1}
        for revision in range(3):
            await app.publish([server(first.port, state="drain"), server(second.port)])
            assert set(await app.shares(6, one_shot=True)) == {second.port}, revision
            assert (await app.counters()).native == {"app": 1}
        first.release.set()
        assert await held == (200, str(first.port))
        await eventually(app.none_native, "nothing is in flight")
        assert app.nginx.errors() == []


async def test_an_old_worker_goes_on_with_its_table_when_the_dict_of_tables_was_enlarged() -> None:
    async with edge(3) as app:
        first, second, third = app.backends
        servers = [server(first.port), server(second.port, weight=0.001), server(third.port, state="drain")]
        await app.publish(servers)
        held = asyncio.create_task(app.get("/hold"))
        await eventually(lambda: first.holding + second.holding, "a request is held")
        enlarge_tables(app)
        await app.publish([server(first.port), server(second.port, state="drain"), server(third.port)])
        first.fault = "/broken"
        for backend in app.backends:
            backend.release.set()
        assert await held == (200, str(second.port)), "the other server of the table that it has"
        await eventually(app.none_native, "nothing is in flight")


def enlarge_both(app: Edge) -> list[int]:
    """Reload into larger dicts; the old workers."""
    larger = {"headgate_table 8m": "headgate_table 16m", "headgate_state 1m": "headgate_state 2m"}
    app.nginx.edit = lambda text: functools.reduce(lambda so_far, change: so_far.replace(*change), larger.items(), text)
    app.nginx.write()
    return app.nginx.reload()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(enlarge_both, id="both dicts are enlarged"),
        pytest.param(lambda app: app.nginx.replace_binary(), id="the binary is replaced"),
    ],
)
async def test_a_drain_waits_for_workers_that_count_in_another_memory(how: Callable[[Edge], list[int]]) -> None:
    async with edge(2, workers=2, as_daemon=True) as app:
        first, second = app.backends
        await app.publish([server(first.port), server(second.port, state="drain")])
        held = asyncio.create_task(app.get("/hold"))
        await eventually(lambda: first.holding, "a request is held")
        old = how(app)
        assert set(await app.shares(6, one_shot=True)) == {first.port}, "the snapshot is in force"
        await app.publish([server(first.port, state="drain"), server(second.port)])
        assert set(await app.shares(6, one_shot=True)) == {second.port}

        async def one() -> bool:
            return (await app.counters()).native == {"app": 1}

        await eventually(one, "the idle one of the old workers ends")
        first.release.set()
        assert await held == (200, str(first.port))
        await app.session.close()
        await eventually(app.none_native, "the old workers have ended")
        assert not set(old) & set(app.nginx.workers())
        assert app.nginx.errors() == []


async def test_an_old_worker_counts_until_it_has_ended() -> None:
    async with edge(1, workers=1) as app:
        (only,) = app.backends
        await app.publish([server(only.port)])
        held = asyncio.create_task(app.get("/hold"))
        await eventually(lambda: only.holding, "a request is held")
        old = enlarge_tables(app)
        for number in range(3):
            await app.publish([server(only.port), server(1, key=f"new-{number}", state="drain")])
        assert (await app.counters()).native == {"app": 1}, "no server has the cell of the held request"
        only.release.set()
        assert (await held)[0] == 200
        await app.session.close()
        await eventually(lambda: not set(old) & set(app.nginx.workers()), "the old workers end")
        await app.publish([server(only.port)])
        assert (await app.counters()).native == {"app": 0}


async def test_a_publication_that_a_killed_worker_left_half_done_is_finished_by_the_next_try() -> None:
    forge = """location = /forge { content_by_lua_block {
        local stats = require("headgate.stats")
        stats.put_in_force(stats.table_number(), 1)
    } }"""
    async with edge(1, extra=forge) as app:
        (only,) = app.backends
        for _ in range(2):
            await app.publish([server(only.port)])
        await app.get("/forge")
        assert (await app.plane.status()).revision == 1, "the worker came as far as the table, not to its revision"
        app.revision = 1
        await app.publish([server(only.port)])
        assert (await app.plane.status()).revision == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format":2}', "directory", "unreadable"])
async def test_a_snapshot_that_cannot_be_used_is_reported_and_nginx_balances_natively(content: str) -> None:
    unprivileged = "nobody" if content == "unreadable" else None
    if unprivileged and os.geteuid() != 0:
        pytest.skip("needs root to run nginx as another user")
    nginx = Nginx("", user=unprivileged)
    if content == "directory":
        nginx.snapshot.mkdir()
    else:
        nginx.snapshot.write_text(content)
    if content == "unreadable":
        nginx.snapshot.chmod(0)
    with nginx:
        async with LuaPlane(nginx.socket, nginx.snapshot) as plane:
            assert (await plane.status()).revision == 0
        (line,) = [line for line in nginx.errors() if "snapshot" in line]
        assert "[error]" in line
        assert str(nginx.snapshot) in line


def test_nginx_starts_over_the_socket_that_a_killed_one_left() -> None:
    nginx = Nginx("")
    with nginx:
        nginx.stop(signal.SIGKILL)
        assert nginx.socket.exists()
        nginx.start()
        assert nginx.errors() == []


def test_a_socket_that_somebody_listens_on_is_left_alone() -> None:
    nginx = Nginx("")
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(nginx.socket))
            listener.listen()
            inode = nginx.socket.stat().st_ino
            assert nginx.test().returncode == 0
            with pytest.raises(RuntimeError, match="Address already in use"):
                nginx.start()
            assert nginx.socket.stat().st_ino == inode
    finally:
        nginx.close()


def test_testing_a_configuration_changes_nothing_on_disk() -> None:
    nginx = Nginx("")
    try:
        nginx.snapshot.write_text(json.dumps(table(1, [server(1)])))
        before = files(nginx.prefix)
        assert nginx.test().returncode == 0
        # The pid file and the directories for temporary files are nginx's own doing.
        assert files(nginx.prefix) - before <= {nginx.prefix / "nginx.pid", *(nginx.prefix / "temp").iterdir()}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(nginx.socket))
        inode = nginx.socket.stat().st_ino
        assert nginx.test().returncode == 0
        assert nginx.socket.stat().st_ino == inode
    finally:
        nginx.close()


def test_testing_a_configuration_beside_a_running_nginx_disturbs_nothing() -> None:
    with Nginx("") as nginx:
        inode = nginx.socket.stat().st_ino
        assert nginx.test().returncode == 0
        assert nginx.socket.stat().st_ino == inode


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run nginx as another user")
async def test_it_all_works_for_an_ordinary_user() -> None:
    user = "nobody"
    async with edge(1, user=user) as app:
        await app.publish([server(app.backends[0].port)])
        await app.shares(4, one_shot=True)
        assert (await app.settled(app.backends[0])).requests == 4
        assert {os.stat(f"/proc/{pid}").st_uid for pid in app.nginx.workers()} == {pwd.getpwnam(user).pw_uid}
        app.nginx.stop(signal.SIGKILL)
        app.nginx.snapshot.chmod(0o644)
        app.nginx.start()
        assert (await app.plane.status()).revision == 1


def test_the_example_is_a_configuration_that_nginx_accepts(tmp_path: Path) -> None:
    nginx = Nginx("")
    try:
        text = (ROOT / "nginx" / "example.conf").read_text()
        include = nginx.prefix / "headgate.conf"
        replaced = {
            "/usr/share/headgate/nginx/headgate.conf": f'"{include}"',
            "/etc/nginx/tls": str(tmp_path),
            "/var/log/nginx": str(tmp_path),
            "/run/nginx.pid": str(tmp_path / "nginx.pid"),
            "/usr/lib/nginx/modules": str(MODULES),
            "listen 80 ": f"listen 127.0.0.1:{free_port()} ",
            "listen 443 ": f"listen 127.0.0.1:{free_port()} ",
        }
        for old, new in replaced.items():
            assert old in text, f"the example does not mention {old}"
            text = text.replace(old, new)
        certificate(tmp_path)
        (nginx.prefix / "nginx.conf").write_text(text)
        done = nginx.test()
        assert done.returncode == 0, done.stderr
        assert "warn" not in done.stderr, done.stderr
    finally:
        nginx.close()


def certificate(directory: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (apt-get install openssl)")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=app.example"
    files = ["-keyout", str(directory / "app.key"), "-out", str(directory / "app.crt")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
