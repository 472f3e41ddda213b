"""A real HAProxy to compare with: started with a configuration, asked and told over its stats socket."""

from __future__ import annotations

import csv
import io
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.nginx import free_port, wait_until

DEFAULTS = """
defaults
  mode http
  http-reuse always
  timeout client 60s
"""


@dataclass(frozen=True, slots=True)
class HAProxy:
    """One that runs: `url` of its front, the stats socket, its pid."""

    url: str
    control: Path
    pid: int

    def command(self, text: str) -> str:
        """What the stats socket answers to a command."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.control))
            connection.sendall(text.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def stat(self, field: str) -> dict[str, int]:
        """A number of each server of the backend `app`, by the server's name."""
        rows = csv.DictReader(io.StringIO(self.command("show stat").removeprefix("# ")))
        return {
            row["svname"]: int(row[field] or 0) for row in rows if row["pxname"] == "app" and row["svname"] != "BACKEND"
        }


@contextmanager
def haproxy(backend: str, defaults: str = "timeout connect 5s\n  timeout server 60s") -> Iterator[HAProxy]:
    """HAProxy in front of `backend`, the lines of its backend section; on exit it is gone."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        path, control = Path(directory) / "haproxy.cfg", Path(directory) / "control.sock"
        path.write_text(
            f"global\n  nbthread 1\n  maxconn 4096\n  stats socket {control} level admin\n"
            f"{DEFAULTS}  {defaults}\n"
            f"frontend in\n  bind 127.0.0.1:{port}\n  default_backend app\nbackend app\n{backend}\n"
        )
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(control.exists, "HAProxy's stats socket")
            yield HAProxy(f"http://127.0.0.1:{port}", control, process.pid)
        finally:
            process.terminate()
            process.wait()
