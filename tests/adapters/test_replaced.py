"""A gunicorn master that somebody else replaces between two steps of a change: seen, named, and left alone."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest

from controller.adapters.process import NotListening, Processes
from controller.core.events import RunStep
from controller.core.model import Group, Master, StepName, Upstream
from controller.core.policy import Policy, ProcessPolicy
from controller.ports import Check, ProcessError
from controller.stages import carry_out
from tests.support.gunicorn import eventually, free_port, get, tcp

POLICY = ProcessPolicy(start_timeout=15, graceful_timeout=5)


@pytest.fixture
def processes() -> Processes:
    return Processes()


async def found(server) -> Master:
    master = await Processes().find("app", server, POLICY)
    assert master is not None
    return master


async def killed(gunicorns, server) -> Master:
    """A master that was found and has ended since, with its workers."""
    gunicorns.master(server.address)
    master = await found(server)
    for pid, _ in ((master.pid, 0.0), *master.workers):
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not gunicorns.alive(), "its end")
    return master


async def carried_out(processes, name, server, master, alone=True, policy=POLICY):
    group = Group(Upstream("app", (server,), policy=Policy(process=policy)), {})
    job = RunStep(1, 0, name, "app", server.key, master, alone=alone)
    return await carry_out(job, group, Check(), processes, 0.0)


@pytest.mark.parametrize("name", [StepName.TERMINATE, StepName.EXIT, StepName.KILL])
async def test_another_master_in_its_place_fails_the_step_and_is_left_alone(gunicorns, processes, name):
    server = tcp(free_port())
    old = await killed(gunicorns, server)
    new = gunicorns.master(server.address, workers=4)  # two more than the old one has told of
    with pytest.raises(ProcessError, match=rf"master {old.pid} has ended, and pid {new.pid} serves in its place"):
        await carried_out(processes, name, server, old)
    assert (await found(server)).pid == new.pid
    assert await get(server) == "200 done"
    assert await carried_out(processes, name, server, old, alone=False), "a restart takes it, for it is new"


@pytest.mark.parametrize("name", [StepName.TERMINATE, StepName.EXIT, StepName.KILL])
async def test_nothing_in_its_place_is_what_a_stop_is_about(gunicorns, processes, name):
    server = tcp(free_port())
    old = await killed(gunicorns, server)
    assert (await carried_out(processes, name, server, old)).gone


async def test_a_master_that_lives_is_replaced_by_nobody(gunicorns, processes):
    server = tcp(free_port())
    gunicorns.master(server.address)
    master = await found(server)
    await processes.unreplaced("app", server, master, POLICY)
    reused = replace(master, created=master.created - 1)
    with pytest.raises(ProcessError, match=f"and pid {master.pid} serves in its place"):
        await processes.unreplaced("app", server, reused, POLICY)


async def test_another_one_that_does_not_listen_yet_is_waited_for(gunicorns, processes):
    server = tcp(free_port())
    old = await killed(gunicorns, server)
    config = gunicorns.directory / "conf.py"
    config.write_text(
        "import os, time\ndef on_starting(server):\n    while not os.path.exists('go'): time.sleep(0.02)\n"
    )
    new = gunicorns.run(*gunicorns.command(server.address, "--pid", "app.pid", "--config", str(config)))
    await eventually((gunicorns.directory / "app.pid").exists, "the pid file")
    policy = gunicorns.policy(pid_file="app.pid", start_timeout=0.2)
    with pytest.raises(NotListening, match=f"pid {new.pid} in .* does not listen"):
        await processes.unreplaced("app", server, old, policy)
    (gunicorns.directory / "go").touch()
    with pytest.raises(ProcessError, match=f"and pid {new.pid} serves in its place"):
        await processes.unreplaced("app", server, old, replace(policy, start_timeout=15.0))
