"""What systemd is told by a real daemon: ready when it serves, alive while its task turns, stopping when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def told(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(20)
        yield listener


@contextlib.contextmanager
def daemon(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon that finds an nginx.conf and no nginx: it has to run all the same."""
    (home / "nginx.conf").write_text("events {} http {}\n")
    settings = home / "headgate.toml"
    settings.write_text(
        f"[nginx]\nconf = {json.dumps(str(home / 'nginx.conf'))}\ncontrol = {json.dumps(str(home / 'nginx.sock'))}\n"
        f"snapshot = {json.dumps(str(home / 'table.json'))}\n[api]\nsocket = {json.dumps(str(home / 'api.sock'))}\n"
        f'listen = ""\n[store]\nurl = {json.dumps(f"sqlite:///{home}/state.db")}\n[log]\nformat = "json"\n'
    )
    environment = {**os.environ, "NOTIFY_SOCKET": str(home / "notify"), "WATCHDOG_USEC": "30000000"}
    with (home / "log").open("wb") as log:
        command = [sys.executable, "-m", "controller", "--config", str(settings), "run"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(told: socket.socket, word: str) -> None:
    deadline = time.monotonic() + 20
    while word not in told.recv(4096).decode().split("\n"):
        assert time.monotonic() < deadline, f"no {word} came"


def test_systemd_hears_of_ready_of_life_of_reload_and_of_the_end(tmp_path: Path, told: socket.socket) -> None:
    with daemon(tmp_path) as process:
        until(told, "READY=1")
        until(told, "WATCHDOG=1")
        process.send_signal(signal.SIGHUP)
        until(told, "RELOADING=1")
        until(told, "READY=1")
        process.terminate()
        until(told, "STOPPING=1")
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {"event", "level", "timestamp"} <= lines[0].keys()
    assert any("nginx does not answer" in line["event"] for line in lines), "what is missing is said"
