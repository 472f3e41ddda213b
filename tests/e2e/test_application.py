"""Somebody sends TERM to a gunicorn master, without a word to Headgate: no request may fail of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from controller.demo.stage import UPSTREAM, WORKERS, Load, Stage, until


def server(stage: Stage, address: str) -> dict[str, Any]:
    (upstream,) = stage.client.status()["upstreams"]
    return next(each for each in upstream["servers"] if each["address"] == address)


def wait(stage: Stage, what: str, done: Callable[[], object], log: str = "headgate.log", timeout: float = 40.0) -> None:
    until(lambda: bool(done()), what, timeout, stage.prefix / log)


def flowing(stage: Stage, load: Load, address: str) -> None:
    """Wait until this server's answers come again, seen from the client's side."""
    load.read()
    seen = len(load.ticks)
    wait(stage, f"answers of {address}", lambda: load.read() and load.ticks[seen:][-1]["servers"].get(address, 0) > 0)


def terminate(stage: Stage, address: str) -> None:
    """A bare TERM, and the wait until the master and its workers have ended."""
    pid = stage.master(address)
    assert pid is not None
    family = [psutil.Process(pid), *psutil.Process(pid).children()]
    os.kill(pid, signal.SIGTERM)
    wait(stage, f"the end of {pid}", lambda: not any(map(alive, family)), f"app-{address.rpartition(':')[2]}.log")


each_worker_class = pytest.mark.parametrize(
    "worker", ["uvicorn", *(pytest.param(worker, marks=pytest.mark.slow) for worker in WORKERS if worker != "uvicorn")]
)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@each_worker_class
def test_a_bare_term_under_load_loses_nothing_and_the_server_comes_back_by_itself(worker: str) -> None:
    with Stage(worker, warm_up=2.0) as stage:
        workers = stage.nginx_workers()
        load = stage.load(120)
        address = stage.addresses[0]
        flowing(stage, load, address)
        terminate(stage, address)
        (entry,) = server(stage, address)["quarantine"]
        assert "got TERM" in entry["why"]
        stage.start_server(address)
        # By itself it would end after 120 s.
        wait(stage, "the end of its quarantine", lambda: server(stage, address)["quarantine"] == [])
        flowing(stage, load, address)
        summary = load.finish()
        assert summary["failures"] == {}, summary["examples"]
        assert stage.nginx_workers() == workers
        log = (stage.prefix / f"app-{address.rpartition(':')[2]}.log").read_text()
        assert f"headgate: {address} is offline, and empty after" in log
        assert f"headgate: {address} is online" in log


@each_worker_class
def test_without_the_daemon_the_mark_in_the_responses_keeps_the_loss_away(worker: str) -> None:
    with Stage(worker, warm_up=2.0) as stage:
        load = stage.load(120)
        address = stage.addresses[0]
        flowing(stage, load, address)
        stage.stop_daemon()
        terminate(stage, address)
        summary = load.finish()
        assert summary["failures"] == {}, summary["examples"]
        log = (stage.prefix / f"app-{address.rpartition(':')[2]}.log").read_text()
        assert f"headgate: {address} goes offline without Headgate" in log


def test_a_restart_by_headgate_is_not_slowed_down_by_the_application_s_own_notice() -> None:
    with Stage("gthread", warm_up=1.0) as stage:
        address = stage.addresses[0]
        change = stage.client.begin_change("restart", UPSTREAM, (address,))
        wait(stage, "the restart", lambda: stage.client.change(change)["status"] != "running")
        assert stage.client.change(change)["status"] == "done"
        log = (stage.prefix / f"app-{address.rpartition(':')[2]}.log").read_text()
        assert f"headgate: {address} is offline, and empty after 0." in log
