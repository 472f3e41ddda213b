"""The stage: a real nginx, real gunicorn masters and the real daemon in a temporary directory, all on loopback.

Building it, starting its parts and ending it belong here; what is played on it stands in run.py and in tests/bench.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

import controller
from controller.adapters.nginx.lua import render_include
from controller.adapters.nginx.verify import version_include
from controller.client import Client
from controller.core.policy import WarmUpPolicy
from controller.demo.sweep import MARK, sweep
from controller.errors import DaemonUnreachable, HeadgateError
from controller.resources import lua_dir, nginx_dir

UPSTREAM = "app"
INSTALL = "apt install nginx libnginx-mod-http-lua lua-resty-core lua-cjson"
GRACEFUL_TIMEOUT = 15
# Begun each second, whatever the rate: so about 4 slow requests and 6 streams are under way at any time.
LONG = {"slow": 1.5, "stream": 1.2}

UVICORN_WORKER = "controller.integration.worker.UvicornWorker"
WORKERS: Mapping[str, Sequence[str]] = {
    "sync": ("--worker-class", "sync", "--workers", "8", "controller.demo.wsgi:app"),
    "gthread": ("--worker-class", "gthread", "--workers", "2", "--threads", "12", "controller.demo.wsgi:app"),
    "uvicorn": ("--worker-class", UVICORN_WORKER, "--workers", "2", "controller.demo.app:app"),
}

GUNICORN_CONF = """\
from controller.integration.gunicorn import configure
configure(globals(), headgate={socket!r})
"""

NGINX_CONF = """\
{user}worker_processes 2;
daemon off;
pid "{prefix}/nginx.pid";
error_log "{prefix}/nginx.log" notice;
{modules}
events {{ worker_connections 1024; }}

http {{
    include "{prefix}/headgate.conf";
    access_log off;
    client_body_temp_path "{prefix}/body";
    proxy_temp_path "{prefix}/proxy";
    fastcgi_temp_path "{prefix}/fastcgi";
    uwsgi_temp_path "{prefix}/uwsgi";
    scgi_temp_path "{prefix}/scgi";

    upstream {upstream} {{
        {servers}
        {hook}
        keepalive 16;
        keepalive_timeout 2s;  # below gunicorn's --keep-alive
    }}

    server {{
        listen {address} backlog=4096;
        client_body_buffer_size 64k;
        location / {{
            proxy_pass http://{upstream};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_buffering off;
            {failover}
        }}
    }}
}}
"""


# A retry would hide what Headgate must not need to have hidden.
NO_FAILOVER = "proxy_next_upstream off;"
# For servers that die or hang: what nginx does by default, with little patience.
FAILOVER = "proxy_next_upstream error timeout; proxy_connect_timeout 1s; proxy_read_timeout 2s;"


class StageError(HeadgateError):
    """A part of the stage did not come up; the message ends with the tail of its log."""


class PortTaken(StageError):
    """Somebody else took a port between our looking and our binding."""


@dataclass(frozen=True, slots=True)
class Nginx:
    """Where nginx is, and the lines that load its Lua module."""

    program: str
    modules: str


def find_nginx() -> Nginx:
    """Look for nginx and its Lua module as Debian installs them; StageError with the line to type."""
    # An ordinary user's PATH lacks the sbin directories on Debian.
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin")
    if program is None:
        raise StageError("nginx is not installed", INSTALL)
    built = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stderr
    where = re.search(r"--modules-path=(\S+)", built)
    directory = Path(where[1] if where else "/usr/lib/nginx/modules")
    lines = []
    for name in ("ndk_http_module.so", "ngx_http_lua_module.so"):
        if not (directory / name).is_file():
            raise StageError(f"nginx has no Lua module: {directory / name} is missing", INSTALL)
        lines.append(f'load_module "{directory / name}";')
    return Nginx(program, "\n".join(lines))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, below the range from which the kernel serves outgoing connections.

    A server's port is free while the server restarts; from within that range the kernel could lend it to a client.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.sample(range(max(1024, min(20000, low - 2000)), max(low, 3024)), k=1000 + count):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found.append(port)
            if len(found) == count:
                return found
    raise StageError(f"{count} free ports were not found on 127.0.0.1", "end something that listens there")


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, indented; empty when there is none."""
    text = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "".join(f"\n    {line}" for line in text[-lines:])


