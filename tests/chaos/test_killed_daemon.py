"""The daemon is killed with -9 in every step of a rollout, under load: the rollout ends as it would have."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from controller.demo import stage as demo
from controller.demo.stage import UPSTREAM, Stage, until
from controller.errors import DaemonUnreachable, HeadgateError

ROOT = Path(__file__).parents[2]
STEPS = ("find", "drain", "empty", "settle", "terminate", "exit", "start", "up", "warm", "hold")
MOMENTS = ("begun", "ended", "during")
DEAF = """\
import signal

def when_ready(arbiter):
    signal.signal(signal.SIGTERM, lambda *_: None)  # ignored it would not pass for a gunicorn master

"""
HASTY = 'graceful_timeout = "1s"\nmargin = "500ms"'
LASTING = ("empty", "exit", "start", "warm")  # steps that are under way for long enough to be killed in the middle


def masters(stage: Stage, address: str) -> list[int]:
    """The gunicorn masters that were started for this address and live."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "--bind" not in line or address not in line or not any(str(stage.prefix) in part for part in line):
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = process.parent()
            if parent is None or line != parent.cmdline():
                found.append(process.pid)
    return found


@pytest.mark.timeout(900)  # two dozen daemons, each with a start of its own
@pytest.mark.slow
def test_a_rollout_whose_daemon_is_killed_in_every_step_ends_as_it_would_have() -> None:
    with Stage("gthread", warm_up=1.0) as stage:
        settings = stage.settings.read_text() + '\n[defaults.rollout]\nready_time = "500ms"\n'
        # Longer than a slow request may keep a server from being empty: else nothing is left to wait for.
        stage.settings.write_text(settings.replace('settle = "1s"', 'settle = "5s"'))
        begin = partial(stage.client.begin_change, "rollout", UPSTREAM)
        record = killed_and_ended(
            stage,
            begin,
            [
                (address, moment, step)
                for address, moment in zip(stage.addresses, MOMENTS, strict=True)
                for step in (LASTING if moment == "during" else STEPS)
            ],
        )
        assert [step["state"] for step in record["steps"] if step["name"] == "kill"] == ["skipped"] * 3


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_rollout_of_servers_that_do_not_hear_is_cut_where_it_kills_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "GUNICORN_CONF", DEAF + demo.GUNICORN_CONF)
    with Stage("gthread", servers=2, warm_up=1.0) as stage:
        settings = stage.settings.read_text().replace(f'graceful_timeout = "{demo.GRACEFUL_TIMEOUT}s"', HASTY)
        assert HASTY in settings
        stage.settings.write_text(settings)
        for address in stage.addresses:  # a supervisor reaps what it started: else its pid would seem to live
            Thread(target=os.waitpid, args=(stage.master(address), 0), daemon=True).start()
        begin = partial(stage.client.begin_change, "rollout", UPSTREAM)
        cuts = [(address, moment, "kill") for address, moment in zip(stage.addresses, MOMENTS, strict=False)]
        record = killed_and_ended(stage, begin, cuts)
        kills = [step for step in record["steps"] if step["name"] == "kill"]
        assert [step["state"] for step in kills] == ["done"] * 2
        assert kills[0]["detail"].startswith("killed "), kills
        assert kills[1]["detail"] == "killed nothing: all were gone", (
            "it had killed, and could not record that any more"
        )


def killed_and_ended(stage: Stage, begin: Callable[[], int], cuts: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Begin a change under load, with a daemon that dies at each of these (server, moment, step); its record."""
    before = {address: stage.master(address) for address in stage.addresses}
    workers = stage.nginx_workers()
    stage.stop_daemon()
    log = stage.prefix / "headgate.log"
    load = stage.load(60, "--mix", "fast=9,echo=1,slow=0.1")
    for number, (address, moment, step) in enumerate(cuts):
        daemon = stage.spawn(
            [sys.executable, "-m", "tests.chaos.dying_daemon", str(stage.settings), moment, step, address],
            log,
            environment={"PYTHONPATH": str(ROOT)},
        )
        if number == 0:
            until(lambda: answers(stage), "the daemon's API", 20, log)
            with contextlib.suppress(DaemonUnreachable):  # it may die before it can answer
                begin()
        assert daemon.wait(60) == -signal.SIGKILL, f"{moment} {step} of {address} was not reached"
    stage.start_daemon()
    change = stage.client.changes()[0]["id"]
    until(lambda: stage.client.change(change)["status"] != "running", "the change", 120, log)
    record = stage.client.change(change)
    summary = load.finish()
    assert record["status"] == "done", record
    for address in stage.addresses:
        assert masters(stage, address) == [stage.master(address)], "one master each, and no orphan"
        assert stage.master(address) != before[address], "it was restarted"
    assert summary["failures"] == {}, summary
    assert summary["requests"] > 500
    assert stage.nginx_workers() == workers, "nginx was not reloaded"
    return record


def answers(stage: Stage) -> bool:
    try:
        return bool(stage.client.status()["upstreams"])
    except HeadgateError:
        return False
