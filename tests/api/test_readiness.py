"""Readiness and health for orchestrators, on the API and on a port of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from controller.api.serve import ListenError, bind_tcp
from controller.client import Client
from controller.core.policy import WarmUpPolicy
from tests.support.house import APP, POLICY, House

FIRST, SECOND, THIRD = (server.key for server in APP.servers)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path, listen="127.0.0.1:0", token="secret", readiness="127.0.0.1:0") as started:
        yield started


@pytest.fixture
def client(house: House) -> Client:
    return Client(str(house.socket))


def ask(house: House, path: str) -> tuple[int, str]:
    """Status and, where it is no yes, the code; the same from both places, without a token, and for HEAD."""
    found = []
    for address in (house.api.address, house.api.readiness_address):
        url = f"http://{address}{path}"
        answer = requests.get(url, timeout=5)
        if answer.ok:
            assert answer.json() == {"ok": True}
        found.append((answer.status_code, "" if answer.ok else answer.json()["error"]["code"]))
        head = requests.head(url, timeout=5)
        assert (head.status_code, head.content) == (answer.status_code, b"")
    assert found[0] == found[1]
    return found[0]


def why(house: House, path: str) -> str:
    error = requests.get(f"http://{house.api.readiness_address}{path}", timeout=5).json()["error"]
    assert error["remedy"]
    return str(error["message"])


def test_a_server_is_ready_while_nginx_sends_it_requests(house: House, client: Client) -> None:
    path = f"/readiness/app/{FIRST}"
    assert ask(house, path) == (200, "")
    client.set_admin("app", FIRST, "drain")
    assert ask(house, path) == (500, "not_registered")
    assert why(house, path) == f"app: {FIRST} drains"
    client.set_admin("app", FIRST, "maint")
    assert why(house, path) == f"app: {FIRST} is under maintenance"
    house.prober.down.add(FIRST)
    client.set_admin("app", FIRST, "ready")
    house.until(lambda: house.runtime.state.groups["app"].peers[FIRST].health == "down")
    assert ask(house, path) == (500, "not_registered")
    assert why(house, path) == f"app: {FIRST} is not up: refused"
    house.prober.down.clear()
    house.do(lambda: house.prober.probe_now("app", FIRST))
    house.until(house.settled)
    assert ask(house, path) == (200, "")


def test_a_quarantined_server_is_not_ready_and_the_answer_says_how_long(house: House, client: Client) -> None:
    client.offline(FIRST, seconds=100, why="it stops")
    assert ask(house, f"/readiness/app/{FIRST}") == (500, "not_registered")
    message = why(house, f"/readiness/app/{FIRST}")
    assert message.startswith(f"app: {FIRST} is quarantined for ")
    assert message.endswith(" s: it stops")


def test_a_server_is_not_ready_before_nginx_was_told_of_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.api.readiness.PUBLISH_SECONDS", 0.1)
    house.plane.error = "nginx's control socket does not answer"
    house.until(lambda: bool(house.runtime.state.plane.error))
    assert ask(house, f"/readiness/app/{FIRST}") == (500, "not_published")
    assert ask(house, "/health") == (500, "not_published")
    assert "control socket" in why(house, "/health")
    house.plane.error = ""
    house.until(house.published)
    assert ask(house, f"/readiness/app/{FIRST}") == (200, "")
    assert ask(house, "/health") == (200, "")


def test_what_nobody_knows_is_not_ready(house: House) -> None:
    assert ask(house, "/readiness/app/10.9.9.9:1") == (500, "not_found")
    assert ask(house, f"/readiness/nope/{FIRST}") == (500, "not_found")


def test_a_host_name_is_ready_when_each_of_its_addresses_is(house: House, client: Client) -> None:
    assert ask(house, "/readiness/named/web:80") == (200, "")
    assert ask(house, "/readiness/named/unix:/run/a%20b.sock") == (200, "")
    client.set_admin("named", "web:80@10.0.0.2", "drain")
    assert ask(house, "/readiness/named/web:80") == (500, "not_registered")
    assert ask(house, "/readiness/named/10.0.0.1:80") == (200, "")


def test_the_second_place_answers_nothing_else(house: House) -> None:
    for path in ("/v1/status", "/metrics", "/openapi.json", "/healthz", "/docs"):
        answer = requests.get(f"http://{house.api.readiness_address}{path}", timeout=5)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
    answer = requests.post(f"http://{house.api.readiness_address}/health", timeout=5)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("warm", [True, False])
def test_readiness_waits_for_the_warm_up_where_that_is_asked(tmp_path: Path, warm: bool) -> None:
    with House(tmp_path, listen="127.0.0.1:0", readiness="127.0.0.1:0", warm=warm) as house:
        policy = replace(POLICY, warm_up=WarmUpPolicy(duration=600, starts="healthy", floor=0.25))
        house.source.config = replace(house.source.config, upstreams=(replace(APP, policy=policy),))
        client = Client(str(house.socket))
        client.reread()
        assert ask(house, f"/readiness/app/{FIRST}") == (200, ""), "what served before is warm"
        client.set_admin("app", FIRST, "maint")
        client.set_admin("app", FIRST, "ready")
        house.until(lambda: house.runtime.state.groups["app"].peers[FIRST].health == "up" and house.published())
        assert ask(house, f"/readiness/app/{FIRST}") == ((500, "not_warm") if warm else (200, ""))
        if warm:
            assert why(house, f"/readiness/app/{FIRST}") == f"app: {FIRST} warms up: it has 25% of its share"
        assert ask(house, f"/readiness/app/{SECOND}") == (200, "")


def test_a_readiness_port_that_is_taken_is_said_to_be(house: House) -> None:
    with pytest.raises(ListenError, match=r"change readiness\.listen"):
        bind_tcp(str(house.api.readiness_address), "readiness.listen")
