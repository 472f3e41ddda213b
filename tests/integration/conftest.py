"""A flag of its own for each test, and a daemon that says what the test wants it to say."""

from __future__ import annotations

import json
import mmap
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from controller.integration import shutdown


@pytest.fixture
def flag(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Sets the flag, for this test alone."""
    monkeypatch.setattr(shutdown, "_memory", mmap.mmap(-1, 1))
    return shutdown.begin


class Daemon:
    """Headgate's API as far as the integration asks for it. `answer` is what it says; `calls` what it was asked."""

    def __init__(self, directory: Path) -> None:
        self.socket = str(directory / "api.sock")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answer: Callable[[str, dict[str, Any]], tuple[int, Any]] = lambda path, body: (200, {"drained": True})
        self._server: socketserver.ThreadingUnixStreamServer | None = None

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def running(self) -> bool:
        return self._server is not None

    def start(self) -> None:
        daemon = self

        class Handler(BaseHTTPRequestHandler):
            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                daemon.calls.append((self.path, body))
                status, said = daemon.answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(said if isinstance(said, bytes) else json.dumps(said).encode())

        self._server = socketserver.ThreadingUnixStreamServer(self.socket, Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            Path(self.socket).unlink()
            self._server = None


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # a unix socket's path has at most 107 bytes
        daemon = Daemon(Path(directory))
        daemon.start()
        yield daemon
        daemon.stop()
