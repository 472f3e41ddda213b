"""What is remembered and forgotten under real traffic: real nginx, gunicorn, daemon and command."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from controller.demo.stage import UPSTREAM, Stage, until


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage("gthread", warm_up=1.0) as built:
        yield built


def headgate(stage: Stage, *words: str) -> str:
    command = [sys.executable, "-m", "controller", "--config", str(stage.settings), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def get(stage: Stage) -> None:
    with urllib.request.urlopen(f"{stage.url}/fast", timeout=5) as answer:
        assert answer.status == 200


def wait(stage: Stage, what: str, done: Any) -> None:
    until(done, what, 20.0, stage.prefix / "headgate.log")


def admin(stage: Stage, address: str) -> str:
    return str(stage.client.servers(UPSTREAM, address)[0]["admin"])


def recorded(stage: Stage) -> dict[str, float]:
    answer = stage.client.traffic(UPSTREAM)
    return {each["server"]: sum(point["requests"] for point in each["points"]) for each in answer["servers"]}


def test_history_has_each_request_that_nginx_passed_on_and_explain_why_one_server_got_none(stage: Stage) -> None:
    first, *others = stage.addresses
    stage.client.set_admin(UPSTREAM, first, "maint")
    sent = 0

    def both_are_read() -> bool:
        nonlocal sent
        sent += 2
        get(stage)
        get(stage)
        found = recorded(stage)
        return all(found[other] for other in others)

    wait(stage, "readings to compare", both_are_read)
    before = sum(recorded(stage).values())
    for _ in range(100):
        get(stage)
    wait(stage, "the next reading", lambda: sum(recorded(stage).values()) > before + 99.9)
    answer = json.loads(headgate(stage, "history", UPSTREAM, "--since", "10m", "--json"))
    assert (
        answer["servers"]
        == stage.client.traffic(UPSTREAM, answer["since"], answer["until"] - 1, answer["step"])["servers"]
    )
    found = recorded(stage)
    assert found[first] == 0
    assert sum(found.values()) < sent + 100.1
    assert abs(found[others[0]] - found[others[1]]) < 5
    said = headgate(stage, "explain", UPSTREAM, first)
    assert "  No new request goes to it: it is under maintenance, since " in said
    assert "  nginx has sent it no new request since " in said
    stage.client.set_admin(UPSTREAM, first, "ready")


@pytest.mark.parametrize("damage", ["deleted", "overwritten"])
def test_a_store_that_is_lost_changes_nothing_in_the_traffic(stage: Stage, damage: str) -> None:
    first, *others = stage.addresses
    wait(stage, "first", lambda: admin(stage, first) == "ready")
    stage.client.set_admin(UPSTREAM, first, "maint")
    before = stage.client.servers(UPSTREAM, first)[0]["requests"]
    load = stage.load(80, "--mix", "fast=9,echo=1")
    wait(stage, "traffic", lambda: load.read() and load.ticks)
    stage.stop_daemon()
    for path in stage.prefix.glob("state.db*"):
        if damage == "deleted":
            path.unlink()
        elif path.name == "state.db":
            path.write_bytes(b"\0" * path.stat().st_size)
    stage.start_daemon()
    ticks = len(load.ticks)
    wait(stage, "more traffic", lambda: load.read() is not None and len(load.ticks) >= ticks + 4)
    server = stage.client.servers(UPSTREAM, first)[0]
    assert (server["admin"], server["requests"]) == ("maint", before)
    assert all(stage.client.servers(UPSTREAM, other)[0]["effective_weight"] == 1 for other in others)
    assert load.finish()["failed"] == 0
    said = " ".join(event["text"] for event in stage.client.events() if event["kind"] == "store")
    assert f"3 servers are taken over as nginx's table has them, without traffic {UPSTREAM}: {first}" in said
    assert ("it is kept as state.db.corrupt-1" in said) == (damage == "overwritten")
    stage.client.set_admin(UPSTREAM, first, "ready")
