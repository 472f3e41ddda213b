"""Real gunicorn masters change their workers, are followed by a new master, and run commands between."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import psutil
import pytest

from controller.adapters import arbiter
from controller.adapters.process import Processes
from controller.core.policy import ProcessPolicy
from controller.ports import Check, ProcessError, Trial
from tests.support.gunicorn import WORKER_CLASSES, eventually, free_port, get, tcp
from tests.support.nginx import wait_until

BY_SOCKET = ProcessPolicy(start_timeout=15, margin=2)
TRIAL = Trial(Check(path="/"), rise=1, limit=15)


@pytest.fixture
def processes() -> Processes:
    return Processes()


async def found(server):
    master = await Processes().find("app", server, BY_SOCKET)
    assert master is not None
    return master


@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_a_reload_is_done_when_all_old_workers_have_ended_and_others_accept(gunicorns, processes, worker):
    server = tcp(free_port())
    gunicorns.master(server.address, worker=worker)
    await get(server)
    old = await found(server)
    asked = await processes.reload(old)
    assert asked == old
    new = await processes.renewed(asked, BY_SOCKET)
    assert (new.pid, len(new.workers)) == (old.pid, 2)
    assert not set(new.workers) & set(old.workers)
    assert await processes.renewed(asked, BY_SOCKET) == new, "it can be asked again after a crash"
    assert await get(server) == "200 done"


async def test_a_reload_to_code_that_does_not_load_ends_in_an_error_that_says_so(gunicorns, processes):
    application = gunicorns.directory / "shop.py"
    application.write_text("from tests.support.apps import wsgi\n")
    server = tcp(free_port())
    gunicorns.applications = "shop"
    gunicorns.master(server.address)
    await get(server)
    master = await found(server)
    application.write_text("raise RuntimeError('the new version does not load')\n")
    asked = await processes.reload(master)
    with pytest.raises(ProcessError, match=f"the master {master.pid} has ended"):
        await processes.renewed(asked, BY_SOCKET)
    with pytest.raises(ProcessError, match="has ended"):
        await processes.reload(master)


@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_an_upgrade_is_done_when_the_workers_of_the_new_master_accept(gunicorns, processes, worker):
    server = tcp(free_port())
    gunicorns.master(server.address, "--pid", "app.pid", worker=worker)
    policy = gunicorns.policy(pid_file="app.pid", start_timeout=8.0)
    await get(server)
    old = await found(server)
    new = await processes.upgrade(server, old, policy, TRIAL)
    assert new.pid == int((gunicorns.directory / "app.pid.2").read_text())
    assert len(new.workers) == 2
    assert (await processes.upgrade(server, old, policy, TRIAL)).pid == new.pid, "it can be asked again after a crash"
    await processes.terminate(old, policy)
    assert await processes.wait_exit(old, 15)
    assert await get(server) == "200 done"
    again = await processes.find("app", server, policy)
    assert again is not None
    assert again.pid == new.pid


async def test_an_upgrade_to_code_that_does_not_load_leaves_the_old_master_as_it_was(gunicorns, processes):
    application = gunicorns.directory / "shop.py"
    application.write_text("from tests.support.apps import wsgi\n")
    server = tcp(free_port())
    gunicorns.applications = "shop"
    gunicorns.master(server.address, "--pid", "app.pid")
    await get(server)
    old = await found(server)
    application.write_text("raise RuntimeError('the new version does not load')\n")
    with pytest.raises(ProcessError, match="ended before its workers accepted requests; the old one goes on"):
        await processes.upgrade(server, old, gunicorns.policy(pid_file="app.pid"), TRIAL)
    assert await get(server) == "200 done"
    assert await found(server) == old
    application.write_text("from tests.support.apps import wsgi\n")
    assert (await processes.upgrade(server, old, BY_SOCKET, TRIAL)).pid != old.pid, "and it can be tried again"


async def test_an_upgrade_that_gunicorn_itself_cannot_do_ends_at_once(gunicorns, processes):
    """gunicorn 27 hands its successor an empty list of sockets when they are its workers' own."""
    server = tcp(free_port())
    gunicorns.master(server.address, "--reuse-port")
    await get(server)
    old = await found(server)
    with pytest.raises(ProcessError, match="ended before its workers accepted requests; the old one goes on"):
        await processes.upgrade(server, old, ProcessPolicy(start_timeout=60), TRIAL)
    assert await get(server) == "200 done"


