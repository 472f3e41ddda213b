"""Changes that are rolled back over the API and by the command, of the daemon that runs and of one before it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.client import Client
from controller.core.policy import ProcessPolicy
from controller.errors import ApiError
from tests.support.house import APP, POLICY, House

FIRST, SECOND, THIRD = (server.key for server in APP.servers)
DEPLOYED = replace(
    APP, policy=replace(POLICY, process=ProcessPolicy(start=("serve",), deploy=("new",), roll_back=("old",)))
)


def settle(house: House) -> None:
    house.source.config = replace(house.source.config, upstreams=(DEPLOYED, *house.source.config.upstreams[1:]))
    Client(str(house.socket)).reread()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    (tmp_path / "headgate.toml").write_text(f'[api]\nsocket = "{tmp_path}/run/api.sock"\nlisten = ""\n')
    with House(tmp_path) as started:
        settle(started)
        yield started


@pytest.fixture
def client(house: House) -> Client:
    return Client(str(house.socket))


def headgate(house: House, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controller", "--config", f"{house.directory}/headgate.toml", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def until(client: Client, change: int, server: str, step: str) -> None:
    for record in client.follow_change(change):
        if any((s["server"], s["name"], s["state"]) == (server, step, "running") for s in record["steps"]):
            return
    raise AssertionError(f"{step} of {server} never began")


def back(client: Client, change: int) -> list[str]:
    """The servers whose roll back command was run, in order."""
    steps = [s for s in client.change(change)["steps"] if (s["name"], s["state"]) == ("roll-back", "done")]
    return [s["server"] for s in sorted(steps, key=lambda step: step["ended_at"])]


def test_a_deploy_that_fails_is_rolled_back_where_that_was_wished(house: House, client: Client) -> None:
    house.plane.busy = {SECOND: 1}
    change = client.begin_change("deploy", "app", roll_back=True)
    until(client, change, SECOND, "empty")
    house.processes.broken = "no module named app"
    house.plane.busy = {}
    *_, record = client.follow_change(change)
    assert record["status"] == "failed"
    assert record["error"].startswith(f"{SECOND}: start: no module named app")
    assert f"; the roll back failed at {SECOND}: start: no module" in record["error"], "nothing starts any more"
    assert back(client, change) == [SECOND]


def test_a_change_under_way_is_rolled_back_by_hand(house: House, client: Client) -> None:
    house.plane.busy = {SECOND: 1}
    change = client.begin_change("deploy", "app")
    until(client, change, SECOND, "empty")
    house.do(house.processes.stuck.clear)
    assert client.roll_back(change) == change
    until(client, change, FIRST, "exit")
    assert client.change(change)["status"] == "rolling-back"
    house.do(house.processes.stuck.set)
    done = headgate(house, "changes", str(change), "--wait")
    assert "change 1: deploy of app aborted after " in done.stdout
    assert done.stdout.rstrip().endswith(": by an operator; rolled back")
    assert back(client, change) == [FIRST]
    assert any("change 1: deploy of app is rolled back" in event["text"] for event in client.events())


def test_what_has_ended_is_rolled_back_by_a_change_of_its_own_also_by_the_next_daemon(tmp_path: Path) -> None:
    with House(tmp_path) as house:
        settle(house)
        client = Client(str(house.socket))
        *_, record = client.follow_change(client.begin_change("deploy", "app", (FIRST, THIRD)))
        assert record["status"] == "done"
    (tmp_path / "headgate.toml").write_text(f'[api]\nsocket = "{tmp_path}/run/api.sock"\nlisten = ""\n')
    with House(tmp_path) as house:
        settle(house)
        client = Client(str(house.socket))
        done = headgate(house, "roll-back", "--change", "1")
        assert done.returncode == 0, done.stderr
        assert "change 2: roll-back of app done in " in done.stdout
        assert back(client, 2) == [THIRD, FIRST]


def test_the_command_exits_with_0_where_what_was_under_way_is_rolled_back(house: House, client: Client) -> None:
    house.do(house.processes.stuck.clear)
    change = client.begin_change("deploy", "app")
    until(client, change, FIRST, "exit")
    done = headgate(house, "roll-back", "--change", str(change), "--no-wait")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("change 1 rolls change 1 back; follow it with: headgate changes 1 --wait")
    house.do(house.processes.stuck.set)
    *_, record = client.follow_change(change)
    assert record["error"].startswith("by an operator")


@pytest.mark.parametrize("wish", [{"kind": "stop"}, {"kind": "rollout", "upstream": "named"}])
def test_what_cannot_be_rolled_back_is_refused_with_the_remedy(client: Client, wish: dict[str, str]) -> None:
    upstream = wish.get("upstream", "app")
    with pytest.raises(ApiError) as caught:
        client.begin_change(wish["kind"], upstream, (FIRST,) if upstream == "app" else (), roll_back=True)
    assert (caught.value.status, caught.value.code) == (422, "invalid")
    assert caught.value.remedy
    with pytest.raises(ApiError) as caught:
        client.roll_back(7)
    assert caught.value.code == "not_found"


def test_a_drain_that_has_ended_is_not_rolled_back(client: Client) -> None:
    change = client.begin_change("drain", "app", (FIRST,))
    *_, record = client.follow_change(change)
    assert record["status"] == "done"
    with pytest.raises(ApiError) as caught:
        client.roll_back(change)
    assert (caught.value.status, caught.value.code) == (409, "busy")


@pytest.mark.parametrize("words", [(), ("app", "--change", "1"), ("--change", "1", "--force")])
def test_either_an_upstream_or_a_change_is_rolled_back(house: House, words: tuple[str, ...]) -> None:
    done = headgate(house, "roll-back", *words)
    assert done.returncode == 2
    assert "--change" in done.stderr
