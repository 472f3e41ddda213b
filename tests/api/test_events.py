"""The event stream: live, resumable, alive while silent, and cleanly ended."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from controller.client import Client
from controller.errors import DaemonUnreachable
from tests.support.house import APP, House

FIRST = APP.servers[0].key


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path, listen="127.0.0.1:0") as started:
        yield started


def stream(house: House, **headers: str) -> requests.Response:
    return requests.get(
        f"http://{house.api.address}/v1/events",
        headers={"Accept": "text/event-stream", **headers},
        stream=True,
        timeout=10,
    )


def toggle(client: Client, times: int) -> list[int]:
    """Make events; their ids."""
    before = client.events()[-1]["id"]
    for number in range(times):
        client.set_admin("app", FIRST, "ready" if number % 2 else "maint")
    return [event["id"] for event in client.events(after=before)]


def test_events_stream_in_order_with_their_ids(house: House) -> None:
    client = Client(str(house.socket))
    with stream(house, **{"Last-Event-ID": str(client.events()[-1]["id"])}) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = response.iter_lines(chunk_size=1, decode_unicode=True)
        assert next(lines) == "retry: 1000"
        ids = toggle(client, 3)
        received = []
        while len(received) < len(ids):
            line = next(lines)
            if line.startswith("id: "):
                event = json.loads(next(lines).removeprefix("data: "))
                assert line == f"id: {event['id']}"
                received.append(event["id"])
        assert received == ids


def test_a_silent_stream_shows_that_it_lives(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.api.app.KEEP_ALIVE_SECONDS", 0.05)
    with stream(house) as response:
        lines = (line for line in response.iter_lines(chunk_size=1, decode_unicode=True) if line.startswith(":"))
        assert [next(lines), next(lines)] == [": still here"] * 2


@pytest.mark.parametrize("given", ["²", "-1", "9" * 5000])
def test_an_unreadable_last_event_id_is_taken_as_none(house: House, given: str) -> None:
    with stream(house, **{"Last-Event-ID": given}) as response:
        assert response.status_code == 200
        assert next(response.iter_lines(chunk_size=1)) == b"retry: 1000"


def test_following_resumes_where_it_was_when_the_daemon_restarts(tmp_path: Path) -> None:
    seen: list[int] = []
    first_ids: list[int] = []
    with House(tmp_path) as house:
        client = Client(str(house.socket))
        followed = client.follow_events(client.events()[-1]["id"])
        first_ids = toggle(client, 2)
        seen += [next(followed)["id"] for _ in first_ids]
    with House(tmp_path) as house:
        client = Client(str(house.socket))
        expected = [event["id"] for event in client.events(after=first_ids[-1])] + toggle(client, 3)
        seen += [next(followed)["id"] for _ in expected]
        followed.close()
    assert seen == first_ids + expected


def test_the_daemon_ends_at_once_though_streams_and_long_polls_are_open(tmp_path: Path) -> None:
    ended = []
    with House(tmp_path) as house:
        client = Client(str(house.socket))
        house.do(house.processes.stuck.clear)
        change = client.begin_change("restart", "app", (FIRST,))
        record = client.change(change)
        while not any(step["name"] == "exit" and step["state"] == "running" for step in record["steps"]):
            record = client.change(change, 10, record["version"])

        def poll() -> None:
            ended.append(client.change(change, 60, record["version"])["status"])

        def follow() -> None:
            with pytest.raises(DaemonUnreachable, match="has ended"):
                list(client._stream(10_000))
            ended.append("stream")

        threads = [threading.Thread(target=poll), threading.Thread(target=follow)]
        for thread in threads:
            thread.start()
        house.until_connections(2)
    for thread in threads:
        thread.join(10)
    assert sorted(ended) == ["running", "stream"]


def test_a_listener_that_goes_away_leaves_nothing_behind(house: House) -> None:
    tasks = house.tasks()
    host, _, port = str(house.api.address).rpartition(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
        received = b""
        while b"retry" not in received:
            received += raw.recv(1000)
        assert house.tasks() > tasks
    house.until(lambda: house.count_tasks() <= tasks)
