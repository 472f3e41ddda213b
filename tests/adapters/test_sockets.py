from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.adapters.nginx.sockets import Endpoint, _tcp_by_diag, _tcp_by_proc, from_clients, held, to_servers
from controller.ports import PlaneUnreachable

US = os.getpid()


@contextlib.contextmanager
def connected(family: int, where: object) -> Iterator[tuple[socket.socket, list[socket.socket]]]:
    """A listener, a client that it accepted and one that waits to be."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.bind(where)
        listener.listen()
        clients = [stack.enter_context(socket.socket(family)) for _ in range(2)]
        for client in clients:
            client.connect(listener.getsockname())
        stack.enter_context(listener.accept()[0])
        yield listener, clients


def inodes(sockets: list[socket.socket]) -> set[int]:
    return {os.fstat(each.fileno()).st_ino for each in sockets}


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_clients_of_a_tcp_server_are_found_and_their_holder(family: int, host: str) -> None:
    with connected(family, (host, 0)) as (listener, clients):
        endpoint: Endpoint = (host, listener.getsockname()[1])
        other: Endpoint = (host, 1)
        assert to_servers([endpoint, other], US) == dict.fromkeys(inodes(clients), endpoint)
        assert inodes(clients) <= held(US)
        clients[0].close()
        assert to_servers([endpoint], US).keys() & held(US) == inodes(clients[1:])


def test_both_sources_tell_the_same_of_tcp() -> None:
    with (
        connected(socket.AF_INET, ("127.0.0.1", 0)) as (_, clients),
        connected(socket.AF_INET6, ("::1", 0)) as (_, six),
    ):
        for family, length, name, expected in ((socket.AF_INET, 4, "tcp", clients), (socket.AF_INET6, 16, "tcp6", six)):
            diag = {row for row in _tcp_by_diag(family, length) if row.inode in inodes(expected)}
            assert diag == {row for row in _tcp_by_proc(name) if row.inode in inodes(expected)}
            assert {row.inode for row in diag} == inodes(expected)


@pytest.mark.parametrize(
    ("family", "bound", "host"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1"),
        (socket.AF_INET6, "::", "::1"),
        (socket.AF_INET6, "::", "127.0.0.1"),
    ],
)
def test_connections_to_what_a_process_listens_on_are_counted_until_they_end(
    family: int, bound: str, host: str
) -> None:
    before = from_clients(US)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((bound, 0))
        listener.listen()
        client = socket.create_connection((host, listener.getsockname()[1]))
        accepted = stack.enter_context(listener.accept()[0])
        assert from_clients(US) - before == 1, "the client's own end does not count"
        client.close()
        assert from_clients(US) - before == 1, "the client has gone, and we have not closed yet"
        accepted.close()
        deadline = time.monotonic() + 10
        while from_clients(US) > before:
            assert time.monotonic() < deadline


def test_clients_of_a_unix_server_are_found_waiting_ones_included(tmp_path: Path) -> None:
    path = tmp_path / "a b.sock"
    endpoint: Endpoint = (f"unix:{path}", 0)
    with connected(socket.AF_UNIX, str(path)) as (_, clients):
        wanted = dict.fromkeys(inodes(clients), endpoint)
        assert to_servers([endpoint], US) == wanted
        link = tmp_path / "link.sock"
        link.symlink_to(path)
        assert to_servers([(f"unix:{link}", 0)], US).keys() == wanted.keys()
        path.unlink()
        assert to_servers([endpoint], US) == wanted


def test_a_unix_server_bound_to_a_relative_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with connected(socket.AF_UNIX, "headgate-relative.sock") as (_, clients):
        endpoint: Endpoint = (f"unix:{tmp_path}/headgate-relative.sock", 0)
        assert to_servers([endpoint], US) == dict.fromkeys(inodes(clients), endpoint)


def test_a_process_that_is_gone_holds_nothing() -> None:
    assert held(2**22 - 1) == frozenset()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_process_that_may_not_be_looked_into_is_told_with_the_remedy() -> None:
    child = os.fork()
    if child == 0:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            held(os.getppid())
        except PlaneUnreachable as error:
            os._exit(0 if "CAP_SYS_PTRACE" in error.remedy else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
