"""Scale-out, scale-in, stop, start and reset over the API and by the command, in a whole daemon."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.client import Client
from controller.core.policy import RolloutPolicy
from controller.errors import ApiError
from tests.support.house import APP, POLICY, House

FIRST, SECOND, THIRD = (server.key for server in APP.servers)
NEW, OTHER = "127.0.0.1:8004", "127.0.0.1:8005"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    (tmp_path / "headgate.toml").write_text(f'[api]\nsocket = "{tmp_path}/run/api.sock"\nlisten = ""\n')
    with House(tmp_path) as started:
        yield started


@pytest.fixture
def client(house: House) -> Client:
    return Client(str(house.socket))


def headgate(house: House, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controller", "--config", f"{house.directory}/headgate.toml", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def servers(client: Client) -> dict[str, str]:
    return {each["address"]: each["admin"] for each in client.upstream("app")["servers"]}


def test_servers_come_and_go_by_the_command(house: House, client: Client) -> None:
    done = headgate(house, "scale-out", "app", NEW, OTHER, "--weight", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "change 1: scale-out of app done" in done.stdout
    shown = {each["address"]: each for each in client.upstream("app")["servers"]}
    assert [(shown[key]["weight"], shown[key]["effective_weight"]) for key in (NEW, OTHER)] == [(2, 2.0), (2, 2.0)]
    done = headgate(house, "scale-in", "app", NEW, OTHER, "--batch", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(servers(client)) == {FIRST, SECOND, THIRD}
    record = client.change(2)
    assert (record["status"], record["error"]) == ("done", "")
    assert {step["batch"] for step in record["steps"]} == {0, 1}
    assert [step["name"] for step in record["steps"] if step["state"] == "done"][-1] == "remove"


def test_what_cannot_be_written_is_refused_before_anything_begins(house: House, client: Client) -> None:
    house.members.error = "the daemon may not write /etc/nginx"
    for kind, server in (("scale-out", NEW), ("scale-in", FIRST)):
        done = headgate(house, kind, "app", server)
        assert done.returncode == 1
        assert "headgate: the daemon may not write /etc/nginx\n  mend it" in done.stderr
    assert client.changes() == []


def test_a_line_that_cannot_be_written_after_all_fails_the_change_with_the_reason(house: House, client: Client) -> None:
    house.do(house.processes.stuck.clear)
    change = client.begin_change("scale-in", "app", (FIRST,))
    house.until(lambda: any(s.name == "exit" and s.state == "running" for s in house.runtime.state.changes[1].steps))
    house.members.error = "the disk is full"
    house.do(house.processes.stuck.set)
    *_, record = client.follow_change(change)
    assert (record["status"], record["error"]) == ("failed", f"{FIRST}: remove: the disk is full (mend it)")
    assert servers(client)[FIRST] == "maint"


def test_one_that_never_comes_up_is_taken_out_again(house: House, client: Client) -> None:
    policy = replace(POLICY, rollout=RolloutPolicy(up_timeout=0.2, max_load=0.0))
    house.source.config = replace(house.source.config, upstreams=(replace(APP, policy=policy),))
    client.reread()
    house.prober.down = {NEW}
    done = headgate(house, "scale-out", "app", NEW)
    assert done.returncode == 1
    assert "taken out again" in done.stdout
    assert set(servers(client)) == {FIRST, SECOND, THIRD}
    wished = client.change(1)
    assert [s["name"] for s in wished["steps"] if s["state"] == "done"][-2:] == ["exit", "remove"]


def test_a_scale_in_that_overloads_the_others_is_refused_unless_it_is_forced(house: House, client: Client) -> None:
    policy = replace(POLICY, rollout=RolloutPolicy(max_load=2.0))
    house.source.config = replace(house.source.config, upstreams=(replace(APP, policy=policy),))
    client.reread()
    done = headgate(house, "scale-in", "app", FIRST, SECOND)
    assert done.returncode == 4
    assert "each other server of app gets 3.00 times its usual share" in done.stderr
    assert headgate(house, "scale-in", "app", FIRST, SECOND, "--force").returncode == 0
    assert set(servers(client)) == {THIRD}


def test_several_servers_are_stopped_and_started_also_in_batches(house: House, client: Client) -> None:
    assert headgate(house, "stop", "app", FIRST, SECOND, "--batch", "1").returncode == 0
    assert servers(client) == {FIRST: "maint", SECOND: "maint", THIRD: "ready"}
    assert {step["batch"] for step in client.change(1)["steps"]} == {0, 1}
    assert headgate(house, "start", "app", FIRST, SECOND).returncode == 0
    assert servers(client) == dict.fromkeys((FIRST, SECOND, THIRD), "ready")
    assert {step["batch"] for step in client.change(2)["steps"]} == {0}
    assert headgate(house, "stop", "app", FIRST, SECOND, THIRD, "--batch", "1").returncode == 4


def test_a_reset_by_the_command_forgets_and_says_what(house: House, client: Client) -> None:
    client.offline(FIRST, why="its disk is full")
    client.set_admin("app", FIRST, "maint")
    done = headgate(house, "reset", "app", FIRST)
    assert done.returncode == 0, done.stderr
    assert "forgot a quarantine (notice: its disk is full)" in " ".join(done.stdout.split())
    (shown,) = client.servers("app", FIRST)
    assert (shown["admin"], shown["quarantine"], shown["effective_weight"]) == ("ready", [], 1.0)


def test_what_is_no_new_server_is_refused(client: Client) -> None:
    with pytest.raises(ApiError, match=r"has the server 127\.0\.0\.1:8001 already") as refused:
        client.begin_change("scale-out", "app", (FIRST,))
    assert refused.value.status == 422
    with pytest.raises(ApiError, match="nothing to plan"):
        client.plan("app", "scale-out", (NEW,))
