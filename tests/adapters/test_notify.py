"""Notifier and SystemClock against real sockets and the real kernel."""

import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.adapters.clock import SystemClock
from controller.adapters.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@headgate-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1))
        listener.settimeout(5)
        yield listener, name


def test_every_message_arrives_as_systemd_reads_it(systemd: tuple[socket.socket, str]) -> None:
    listener, name = systemd
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert notifier.ready("app: 3 of 3\nservers serving")
    assert listener.recv(999) == b"READY=1\nSTATUS=app: 3 of 3 servers serving"
    assert notifier.reloading()
    assert listener.recv(999).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert notifier.stopping()
    assert listener.recv(999) == b"STOPPING=1"
    assert notifier.status("well")
    assert listener.recv(999) == b"STATUS=well"
    assert notifier.ping()
    assert listener.recv(999) == b"WATCHDOG=1"


def test_without_systemd_nothing_is_sent_and_nothing_fails(tmp_path: Path) -> None:
    assert not Notifier({}).ready()
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ping()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_the_watchdog_is_for_the_process_that_systemd_means(environ: dict[str, str], seconds: float | None) -> None:
    assert Notifier(environ).watchdog == seconds


def test_the_clock_is_the_monotonic_one_and_knows_the_boot() -> None:
    clock = SystemClock()
    assert time.monotonic() - clock.now() < 1
    assert abs(time.time() - clock.wall()) < 1
    assert uuid.UUID(clock.boot())
    assert clock.boot() == SystemClock().boot()
