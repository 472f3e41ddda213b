"""A new version that boots and is no good: its master goes, and the old one has never stopped serving."""

from __future__ import annotations

import os
import signal
import socket
import sys

import pytest

from controller.adapters import trial
from controller.adapters.process import Processes
from controller.core.policy import ProcessPolicy
from controller.ports import Check, ProcessError, Trial
from tests.support.gunicorn import SYNC, UVICORN, WORKER_CLASSES, eventually, free_port, get, tcp, unix

POLICY = ProcessPolicy(start_timeout=15, margin=2)
CHECK = Check(path="/check", timeout=5.0)
OLD = "from tests.support.apps import asgi, wsgi\n"
# Answers `status()` at /check, and says so nowhere: what the old version was asked stands in `seen`.
NEW = """
from tests.support import apps

def status():
    {status}

def wsgi(environ, start_response):
    if environ["PATH_INFO"] != "/check":
        return apps.wsgi(environ, start_response)
    start_response(f"{{status()}} X", [("Content-Length", "3")])
    return [b"new"]

async def asgi(scope, receive, send):
    if scope.get("path") != "/check":
        return await apps.asgi(scope, receive, send)
    await send({{"type": "http.response.start", "status": status(), "headers": [(b"content-length", b"3")]}})
    await send({{"type": "http.response.body", "body": b"new"}})
"""
SICK = NEW.format(status="return 500")
SLOW_TO_HEAL = NEW.format(status="import os; return 200 if os.path.exists('healed') else 503")


@pytest.fixture
def processes() -> Processes:
    return Processes()


async def upgraded_to(
    version, gunicorns, processes, server, worker=SYNC, check=CHECK, limit=8.0, rise=3, python=sys.executable
):
    """The old master and what an upgrade to this version makes of it: the new master, or the error."""
    (gunicorns.directory / "shop.py").write_text(OLD)
    gunicorns.applications = "shop"
    gunicorns.run(*gunicorns.command(server.address, "--workers", "2", worker=worker, python=python))
    await eventually(lambda: gunicorns.printed().count("Booting worker") >= 2, "the old version")
    assert await get(server) == "200 done"
    old = await processes.find("app", server, POLICY)
    (gunicorns.directory / "shop.py").write_text(version)
    try:
        return old, await processes.upgrade(server, old, POLICY, Trial(check, rise, limit))
    except ProcessError as error:
        return old, error


def asked_of_the_old(gunicorns) -> int:
    return gunicorns.seen.read_text().split().count("/check")


@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_a_version_that_boots_and_fails_its_check_is_ended_and_the_old_one_goes_on(gunicorns, processes, worker):
    server = tcp(free_port())
    old, error = await upgraded_to(SICK, gunicorns, processes, server, worker)
    assert isinstance(error, ProcessError), error
    assert error.message.endswith("do not pass the check within 8 s: status 500")
    assert asked_of_the_old(gunicorns) == 0, "only workers of the new master were asked"
    assert gunicorns.alive() == {old.pid, *(pid for pid, _ in old.workers)}
    assert await processes.find("app", server, POLICY) == old
    assert await get(server) == "200 done"


@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_a_version_that_passes_its_check_is_asked_alone(gunicorns, processes, worker):
    server = tcp(free_port())
    check = Check(path="/check", timeout=5.0, body="new")
    old, new = await upgraded_to(NEW.format(status="return 200"), gunicorns, processes, server, worker, check, 20.0, 8)
    assert not isinstance(new, ProcessError), new
    assert new.pid != old.pid
    assert asked_of_the_old(gunicorns) == 0


@pytest.mark.parametrize("worker", [SYNC, UVICORN])
async def test_the_same_on_a_unix_socket(gunicorns, processes, worker):
    server = unix(gunicorns.directory / "app.sock")
    old, error = await upgraded_to(SICK, gunicorns, processes, server, worker)
    assert isinstance(error, ProcessError), error
    assert error.message.endswith("within 8 s: status 500")
    assert asked_of_the_old(gunicorns) == 0
    assert gunicorns.alive() == {old.pid, *(pid for pid, _ in old.workers)}
    assert await get(server) == "200 done", "the socket's file is still there"


async def test_a_version_that_takes_its_time_is_waited_for(gunicorns, processes, monkeypatch):
    server = tcp(free_port())
    asked = 0
    really = trial.ask

    async def ask(endpoint):
        nonlocal asked
        asked += 1
        if asked == 3:
            (gunicorns.directory / "healed").touch()
        return await really(endpoint)

    monkeypatch.setattr(trial, "ask", ask)
    _, new = await upgraded_to(SLOW_TO_HEAL, gunicorns, processes, server, limit=20.0)
    assert not isinstance(new, ProcessError), new
    assert asked == 5, "two that failed, and three in a row that passed"


async def test_a_new_master_that_ends_on_trial_is_no_success(gunicorns, processes, monkeypatch):
    server = tcp(free_port())
    version = NEW.format(status="return 200") + "\nimport os\nopen('pids', 'a').write(f'{os.getppid()} ')\n"

    async def kill(endpoint):
        pids = {int(pid) for pid in (gunicorns.directory / "pids").read_text().split()}
        (master,) = pids
        os.kill(master, signal.SIGKILL)
        await eventually(lambda: master not in gunicorns.alive(), "its end")
        raise ConnectionResetError

    monkeypatch.setattr(trial, "ask", kill)
    old, error = await upgraded_to(version, gunicorns, processes, server, UVICORN, limit=20.0)
    assert isinstance(error, ProcessError), error
    assert error.message.endswith("has ended")
    assert gunicorns.alive() == {old.pid, *(pid for pid, _ in old.workers)}, "its workers are ended, too"
    assert await get(server) == "200 done"


async def test_a_check_that_another_process_answers_says_nothing_about_a_version(gunicorns, processes):
    server, other = tcp(free_port()), free_port()
    gunicorns.run(sys.executable, "-m", "http.server", "-b", "127.0.0.1", str(other))
    await eventually(lambda: "Serving HTTP" in gunicorns.printed() or answers(other), "http.server")
    check = Check(path="/no-such-file", port=other, timeout=5.0)
    _, new = await upgraded_to(SICK, gunicorns, processes, server, check=check)
    assert not isinstance(new, ProcessError), new


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_older_versions_stand_trial_too(gunicorns, processes, older_python, worker):
    server = tcp(free_port())
    old, error = await upgraded_to(SICK, gunicorns, processes, server, worker, python=older_python)
    assert isinstance(error, ProcessError), error
    assert error.message.endswith("within 8 s: status 500")
    assert asked_of_the_old(gunicorns) == 0
    assert gunicorns.alive() == {old.pid, *(pid for pid, _ in old.workers)}
