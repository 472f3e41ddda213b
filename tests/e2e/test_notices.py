"""Notices on the real thing, under traffic that must not fail: offline, online, readiness, and told consumers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from controller.demo.stage import UPSTREAM, Stage, free_ports, until


class Consumer:
    """Acknowledges every notice."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        told = self.told

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def consumer() -> Iterator[Consumer]:
    started = Consumer()
    yield started
    started.close()


def test_a_server_leaves_by_notice_comes_back_by_notice_and_consumers_hear_of_its_restart(consumer: Consumer) -> None:
    (port,) = free_ports(1)
    settings = f"""
[readiness]
listen = "127.0.0.1:{port}"

[upstream.{UPSTREAM}.notices]
enabled = true
consumers = ["http://127.0.0.1:{consumer.port}/headgate"]
"""
    with Stage("gthread", warm_up=1.0, settings=settings) as stage:
        client, address = stage.client, stage.addresses[0]

        def requests_of() -> int:
            return int(client.servers(UPSTREAM, address)[0]["requests"])

        def wait(what: str, done: Any) -> None:
            until(done, what, 30.0, stage.prefix / "headgate.log")

        def ready() -> int:
            return requests.get(f"http://127.0.0.1:{port}/readiness/{UPSTREAM}/{address}", timeout=5).status_code

        load = stage.load(80, "--mix", "fast=9,echo=1")
        wait("traffic at every server", lambda: load.read() and requests_of() > 0)
        assert ready() == 200

        answer = client.offline(address, id="stop-1", why="it stops", wait=30)
        assert (answer["drained"], answer["replayed"]) == (True, False)
        assert ready() == 500
        before, seen = requests_of(), len(load.ticks)
        wait("a second of traffic", lambda: load.read() is not None and len(load.ticks) >= seen + 3)
        assert client.offline(address, id="stop-1")["replayed"]
        assert requests_of() == before, "nothing reached it since"

        client.online(address)
        wait("its return", lambda: ready() == 200)
        wait("traffic at it again", lambda: requests_of() > before)

        *_, record = client.follow_change(client.begin_change("restart", UPSTREAM, (address,)))
        assert record["status"] == "done", record["error"]
        details = {step["name"]: step["detail"] for step in record["steps"]}
        assert details["notify"] == "1 of 1 consumers acknowledged"
        assert load.finish()["failed"] == 0
    by_notice, by_restart = consumer.told
    assert by_notice["id"] != by_restart["id"]
    for told in consumer.told:
        assert (told["event"], told["upstream"], told["server"]) == ("offline", UPSTREAM, address)
        assert f"{told['host']}:{told['port']}" == address
