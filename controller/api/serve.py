"""Where the API listens: a unix socket with everything, and TCP for reading or with a token."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from controller.api.app import Guarded, create_app
from controller.api.face import Runtime
from controller.api.readiness import readiness_app
from controller.errors import HeadgateError


class ListenError(HeadgateError):
    """The API cannot listen where it should."""


class ApiServer:
    """Serves the API of a runtime.

    `path` is the unix socket (mode 0660; its directory is created, 0750, where it is missing); `listen` is `host:port`
    or None; `token` guards TCP, without one TCP is for reading. `readiness` is `host:port` for /readiness and /health
    alone, or None; with `warm` a server is ready once it is warm. `start` raises ListenError, also when another daemon
    answers at the socket; `stop` ends event streams and waiting calls cleanly and removes the socket.
    """

    def __init__(
        self,
        runtime: Runtime,
        path: Path,
        listen: str | None = None,
        token: str | None = None,
        readiness: str | None = None,
        warm: bool = False,
    ) -> None:
        self._path = path
        self._listen = listen
        self._readiness = readiness
        self._stopping = asyncio.Event()
        self._app = create_app(runtime, self._stopping, warm)
        self._guarded = Guarded(self._app, token)
        self._readiness_app = readiness_app(runtime, warm)
        self._inode = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.servers: list[_Server] = []
        self.address: str | None = None  #: `host:port` that TCP is served at, once started
        self.readiness_address: str | None = None  #: the same of the second place

    async def start(self) -> None:
        """Bind everything, then serve."""
        with contextlib.ExitStack() as unbind:
            unix = unbind.enter_context(bind_unix(self._path))
            unbind.callback(self._path.unlink)
            self._inode = self._path.stat().st_ino
            servers = [(_Server(self._app, self._stopping), unix)]
            if self._listen:
                tcp = unbind.enter_context(bind_tcp(self._listen))
                self.address = _address(tcp)
                servers.append((_Server(self._guarded, self._stopping), tcp))
            if self._readiness:
                tcp = unbind.enter_context(bind_tcp(self._readiness, "readiness.listen"))
                self.readiness_address = _address(tcp)
                servers.append((_Server(self._readiness_app, self._stopping), tcp))
            unbind.pop_all()
        self._tasks = [asyncio.create_task(server.serve([sock]), name="api") for server, sock in servers]
        self.servers = [server for server, _ in servers]
        await asyncio.gather(*(server.up.wait() for server in self.servers))

    async def stop(self) -> None:
        """Answer what is under way, end what waits, close."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()


def bind_unix(path: Path) -> socket.socket:
    """A bound unix socket; a stale file that nobody listens on is replaced. ListenError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        with _alone_in(path.parent):
            _remove_stale(path)
            before = os.umask(0o117)
            try:
                sock.bind(str(path))
            finally:
                os.umask(before)
            sock.listen()
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            why = "its path is too long for a unix socket" if error.errno is None else error.strerror
            remedy = "make its directory writable for the user that runs headgate, or change api.socket"
            raise ListenError(f"the API socket {path} cannot be made: {why}", remedy) from error
        raise
    return sock


def bind_tcp(listen: str, setting: str = "api.listen") -> socket.socket:
    """A bound TCP socket for `host:port`, which this setting names; ListenError."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        return _bound(socket.socket(family, kind, proto), address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        remedy = f"stop the other program, or change {setting}" if taken else f"change {setting}"
        raise ListenError(f"the API cannot listen on {listen}: {error.strerror}", remedy) from error


def read_token(path: Path) -> str:
    """The token that a file holds, without white space around it; ListenError when it cannot be read or is empty."""
    try:
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ListenError(
            f"api.token_file {path} cannot be read: {error}", "create it, readable for headgate"
        ) from error
    if not token:
        raise ListenError(f"api.token_file {path} is empty", "write a long random word into it")
    return token


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """No other daemon binds a socket in this directory meanwhile: one that is bound and does not listen yet looks
    stale."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"{path} exists and is not a socket", "move it away, or change api.socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ListenError(f"another daemon answers at {path}", "stop it first, or give this one its own api.socket")


def _bound(
    sock: socket.socket, address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
) -> socket.socket:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except BaseException:
        sock.close()
        raise
    return sock


class _Server(uvicorn.Server):
    """uvicorn inside a program that has its own signals and its own end."""

    def __init__(self, app: object, stopping: asyncio.Event) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=3,
            )
        )
        self.up = asyncio.Event()
        self._stopping = stopping

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        # The loop of the base class wakes ten times a second to look at a flag.
        await self.on_tick(0)
        self.up.set()
        await self._stopping.wait()
