"""People go on editing nginx.conf and headgate.toml: the daemon follows by itself, and nginx without a reload."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from controller.demo.stage import UPSTREAM, Stage, free_ports, until
from tests.e2e.test_faults import server, traffic


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage("gthread", warm_up=1.0) as built:
        yield built


def wait(stage: Stage, what: str, done: object) -> None:
    assert callable(done)
    until(done, what, 20, stage.prefix / "headgate.log")


def readyz(stage: Stage) -> tuple[int, dict[str, Any]]:
    """What /readyz answers."""
    words = ["curl", "-s", "-w", "\n%{http_code}", "--unix-socket", str(stage.prefix / "api.sock"), "http://x/readyz"]
    body, code = subprocess.run(words, capture_output=True, text=True, check=True).stdout.rsplit("\n", 1)
    return int(code), json.loads(body)


def keys(stage: Stage) -> list[str]:
    (upstream,) = stage.client.status()["upstreams"]
    return [each["address"] for each in upstream["servers"]]


def test_a_new_server_line_joins_cold_and_a_removed_one_leaves(stage: Stage) -> None:
    conf = stage.prefix / "nginx.conf"
    good = conf.read_text()
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    workers = stage.nginx_workers()
    with traffic(stage):
        stage.start_server(f"127.0.0.1:{port}")
        conf.write_text(
            good.replace(f"server {stage.addresses[0]};", f"server {stage.addresses[0]}; server {address};")
        )
        wait(stage, "the new server", lambda: address in keys(stage))
        wait(stage, "its first requests", lambda: server(stage, address)["requests"])
        assert server(stage, address)["warm_up"]["phase"] in ("running", "done")  # type: ignore[index]
        wait(stage, "its full weight", lambda: server(stage, address)["effective_weight"] == 1)
        conf.write_text(good)
        wait(stage, "its leaving", lambda: address not in keys(stage))
    assert stage.nginx_workers() == workers, "nginx was not reloaded"


def test_a_broken_edit_is_shown_and_a_mended_one_taken_up_without_a_command(stage: Stage) -> None:
    conf = stage.prefix / "nginx.conf"
    good = conf.read_text()
    with traffic(stage):
        conf.write_text(good.replace("upstream app {", "upstream app {\n        nonsense {"))
        wait(stage, "the error", lambda: stage.client.status()["config"]["state"] != "ok")
        error = stage.client.status()["config"]["error"]
        assert re.search(r"nginx\.conf:\d+", error)
        code, answer = readyz(stage)
        assert code == 503
        assert error in answer["error"]["message"]
        told = [each for each in stage.client.events() if each["kind"] == "config"]
        assert any(error in json.dumps(each, ensure_ascii=False).replace('\\"', '"') for each in told), told
        assert keys(stage) == stage.addresses
        conf.write_text(good)
        wait(stage, "the mended file", lambda: stage.client.status()["config"]["state"] == "ok")
        wait(stage, "readiness", lambda: readyz(stage)[0] == 200)


def test_a_rule_is_switched_while_everything_runs(stage: Stage) -> None:
    good = stage.settings.read_text()
    try:
        stage.settings.write_text(good.replace('duration = "1s"', 'duration = "30s"'))
        wait(stage, "the new rule", lambda: server(stage, stage.addresses[0])["warm_up"]["duration"] == 30)  # type: ignore[index]
        stage.client.set_admin(UPSTREAM, stage.addresses[0], "drain")
        stage.client.set_admin(UPSTREAM, stage.addresses[0], "ready")
        assert 0 < float(str(server(stage, stage.addresses[0])["effective_weight"])) < 0.5
        stage.settings.write_text(good)
        wait(stage, "its full weight", lambda: server(stage, stage.addresses[0])["effective_weight"] == 1)
    finally:
        stage.settings.write_text(good)
