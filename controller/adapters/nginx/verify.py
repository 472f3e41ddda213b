"""One verified reload of nginx: a new version served by the configuration itself, newer workers, the same master.

HUP alone proves nothing: it returns 0 on a broken configuration, and the old workers go on. What is written into the
configuration, and when a reload is worth its price, does not stand here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from controller.adapters import procfs
from controller.adapters.nginx.check import Nginx, NginxMissing, check, find
from controller.adapters.nginx.writer import CheckFailed
from controller.adapters.pidfd import Identity, is_alive, send
from controller.adapters.whole import put, read
from controller.errors import HeadgateError
from controller.ports import PlaneUnreachable, ProcessError

POLL = 0.02  # seconds between two looks at workers that are being replaced
CONNECTIONS = 3  # fresh ones that must all answer the new version
STALE = 1.0  # seconds for which a socket must refuse, with no nginx there, before it counts as left behind

_MAX_SOCKET_PATH = 107  # sun_path of unix(7), without its closing zero


class ReloadFailed(HeadgateError):
    """No proof that nginx serves the new configuration. `taken`: a worker with it was seen, or may be there."""

    def __init__(self, message: str, remedy: str, taken: bool) -> None:
        super().__init__(message, remedy)
        self.taken = taken


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process. `exiting`: it accepts nothing new and ends with its last request."""

    identity: Identity
    exiting: bool


def version_include(socket: Path, version: str) -> bytes:
    """The text of the version include: a server on `socket` that answers `version`; ValueError for a bad path.

    `return` stands in the server itself: there it comes before every access rule of the http block.
    """
    path = str(socket)
    if not path.startswith("/") or any(ord(character) < 32 for character in path):
        raise ValueError(f"{path!r}: give an absolute path without control characters")
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise ValueError(f"{path!r}: a unix socket's path has at most {_MAX_SOCKET_PATH} bytes; choose a shorter one")
    quoted = path.replace("\\", "\\\\").replace('"', '\\"')
    return (
        "# Written by Headgate: proves which configuration nginx serves (docs/reload-plane.md).\n"
        f'server {{ listen "unix:{quoted}"; access_log off; default_type text/plain; return 200 "{version}"; }}\n'
    ).encode()


def workers(master: int) -> tuple[Worker, ...]:
    """All workers of this master by pid, those that are shutting down included; none where it is gone."""
    return tuple(_workers(master))


