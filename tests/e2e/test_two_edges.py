"""Two edge hosts share an address by keepalived: one goes offline under load and comes back, and no request is lost."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.network import Network, missing
from tests.support.nginx import ROOT, Nginx, missing_parts, wait_until

SHARED = "192.0.2.10"
EDGES = {"first": "192.0.2.11", "second": "192.0.2.12"}
SERVERS = (8001, 8002)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(missing_parts() is not None, reason=str(missing_parts())),
]


class Backend(ThreadingHTTPServer):
    """Answers the name of its edge; /slow takes a second."""

    daemon_threads = True

    def __init__(self, edge: str, port: int) -> None:
        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/slow":
                    time.sleep(1)
                self.send_response(200)
                self.send_header("Content-Length", str(len(edge)))
                self.end_headers()
                self.wfile.write(edge.encode())

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", port), Answer)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class EdgeNginx(Nginx):
    """nginx on a host of the network."""

    def __init__(self, network: Network, host: str) -> None:
        self._network, self._host = network, host
        servers = " ".join(f"server 127.0.0.1:{port};" for port in SERVERS)
        super().__init__(f"""
            upstream app {{ {servers} balancer_by_lua_block {{ require("headgate").balance("app") }} keepalive 8; }}
            keepalive_requests 30;
            server {{
                listen 80;
                proxy_http_version 1.1;
                proxy_set_header Connection "";
                location / {{ proxy_pass http://app; }}
            }}""")

    def command(self, *arguments: str) -> list[str]:
        return self._network.on(self._host, *super().command(*arguments))


class Edge:
    """An edge host: backends, nginx, the daemon and keepalived, with the files that docs/edge.md recommends."""

    def __init__(self, network: Network, host: str) -> None:
        self.network, self.host = network, host
        self.peer = next(address for each, address in EDGES.items() if each != host)
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Edge:
        with contextlib.ExitStack() as closing:
            # keepalived only runs scripts in whose way nobody but root can come.
            self.home = Path(tempfile.mkdtemp(prefix=f"headgate-{self.host}-", dir="/run"))
            closing.callback(shutil.rmtree, self.home)
            for port in SERVERS:
                backend = self.network.within(self.host, functools.partial(Backend, self.host, port))
                closing.callback(backend.close)
            self.nginx = EdgeNginx(self.network, self.host)
            closing.callback(self.nginx.close)
            self._closing = closing
            self._write()
            self.network.run(self.host, str(ROOT / "nginx" / "second-chance"), SHARED, self.peer)
            self.start()
            self.spawn(
                *("keepalived", "-n", "-l", "-D", "-f", str(self.home / "keepalived.conf")),
                *("-p", str(self.home / "keepalived.pid"), "-r", str(self.home / "vrrp.pid")),
            )
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _write(self) -> None:
        text = json.dumps
        (self.home / "headgate.toml").write_text(
            f"[nginx]\nconf = {text(str(self.nginx.prefix / 'nginx.conf'))}\n"
            f"control = {text(str(self.nginx.socket))}\nsnapshot = {text(str(self.nginx.snapshot))}\n"
            f'[api]\nsocket = "{self.home}/api.sock"\nlisten = ""\n[store]\nurl = "sqlite:///{self.home}/state.db"\n'
            '[defaults.check]\ntype = "tcp"\ninterval = "500ms"\ntimeout = "500ms"\n'
            '[defaults.warm_up]\nduration = "0s"\n'
        )
        command = self.home / "headgate"
        command.write_text(
            f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m controller'
            f' --config "{self.home}/headgate.toml" "$@"\n'
        )
        command.chmod(0o755)
        conf = (ROOT / "nginx" / "keepalived.conf").read_text().replace("/usr/bin/headgate", str(command))
        if self.host == "second":
            one, two = EDGES.values()
            conf = conf.replace("priority 150", "priority 120")
            conf = conf.replace(one, "ONE").replace(two, one).replace("ONE", two)
        (self.home / "keepalived.conf").write_text(conf)

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.home / "log").open("ab") as log:
            process = subprocess.Popen(self.network.on(self.host, *command), stdout=log, stderr=log, cwd=ROOT)
        self._closing.callback(ended, process)
        return process

    def start(self) -> None:
        """Start nginx and the daemon."""
        self.nginx.start()
        self.daemon = self.spawn(str(self.home / "headgate"), "run")

        def up() -> bool:
            assert self.daemon.poll() is None, (self.home / "log").read_text()
            return self.headgate("status").returncode == 0

        wait_until(up, f"the daemon of {self.host}", 30)

    def stop(self) -> None:
        """End the daemon and nginx."""
        self.daemon.terminate()
        assert self.daemon.wait(20) == 0
        self.nginx.stop()

    def headgate(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.home / "headgate"), *words], capture_output=True, text=True, timeout=120, check=False
        )

    def is_active(self) -> bool:
        return self.network.holds(self.host, SHARED)


def ended(process: subprocess.Popen[bytes]) -> None:
    """End a process; it may have ended already."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Load:
    """Clients of the shared address: one-shot, kept connections, and slow uploads. A context manager."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._stop = threading.Event()
        self.answers: Counter[str] = Counter()  # by edge
        self.failures: list[str] = []
        kinds = [("/", b"", False)] * 3 + [("/", b"", True)] * 2 + [("/slow", b"x" * 10_000, False)] * 2
        self._threads = [threading.Thread(target=self._client, args=kind) for kind in kinds]

    def _client(self, path: str, body: bytes, kept: bool) -> None:
        self._network.enter("client")
        connection = http.client.HTTPConnection(SHARED, timeout=20)
        while not self._stop.wait(0.03):
            try:
                connection.request("POST" if body else "GET", path, body or None)
                response = connection.getresponse()
                edge = response.read().decode()
                if response.status != 200:
                    raise OSError(f"status {response.status}")
                self.answers[edge] += 1
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"{time.strftime('%X')} {path} {'kept' if kept else 'one-shot'}: {error!r}")
                connection.close()
            if not kept:
                connection.close()
        connection.close()

    def answered_by(self, edge: str, more: int = 200) -> None:
        """Wait until this edge has answered so many more."""
        goal = self.answers[edge] + more
        wait_until(lambda: self.answers[edge] >= goal, f"{more} more answers of {edge}", 60)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def network() -> Iterator[Network]:
    hosts = {**EDGES, "client": "192.0.2.100"}
    with Network({host: f"{address}/24" for host, address in hosts.items()}) as made:
        yield made


@pytest.fixture
def edges(network: Network) -> Iterator[tuple[Edge, Edge]]:
    with Edge(network, "first") as first, Edge(network, "second") as second:
        yield first, second


def moved(to: Edge, away: Edge) -> None:
    wait_until(lambda: to.is_active() and not away.is_active(), f"the shared address at {to.host}", 60)


def test_an_edge_goes_offline_under_load_and_comes_back_without_one_failed_request(
    network: Network, edges: tuple[Edge, Edge]
) -> None:
    first, second = edges
    moved(to=first, away=second)
    with Load(network) as load:
        load.answered_by("first")
        assert first.headgate("edge", "drain").returncode == 0
        moved(to=second, away=first)
        done = first.headgate("edge", "drain", "--wait", "--timeout", "60")
        assert done.returncode == 0, done.stdout + done.stderr
        first.stop()
        load.answered_by("second")
        first.start()
        assert first.headgate("check").returncode == 1, "it stays offline over a restart"
        load.answered_by("second")
        assert second.is_active()
        assert first.headgate("edge", "enable").returncode == 0
        moved(to=first, away=second)
        load.answered_by("first")
    assert load.failures == []