class Load:
    """A load generator in a process of its own. Its ticks are in `ticks` as they come; see controller/demo/load.py."""

    def __init__(self, stage: Stage, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "controller.demo.load", stage.url, *arguments]
        self._log = stage.prefix / "load.log"
        self._process = stage.spawn(command, self._log, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._partial = b""
        self.pid = self._process.pid
        self.ticks: list[dict[str, Any]] = []
        self.summary: dict[str, Any] | None = None

    def read(self) -> list[dict[str, Any]]:
        """Take what it has said since the last call; the new ticks."""
        assert self._process.stdout is not None
        *lines, self._partial = (self._partial + (self._process.stdout.read() or b"")).split(b"\n")
        new = []
        for line in map(json.loads, lines):
            if "summary" in line:
                self.summary = line["summary"]
            else:
                new.append(line)
        self.ticks += new
        return new

    def finish(self, timeout: float = 60.0) -> dict[str, Any]:
        """Let it finish what it has begun; its summary."""
        self._process.terminate()
        until(self._finished, "the load generator's summary", timeout, self._log)
        self._process.wait()
        assert self.summary is not None
        return self.summary

    def _finished(self) -> bool:
        ended = self._process.poll() is not None
        self.read()
        if ended and self.summary is None:
            raise StageError(f"the load generator has died{tail(self._log)}")
        return self.summary is not None


def until(done: Callable[[], bool], what: str, timeout: float, log: Path) -> None:
    """Wait for evidence; StageError when it has not come within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise StageError(f"waited {timeout:g} s for {what} in vain{tail(log)}")
        time.sleep(0.05)


class Stage:
    """A context: on entry everything runs and the daemon has seen every server up; on exit nothing is left.

    `worker` is a key of WORKERS, `warm_up` its seconds. `servers` gunicorn masters stand behind one nginx at `url`; on
    the `data_plane` reload it is a plain nginx, without the Lua module. `settings` goes to the end of headgate.toml;
    with `failover` nginx tries another server when one fails.
    """

    def __init__(
        self,
        worker: str = "uvicorn",
        *,
        servers: int = 3,
        warm_up: float = 6.0,
        data_plane: str = "lua",
        settings: str = "",
        failover: bool = False,
    ) -> None:
        self.worker = worker
        self._more_settings = settings
        self._failover = FAILOVER if failover else NO_FAILOVER
        self.data_plane = data_plane
        self.warm_up = WarmUpPolicy(duration=warm_up, curve=1.0, floor=0.1, starts="healthy")
        self._count = servers
        if missing := [name for name in ("gunicorn", "uvicorn_worker") if find_spec(name) is None]:
            raise StageError(f"Python finds no {' and no '.join(missing)}", "pip install 'headgate[demo]'")
        self._nginx = find_nginx()
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for attempt in range(3):
            # A unix socket's path has at most 107 bytes.
            parent = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
            self.prefix = Path(tempfile.mkdtemp(prefix="headgate-", dir=parent))
            self._environment = self._surroundings()
            self._watchdog = self._guard()
            try:
                self._open()
            except PortTaken:
                self.close()
                if attempt == 2:
                    raise
            except BaseException:
                self.close()
                raise
            else:
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the stage, wherever it was started, and delete its files."""
        sweep(self.prefix)
        if self._watchdog.stdin:
            self._watchdog.stdin.close()
        for child in (*self._children, self._watchdog):
            child.wait()
        self._children.clear()

    def _open(self) -> None:
        front, *ports = sorted(free_ports(1 + self._count))
        self.url = f"http://127.0.0.1:{front}"
        self.addresses = [f"127.0.0.1:{port}" for port in ports]
        self.settings = self.prefix / "headgate.toml"
        self.client = Client(str(self.prefix / "api.sock"))
        self._write()
        servers = [self.start_server(address) for address in self.addresses]
        self.nginx = self._start_nginx()
        for address, server in zip(self.addresses, servers, strict=True):
            self._answers(address, server, self._server_log(address))
        self._answers(self.url.removeprefix("http://"), self.nginx, self.prefix / "nginx.log")
        self.start_daemon()
        until(self._serves, "the daemon to find every server up", 30, self.prefix / "headgate.log")

    def start_daemon(self) -> subprocess.Popen[bytes]:
        """Start the daemon and wait until it answers for the upstream: at first it has not yet read nginx.conf."""
        command = [sys.executable, "-m", "controller", "--config", str(self.settings), "run"]
        log = self.prefix / "headgate.log"
        self.daemon = self.spawn(command, log)
        until(lambda: bool((self._status() or {}).get("upstreams")), "the daemon to answer", 30, log)
        return self.daemon

    def stop_daemon(self) -> None:
        """End the daemon as an operator would; StageError when it does not end well."""
        self.daemon.terminate()
        if status := self.daemon.wait(20):
            raise StageError(f"the daemon ended with status {status}{tail(self.prefix / 'headgate.log')}")

    def restart_nginx(self, how: signal.Signals) -> None:
        """End nginx by this signal, its workers too, and start it again."""
        workers = [psutil.Process(pid) for pid, _ in self.nginx_workers()]
        self.nginx.send_signal(how)
        self.nginx.wait(20)
        if how is signal.SIGKILL:
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        psutil.wait_procs(workers, 20)
        self.nginx = self._start_nginx()
        self._answers(self.url.removeprefix("http://"), self.nginx, self.prefix / "nginx.log")

    def _status(self) -> dict[str, Any] | None:
        self._lives(self.daemon, self.prefix / "headgate.log")
        with contextlib.suppress(DaemonUnreachable):
            return self.client.status()
        return None

    def _serves(self) -> bool:
        status = self._status()
        if status is None or status["revision"] == 0:
            return False
        health = [server["health"] for one in status["upstreams"] for server in one["servers"]]
        return health == ["up"] * self._count

    def load(self, rate: float, *arguments: str, interval: float = 0.5) -> Load:
        """Start a load generator at `rate` (more than 3) requests a second, of all kinds; arguments as load.py has."""
        short = rate - sum(LONG.values())
        mix = ",".join(f"{k}={share}" for k, share in {"fast": 0.8 * short, "echo": 0.2 * short, **LONG}.items())
        return Load(self, ["--rate", str(rate), "--interval", str(interval), "--mix", mix, *arguments])

    def nginx_workers(self) -> frozenset[tuple[int, float]]:
        """nginx's workers as (pid, create time): the same set before and after means that nginx was not reloaded."""
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            master = psutil.Process(int((self.prefix / "nginx.pid").read_text()))
            return frozenset((child.pid, child.create_time()) for child in master.children())
        return frozenset()

    def master(self, address: str) -> int | None:
        """The pid of the gunicorn master that serves at `address`, from its pid file; None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return int((self.prefix / f"app-{address.rpartition(':')[2]}.pid").read_text())
        return None

    def spawn(
        self, command: Sequence[str], log: Path, *, stdout: int | None = None, environment: Mapping[str, str] = {}
    ) -> subprocess.Popen[bytes]:
        """Start a process that belongs to the stage; what it says goes to `log`."""
        with log.open("ab") as said:
            child = subprocess.Popen(
                command,
                cwd=self.prefix,
                env={**self._environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=said if stdout is None else stdout,
                stderr=said,
                # Ctrl-C at the terminal is for the demo alone, which then ends its parts in order.
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def _surroundings(self) -> dict[str, str]:
        package = str(Path(controller.__file__).parents[1])
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")}
        # Without PYTHONSAFEPATH USR2 does not work for `python -m gunicorn`.
        return clean | {MARK: str(self.prefix), "PYTHONPATH": package, "PYTHONSAFEPATH": "1"}

    def _guard(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "controller.demo.sweep", str(self.prefix)],
            env={name: value for name, value in self._environment.items() if name != MARK},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _write(self) -> None:
        root = os.geteuid() == 0
        conf = NGINX_CONF.format(
            # The prefix is private to us, so root's workers have to be root's.
            user="user root;\n" if root else "",
            prefix=self.prefix,
            modules=self._nginx.modules if self.data_plane == "lua" else "",
            hook=f'balancer_by_lua_block {{ require("headgate").balance("{UPSTREAM}") }}' * (self.data_plane == "lua"),
            upstream=UPSTREAM,
            servers="\n        ".join(f"server {address};" for address in self.addresses),
            address=self.url.removeprefix("http://"),
            failover=self._failover,
        )
        (self.prefix / "nginx.conf").write_text(conf)
        (self.prefix / "headgate.conf").write_bytes(self._include())
        self.settings.write_text(self._toml())
        (self.prefix / "gunicorn.conf.py").write_text(GUNICORN_CONF.format(socket=str(self.prefix / "api.sock")))

    def _include(self) -> bytes:
        """What nginx includes in http{}: the Lua data plane, or the version that the reload plane proves itself by."""
        if self.data_plane == "reload":
            return version_include(self.prefix / "version.sock", "0")
        return render_include(
            (nginx_dir() / "headgate.conf").read_text(),
            lua=str(lua_dir()),
            socket=str(self.prefix / "nginx.sock"),
            snapshot=str(self.prefix / "table.json"),
        ).encode()

    def _toml(self) -> str:
        text = json.dumps  # a JSON string is a TOML string
        warm = self.warm_up
        return f"""\
[nginx]
data_plane = {text(self.data_plane)}
conf = {text(str(self.prefix / "nginx.conf"))}
version_socket = {text(str(self.prefix / "version.sock"))}
version_file = {text(str(self.prefix / "headgate.conf"))}
control = {text(str(self.prefix / "nginx.sock"))}
snapshot = {text(str(self.prefix / "table.json"))}

[api]
socket = {text(str(self.prefix / "api.sock"))}
listen = ""

[store]
url = {text(f"sqlite:///{self.prefix / 'state.db'}")}

[defaults.check]
path = "/healthz"
interval = "500ms"
timeout = "500ms"
rise = 2
fall = 3

[defaults.warm_up]
duration = "{warm.duration:g}s"
curve = {warm.curve}
floor = "{warm.floor:.0%}"
starts = "{warm.starts}"

[defaults.drain]
timeout = "30s"
settle = "1s"

[upstream.{UPSTREAM}.process]
kind = "gunicorn"
pid_file = {text(str(self.prefix / "app-{port}.pid"))}
start = {text(self._start_command("{address}", "{port}"))}
directory = {text(str(self.prefix))}
log = {text(str(self.prefix / "app-{port}.log"))}
graceful_timeout = "{GRACEFUL_TIMEOUT}s"
environment = {{ APP_SERVER = "{{address}}" }}

{self._more_settings}
"""

    def _start_command(self, address: str, port: str) -> list[str]:
        return [
            *(sys.executable, "-m", "gunicorn", "--bind", address, "--pid", str(self.prefix / f"app-{port}.pid")),
            *("--graceful-timeout", str(GRACEFUL_TIMEOUT), "--timeout", str(2 * GRACEFUL_TIMEOUT)),
            *("--keep-alive", "5", "--no-control-socket"),
            *("--config", str(self.prefix / "gunicorn.conf.py"), *WORKERS[self.worker]),
        ]

    def _server_log(self, address: str) -> Path:
        return self.prefix / f"app-{address.rpartition(':')[2]}.log"

    def start_server(self, address: str) -> subprocess.Popen[bytes]:
        """Start the gunicorn master of this address, as a process supervisor would."""
        command = self._start_command(address, address.rpartition(":")[2])
        return self.spawn(command, self._server_log(address), environment={"APP_SERVER": address})

    def _start_nginx(self) -> subprocess.Popen[bytes]:
        log = self.prefix / "nginx.log"
        conf = self.prefix / "nginx.conf"
        return self.spawn([self._nginx.program, "-p", str(self.prefix), "-e", str(log), "-c", str(conf)], log)

    def _answers(self, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
        def answered() -> bool:
            self._lives(process, log)
            connection = http.client.HTTPConnection(address, timeout=1)
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", "/healthz")
                return connection.getresponse().status == 200
            return False

        until(answered, f"an answer at {address}", 30, log)

    def _lives(self, process: subprocess.Popen[bytes], log: Path) -> None:
        if (status := process.poll()) is None:
            return
        last = tail(log)
        name = Path(process.args[0] if isinstance(process.args, list) else str(process.args)).name
        cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        error = PortTaken if "address already in use" in last.lower() else StageError
        raise error(f"{name} ended with {cause}; its log ends with:{last}")
