"""The client's words when there is no daemon, or something else answers."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from controller.client import Client
from controller.errors import ApiError, DaemonUnreachable
from tests.support.house import House


def test_a_missing_socket_names_it_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match=r"no daemon answers at .*/no\.sock: no such socket.*headgate run"):
        Client(str(tmp_path / "no.sock")).status()


def test_a_socket_that_nobody_listens_on_names_it_and_the_command(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    with pytest.raises(DaemonUnreachable, match=r"dead\.sock: connection refused.*headgate run"):
        Client(str(tmp_path / "dead.sock")).status()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not connect")
def test_a_socket_that_may_not_be_opened_says_what_helps(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "api.sock"))
        other.listen()
        tmp_path.chmod(0o700)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setuid(65534)
                Client(str(tmp_path / "api.sock")).status()
            except DaemonUnreachable as error:
                status = 0 if "may not open" in error.message and "sudo" in error.remedy else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_path_with_odd_letters_works(tmp_path: Path) -> None:
    odd = tmp_path / "Run Here %20 #1"
    odd.mkdir()
    with House(odd) as house:
        assert Client(str(house.socket)).status()["revision"] >= 1


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}"],
)
def test_an_answer_of_something_else_is_not_taken_for_the_daemons(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other.sock"))
        other.listen()

        def serve() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ApiError, match=r"other\.sock answered .* not Headgate's"):
            Client(str(tmp_path / "other.sock")).status()
        thread.join(10)


def test_a_connection_that_is_cut_is_no_answer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other.sock"))
        other.listen()

        def cut() -> None:
            connection, _ = other.accept()
            connection.recv(10_000)
            connection.close()

        thread = threading.Thread(target=cut)
        thread.start()
        with pytest.raises(DaemonUnreachable, match=r"other\.sock"):
            Client(str(tmp_path / "other.sock")).status()
        thread.join(10)
