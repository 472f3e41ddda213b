"""Real gunicorn masters with the hooks, and a daemon that says what the test wants: what TERM brings about."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from controller.integration.gunicorn import _address, configure
from tests.adapters.conftest import older_python
from tests.integration.conftest import Daemon
from tests.support.gunicorn import GTHREAD, SYNC, Gunicorns, eventually, free_port, get, tcp

__all__ = ["older_python"]
UVICORN = "controller.integration.worker.UvicornWorker"
CLASSES = (SYNC, GTHREAD, UVICORN)
CONF = """
def on_exit(server): print("the user's own hook has run", flush=True)
def when_ready(server): print("ready as the user said", flush=True)
from controller.integration.gunicorn import configure
configure(globals(), headgate={headgate!r}, {options})
"""


class Site:
    """One gunicorn server beside a daemon."""

    def __init__(self, gunicorns: Gunicorns, daemon: Daemon) -> None:
        self.gunicorns, self.daemon = gunicorns, daemon
        self.server = tcp(free_port())
        self.conf = gunicorns.directory / "conf.py"
        self.master: subprocess.Popen[bytes]

    def configure(self, options: str = "") -> None:
        self.conf.write_text(CONF.format(headgate=self.daemon.socket, options=options))

    async def start(self, worker: str, *more: str, options: str = "", workers: int = 2, **how: Any) -> None:
        self.configure(options)
        command = ["--config", str(self.conf), "--workers", str(workers), "--timeout", "60", *more]
        command += ["--threads", "4"] * (worker == GTHREAD)
        python, _, _, *arguments = self.gunicorns.command(self.server.address, *command, worker=worker, **how)
        # The script, since USR2 runs the file that `-m` names, and beside it the standard library's `http` is hidden.
        self.master = self.gunicorns.run(python, str(Path(python).with_name("gunicorn")), *arguments)
        await self.logged("is online" if self.daemon.running() else "could not be announced")

    async def logged(self, text: str, times: int = 1) -> None:
        await eventually(lambda: self.gunicorns.printed().count(text) >= times, f"{text!r} in the log")

    async def request(self, method: str = "GET", path: str = "/") -> tuple[int, dict[str, str]]:
        url = f"http://{self.server.address}{path}"
        async with aiohttp.ClientSession() as session, session.request(method, url, data=b"x" * 9) as answer:
            await answer.read()
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}

    async def ended(self) -> int:
        return await asyncio.to_thread(self.master.wait, 20)


@pytest.fixture
def site(tmp_path: Path, daemon: Daemon) -> Iterator[Site]:
    gunicorns = Gunicorns(tmp_path, "tests.integration.apps")
    yield Site(gunicorns, daemon)
    gunicorns.close()
    assert not gunicorns.alive()


def held(daemon: Daemon) -> Callable[[], None]:
    """Let nginx have requests there until the function that this returns is called."""
    drained = threading.Event()

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"drained": drained.wait(body.get("wait", 0))}

    daemon.answer = answer
    return drained.set


@pytest.mark.parametrize("worker", CLASSES)
async def test_a_bare_term_ends_nothing_before_nginx_has_let_go(site: Site, worker: str) -> None:
    let_go = held(site.daemon)
    await site.start(worker)
    assert site.daemon.calls == [("/v1/online", {"server": site.server.address, "upstream": None})]
    site.master.terminate()
    await eventually(lambda: len(site.daemon.calls) >= 3, "the notice and the wait")
    psutil.Process(site.master.pid).children()[0].kill()
    await site.logged("Booting worker", 3)  # the master still cares for its workers
    for method in ("GET", "POST"):
        status, headers = await site.request(method)
        assert (status, headers.get("x-headgate-offline")) == (200, None)

    slow = asyncio.create_task(get(site.server, "/slow?1"))
    await site.gunicorns.inside("/slow")
    let_go()
    assert await slow == "200 done"
    assert await site.ended() == 0
    (first, *others) = [body for path, body in site.daemon.calls if path == "/v1/offline"]
    assert first == {
        "server": site.server.address,
        "upstream": None,
        "id": first["id"],
        "seconds": None,
        "why": f"gunicorn master {site.master.pid} got TERM",
        "wait": 0.0,
    }
    assert {body["id"] for body in others} == {first["id"]}
    printed = site.gunicorns.printed()
    assert f"headgate: {site.server.address} is offline, and empty after" in printed
    assert "ready as the user said" in printed
    assert "the user's own hook has run" in printed


async def test_a_server_that_is_drained_already_goes_at_once(site: Site) -> None:
    await site.start(SYNC)
    site.master.terminate()
    assert await site.ended() == 0
    assert [body["wait"] for path, body in site.daemon.calls if path == "/v1/offline"] == [0.0]
    assert "empty after 0.0 s" in site.gunicorns.printed()


@pytest.mark.parametrize("worker", CLASSES)
async def test_without_headgate_the_server_says_itself_that_it_goes(site: Site, worker: str) -> None:
    site.daemon.stop()
    await site.start(worker, options="grace=4.0")
    site.master.terminate()
    await site.logged("goes offline without Headgate: no answer at")
    status, headers = await site.request()
    assert (status, headers["x-headgate-offline"], headers["retry-after"]) == (503, "1", "1")
    assert headers["connection"] == "close" or worker == GTHREAD
    status, headers = await site.request("POST")
    assert (status, headers["x-headgate-offline"]) == (200, "1")
    assert await site.ended() == 0


async def test_a_request_from_before_the_flag_ends_well_and_is_marked(site: Site) -> None:
    site.daemon.stop()
    await site.start(UVICORN, options="grace=1.0")
    slow = asyncio.create_task(site.request(path="/slow?2"))
    await site.gunicorns.inside("/slow")
    site.master.terminate()
    status, headers = await slow
    assert (status, headers["x-headgate-offline"]) == (200, "1")
    assert await site.ended() == 0


async def test_an_unknown_server_and_a_daemon_that_fails_are_said_in_gunicorn_s_log(site: Site) -> None:
    error = {"code": "not_found", "message": "no server 127.0.0.1:1", "remedy": "app has 127.0.0.1:2"}
    site.daemon.answer = lambda path, body: (404, {"error": error}) if path == "/v1/offline" else (500, b"<html>")
    site.configure()
    site.master = site.gunicorns.run(
        *site.gunicorns.command(site.server.address, "--config", str(site.conf), worker=SYNC)
    )
    await site.logged(f"headgate: {site.server.address} could not be announced: no answer at {site.daemon.socket}: Exp")
    site.master.terminate()
    assert await site.ended() == 0
    assert "goes offline without Headgate: no server 127.0.0.1:1; app has 127.0.0.1:2" in site.gunicorns.printed()


async def test_of_several_addresses_it_is_enough_that_headgate_knows_one(site: Site) -> None:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["server"] == "unix:/unknown":
            return 404, {"error": {"code": "not_found", "message": "no server unix:/unknown"}}
        return 200, {"drained": True}

    site.daemon.answer = answer
    await site.start(SYNC, options=f"server=['unix:/unknown', {site.server.address!r}], grace=60")
    site.master.terminate()
    assert await site.ended() == 0
    assert f"{site.server.address} is offline, and empty" in site.gunicorns.printed()


async def test_where_no_other_server_serves_nobody_is_refused(site: Site) -> None:
    await site.start(SYNC, options="grace=60.0")
    site.daemon.answer = lambda path, body: (409, {"error": {"code": "guard", "message": "it is the last"}})
    site.master.terminate()
    assert await site.ended() == 0
    assert "goes offline without Headgate: it is the last" in site.gunicorns.printed()


async def test_a_daemon_that_dies_once_it_has_been_told_is_waited_for_no_longer_than_asked(site: Site) -> None:
    held(site.daemon)
    await site.start(SYNC, options="wait=1.5")
    site.master.terminate()
    await eventually(lambda: "/v1/offline" in site.daemon.paths(), "the notice")
    site.daemon.stop()
    assert await site.ended() == 0
    assert "is offline, but still has requests after" in site.gunicorns.printed()


async def test_a_second_term_changes_nothing_and_quit_ends_at_once(site: Site) -> None:
    held(site.daemon)
    await site.start(SYNC, options="wait=60")
    site.master.terminate()
    await eventually(lambda: "/v1/offline" in site.daemon.paths(), "the notice")
    site.master.terminate()
    await site.logged("already waiting for nginx; INT or QUIT ends at once")
    assert await get(site.server) == "200 done"
    site.master.send_signal(signal.SIGQUIT)
    assert await site.ended() == 0
    assert "but still has requests" not in site.gunicorns.printed()


async def test_hup_takes_new_options_and_announces_nothing(site: Site) -> None:
    await site.start(SYNC)
    before = {child.pid for child in psutil.Process(site.master.pid).children()}
    site.configure("server='127.0.0.9:80', upstream='app'")
    site.master.send_signal(signal.SIGHUP)
    await eventually(
        lambda: (
            len(after := {child.pid for child in psutil.Process(site.master.pid).children()}) == 2
            and not after & before
        ),
        "new workers",
    )
    assert site.daemon.paths() == ["/v1/online"]
    assert "x-headgate-offline" not in (await site.request())[1]
    site.master.terminate()
    assert await site.ended() == 0
    (body,) = [body for path, body in site.daemon.calls if path == "/v1/offline"]
    assert (body["server"], body["upstream"]) == ("127.0.0.9:80", "app")


@pytest.mark.parametrize("goes", ["old", "new"])
async def test_of_two_masters_the_one_that_stays_says_that_the_server_is_there(site: Site, goes: str) -> None:
    await site.start(GTHREAD, "--pid", str(site.gunicorns.directory / "app.pid"))
    let_go = held(site.daemon)
    os.kill(site.master.pid, signal.SIGUSR2)
    await site.logged("Booting worker", 4)
    new = int((site.gunicorns.directory / "app.pid.2").read_text())
    os.kill(site.master.pid if goes == "old" else new, signal.SIGTERM)
    await eventually(lambda: "/v1/offline" in site.daemon.paths(), "the notice")
    assert site.daemon.paths().count("/v1/online") == 1
    let_go()
    await eventually(lambda: site.daemon.paths().count("/v1/online") == 2, "the one that stays")
    assert psutil.pid_exists(new) == (goes == "old")
    assert {(await site.request())[0] for _ in range(4)} == {200}


async def test_gunicorn_s_graceful_timeout_reaches_uvicorn(site: Site) -> None:
    await site.start(UVICORN, "--graceful-timeout", "2", workers=1)
    hanging = asyncio.create_task(get(site.server, "/hang"))
    await site.gunicorns.inside("/hang")
    site.master.terminate()
    assert await site.ended() == 0
    await asyncio.gather(hanging, return_exceptions=True)
    printed = site.gunicorns.printed()
    assert "timeout graceful shutdown exceeded" in printed
    assert "SIGKILL" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("worker", CLASSES)
async def test_older_versions_of_gunicorn_do_the_same(site: Site, older_python: str, worker: str) -> None:
    let_go = held(site.daemon)
    await site.start(worker, python=older_python)
    site.master.terminate()
    await eventually(lambda: len(site.daemon.calls) >= 3, "the notice and the wait")
    assert await get(site.server) == "200 done"
    for _ in range(6):  # gunicorn before 25 keeps no more than five signals
        site.master.terminate()
    let_go()
    assert await site.ended() == 0
    assert f"headgate: {site.server.address} is offline, and empty after" in site.gunicorns.printed()


def test_addresses_are_written_as_nginx_conf_writes_them() -> None:
    bound: list[tuple[Any, ...] | str] = [("127.0.0.1", 1), ("0.0.0.0", 2), ("::", 3, 0, 0), ("::1", 4, 0, 0), "/run/a"]
    assert [*map(_address, bound)] == ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "[::1]:4", "unix:/run/a"]


def test_hooks_that_stand_there_already_are_kept() -> None:
    ran: list[object] = []
    namespace: dict[str, Any] = {"post_worker_init": ran.append}
    configure(namespace)

    class Worker:
        ppid = os.getpid()

    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    worker = Worker()
    namespace["post_worker_init"](worker)
    signal.signal(signal.SIGCHLD, before)
    assert ran == [worker]
