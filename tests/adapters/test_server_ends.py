"""The server's end of a connection, as /proc shows it: waiting, accepted, closed."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.adapters import procfs

US = os.getpid()


@contextlib.contextmanager
def connected(family: int, where: object, to: object = None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listener, and a client that it has not accepted yet."""
    with socket.socket(family) as listener, socket.socket(family) as client:
        listener.bind(where)
        listener.listen()
        port = () if isinstance(where, str) else listener.getsockname()[1:2]
        client.connect((to, *port) if to else listener.getsockname())
        yield listener, client


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


@pytest.mark.parametrize(
    ("family", "host", "to"),
    [(socket.AF_INET, "127.0.0.1", None), (socket.AF_INET6, "::1", None), (socket.AF_INET, "0.0.0.0", "127.0.0.2")],
)
def test_the_end_of_a_tcp_connection_is_known_from_its_acceptance_to_its_close(
    family: int, host: str, to: str | None
) -> None:
    with connected(family, (host, 0), to) as (listener, client):
        ends = client.getsockname(), client.getpeername()
        assert procfs.server_end(*ends, US) == 0
        accepted, _ = listener.accept()
        assert procfs.server_end(*ends, US) == inode(accepted)
        assert procfs.server_end((ends[0][0], 1), ends[1], US) is None
        accepted.close()
        assert procfs.server_end(*ends, US) is None


def test_the_ends_of_all_connections_to_a_unix_socket_are_known(tmp_path: Path) -> None:
    path = str(tmp_path / "app.sock")
    with connected(socket.AF_UNIX, path) as (listener, _), connected(socket.AF_UNIX, f"{path}2"):
        assert procfs.connections(path, US) == [0]
        with listener.accept()[0] as accepted:
            assert procfs.connections(path, US) == [inode(accepted)]
            with socket.socket(socket.AF_UNIX) as another:
                another.connect(path)
                assert sorted(procfs.connections(path, US)) == [0, inode(accepted)]
        assert procfs.connections(path, US) == [0]