def _workers(master: int) -> Iterator[Worker]:
    try:
        children = Path(f"/proc/{master}/task/{master}/children").read_text(encoding="ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return
    for pid in map(int, children):
        process, title = procfs.read(pid), _title(pid)
        if process is not None and title.startswith(b"nginx: worker process"):
            yield Worker((pid, process.created), b"is shutting down" in title)


class Reloader:
    """Reloads nginx, one at a time, and proves it by `version_file`, which the http block includes.

    `conf` and `nginx` (None: found) name the configuration and the binary. `timeout` is what a proof may take, in
    seconds. `announce` is told of the version file's content before it is written, as by ConfWriter.
    """

    def __init__(
        self,
        conf: Path,
        version_socket: Path,
        version_file: Path,
        nginx: str | None = None,
        *,
        timeout: float = 20.0,
        announce: Callable[[str, bytes | None], None] = lambda path, content: None,
    ) -> None:
        self._announce = announce
        self._conf = conf
        self._program = nginx
        self._socket = version_socket
        self._file = version_file
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._found: tuple[Nginx, Identity] | None = None
        self._refusing: tuple[int, float] | None = None

    async def master(self) -> Identity:
        """The master that runs with this configuration; PlaneUnreachable."""
        if self._found is None or not is_alive(self._found[1]):
            self._found = None
            self._found = await asyncio.to_thread(self._find)
        return self._found[1]

    async def check(self) -> None:
        """`nginx -t` as the running nginx would read it; CheckFailed, PlaneUnreachable."""
        await self.master()
        assert self._found is not None
        await check(self._found[0])

    async def served(self) -> str:
        """The version that a fresh connection is answered; PlaneUnreachable."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._ask()
        except (OSError, TimeoutError, ValueError) as error:
            if isinstance(error, ConnectionRefusedError):
                await self._clear()
            raise PlaneUnreachable(
                f"nginx does not answer on {self._socket}: {error or type(error).__name__}",
                f"see that nginx runs and that its http block includes {self._file} (headgate adopt)",
            ) from error

    def on_disk(self, version: str) -> bool:
        """Whether the version file says `version`, so that nginx would serve it after a restart. Blocks."""
        return read(self._file) == version_include(self._socket, version)

    async def reload(self, version: str, *, checked: bool = False) -> frozenset[Identity]:
        """Bring nginx to its files as they are, which serve as `version` from now on; the workers that were before.

        `checked`: `nginx -t` has just taken them. ReloadFailed with the evidence, and then the version file is what it
        was; PlaneUnreachable where no nginx runs.
        """
        async with self._lock:
            master = await self.master()
            former = await asyncio.to_thread(read, self._file)
            await self._put(version_include(self._socket, version))
            try:
                return await self._reload(master, version, checked)
            except BaseException:
                await self._put(former)
                raise

    async def _put(self, content: bytes | None) -> None:
        self._announce(str(self._file), content)
        await asyncio.to_thread(put, self._file, content)

    async def _reload(self, master: Identity, version: str, checked: bool) -> frozenset[Identity]:
        if not checked:
            try:
                await self.check()
            except CheckFailed as error:
                raise ReloadFailed(error.message, error.remedy, taken=False) from error
        old = frozenset(worker.identity for worker in await asyncio.to_thread(workers, master[0]))
        try:
            reached = send(master, signal.SIGHUP)
        except ProcessError as error:
            raise ReloadFailed(error.message, error.remedy, taken=False) from error
        if not reached:
            raise ReloadFailed(f"nginx's master {master[0]} has ended", "start nginx", taken=False)
        deadline = time.monotonic() + self._timeout
        while True:
            missing, taken = await self._missing(master, old, version)
            if missing is None:
                return old
            if time.monotonic() > deadline:
                raise ReloadFailed(
                    f"nginx was told to reload and {self._timeout:g} s later {missing}",
                    "see nginx's error log for why",
                    taken,
                )
            await asyncio.sleep(POLL)

    async def _missing(self, master: Identity, old: frozenset[Identity], version: str) -> tuple[str | None, bool]:
        """What of the proof is missing, None when it is complete; and whether the new configuration runs somewhere."""
        seen = await asyncio.to_thread(workers, master[0])
        taken = any(worker.identity not in old for worker in seen)
        if not is_alive(master):
            return f"its master {master[0]} has ended", True
        if not taken:
            return "no new worker has come", False
        if left := [worker.identity[0] for worker in seen if worker.identity in old and not worker.exiting]:
            return f"old workers still accept: {', '.join(map(str, left))}", True
        for _ in range(CONNECTIONS):
            try:
                answer = await self.served()
            except PlaneUnreachable as error:
                return error.message, True
            if answer != version:
                return f"a fresh connection is answered {answer!r}, not {version!r}", True
        return None, True

    def _find(self) -> tuple[Nginx, Identity]:
        try:
            found = find(str(self._conf))
        except NginxMissing as error:
            raise PlaneUnreachable(error.message, error.remedy) from error
        process = None if found.master is None else procfs.read(found.master)
        if process is None:
            raise PlaneUnreachable(f"no nginx runs with {self._conf}", "start nginx")
        nginx = replace(found, program=self._program) if self._program else found
        return nginx, (process.pid, process.created)

    async def _ask(self) -> str:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            writer.write(b"GET /version HTTP/1.0\r\n\r\n")
            head, _, body = (await reader.read(65536)).partition(b"\r\n\r\n")
            while chunk := await reader.read(65536):
                body += chunk
        finally:
            writer.close()
        if head.split()[1:2] != [b"200"]:
            raise ValueError(f"it answers {head[:80]!r}")
        return body.decode("ascii")

    async def _clear(self) -> None:
        """Remove the socket that a killed nginx left behind: with it there, nginx refuses to start.

        Between bind and listen a starting nginx refuses connections, too, but not for long.
        """
        inode, now = self._socket.stat().st_ino, time.monotonic()
        if self._refusing is None or self._refusing[0] != inode:
            self._refusing = inode, now
        elif now - self._refusing[1] >= STALE:
            try:
                await self.master()
            except PlaneUnreachable:
                self._socket.unlink(missing_ok=True)
                self._refusing = None


def _title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
