"""Real gunicorn masters for tests: started on free loopback addresses, and gone with the test that started them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from controller.core.model import Server
from controller.core.policy import ProcessPolicy

ROOT = Path(__file__).resolve().parents[2]
SYNC, GTHREAD, UVICORN = "sync", "gthread", "uvicorn_worker.UvicornWorker"
WORKER_CLASSES = (SYNC, GTHREAD, UVICORN)


def free_port(ip: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
        probe.bind((ip, 0))
        return int(probe.getsockname()[1])


def tcp(port: int, ip: str = "127.0.0.1") -> Server:
    address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
    return Server(key=address, address=address, ip=ip, port=port)


def unix(path: Path) -> Server:
    return Server(key=f"unix:{path}", address=f"unix:{path}", ip=f"unix:{path}", port=0)


class Gunicorns:
    """Starts masters, and knows all that they became by a mark in their environment: daemons and USR2 too."""

    def __init__(self, directory: Path, applications: str = "tests.support.apps") -> None:
        self.directory = directory
        self.applications = applications
        self.seen = directory / "seen"
        self._mark = secrets.token_hex(8)
        self._children: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HEADGATE_TEST": self._mark,
            "HEADGATE_TEST_SEEN": str(self.seen),
            "PYTHONPATH": f"{ROOT}:{self.directory}",
            "PYTHONSAFEPATH": "1",  # else USR2 does not work for `python -m gunicorn`
        }

    def command(self, bind: str, *options: str, worker: str = SYNC, python: str = sys.executable) -> list[str]:
        application = f"{self.applications}:" + ("wsgi" if worker in (SYNC, GTHREAD) else "asgi")
        control = ["--no-control-socket"] if python == sys.executable else []  # unknown before 25.1
        common = ["--bind", bind, "--worker-class", worker, "--graceful-timeout", "20", *control]
        return [python, "-m", "gunicorn", *common, *options, application]

    def policy(self, *command: str, **changes: object) -> ProcessPolicy:
        values = {"start": command, "directory": str(self.directory), "environment": self.environment, **changes}
        return ProcessPolicy(**values)  # type: ignore[arg-type]

    def run(self, *command: str) -> subprocess.Popen[bytes]:
        """Run any command as a marked child, in the tests' directory."""
        with open(self.directory / "output", "ab") as output:
            environment = {**os.environ, **self.environment}
            child = subprocess.Popen(command, cwd=self.directory, env=environment, stdout=output, stderr=output)
        self._children.append(child)
        return child

    def master(self, bind: str, *options: str, worker: str = SYNC, workers: int = 2) -> subprocess.Popen[bytes]:
        """A master that has booted and has all its workers."""
        child = self.run(*self.command(bind, "--workers", str(workers), *options, worker=worker))
        wait_for(lambda: self.printed().count("Booting worker") >= workers, f"gunicorn on {bind}", self.printed)
        return child

    def printed(self) -> str:
        path = self.directory / "output"
        return path.read_text(errors="replace") if path.exists() else ""

    def alive(self) -> set[int]:
        return set(self._marked())

    async def inside(self, path: str, times: int = 1) -> None:
        """Wait until the application has begun to answer this path so many times."""
        await eventually(
            lambda: self.seen.exists() and self.seen.read_text().split().count(path) >= times, f"{path} inside"
        )

    def close(self) -> None:
        for _ in range(100):
            for pid in (marked := list(self._marked())):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not marked:
                break
            time.sleep(0.02)
        for child in self._children:
            child.wait(10)

    def _marked(self) -> Iterator[int]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("HEADGATE_TEST") == self._mark:
                    yield process.pid


async def get(server: Server, path: str = "/", started: asyncio.Event | None = None) -> str:
    """One request on a connection of its own: the status line's code and the body, `200 done`."""
    if server.port:
        reader, writer = await asyncio.open_connection(server.ip, server.port)
    else:
        reader, writer = await asyncio.open_unix_connection(server.ip.removeprefix("unix:"))
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
        answer = (await reader.read()).decode()
    finally:
        writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return f"{head.split(' ')[1] if head else 'nothing'} {body}"


async def eventually(condition: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    """Wait for evidence, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        await asyncio.sleep(0.02)


def wait_for(condition: Callable[[], bool], what: str, told: Callable[[], str], seconds: float = 20.0) -> None:
    """The same outside a loop, with what was printed in the message."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}\n{told()}"
        time.sleep(0.02)
