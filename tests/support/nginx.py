"""A real nginx in a directory of its own: started, reloaded, killed and ended by pid. No test stands here."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from controller.adapters.nginx.lua import render_include

ROOT = Path(__file__).resolve().parents[2]
MODULES = Path("/usr/lib/nginx/modules")


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], what: str, timeout: float = 10.0) -> None:
    """Return as soon as `condition()` is true; TimeoutError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for: {what}")
        time.sleep(0.005)


def missing_parts() -> str | None:
    """Why no nginx with the Lua module can run here, or None."""
    if shutil.which("nginx") is None:
        return "nginx is not installed (apt-get install nginx)"
    if not (MODULES / "ngx_http_lua_module.so").exists():
        return "nginx has no Lua module (apt-get install libnginx-mod-http-lua lua-resty-core lua-cjson)"
    return None


class Nginx:
    """nginx with `http` (text for inside http{}) in a temporary prefix, whose name holds a space on purpose.

    `as_daemon`: it leaves its parent, as on a host, without which it replaces no binary.

    A context manager: it starts nginx, and leaves nothing behind. `plane` includes Headgate's data plane, `edit` may
    change the include's text, `main` is text for the top level, `user` runs all as that account (needs root).
    """

    def __init__(
        self,
        http: str,
        *,
        workers: int = 2,
        plane: bool = True,
        user: str | None = None,
        edit: Callable[[str], str] = lambda text: text,
        main: str = "",
        as_daemon: bool = False,
    ) -> None:
        self.prefix = Path(tempfile.mkdtemp(prefix="headgate nginx "))
        self.socket = self.prefix / "run" / "nginx.sock"
        self.snapshot = self.prefix / "table.json"
        self.error_log = self.prefix / "error.log"
        self.http, self.main, self.edit = http, main, edit
        self.workers_wanted, self.plane, self.user, self.as_daemon = workers, plane, user, as_daemon
        self.process: subprocess.Popen[bytes] | None = None
        self.daemon: psutil.Process | None = None
        (self.prefix / "run").mkdir(mode=0o700)
        (self.prefix / "temp").mkdir()
        self.lua = ROOT / "lua"
        if user is not None:
            self.lua = self.prefix / "lua"
            shutil.copytree(ROOT / "lua", self.lua)
        self.write()

    def write(self) -> None:
        """Write the configuration as the attributes say now."""
        include = ""
        if self.plane:
            template = (ROOT / "nginx" / "headgate.conf").read_text()
            rendered = render_include(template, lua=str(self.lua), socket=str(self.socket), snapshot=str(self.snapshot))
            (self.prefix / "headgate.conf").write_text(self.edit(rendered))
            include = f'include "{self.prefix}/headgate.conf";'
        account = "user root;" if self.user is None and os.geteuid() == 0 else ""
        temp = "\n".join(
            f'    {name}_temp_path "{self.prefix}/temp/{name}";'
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.prefix / "nginx.conf").write_text(
            f'load_module "{MODULES}/ndk_http_module.so";\nload_module "{MODULES}/ngx_http_lua_module.so";\n'
            f'{account}\nworker_processes {self.workers_wanted};\npid "{self.prefix}/nginx.pid";\n'
            f'error_log "{self.error_log}" notice;\n{self.main}\nevents {{ worker_connections 8192; }}\n'
            f"http {{\n    access_log off;\n{temp}\n    {include}\n{self.http}\n}}\n"
        )
        if self.user is not None:
            account_id = pwd.getpwnam(self.user)
            for path in [self.prefix, *self.prefix.rglob("*")]:
                os.chown(path, account_id.pw_uid, account_id.pw_gid)

    def command(self, *arguments: str) -> list[str]:
        """The nginx command line on this prefix."""
        places = {"-p": self.prefix, "-c": self.prefix / "nginx.conf", "-e": self.error_log}
        return [
            shutil.which("nginx") or "nginx",
            *(str(word) for place in places.items() for word in place),
            *arguments,
        ]

    def _account(self) -> dict[str, Any]:
        if self.user is None:
            return {}
        return {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid, "extra_groups": []}

    def test(self) -> subprocess.CompletedProcess[str]:
        """Run `nginx -t`."""
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, **self._account()}
        return subprocess.run(self.command("-t"), **options)

    def start(self) -> Nginx:
        """Start nginx and wait until every worker runs; RuntimeError with its messages if it does not."""
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **self._account()}
        words = () if self.as_daemon else ("-g", "daemon off;")
        self.process = process = subprocess.Popen(self.command(*words), **options)
        if self.as_daemon and process.wait(10) == 0:
            wait_until(self._pid_file, "nginx writes its pid")
            self.daemon = psutil.Process(self._pid_file())

        def up() -> bool:
            if process.poll() is not None and not self.daemon:
                assert process.stderr is not None
                raise RuntimeError("nginx did not start: " + process.stderr.read().decode())
            return len(self.workers()) == self.workers_wanted and (not self.plane or self.socket.exists())

        wait_until(up, "nginx starts")
        return self

    def workers(self) -> list[int]:
        """The pids of the workers, those that shut down included."""
        return [pid for pid in self.children() if b"worker process" in _command_line(pid)]

    def serving(self) -> list[int]:
        """The pids of the workers that do not shut down."""
        return [pid for pid in self.workers() if b"shutting down" not in _command_line(pid)]

    def children(self) -> list[int]:
        """The pids of all processes that the master has made."""
        assert self.process is not None
        master = (self.daemon or self.process).pid
        children = Path(f"/proc/{master}/task/{master}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def _pid_file(self) -> int:
        """The pid in nginx's pid file, 0 where there is none."""
        file = self.prefix / "nginx.pid"
        return int(file.read_text() or 0) if file.exists() else 0

    def reload(self) -> list[int]:
        """HUP, and wait until a full set of new workers runs; return the old ones, which may still be shutting down."""
        assert self.process is not None
        old = set(self.workers())
        (self.daemon or self.process).send_signal(signal.SIGHUP)
        wait_until(lambda: len(set(self.workers()) - old) == self.workers_wanted, "nginx reloads")
        wait_until(
            lambda: all(b"shutting down" in _command_line(pid) for pid in set(self.workers()) & old),
            "the old workers stop accepting",
        )
        return sorted(old)

    def replace_binary(self) -> list[int]:
        """As the upgrade of a package does: USR2, and QUIT to the old master as soon as the new one serves.

        Return the old workers, which may still have requests.
        """
        assert self.daemon is not None
        old, master = self.workers(), self.daemon
        master.send_signal(signal.SIGUSR2)
        wait_until(lambda: self._pid_file() not in (0, master.pid), "a new master")
        self.daemon = psutil.Process(self._pid_file())
        wait_until(lambda: len(self.workers()) == self.workers_wanted, "its workers")
        master.send_signal(signal.SIGQUIT)
        wait_until(lambda: all(b"shutting down" in (_command_line(pid) or b"shutting down") for pid in old), "its end")
        return old

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the master with a signal and wait; its workers, too, when it is SIGKILL."""
        if self.process is None:
            return
        workers = self.workers()
        if self.daemon is not None:
            self.daemon.send_signal(number)
            self.daemon.wait(10)
            self.daemon = None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in workers:
            if b"nginx: worker process" in _command_line(pid):
                os.kill(pid, signal.SIGKILL)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process = None

    def errors(self) -> list[str]:
        """The lines of the error log at level warn and above."""
        lines = self.error_log.read_text().splitlines() if self.error_log.exists() else []
        levels = ("[warn]", "[error]", "[crit]", "[alert]", "[emerg]")
        return [line for line in lines if any(level in line for level in levels)]

    def __enter__(self) -> Nginx:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End nginx and remove its directory."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.prefix, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
