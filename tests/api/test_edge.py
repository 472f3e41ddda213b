"""The edge host over HTTP and as a command: what the tier above is answered, and going offline with nobody cut off."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from controller.client import Client
from controller.errors import ApiError
from tests.support.house import APP, House


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    run = tmp_path / "run"
    (tmp_path / "headgate.toml").write_text(
        f'[api]\nsocket = "{run}/api.sock"\nlisten = ""\n[store]\nurl = "sqlite:///{tmp_path}/state.db"\n'
        f'[nginx]\ncontrol = "{run}/nginx.sock"\nsnapshot = "{tmp_path}/table.json"\n'
    )
    with House(tmp_path, listen="127.0.0.1:0", token="secret", readiness="127.0.0.1:0") as started:
        yield started


@pytest.fixture
def client(house: House) -> Client:
    return Client(str(house.socket))


def headgate(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controller", "--config", f"{home}/headgate.toml", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def ask(house: House, query: str = "") -> tuple[int, str]:
    """Status and code; the same from both places, without a token, and for HEAD."""
    found = set()
    for address in (house.api.address, house.api.readiness_address):
        url = f"http://{address}/healthz/traffic{query}"
        answer = requests.get(url, timeout=5)
        assert requests.head(url, timeout=5).status_code == answer.status_code
        found.add((answer.status_code, "" if answer.ok else answer.json()["error"]["code"]))
    (only,) = found
    return only


def test_the_tier_above_hears_yes_until_the_edge_is_taken_offline(house: House, client: Client) -> None:
    assert ask(house) == (200, "")
    assert client.set_edge(True)["takes_traffic"] is False
    assert ask(house) == (503, "edge_offline")
    assert client.status()["offline"] is True
    assert client.set_edge(False) == {"offline": False, "takes_traffic": True, "why": []}
    assert ask(house) == (200, "")
    assert [each["text"] for each in client.events() if each["kind"] == "edge"] == [
        "this edge goes offline: checks are answered no",
        "this edge is online again",
    ]


def test_the_tier_above_hears_no_while_an_upstream_that_counts_has_no_server(house: House) -> None:
    house.prober.down.update(server.key for server in APP.servers)
    house.do(lambda: [house.prober.probe_now("app", server.key) for server in APP.servers])
    house.until(lambda: house.runtime.state.groups["app"].fail_open)
    assert ask(house) == (503, "no_traffic")
    assert ask(house, "?upstream=app&upstream=named") == (503, "no_traffic")
    assert ask(house, "?upstream=named") == (200, "")
    assert ask(house, "?upstream=nope") == (404, "not_found")


def test_the_tier_above_hears_no_while_nginx_does_not_answer(house: House, client: Client) -> None:
    house.plane.error = "nginx does not answer"
    house.until(lambda: bool(house.runtime.state.plane.error))
    assert ask(house) == (503, "no_traffic")
    assert "nginx does not answer" in client.edge()["why"][0]
    house.plane.error = ""
    house.until(house.published)
    assert ask(house) == (200, "")


def test_an_edge_stays_offline_over_a_restart_of_the_daemon_and_the_loss_of_its_store(tmp_path: Path) -> None:
    with House(tmp_path) as house:
        Client(str(house.socket)).set_edge(True)
    for file in tmp_path.glob("state.db*"):
        file.unlink()
    with House(tmp_path) as house:
        assert Client(str(house.socket)).edge()["offline"] is True
        Client(str(house.socket)).set_edge(False)
    with House(tmp_path) as house:
        assert Client(str(house.socket)).edge()["offline"] is False


def test_what_cannot_be_remembered_has_not_happened(house: House, client: Client) -> None:
    (house.directory / "edge-offline.new").mkdir()
    with pytest.raises(ApiError) as refused:
        client.set_edge(True)
    assert (refused.value.status, refused.value.code) == (507, "store_failed")
    assert client.edge()["offline"] is False


def test_check_says_by_its_exit_code_whether_the_edge_takes_traffic(house: House, client: Client) -> None:
    done = headgate(house.directory, "check")
    assert (done.returncode, done.stdout) == (0, "this edge takes traffic\n")
    client.set_edge(True)
    done = headgate(house.directory, "check", "--upstream", "app")
    assert (done.returncode, done.stdout) == (1, "")
    assert "offline" in done.stderr
    assert headgate(house.directory, "check", "--upstream", "nope").returncode == 2


def test_drain_waits_until_the_tier_above_had_its_time_and_no_client_is_left(house: House, client: Client) -> None:
    house.edge.connected = 3
    done = headgate(house.directory, "edge", "drain", "--wait", "--settle", "0", "--timeout", "0.2")
    assert done.returncode == 1
    assert "3 client connections are left" in done.stderr
    assert client.edge() == {
        "offline": True,
        "takes_traffic": False,
        "why": ["this edge is offline by `headgate edge drain`"],
        "connections": 3,
    }
    assert "this edge is offline" in headgate(house.directory, "status").stdout
    house.edge.connected = 0
    done = headgate(house.directory, "edge", "drain", "--wait", "--settle", "0.3")
    assert done.returncode == 0
    assert re.fullmatch(r"no client is connected after \d+ s; nginx may end", done.stdout.splitlines()[-1])
    done = headgate(house.directory, "edge", "enable")
    assert (done.returncode, done.stdout) == (0, "this edge is online\n")


def test_enable_says_what_still_keeps_traffic_away(house: House) -> None:
    house.plane.error = "nginx does not answer"
    house.until(lambda: bool(house.runtime.state.plane.error))
    done = headgate(house.directory, "edge", "enable")
    assert done.stdout.startswith("not yet: nginx does not answer")


def test_without_daemon_and_nginx_check_says_no_with_both_reasons(tmp_path: Path) -> None:
    (tmp_path / "headgate.toml").write_text(
        f'[api]\nsocket = "{tmp_path}/api.sock"\n[nginx]\ncontrol = "{tmp_path}/nginx.sock"\n'
        f'[store]\nurl = "sqlite:///{tmp_path}/state.db"\n'
    )
    done = headgate(tmp_path, "check")
    assert done.returncode == 1
    assert "api.sock" in done.stderr
    assert "nginx.sock" in done.stderr
