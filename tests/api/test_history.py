"""The routes that look back, over a real runtime and store; nginx's counters are in the test's hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.client import Client
from controller.errors import ApiError
from controller.runtime import FLUSH
from tests.support.house import APP, House
from tests.support.nginx import wait_until

FIRST, SECOND, THIRD = (server.key for server in APP.servers)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path) as started:
        yield started


@pytest.fixture
def client(house: House) -> Client:
    return Client(str(house.socket))


def recorded(client: Client, server: str) -> float:
    (series,) = [each for each in client.traffic("app")["servers"] if each["server"] == server]
    return sum(point["requests"] for point in series["points"])


def test_traffic_is_what_nginx_counted_by_server_with_the_mean_response_time(house: House, client: Client) -> None:
    house.plane.served = {FIRST: 50, SECOND: 8}
    wait_until(lambda: recorded(client, FIRST) > 0, "the counters are read")
    assert recorded(client, FIRST) == pytest.approx(50, abs=0.01)
    assert recorded(client, SECOND) == pytest.approx(8, abs=0.01)
    assert recorded(client, THIRD) == 0
    answer = client.traffic("app")
    assert [each["server"] for each in answer["servers"]] == [FIRST, SECOND, THIRD]
    assert all(point["response_time"] == pytest.approx(0.01) for point in answer["servers"][0]["points"])
    assert any("is up" in event["text"] for event in answer["events"])


def test_steps_begin_at_their_own_multiples_and_the_caller_may_choose_them(client: Client) -> None:
    answer = client.traffic("app", since=1_700_000_003, until=1_700_000_021, step=10)
    assert (answer["since"], answer["until"], answer["step"]) == (1_700_000_000, 1_700_000_030, 10)
    assert client.traffic("app", since=1_700_000_000, until=1_700_003_600)["step"] == 120
    with pytest.raises(ApiError, match=r"more than 10,000 steps of 1 s.*longer step") as caught:
        client.traffic("app", since=0, step=1)
    assert caught.value.code == "invalid"


def test_an_upstream_or_server_that_is_not_there_is_not_found(client: Client) -> None:
    for ask in (
        lambda: client.traffic("none"),
        lambda: client.explain("none", FIRST),
        lambda: client.explain("app", "x"),
    ):
        with pytest.raises(ApiError) as caught:
            ask()
        assert caught.value.code == "not_found"


def test_traffic_outlives_the_daemon(tmp_path: Path) -> None:
    with House(tmp_path) as house:
        house.plane.served = {FIRST: 50}
        wait_until(lambda: recorded(Client(str(house.socket)), FIRST) > 0, "the counters are read")
        house.plane.served = {FIRST: 80}
        house.until(lambda: house.runtime.counters.upstreams["app"][FIRST].requests == 180)
    with House(tmp_path) as house:
        assert recorded(Client(str(house.socket)), FIRST) == pytest.approx(80, abs=0.01)


def test_a_store_that_cannot_be_written_leaves_a_gap_and_is_said(house: House, client: Client) -> None:
    house.refuse_writes()
    house.plane.served = {FIRST: 50}
    wait_until(lambda: bool(house.runtime.store_error), "the write fails", 3 * FLUSH)
    assert "readonly" in house.runtime.store_error
    assert recorded(client, FIRST) == 0


def test_explain_tells_each_address_of_a_host_name_apart(client: Client) -> None:
    answer = client.explain("named", "web:80")
    assert [story["server"] for story in answer["servers"]] == ["web:80@10.0.0.1", "web:80@10.0.0.2"]
    for story in answer["servers"]:
        assert story["answers"][0] == {
            "question": "Does it get traffic now?",
            "sentences": ["It gets 50% of the new requests: its weight now is 2 of 4 in all."],
        }


def test_explain_says_what_a_drained_server_still_has(house: House, client: Client) -> None:
    house.plane.busy = {FIRST: 3}
    client.set_admin("app", FIRST, "drain")
    wait_until(lambda: client.servers("app", FIRST)[0]["in_flight"] == 3, "the counters are read")
    (story,) = client.explain("app", FIRST)["servers"]
    answers = {each["question"]: each["sentences"] for each in story["answers"]}
    assert answers["Does it get traffic now?"][0].startswith("No new request goes to it: it drains, since ")
    assert answers["Does traffic still reach it, and why?"][0].startswith("3 requests that began before")
    assert "Change 1 (drain) began at" in answers["Why did its last change take so long?"][0]


def test_a_daemon_whose_store_is_damaged_starts_says_so_and_serves_as_before(tmp_path: Path) -> None:
    with House(tmp_path):
        pass
    (tmp_path / "state.db").write_bytes(b"\0" * 8192)
    with House(tmp_path) as house:
        client = Client(str(house.socket))
        assert all(each["effective_weight"] == each["weight"] for each in client.upstream("app")["servers"])
        said = [event for event in client.events() if event["kind"] == "store"]
    assert len(said) == 1
    assert "it is kept as state.db.corrupt-1, and a new one begins" in said[0]["text"]
    assert (tmp_path / "state.db.corrupt-1").read_bytes() == b"\0" * 8192
