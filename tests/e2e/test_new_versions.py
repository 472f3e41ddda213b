"""New versions that are no good, and processes that somebody else touches, on the real thing under traffic."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from controller.demo.stage import UPSTREAM, Stage, until

# What follows the stage's [upstream.app.process]. A version is a piece of gunicorn's configuration; where there is a
# file `hold` a drained server is held until that is gone.
SETTINGS = """
start_timeout = "6s"
deploy = ["sh", "-c", "echo deploy {port} >> deployed; cp new.py version.py"]
roll_back = ["sh", "-c", "echo back {port} >> deployed; cp old.py version.py"]

[[upstream.app.hooks.after_drain]]
command = ["sh", "-c", "if test -e hold; then touch held; while test -e hold; do sleep 0.05; done; fi"]
timeout = "60s"

[defaults.rollout]
up_timeout = "5s"
"""
WRONG_PORT = """
def on_starting(server):
    host, port = server.cfg.address[0]
    server.cfg.set("bind", f"{host}:{port + 10000}")
"""
SICK = """
def post_worker_init(worker):
    well = worker.wsgi

    def sick(environ, start_response):
        if environ["PATH_INFO"] != "/healthz":
            return well(environ, start_response)
        start_response("500 Sick", [("Content-Length", "0")])
        return [b""]

    worker.wsgi = sick
"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage("gthread", warm_up=1.0, settings=SETTINGS) as built:
        for name in ("old.py", "new.py", "version.py"):
            (built.prefix / name).touch()
        with (built.prefix / "gunicorn.conf.py").open("a") as conf:
            conf.write('exec(open("version.py").read())\n')
        yield built


@pytest.fixture(autouse=True)
def _as_before(stage: Stage) -> Iterator[None]:
    """Each test leaves three servers of the old version that serve."""
    yield
    (stage.prefix / "hold").unlink(missing_ok=True)
    (stage.prefix / "held").unlink(missing_ok=True)
    (stage.prefix / "deployed").unlink(missing_ok=True)
    (stage.prefix / "version.py").write_text("")

    def whole() -> bool:
        servers = stage.client.upstream(UPSTREAM)["servers"]
        return [(s["admin"], s["health"]) for s in servers] == [("ready", "up")] * 3

    until(whole, "every server to serve", 20, stage.prefix / "headgate.log")


@contextmanager
def traffic(stage: Stage) -> Iterator[None]:
    """Load during which nothing may fail."""
    load = stage.load(60, "--mix", "fast=9,echo=1")
    until(lambda: bool(load.read() or load.ticks), "traffic", 20, stage.prefix / "load.log")
    yield
    summary = load.finish()
    assert summary["failures"] == {}, summary
    assert summary["requests"] > 0


def ended(stage: Stage, change: int) -> dict[str, Any]:
    *_, record = stage.client.follow_change(change)
    return record


def steps(record: dict[str, Any], server: str, state: str = "done") -> list[str]:
    return [s["name"] for s in record["steps"] if s["server"] == server and s["state"] == state]


def deployed(stage: Stage) -> list[str]:
    log = stage.prefix / "deployed"
    return log.read_text().splitlines() if log.exists() else []


def wait(stage: Stage, what: str, path: Path) -> None:
    until(path.exists, what, 30, stage.prefix / "headgate.log")


@pytest.mark.timeout(120)
def test_a_deploy_whose_master_was_replaced_meanwhile_is_no_success(stage: Stage) -> None:
    address = stage.addresses[0]
    old = psutil.Process(stage.master(address))
    (stage.prefix / "hold").touch()
    with traffic(stage):
        change = stage.client.begin_change("deploy", UPSTREAM, (address,))
        wait(stage, "the server to be empty", stage.prefix / "held")
        old.send_signal(signal.SIGTERM)
        psutil.wait_procs([old], 20)
        new = stage.start_server(address)
        until(lambda: stage.master(address) == new.pid, "its pid file", 20, stage.prefix / "headgate.log")
        (stage.prefix / "hold").unlink()
        record = ended(stage, change)
    assert record["status"] == "failed"
    assert f"the master {old.pid} has ended, and pid {new.pid} serves in its place" in record["error"]
    assert steps(record, address, "failed") == ["terminate"]
    assert deployed(stage) == [], "its command did not run beside a server that runs"
    assert new.poll() is None


@pytest.mark.timeout(120)
def test_a_new_version_that_binds_another_port_is_ended_and_rolled_back(stage: Stage) -> None:
    first, second, _ = stage.addresses
    (stage.prefix / "new.py").write_text(WRONG_PORT)
    port = first.rpartition(":")[2]
    with traffic(stage):
        record = ended(stage, stage.client.begin_change("deploy", UPSTREAM))
    assert record["status"] == "failed"
    assert record["error"].startswith(f"{first}: start: {first} did not listen within 6 s; it printed: ")
    assert f"Listening at: http://127.0.0.1:{int(port) + 10000}" in record["error"]
    assert record["error"].endswith("; rolled back")
    assert steps(record, first)[-3:] == ["roll-back", "start", "up"]
    assert steps(record, second) == []
    assert deployed(stage) == [f"deploy {port}", f"back {port}"]
    listeners = {c.laddr.port for c in psutil.net_connections("tcp") if c.laddr and c.status == "LISTEN"}
    assert int(port) + 10000 not in listeners


@pytest.mark.timeout(120)
def test_an_upgrade_to_a_version_that_fails_its_check_goes_back_to_the_old_master(stage: Stage) -> None:
    first, second, _ = stage.addresses
    masters = [stage.master(address) for address in stage.addresses]
    (stage.prefix / "version.py").write_text(SICK)
    with traffic(stage):
        record = ended(stage, stage.client.begin_change("upgrade", UPSTREAM))
    assert record["status"] == "failed"
    assert record["error"].startswith(f"{first}: upgrade: the workers of the new master ")
    assert "do not pass the check within 5 s: status 500" in record["error"]
    assert steps(record, first)[-1] == "settle"
    assert steps(record, second) == []
    assert [stage.master(address) for address in stage.addresses] == masters
    master = psutil.Process(masters[0])
    here = {process.pid for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == master.cmdline()}
    assert here == {master.pid, *(child.pid for child in master.children())}, "nothing is left of the new one"
