"""Hooks on the real thing, under traffic that must not fail: a registry is left and returned to, and gets sick."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from controller.demo.stage import UPSTREAM, Stage, until

TOKEN = "c0ffee-d15ea5e"


class Registry:
    """The maintenance interface of a Consul agent; while it is `sick` no service can be put into maintenance."""

    def __init__(self) -> None:
        self.sick = False
        self.maintenance: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        registry = self

        class Answer(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.send_response(registry.answer(self.path, self.headers["X-Consul-Token"]))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def answer(self, path: str, token: str) -> int:
        """The status of a call, which is noted."""
        parts = urlsplit(path)
        service = parts.path.removeprefix("/v1/agent/service/maintenance/")
        (enable,) = parse_qs(parts.query)["enable"]
        self.calls.append((service, enable))
        if token != TOKEN:
            return 403
        if enable == "true" and self.sick:
            return 500
        (self.maintenance.add if enable == "true" else self.maintenance.discard)(service)
        return 200

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def registry() -> Iterator[Registry]:
    started = Registry()
    yield started
    started.close()


def test_a_server_leaves_its_registry_and_returns_and_keeps_serving_when_it_cannot_leave(
    registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    settings = f"""
[upstream.{UPSTREAM}.hooks]
after_drain = [{{ command = ["sh", "-c", 'echo "$1" >> {tmp_path}/drained', "sh", "{{address}}"] }}]

[upstream.{UPSTREAM}.hooks.registry]
preset = "consul"
url = "http://127.0.0.1:{registry.port}"
service = "app-{{port}}"
headers = {{ X-Consul-Token = "{{file:{tmp_path}/token}}" }}
tries = 2
"""
    with Stage("gthread", warm_up=1.0, settings=settings) as stage:
        client, address = stage.client, stage.addresses[0]
        service = f"app-{address.rpartition(':')[2]}"
        load = stage.load(80, "--mix", "fast=9,echo=1")
        until(lambda: load.read() and len(load.ticks) >= 2, "traffic", 30.0, stage.prefix / "headgate.log")

        *_, record = client.follow_change(client.begin_change("restart", UPSTREAM, (address,)))
        assert record["status"] == "done", record["error"]
        details = {step["name"]: step["detail"] for step in record["steps"]}
        url = f"PUT http://127.0.0.1:{registry.port}/v1/agent/service/maintenance/{service}"
        assert details["before_drain"] == details["after_up"] == f"{url} answered 200"
        assert registry.calls == [(service, "true"), (service, "false")]
        assert (tmp_path / "drained").read_text() == f"{address}\n"

        registry.sick = True
        *_, record = client.follow_change(client.begin_change("restart", UPSTREAM, (address,)))
        assert record["status"] == "failed"
        assert f"before_drain: {url} answered 500 after 2 tries" in record["error"]
        assert {step["name"]: step["state"] for step in record["steps"]}["after_up"] == "done"
        assert registry.calls[2:] == [(service, "true"), (service, "true"), (service, "false")]
        (server,) = client.servers(UPSTREAM, address)
        assert (server["admin"], server["health"]) == ("ready", "up")
        assert registry.maintenance == set()
        assert load.finish()["failed"] == 0
        seen = [path for path in stage.prefix.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
        assert seen == [], "a secret stands in no log and in no record"
