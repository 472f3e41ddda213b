"""The daemon is killed with -9 in every step of a rollout, under load: the rollout ends as it would have."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path

import psutil
import pytest

from controller.demo.stage import UPSTREAM, Stage, until
from controller.errors import DaemonUnreachable, HeadgateError

ROOT = Path(__file__).parents[2]
STEPS = ("find", "drain", "empty", "settle", "terminate", "exit", "start", "up", "warm", "hold")
MOMENTS = ("begun", "ended", "during")
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


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_rollout_whose_daemon_is_killed_in_every_step_ends_as_it_would_have() -> None:
    with Stage("gthread", warm_up=1.0) as stage:
        settings = stage.settings.read_text() + '\n[defaults.rollout]\nready_time = "500ms"\n'
        # Longer than a slow request may keep a server from being empty: else nothing is left to wait for.
        stage.settings.write_text(settings.replace('settle = "1s"', 'settle = "5s"'))
        before = {address: stage.master(address) for address in stage.addresses}
        workers = stage.nginx_workers()
        stage.stop_daemon()
        load = stage.load(60, "--mix", "fast=9,echo=1,slow=0.1")
        asked = False
        for address, moment in zip(stage.addresses, MOMENTS, strict=True):
            for step in LASTING if moment == "during" else STEPS:
                daemon = stage.spawn(
                    [sys.executable, "-m", "tests.chaos.dying_daemon", str(stage.settings), moment, step, address],
                    stage.prefix / "headgate.log",
                    environment={"PYTHONPATH": str(ROOT)},
                )
                if not asked:
                    until(lambda: answers(stage), "the daemon's API", 20, stage.prefix / "headgate.log")
                    with pytest.raises(DaemonUnreachable):
                        stage.client.begin_change("rollout", UPSTREAM)
                    asked = True
                assert daemon.wait(60) == -signal.SIGKILL, f"{moment} {step} of {address} was not reached"
        stage.start_daemon()
        change = stage.client.changes()[0]["id"]
        until(
            lambda: stage.client.change(change)["status"] != "running",
            "the rollout",
            120,
            stage.prefix / "headgate.log",
        )
        record = stage.client.change(change)
        summary = load.finish()
        assert record["status"] == "done", record
        assert [step["state"] for step in record["steps"] if step["name"] == "kill"] == ["skipped"] * 3
        for address in stage.addresses:
            assert masters(stage, address) == [stage.master(address)], "one master each, and no orphan"
            assert stage.master(address) != before[address], "it was restarted"
        assert summary["failures"] == {}, summary
        assert summary["requests"] > 1000
        assert stage.nginx_workers() == workers, "nginx was not reloaded"


def answers(stage: Stage) -> bool:
    try:
        return bool(stage.client.status()["upstreams"])
    except HeadgateError:
        return False
