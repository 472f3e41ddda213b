"""Changes that go back as a whole, on real gunicorn masters behind nginx under traffic."""

from __future__ import annotations

import contextlib
import http.client
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from controller.demo.stage import UPSTREAM, Stage, until

# What follows the stage's [upstream.app.process]. The version of a server is a piece of gunicorn's configuration.
SETTINGS = """
start_timeout = "10s"
deploy = ["sh", "-c", "echo deploy {port} >> deployed; cp new-{port}.py version-{port}.py"]
roll_back = ["sh", "-c", "echo back {port} >> deployed; : > version-{port}.py"]

[defaults.rollout]
up_timeout = "5s"
ready_time = "10s"
max_errors = "5%"
min_requests = 20
window = "1s"

[defaults.outlier]
server_errors = 0

[upstream.app.warm_up]
hold_errors = 0
"""
READ = """
import os
with open(f"version-{os.environ['APP_SERVER'].rpartition(':')[2]}.py") as version:
    exec(version.read())
"""
ERRS = """
def post_worker_init(worker):
    well = worker.wsgi

    def errs(environ, start_response):
        if environ["PATH_INFO"] != "%s":
            return well(environ, start_response)
        start_response("500 Sick", [("Content-Length", "0")])
        return [b""]

    worker.wsgi = errs
"""


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage("gthread", warm_up=1.0, settings=SETTINGS) as built:
        with (built.prefix / "gunicorn.conf.py").open("a") as conf:
            conf.write(READ)
        yield built


def port(address: str) -> str:
    return address.rpartition(":")[2]


def bring(stage: Stage, *new: str) -> None:
    """Have a deploy bring these versions, to each server its own."""
    for address, text in zip(stage.addresses, new, strict=True):
        (stage.prefix / f"version-{port(address)}.py").touch()
        (stage.prefix / f"new-{port(address)}.py").write_text(text)


def deploy(stage: Stage, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "controller", "--config", str(stage.settings), "deploy", UPSTREAM, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return stage.client.change(stage.client.changes()[0]["id"])


def deployed(stage: Stage) -> list[str]:
    return (stage.prefix / "deployed").read_text().splitlines()


def assert_as_before(stage: Stage) -> None:
    """Every server serves, in the old version."""
    servers = stage.client.upstream(UPSTREAM)["servers"]
    assert [(s["admin"], s["health"], s["effective_weight"] > 0) for s in servers] == [("ready", "up", True)] * 3
    for address in stage.addresses:
        assert (stage.prefix / f"version-{port(address)}.py").read_text() == ""
        for path in ("/healthz", "/who"):
            assert ask(address, path) == 200


def ask(address: str, path: str) -> int:
    with contextlib.closing(http.client.HTTPConnection(address, timeout=5)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_deploy_whose_second_server_errs_is_rolled_back_on_both_and_no_request_fails(stage: Stage) -> None:
    first, second, third = stage.addresses
    untouched = stage.master(third)
    bring(stage, "", ERRS % "/healthz", "")
    load = stage.load(60)
    until(lambda: bool(load.read() or load.ticks), "traffic", 20, stage.prefix / "load.log")
    record = deploy(stage, "--roll-back")
    until(lambda: bool(load.read()), "traffic", 20, stage.prefix / "load.log")
    summary = load.finish()
    assert summary["failures"] == {}, summary
    assert record["status"] == "failed"
    assert record["error"].startswith(f"{second}: up: not up within 5 s: ")
    assert record["error"].endswith("; rolled back")
    assert deployed(stage) == [
        f"deploy {port(first)}",
        f"deploy {port(second)}",
        f"back {port(second)}",
        f"back {port(first)}",
    ]
    assert stage.master(third) == untouched
    assert_as_before(stage)


@pytest.mark.timeout(300)
def test_a_new_version_that_is_healthy_and_errs_exceeds_the_budget_and_is_rolled_back(stage: Stage) -> None:
    first = stage.addresses[0]
    bring(stage, ERRS % "/who", "", "")
    ended = threading.Event()

    def asks() -> None:
        while not ended.is_set():
            ask(stage.url.removeprefix("http://"), "/who")

    client = threading.Thread(target=asks)
    client.start()
    try:
        record = deploy(stage, "--roll-back")
    finally:
        ended.set()
        client.join()
    assert re.fullmatch(
        r"[\d.]+ % of \d+ tries of app failed or were answered 5xx, and max_errors is 5 %; rolled back", record["error"]
    )
    assert deployed(stage) == [f"deploy {port(first)}", f"back {port(first)}"]
    assert_as_before(stage)