async def test_a_new_master_that_comes_and_goes_between_two_looks_is_missed_by_no_upgrade(
    gunicorns, processes, monkeypatch
):
    server = tcp(free_port())
    gunicorns.master(server.address, "--reuse-port")
    await get(server)
    old = await found(server)
    signalled = arbiter._signal

    def signal_and_stay_away(master, number):
        before = psutil.Process(master.pid).children()
        signalled(master, number)
        wait_until(lambda: "ValueError" in gunicorns.printed(), "the new master fails", 60)
        wait_until(lambda: psutil.Process(master.pid).children() == before, "the old one has seen its end")

    monkeypatch.setattr(arbiter, "_signal", signal_and_stay_away)
    with pytest.raises(ProcessError, match="the new master ended before its workers accepted requests"):
        await processes.upgrade(server, old, ProcessPolicy(start_timeout=11), TRIAL)
    assert await get(server) == "200 done"


async def test_an_upgrade_that_would_hide_a_module_of_python_is_refused(gunicorns, processes):
    server = tcp(free_port())
    gunicorns.run("env", "-u", "PYTHONSAFEPATH", *gunicorns.command(server.address))
    await eventually(lambda: "Booting worker" in gunicorns.printed(), "gunicorn")
    old = await found(server)
    with pytest.raises(ProcessError, match="was started as `python -m gunicorn`") as refused:
        await processes.upgrade(server, old, BY_SOCKET, TRIAL)
    assert "PYTHONSAFEPATH" in refused.value.remedy
    assert await found(server) == old


async def test_a_new_master_whose_workers_never_come_up_is_ended(gunicorns, processes):
    application = gunicorns.directory / "shop.py"
    application.write_text("from tests.support.apps import wsgi\n")
    server = tcp(free_port())
    gunicorns.applications = "shop"
    gunicorns.master(server.address)
    await get(server)
    old = await found(server)
    application.write_text("import time\ntime.sleep(600)\n")
    before = gunicorns.alive()
    with pytest.raises(ProcessError, match=r"has made no new master that serves .* within 2 s"):
        await processes.upgrade(server, old, ProcessPolicy(start_timeout=2, margin=1), TRIAL)
    assert gunicorns.alive() == before
    assert await get(server) == "200 done"


@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_a_master_is_brought_to_more_and_to_fewer_workers(gunicorns, processes, worker):
    server = tcp(free_port())
    gunicorns.master(server.address, worker=worker)
    await get(server)
    master = await found(server)
    assert len((await processes.scale(master, 4, BY_SOCKET)).workers) == 4
    assert len((await processes.scale(master, 4, BY_SOCKET)).workers) == 4
    slow = asyncio.ensure_future(get(server, "/slow?1"))
    await gunicorns.inside("/slow")
    assert len((await processes.scale(master, 1, BY_SOCKET)).workers) == 1
    assert await slow == "200 done"
    assert len(psutil.Process(master.pid).children()) == 1


async def test_the_end_of_a_master_is_seen_at_once(gunicorns, processes):
    server = tcp(free_port())
    gunicorns.master(server.address)
    master = await found(server)
    assert not await processes.ended(master, 0.1)
    watching = asyncio.ensure_future(processes.ended(master, 30))
    os.kill(master.pid, signal.SIGKILL)
    assert await watching


async def test_a_command_has_placeholders_filled_and_its_error_says_what_it_printed(gunicorns, processes):
    server = tcp(8001)
    policy = gunicorns.policy(deploy_timeout=20.0)
    words = (sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])")
    await processes.run((*words, "{port}.txt", "{upstream} {address}"), "app", server, policy, "one")
    assert (gunicorns.directory / "8001.txt").read_text() == "app 127.0.0.1:8001"
    failing = (sys.executable, "-c", "print('no such release'); raise SystemExit(3)")
    with pytest.raises(ProcessError, match=r"(?s)ended with exit status 3; it printed: no such release"):
        await processes.run(failing, "app", server, policy, "two")
    with pytest.raises(ProcessError, match="No such file"):
        await processes.run(("/no/such/command",), "app", server, policy, "three")


async def test_a_command_that_does_not_end_is_ended_with_all_that_it_started(gunicorns, processes):
    policy = gunicorns.policy(deploy_timeout=1.0)
    hanging = ("sh", "-c", "sleep 600 & echo begun; sleep 600")
    with pytest.raises(ProcessError, match=r"(?s)did not end within 1 s; it printed: begun"):
        await processes.run(hanging, "app", tcp(8001), policy, "four")
    assert not gunicorns.alive()


async def test_a_command_that_a_dead_daemon_left_is_ended_before_it_is_run_again(gunicorns, processes):
    policy = gunicorns.policy(deploy_timeout=20.0)
    first = asyncio.ensure_future(processes.run(("sleep", "600"), "app", tcp(8001), policy, "the same"))
    await eventually(lambda: bool(gunicorns.alive()), "the command")
    left = gunicorns.alive()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert gunicorns.alive() == left, "it goes on without the daemon"
    await Processes().run(("true",), "app", tcp(8001), policy, "the same")
    assert not gunicorns.alive() & left
