"""Every operation on real gunicorn masters behind nginx under load: no request fails, whatever the new version does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import pytest

from controller.demo.stage import UPSTREAM, Stage, free_ports, until
from tests.support.operations import DEPLOY, under_load


@pytest.fixture(
    scope="module",
    params=["uvicorn", *(pytest.param(worker, marks=pytest.mark.slow) for worker in ("sync", "gthread"))],
)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with Stage(request.param, warm_up=1.0, settings=DEPLOY) as built:
        yield built


def unharmed(stage: Stage, *words: str, servers: int = 3) -> Mapping[str, Any]:
    """The change that a command makes, during which no request may fail; afterwards so many servers serve."""
    ran = under_load(stage, *words)
    assert ran.summary["failures"] == {}, ran.summary
    assert ran.serves == (True,) * servers
    return ran.record


def workers(stage: Stage, address: str) -> set[int]:
    master = stage.master(address)
    assert master is not None
    return {child.pid for child in psutil.Process(master).children()}


def ended(record: Mapping[str, Any], server: str) -> list[str]:
    return [s["name"] for s in record["steps"] if s["server"] == server and s["state"] == "done"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_reload_replaces_all_workers_and_keeps_the_masters(stage: Stage) -> None:
    masters = [stage.master(address) for address in stage.addresses]
    old = [workers(stage, address) for address in stage.addresses]
    assert unharmed(stage, "reload", UPSTREAM)["status"] == "done"
    assert [stage.master(address) for address in stage.addresses] == masters
    for address, before in zip(stage.addresses, old, strict=True):
        assert not workers(stage, address) & before


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_upgrade_replaces_the_masters(stage: Stage) -> None:
    old = [stage.master(address) for address in stage.addresses]
    assert unharmed(stage, "upgrade", UPSTREAM)["status"] == "done"
    until(
        lambda: all(stage.master(a) not in (None, *old) for a in stage.addresses), "the pid files", 10,
        stage.prefix / "headgate.log",
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_a_deploy_runs_its_command_between_stop_and_start_and_what_fails_is_rolled_back(stage: Stage) -> None:
    first, second, third = stage.addresses
    port = second.rpartition(":")[2]
    (stage.prefix / f"broken-{port}").touch()
    record = unharmed(stage, "deploy", UPSTREAM)
    assert record["status"] == "failed"
    assert record["error"].startswith(f"{second}: deploy: `sh -c ")
    assert record["error"].endswith("; rolled back")
    assert ended(record, first)[-1] == "hold"
    assert ended(record, second)[-3:] == ["roll-back", "start", "up"]
    assert ended(record, third) == []
    ports = [address.rpartition(":")[2] for address in stage.addresses]
    log = stage.prefix / "deployed"
    assert log.read_text().splitlines() == [f"deploy {ports[0]}", f"deploy {ports[1]}", f"back {ports[1]}"]
    log.unlink()
    assert unharmed(stage, "roll-back", UPSTREAM, first)["status"] == "done"
    assert log.read_text() == f"back {ports[0]}\n"
    log.unlink()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_masters_are_scaled_out_and_in(stage: Stage) -> None:
    before = len(workers(stage, stage.addresses[0]))
    for count in (before + 2, before):
        assert unharmed(stage, "scale", UPSTREAM, stage.addresses[0], "--workers", str(count))["status"] == "done"
        assert len(workers(stage, stage.addresses[0])) == count


@pytest.mark.timeout(300)
def test_servers_are_added_and_removed_with_their_lines_and_processes(stage: Stage) -> None:
    conf = stage.prefix / "nginx.conf"
    before, workers_before = conf.read_bytes(), stage.nginx_workers()
    new = [f"127.0.0.1:{port}" for port in free_ports(2)]
    record = unharmed(stage, "scale-out", UPSTREAM, *new, servers=5)
    assert record["status"] == "done", record["error"]
    masters = [stage.master(address) for address in new]
    assert all(master and psutil.pid_exists(master) for master in masters)
    assert all(f"server {address};".encode() in conf.read_bytes() for address in new)
    record = unharmed(stage, "scale-in", UPSTREAM, *new, "--batch", "1")
    assert record["status"] == "done", record["error"]
    assert [ended(record, address)[-1] for address in new] == ["remove", "remove"]
    assert not any(master and psutil.pid_exists(master) for master in masters)
    assert conf.read_bytes() == before
    assert stage.nginx_workers() == workers_before, "nginx was not reloaded"
    assert "files have changed" not in (stage.prefix / "headgate.log").read_text(), "our own writes are no news"


@pytest.mark.timeout(300)
def test_a_rollout_is_paused_resumed_and_aborted(stage: Stage) -> None:
    change = stage.client.begin_change("rollout", UPSTREAM)
    stage.client.steer(change, "pause")
    log = stage.prefix / "headgate.log"

    def first_is_done() -> bool:
        return any(s["name"] == "hold" and s["state"] == "done" for s in stage.client.change(change)["steps"])

    until(first_is_done, "the server under way", 60, log)
    record = stage.client.change(change)
    assert record["status"] == "paused"
    assert {s["state"] for s in record["steps"] if s["server"] != stage.addresses[0]} == {"pending"}
    stage.client.steer(change, "resume")
    until(
        lambda: "terminate" in ended(stage.client.change(change), stage.addresses[1]),
        "the next server", 60, log,
    )  # fmt: skip
    stage.client.steer(change, "abort")
    *_, record = stage.client.follow_change(change)
    assert record["status"] == "aborted"
    assert ended(record, stage.addresses[1])[-1] == "up"
    assert ended(record, stage.addresses[2]) == []
