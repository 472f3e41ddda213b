"""A process is known by the sockets that it, or a process that it forked, listens on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from controller.adapters import own
from controller.ports import ProcessError

# A parent that has forked the one that listens, as a gunicorn with reuse_port does.
LISTEN = """
import os, signal, socket, sys
if os.fork():
    signal.pause()
if sys.argv[1].startswith("/"):
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
else:
    server = socket.create_server((sys.argv[1], 0))
server.listen()
print(server.getsockname()[1] if server.family != socket.AF_UNIX else 0, flush=True)
sys.stdin.read()
os.kill(os.getppid(), 9)
"""


@contextmanager
def listening(where: str) -> Iterator[tuple[int, int]]:
    """The pid of a process whose child listens there, and the port."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", LISTEN, where], text=True, **pipes) as parent:
        assert parent.stdin
        assert parent.stdout
        try:
            yield parent.pid, int(parent.stdout.readline())
        finally:
            parent.stdin.close()


def test_a_process_is_the_servers_that_its_children_listen_on() -> None:
    with listening("127.0.0.1") as (pid, port), socket.create_server(("127.0.0.1", 0)) as other:
        mine, named = f"127.0.0.1:{port}", f"localhost:{port}@127.0.0.1"
        stranger = f"127.0.0.1:{other.getsockname()[1]}"
        addresses = [mine, stranger, named, "10.9.9.9", f"[::1]:{port}", mine]
        assert own.served_by(pid, addresses) == (mine, named)
        assert own.served_by(os.getpid(), [stranger]) == (stranger,)


def test_all_addresses_and_unix_sockets_count_too(tmp_path: Path) -> None:
    with listening("0.0.0.0") as (pid, port):
        assert own.served_by(pid, [f"127.0.0.1:{port}"]) == (f"127.0.0.1:{port}",)
    with listening(f"{tmp_path}/app.sock") as (pid, _):
        assert own.served_by(pid, [f"unix:{tmp_path}/app.sock", "127.0.0.1:1"]) == (f"unix:{tmp_path}/app.sock",)


def test_a_process_that_has_ended_serves_nothing() -> None:
    with listening("127.0.0.1") as (pid, port):
        pass
    assert own.served_by(pid, [f"127.0.0.1:{port}"]) == ()


def test_a_socket_whose_process_cannot_be_seen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening("127.0.0.1") as (pid, port):
        monkeypatch.setattr(own.procfs, "holders", lambda inodes: frozenset())
        with pytest.raises(ProcessError, match=f"127.0.0.1:{port}, but its process cannot be seen") as error:
            own.served_by(pid, [f"127.0.0.1:{port}"])
    assert "CAP_SYS_PTRACE" in error.value.remedy


def test_a_port_means_servers_of_this_machine_alone() -> None:
    addresses = ["127.0.0.1:8001", "[::1]:8001", "198.51.100.7:8001", "127.0.0.1:8002", "unix:/run/8001", "127.0.0.1"]
    assert own.at_port(8001, addresses) == ("127.0.0.1:8001", "[::1]:8001")
    assert own.at_port(80, addresses) == ("127.0.0.1",)
