"""Where the API listens: the socket's rights, stale files, a second daemon, and places where it cannot be."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from controller.api.serve import ApiServer, ListenError, bind_tcp, bind_unix, read_token
from controller.client import Client
from tests.support.house import House


def test_the_socket_is_for_owner_and_group_and_goes_with_the_daemon(tmp_path: Path) -> None:
    with House(tmp_path) as house:
        assert stat.S_IMODE(house.socket.stat().st_mode) == 0o660
        assert stat.S_IMODE(house.socket.parent.stat().st_mode) & 0o027 == 0
    assert not house.socket.exists()


def test_a_second_daemon_is_refused_and_the_first_keeps_its_socket(tmp_path: Path) -> None:
    with House(tmp_path) as house:
        second = ApiServer(house.runtime, house.socket)
        with pytest.raises(ListenError, match=r"another daemon answers at .*api\.sock.*stop it first"):
            house.call(second.start())
        house.call(second.stop())
        assert Client(str(house.socket)).status()["revision"] >= 1


def test_the_socket_of_a_daemon_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    bind_unix(path).close()


def test_the_socket_of_a_daemon_that_just_starts_is_not_taken_for_stale(tmp_path: Path) -> None:
    """Between its bind and its listen a connection to it is refused, as to that of a dead one."""
    path = tmp_path / "api.sock"
    directory = os.open(tmp_path, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as first, ThreadPoolExecutor() as pool:
        fcntl.flock(directory, fcntl.LOCK_EX)
        first.bind(str(path))
        second = pool.submit(bind_unix, path)
        first.listen()
        os.close(directory)
        with pytest.raises(ListenError, match="another daemon answers"):
            second.result(30)
    assert path.exists()


def test_what_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "api.sock").write_text("precious")
    with pytest.raises(ListenError, match=r"api\.sock exists and is not a socket"):
        bind_unix(tmp_path / "api.sock")
    assert (tmp_path / "api.sock").read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_an_error_with_place_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ListenError, match=r"file/api\.sock cannot be made.*api\.socket"):
        bind_unix(tmp_path / "file" / "api.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not write")
def test_a_directory_that_may_not_be_written_is_an_error_with_place_and_remedy(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setuid(65534)
            bind_unix(tmp_path / "api.sock")
        except ListenError as error:
            status = 0 if "Permission denied" in error.message and "writable" in error.remedy else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_path_that_is_too_long_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="too long"):
        bind_unix(tmp_path / ("x" * 120))


def test_a_port_that_is_taken_is_said_to_be_and_the_unix_socket_goes_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, House(tmp_path) as house:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ListenError, match=f"cannot listen on {taken}.*stop the other program"):
            bind_tcp(taken)
        second = ApiServer(house.runtime, tmp_path / "second.sock", taken)
        with pytest.raises(ListenError):
            house.call(second.start())
        assert not (tmp_path / "second.sock").exists()


def test_ipv6_loopback_is_served_too(tmp_path: Path) -> None:
    with House(tmp_path, listen="[::1]:0") as house:
        assert str(house.api.address).startswith("[::1]:")
        assert Client(f"http://{house.api.address}").status()["revision"] >= 1


def test_a_token_file_is_read_without_white_space_and_must_not_be_empty(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" secret\n")
    assert read_token(tmp_path / "token") == "secret"
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ListenError, match="is empty"):
        read_token(tmp_path / "empty")
    with pytest.raises(ListenError, match="cannot be read"):
        read_token(tmp_path / "missing")
