"""Somebody's own nginx, as it has grown: some thirty files, odd quotes, comments, Lua, links. No test stands here."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.nginx import MODULES, ROOT, free_port, wait_until

LUA = f"load_module {MODULES}/ndk_http_module.so;\nload_module '{MODULES}/ngx_http_lua_module.so';"


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5

    def do_GET(self) -> None:
        body = str(self.server.server_address[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Backend:
    """Answers its port to everything."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.address = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Site:
    """Written on entry, with `servers` backends; nginx runs after `start`. Nothing is left on exit.

    `module` is what stands at the top of nginx.conf, `http` comes into its http block.
    """

    def __init__(self, servers: int = 3, *, module: str = LUA, http: str = "", plane: str = "lua") -> None:
        self.backends = [Backend() for _ in range(servers)]
        self.ports = [backend.port for backend in self.backends]
        self.addresses = [backend.address for backend in self.backends]
        self.port = free_port()
        self._module, self._http, self._plane = module, http, plane
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="headgate site ", dir="/tmp")
        self.prefix = Path(self._directory.name)
        self.conf = self.prefix / "etc" / "nginx.conf"
        self.settings = self.prefix / "headgate.toml"
        self.include = self.prefix / "headgate" / "nginx-http.conf"
        self._write()
        self.before = self.files()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for backend in self.backends:
            backend.close()
        self._directory.cleanup()

    def _write(self) -> None:
        one, two, three = (self.addresses * 3)[:3]
        etc = self.conf.parent
        for name in ("conf.d", "sites-available", "sites-enabled", "snippets", "maps"):
            (etc / name).mkdir(parents=True)
        for name in ("run", "temp", "store"):
            (self.prefix / name).mkdir(mode=0o700)
        temp = "\n".join(
            f'    {name}_temp_path "{self.prefix}/temp/{name}";'
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;" if os.geteuid() == 0 else ""
        self.conf.write_text(
            f'{self._module}\n{user}\nworker_processes 2;\npid "{self.prefix}/run/nginx.pid";\n'
            f'error_log "{self.prefix}/error.log" notice;\nevents {{ worker_connections 256; }}\n\n'
            "http\t{   # everything about HTTP { is below ;\n"
            f"    access_log off;\n{temp}\n{self._http}"
            "    include maps/*.map;\n    include 'conf.d/*.conf' ;\n    include \"sites-enabled/*\";\n}\n"
        )
        for number in range(20):
            (etc / "maps" / f"{number:02}.map").write_text(
                f"map $uri $map_{number} {{ default \"{{;}}\"; ~^/{number} 'a \"quoted\" \\'word\\''; }} # {number}\n"
            )
        (etc / "maps" / "latin.map").write_bytes(b"# caf\xe9\nmap $uri $latin { default 'caf\xe9'; }")
        (etc / "conf.d" / "10-app.conf").write_text(
            "# The application. server 10.0.0.1; in a comment\n"
            'upstream "app"\n{\n'
            f"\tserver {one} weight=1; server '{two}';   # two on one line\n"
            f"\tserver\n\t    {three}   # over three lines\n\t    max_fails=2;\n\n"
            "\tkeepalive 8;\n}\n"
        )
        (etc / "sites-available" / "api").write_bytes(
            f"upstream api {{ server {one}; server {two}; }}\r\n# end".encode()
        )
        (etc / "sites-enabled" / "api").symlink_to("../sites-available/api")
        (etc / "conf.d" / "30-legacy.conf").write_text(f"upstream legacy {{\n    least_conn;\n    server {one};\n}}\n")
        (etc / "conf.d" / "40-zoned.conf").write_text(
            f"upstream zoned {{\n    zone zoned 64k;\n    server {one};\n}}\n"
        )
        (etc / "snippets" / "proxy.conf").write_text(
            'proxy_http_version 1.1;\nproxy_set_header Connection "";\nproxy_connect_timeout 2s;\n'
        )
        lua = (
            "        location = /lua {\n            content_by_lua_block {\n"
            '                -- a comment with a { brace and a "quote\n'
            "                local text = [==[ } ]] ; ' ]==] .. '}' .. \"{\"\n"
            "                ngx.print(#text)\n            }\n        }\n"
        )
        lua = lua if "lua" in self._module else ""
        (etc / "sites-available" / "shop").write_text(
            f"server {{\n    listen 127.0.0.1:{self.port};\n    include snippets/proxy.conf;\n"
            "    location / { proxy_pass http://app; }\n    location /api/ { proxy_pass http://api/; }\n"
            f"    location /legacy {{ proxy_pass http://legacy; }}\n{lua}}}\n"
        )
        (etc / "sites-enabled" / "shop").symlink_to("../sites-available/shop")
        text = json.dumps  # a JSON string is a TOML string
        values = {
            "nginx": {
                "conf": self.conf,
                "data_plane": self._plane,
                "control": self.prefix / "run" / "nginx.sock",
                "snapshot": self.prefix / "store" / "table.json",
                "include": self.include,
                "version_socket": self.prefix / "run" / "version.sock",
                "version_file": self.prefix / "store" / "version.conf",
            },
            "api": {"socket": self.prefix / "run" / "api.sock", "listen": ""},
            "store": {"url": f"sqlite:///{self.prefix}/store/state.db"},
            "defaults.check": {"interval": "200ms", "timeout": "200ms"},
            "defaults.warm_up": {"duration": "0s"},
        }
        self.settings.write_text(
            "".join(
                f"[{table}]\n" + "".join(f"{key} = {text(str(value))}\n" for key, value in keys.items())
                for table, keys in values.items()
            )
        )

    def files(self) -> dict[str, bytes]:
        """Every file of the configuration, with what is hidden, and of Headgate's own there."""
        roots = (self.conf.parent, self.include.parent)
        return {
            str(path.relative_to(self.prefix)): path.read_bytes()
            for root in roots
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    def changed(self) -> set[str]:
        """Which of them are not as they were at first."""
        now = self.files()
        return {name for name in now.keys() | self.before.keys() if now.get(name) != self.before.get(name)}

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        """A process that ends with the site; what it says goes to its log."""
        with (self.prefix / f"{Path(command[0]).name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
            )
        self._processes.append(process)
        return process

    def start(self) -> None:
        """Start nginx."""
        self.nginx = self.spawn("nginx", "-e", f"{self.prefix}/error.log", "-c", str(self.conf), "-g", "daemon off;")

        def up() -> bool:
            assert self.nginx.poll() is None, (self.prefix / "error.log").read_text()
            return len(self.workers()) == 2

        wait_until(up, "nginx starts")

    def start_daemon(self) -> None:
        """Start the daemon and wait until it answers."""
        self.daemon = self.spawn(sys.executable, "-m", "controller", "--config", str(self.settings), "run")

        def up() -> bool:
            assert self.daemon.poll() is None, (self.prefix / f"{Path(sys.executable).name}.log").read_text()
            return self.headgate("status").returncode == 0

        wait_until(up, "the daemon answers", 30)

    def kill_nginx(self) -> None:
        """End nginx as a power cut would."""
        workers = self.workers()
        self.nginx.kill()
        self.nginx.wait()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)

    def workers(self) -> list[int]:
        """nginx's workers, those that are shutting down included."""
        children = Path(f"/proc/{self.nginx.pid}/task/{self.nginx.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"worker process" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def accepting(self) -> set[int]:
        """nginx's workers that accept connections."""
        return {pid for pid in self.workers() if b"shutting" not in Path(f"/proc/{pid}/cmdline").read_bytes()}

    def headgate(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """The command, to its end."""
        command = [sys.executable, "-m", "controller", "--config", str(self.settings), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False, **options)

    def status(self, upstream: str = "app") -> dict[str, dict[str, Any]]:
        """The daemon's view of an upstream's servers by address; empty where it does not know it."""
        done = self.headgate("status", "--json")
        shown = json.loads(done.stdout)["upstreams"] if done.returncode == 0 else []
        return {each["address"]: each for one in shown if one["name"] == upstream for each in one["servers"]}

    def get(self, path: str = "/") -> tuple[int, str]:
        """One request to nginx."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def shares(self, requests: int = 60, path: str = "/") -> Counter[int]:
        """Which port answered how often; every request must succeed."""
        answers = [self.get(path) for _ in range(requests)]
        assert {status for status, _ in answers} == {200}, answers
        return Counter(int(text) for _, text in answers)
