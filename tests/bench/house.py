"""A daemon beside a real nginx with servers that cost next to nothing: the same nginx, which answers by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from controller.adapters.nginx.lua import LuaPlane
from controller.client import Client
from controller.demo.stage import free_ports, until
from controller.errors import HeadgateError
from controller.ports import PeerCounters
from tests.support.nginx import Nginx


@dataclass(frozen=True, slots=True)
class House:
    """What runs: `addresses` by upstream, `url` of the first one's front, the daemon's pid and client."""

    nginx: Nginx
    client: Client
    daemon: int
    url: str
    addresses: dict[str, list[str]]

    @contextmanager
    def load(self, rate: float) -> Iterator[Load]:
        """Short requests to the first upstream, at `rate` a second."""
        command = [sys.executable, "-m", "controller.demo.load", self.url, "--rate", str(rate), "--mix", "fast=1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield Load(process)
            finally:
                process.terminate()
                process.communicate()


@dataclass(frozen=True, slots=True)
class Load:
    """A load generator that runs."""

    process: subprocess.Popen[str]

    def finish(self) -> dict[str, Any]:
        """Let it end what it has begun; its summary."""
        self.process.terminate()
        assert self.process.stdout is not None
        told = self.process.stdout.read()
        return dict(json.loads(told.splitlines()[-1])["summary"])


async def counters(plane: LuaPlane) -> dict[str, PeerCounters]:
    """The first upstream's counters by server, as nginx has them now."""
    return dict((await plane.counters("app0")).upstreams["app0"])


def total(counters: dict[str, PeerCounters]) -> int:
    """Requests to all servers."""
    return sum(each.requests for each in counters.values())


@contextmanager
def house(upstreams: int, servers: int, settings: str = "") -> Iterator[House]:
    """Start everything, wait until every probe has risen, and leave nothing behind."""
    front, *ports = free_ports(1 + upstreams * servers)
    groups = {f"app{n}": ports[n * servers : (n + 1) * servers] for n in range(upstreams)}
    addresses = {name: [f"127.0.0.1:{port}" for port in mine] for name, mine in groups.items()}
    blocks = [
        f"server {{ {' '.join(f'listen 127.0.0.1:{port};' for port in ports)} add_header X-Served-By $server_port; "
        'location / { return 200 "fast\\n"; } }',
        f"server {{ listen 127.0.0.1:{front}; location / {{ proxy_pass http://app0; proxy_http_version 1.1; "
        'proxy_set_header Connection ""; } }',
    ]
    for name, mine in addresses.items():
        lines = " ".join(f"server {address};" for address in mine)
        hook = f'balancer_by_lua_block {{ require("headgate").balance("{name}") }}'
        blocks.append(f"upstream {name} {{ {lines} {hook} keepalive 16; }}")
    with Nginx("\n".join(blocks)) as nginx:
        paths = {name: json.dumps(str(nginx.prefix / name)) for name in ("nginx.conf", "api.sock")}
        config = nginx.prefix / "headgate.toml"
        config.write_text(
            f"[nginx]\nconf = {paths['nginx.conf']}\ncontrol = {json.dumps(str(nginx.socket))}\n"
            f"snapshot = {json.dumps(str(nginx.snapshot))}\n[api]\nsocket = {paths['api.sock']}\nlisten = ''\n"
            f"[store]\nurl = {json.dumps(f'sqlite:///{nginx.prefix}/state.db')}\n{settings}"
        )
        log = nginx.prefix / "headgate.log"
        with log.open("wb") as said:
            command = [sys.executable, "-m", "controller", "--config", str(config), "run"]
            daemon = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            client = Client(str(nginx.prefix / "api.sock"))
            until(lambda: _up(client) == upstreams * servers, "every server up", 60, log)
            yield House(nginx, client, daemon.pid, f"http://127.0.0.1:{front}", addresses)
        finally:
            daemon.terminate()
            daemon.wait()


def _up(client: Client) -> int:
    try:
        upstreams = client.status()["upstreams"]
    except HeadgateError:
        return 0
    return sum(server["health"] == "up" for upstream in upstreams for server in upstream["servers"])
