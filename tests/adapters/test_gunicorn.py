"""Real gunicorn masters: found, told to finish, killed and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace

import psutil
import pytest

from controller.adapters.process import NotListening, Processes
from controller.core.policy import ProcessPolicy
from controller.ports import ProcessError
from tests.support.gunicorn import (
    UVICORN,
    WORKER_CLASSES,
    eventually,
    free_port,
    get,
    tcp,
    unix,
)

BY_SOCKET = ProcessPolicy()


@pytest.fixture
def processes() -> Processes:
    return Processes()


def children(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children()}


@pytest.mark.parametrize("worker", WORKER_CLASSES)
@pytest.mark.parametrize("options", [(), ("--reuse-port",)], ids=["one-socket", "reuse-port"])
async def test_the_master_and_its_workers_are_found_by_the_socket(gunicorns, processes, worker, options):
    server = tcp(free_port())
    child = gunicorns.master(server.address, *options, worker=worker)
    await get(server)
    master = await processes.find("app", server, BY_SOCKET)
    assert master is not None
    assert (master.pid, master.unit) == (child.pid, None)
    assert {pid for pid, _ in master.workers} == children(child.pid)
    assert master.executable == psutil.Process(child.pid).exe()


async def test_a_master_is_found_by_a_unix_socket_through_a_link_and_by_its_relative_path(gunicorns, processes):
    gunicorns.directory.joinpath("run").mkdir()
    gunicorns.directory.joinpath("link").symlink_to("run")
    child = gunicorns.master(f"unix:{gunicorns.directory}/run/app.sock", "--bind", "unix:run/relative.sock")
    for path in ("run/app.sock", "link/app.sock", "run/relative.sock"):
        server = unix(gunicorns.directory / path)
        assert await get(server) == "200 done"
        master = await processes.find("app", server, BY_SOCKET)
        assert master is not None, path
        assert master.pid == child.pid
    assert await processes.find("app", unix(gunicorns.directory / "relative.sock"), BY_SOCKET) is None


@pytest.mark.parametrize(
    ("bind", "ip"), [("0.0.0.0", "127.0.0.1"), ("[::]", "::1"), ("[::]", "127.0.0.1"), ("[::1]", "::1")]
)
async def test_a_master_that_binds_all_addresses_serves_each_of_them(gunicorns, processes, bind, ip):
    port = free_port()
    child = gunicorns.master(f"{bind}:{port}", workers=1)
    master = await processes.find("app", tcp(port, ip), BY_SOCKET)
    assert master is not None
    assert master.pid == child.pid


async def test_a_socket_of_the_very_address_comes_before_one_for_all_addresses(gunicorns, processes):
    port = free_port()
    everywhere = gunicorns.master(f"0.0.0.0:{port}", "--reuse-port", workers=1)
    here = gunicorns.run(*gunicorns.command(f"127.0.0.1:{port}", "--reuse-port"))
    await eventually(lambda: gunicorns.printed().count("Booting worker") == 2, "the second master")
    for ip, child in (("127.0.0.1", here), ("127.0.0.2", everywhere)):
        await get(tcp(port, ip))
        master = await processes.find("app", tcp(port, ip), BY_SOCKET)
        assert master is not None
        assert master.pid == child.pid


async def test_a_master_is_found_by_its_pid_file(gunicorns, processes):
    server = tcp(free_port())
    child = gunicorns.master(server.address, "--pid", f"app-{server.port}.pid")
    master = await processes.find("app", server, gunicorns.policy(pid_file="{upstream}-{port}.pid"))
    assert master is not None
    assert master.pid == child.pid


async def test_a_stale_pid_file_does_not_hide_a_master_that_listens(gunicorns, processes):
    server = tcp(free_port())
    gone = gunicorns.run("true")
    gone.wait(10)
    (gunicorns.directory / "app.pid").write_text(f"{gone.pid}\n")
    policy = gunicorns.policy(pid_file="app.pid")
    assert await processes.find("app", server, policy) is None
    child = gunicorns.master(server.address, workers=1)
    master = await processes.find("app", server, policy)
    assert master is not None
    assert master.pid == child.pid


async def test_a_master_with_a_title_is_found(gunicorns, processes):
    server = tcp(free_port())
    (gunicorns.directory / "setproctitle.py").write_text(
        "import ctypes\n"
        "def getproctitle(): return ''\n"
        "def setproctitle(title): ctypes.CDLL(None).prctl(15, title.encode()[:15], 0, 0, 0)\n"
    )
    child = gunicorns.run("env", f"PYTHONPATH={gunicorns.directory}:{os.getcwd()}", *gunicorns.command(server.address))
    await eventually(lambda: gunicorns.printed().count("Booting worker") == 1, "gunicorn")
    assert psutil.Process(child.pid).name().startswith("gunicorn: maste")
    master = await processes.find("app", server, BY_SOCKET)
    assert master is not None
    assert master.pid == child.pid


async def test_a_server_that_the_application_runs_is_not_traced_back_to_the_application(gunicorns, processes):
    server, own = tcp(free_port()), tcp(free_port())
    config = gunicorns.directory / "conf.py"
    config.write_text(
        "import subprocess, sys\n"
        "def post_worker_init(worker):\n"
        f"    subprocess.Popen([sys.executable, '-m', 'http.server', '-b', '127.0.0.1', '{own.port}'])\n"
    )
    gunicorns.master(server.address, "--config", str(config), workers=1)
    await eventually(lambda: "Serving HTTP" in gunicorns.printed() or listens(own.port), "http.server")
    with pytest.raises(ProcessError, match=r"http\.server.*which is no gunicorn master"):
        await processes.find("app", own, BY_SOCKET)


def listens(port: int) -> bool:
    return any(c.laddr and c.laddr.port == port and c.status == "LISTEN" for c in psutil.net_connections("tcp"))


@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_a_terminated_master_finishes_the_request_in_flight(gunicorns, processes, worker):
    server = tcp(free_port())
    child = gunicorns.master(server.address, worker=worker)
    master = await processes.find("app", server, BY_SOCKET)
    assert master is not None
    slow = asyncio.ensure_future(get(server, "/slow?1.5"))
    await gunicorns.inside("/slow")
    await processes.terminate(master, BY_SOCKET)
    assert not await processes.wait_exit(master, 0.1)
    await processes.terminate(master, BY_SOCKET)
    assert await processes.wait_exit(master, 15)
    assert await slow == "200 done"
    assert child.wait(1) == 0
    assert not gunicorns.alive()
    await processes.terminate(master, BY_SOCKET)
    assert await processes.kill(master, BY_SOCKET) == ()
    assert await processes.find("app", server, BY_SOCKET) is None


@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_a_master_and_workers_that_hang_are_killed(gunicorns, processes, worker):
    server = tcp(free_port())
    gunicorns.master(server.address, worker=worker)
    master = await processes.find("app", server, BY_SOCKET)
    assert master is not None
    hanging = asyncio.ensure_future(get(server, "/hang"))
    await gunicorns.inside("/hang")
    await processes.terminate(master, BY_SOCKET)
    assert not await processes.wait_exit(master, 0.5)
    killed = await processes.kill(master, BY_SOCKET)
    assert killed[0] == master.pid
    assert set(killed) <= {master.pid, *(pid for pid, _ in master.workers)}
    assert len(killed) >= 2
    assert not gunicorns.alive()
    assert await processes.wait_exit(master, 0)
    with pytest.raises((ConnectionError, AssertionError)):
        assert await hanging == "200 done"


async def test_workers_that_came_after_the_master_was_found_are_waited_for_and_killed(gunicorns, processes):
    server = tcp(free_port())
    gunicorns.master(server.address, workers=1)
    master = await processes.find("app", server, BY_SOCKET)
    assert master is not None
    os.kill(master.pid, signal.SIGTTIN)
    await eventually(lambda: len(children(master.pid)) == 2, "a second worker")
    late = children(master.pid) - {pid for pid, _ in master.workers}
    assert late < set(await processes.kill(master, BY_SOCKET))
    assert not gunicorns.alive()


async def test_workers_whose_master_was_killed_are_killed_by_a_later_life_of_the_daemon(gunicorns):
    server = tcp(free_port())
    gunicorns.master(server.address, worker=UVICORN)
    master = await Processes().find("app", server, BY_SOCKET)
    assert master is not None
    hanging = [asyncio.ensure_future(get(server, "/hang")) for _ in range(4)]
    await gunicorns.inside("/hang", 4)
    os.kill(master.pid, signal.SIGKILL)
    await eventually(lambda: master.pid not in gunicorns.alive(), "the master's end")
    orphans = gunicorns.alive()
    assert orphans == {pid for pid, _ in master.workers}, "uvicorn's workers do not look after their master"
    with pytest.raises(ProcessError, match="which is no gunicorn master"):
        await Processes().find("app", server, BY_SOCKET)
    assert set(await Processes().kill(master, BY_SOCKET)) == orphans
    assert not gunicorns.alive()
    await asyncio.gather(*hanging, return_exceptions=True)


async def test_a_master_that_stops_is_told_from_one_that_does_not_run(gunicorns, processes):
    server = tcp(free_port())
    gunicorns.master(server.address, "--pid", "app.pid", worker=UVICORN)  # closes its listener first, others last
    policy = gunicorns.policy(pid_file="app.pid")
    master = await processes.find("app", server, policy)
    assert master is not None
    hanging = asyncio.ensure_future(get(server, "/hang"))
    await gunicorns.inside("/hang")
    await processes.terminate(master, policy)
    await eventually(lambda: not listens(server.port), "the listeners closed")
    with pytest.raises(NotListening, match=rf"pid {master.pid} in .*app\.pid does not listen on {server.address}"):
        await processes.find("app", server, policy)
    await processes.kill(master, policy)
    await asyncio.gather(hanging, return_exceptions=True)


async def test_two_masters_during_an_upgrade_are_refused_and_the_last_one_is_found(gunicorns, processes):
    server = tcp(free_port())
    old = gunicorns.master(server.address, "--pid", "app.pid")
    policy = gunicorns.policy(pid_file="app.pid")
    found = await processes.find("app", server, policy)
    assert found is not None
    os.kill(old.pid, signal.SIGUSR2)
    await eventually(lambda: gunicorns.printed().count("Booting worker") == 4, "the new master's workers")
    new = int((gunicorns.directory / "app.pid.2").read_text())
    for some in (policy, BY_SOCKET):
        with pytest.raises(ProcessError, match=f"pid {old.pid} .*pid {new} .*more than one gunicorn master") as refused:
            await processes.find("app", server, some)
        assert "USR2" in refused.value.remedy
    await processes.terminate(found, policy)
    assert await processes.wait_exit(found, 15), "the new master is no worker of the old one"
    assert old.wait(5) == 0
    for some in (policy, BY_SOCKET):
        master = await processes.find("app", server, some)
        assert master is not None
        assert master.pid == new


@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_a_started_master_serves_and_can_be_started_again(gunicorns, processes, worker):
    server = tcp(free_port())
    command = gunicorns.command("{host}:{port}", "--name", "{upstream} {literal}", worker=worker)
    policy = gunicorns.policy(*command, log="{upstream}-{port}.log")
    first = await processes.start("app", server, policy)
    assert await get(server) == "200 done"
    assert await processes.start("app", server, policy) == replace(first, workers=(await found(server)).workers)
    assert "Listening at" in (gunicorns.directory / f"app-{server.port}.log").read_text()
    assert "app {literal}" in psutil.Process(first.pid).cmdline()
    assert os.getsid(first.pid) == first.pid
    await processes.terminate(first, policy)
    assert await processes.wait_exit(first, 15)
    assert not psutil.pid_exists(first.pid), "it was reaped"
    second = await processes.start("app", server, policy)
    assert second.pid != first.pid
    assert await get(server) == "200 done"


async def found(server):
    master = await Processes().find("app", server, BY_SOCKET)
    assert master is not None
    return master


async def test_a_master_that_goes_into_the_background_is_waited_for(gunicorns, processes):
    server = tcp(free_port())
    policy = gunicorns.policy(*gunicorns.command("{address}", "--daemon", "--pid", "app.pid"), pid_file="app.pid")
    master = await processes.start("app", server, policy)
    assert await get(server) == "200 done"
    assert master.pid == int((gunicorns.directory / "app.pid").read_text())


async def test_a_master_that_cannot_load_its_settings_tells_why(gunicorns, processes):
    server = tcp(free_port())
    policy = gunicorns.policy(*gunicorns.command("{address}", "--workers", "many"))
    with pytest.raises(ProcessError, match=r"(?s)ended with exit status [12] before it listened.*invalid int.*many"):
        await processes.start("app", server, policy)


async def test_a_start_on_an_address_that_another_program_holds_is_refused_at_once(gunicorns, processes):
    server = tcp(free_port())
    holder = gunicorns.run(sys.executable, "-m", "http.server", "-b", "127.0.0.1", str(server.port))
    await eventually(lambda: listens(server.port), "http.server")
    before = gunicorns.alive()
    with pytest.raises(ProcessError, match=rf"held by pid {holder.pid} \(`.*http\.server"):
        await processes.start("app", server, gunicorns.policy(*gunicorns.command("{address}")))
    assert gunicorns.alive() == before


async def test_a_start_that_another_life_of_the_daemon_began_is_waited_for(gunicorns, processes):
    server = tcp(free_port())
    config = gunicorns.directory / "conf.py"
    config.write_text("import time\ndef on_starting(server): time.sleep(1)\n")
    command = gunicorns.command(server.address, "--pid", "app.pid", "--config", str(config))
    policy = gunicorns.policy(*command, pid_file="app.pid")
    earlier = gunicorns.run(*command)
    await eventually((gunicorns.directory / "app.pid").exists, "the pid file")
    assert not listens(server.port)
    assert (await processes.start("app", server, policy)).pid == earlier.pid


@pytest.mark.parametrize("options", [(), ("--reuse-port",)], ids=["one-socket", "reuse-port"])
async def test_a_start_of_another_life_that_nothing_points_to_is_ended_and_begun_anew(gunicorns, processes, options):
    server = tcp(free_port())
    config = gunicorns.directory / "conf.py"
    config.write_text(
        "import os, time\ndef on_starting(server):\n    while not os.path.exists('go'): time.sleep(0.02)\n"
    )
    policy = gunicorns.policy(*gunicorns.command(server.address, "--config", str(config), *options))
    earlier = asyncio.ensure_future(Processes().start("app", server, policy, f"app {server.address} 1-8"))
    await eventually(lambda: bool(gunicorns.alive()), "the first start")
    (first,) = gunicorns.alive()
    earlier.cancel()
    await asyncio.gather(earlier, return_exceptions=True)
    assert gunicorns.alive() == {first}, "it goes on without the daemon"
    bystander = gunicorns.run("env", f"HEADGATE_START=app {server.address} 1-80", "sleep", "60")
    again = asyncio.ensure_future(processes.start("app", server, policy, f"app {server.address} 1-8"))
    await eventually(lambda: first not in gunicorns.alive(), "the end of the first start")
    (gunicorns.directory / "go").touch()
    master = await again
    assert master.pid != first
    here = {pid for pid in gunicorns.alive() if psutil.Process(pid).ppid() != master.pid}
    assert here == {master.pid, bystander.pid}, "one master, and what another step started"


async def test_a_started_master_outlives_the_daemon(gunicorns):
    server = tcp(free_port())
    script = gunicorns.directory / "daemon.py"
    script.write_text(
        "import asyncio\n"
        "from controller.adapters.process import Processes\n"
        "from controller.core.policy import ProcessPolicy\n"
        "from tests.support.gunicorn import tcp\n"
        f"command = {tuple(gunicorns.command(server.address, '--access-logfile', '-'))!r}\n"
        f"start = Processes().start('app', tcp({server.port}), ProcessPolicy(start=command))\n"
        "print('pid', asyncio.run(start).pid, flush=True)\n"
    )
    daemon = gunicorns.run(sys.executable, str(script))
    assert daemon.wait(20) == 0, gunicorns.printed()
    master = await found(server)
    assert f"pid {master.pid}" in gunicorns.printed()
    for _ in range(3):
        assert await get(server) == "200 done", "its output still goes somewhere"
    await Processes().terminate(master, BY_SOCKET)
    assert await Processes().wait_exit(master, 15)
    assert not gunicorns.alive()


@pytest.mark.slow
@pytest.mark.parametrize("worker", WORKER_CLASSES)
async def test_older_versions_are_found_finish_and_start_again(gunicorns, processes, older_python, worker):
    server = tcp(free_port())
    command = gunicorns.command("{address}", "--pid", "app.pid", "--workers", "2", worker=worker, python=older_python)
    policy = gunicorns.policy(*command, pid_file="app.pid")
    master = await processes.start("app", server, policy)
    slow = asyncio.ensure_future(get(server, "/slow?1"))
    await gunicorns.inside("/slow")
    for some in (policy, BY_SOCKET):
        again = await processes.find("app", server, some)
        assert again is not None
        assert (again.pid, again.created) == (master.pid, master.created)
    await processes.terminate(master, policy)
    assert await processes.wait_exit(master, 15)
    assert await slow == "200 done"
    master = await processes.start("app", server, policy)
    await eventually(lambda: len(children(master.pid)) == 2, "both workers")
    hanging = asyncio.ensure_future(get(server, "/hang"))
    await gunicorns.inside("/hang")
    assert len(await processes.kill(master, policy)) == 3
    await asyncio.gather(hanging, return_exceptions=True)
