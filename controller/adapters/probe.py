"""Probes: http, https and tcp checks of many servers, each on a connection of its own (ports.Prober).

One connection a probe proves that the server accepts; a kept one would go on talking to a worker whose listener is
gone. A plain http check that is judged by its status goes over a bare socket, for a thousand of them a second must
cost little; whatever needs a whole HTTP client (https, a body to look into) goes through aiohttp.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import aiohttp
import structlog
from yarl import URL

from controller.core.events import ProbeResult
from controller.core.model import Server
from controller.ports import Check, Target

BODY_LIMIT = 65536
"""Bytes of a body that are read; what comes after them is not looked at."""

GRID = (0.05, 0.2)
"""Seconds to which probes are aligned, at least and at most; between these it is what their jitter allows.

Woken together they cost a fraction of what they cost one by one: a daemon that sleeps between probes is cold each time.
"""

_REASONS = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM), "ours"),
    errno.ECONNREFUSED: "refused",
    errno.ENOENT: "refused",  # no such unix socket
    errno.ENOTCONN: "refused",  # a unix socket whose backlog is full
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
}
_log = structlog.get_logger(__name__)


class HttpProber:
    """Fulfils ports.Prober. `emit` is called on the event loop, once for each probe that ran to its end.

    A probe that we cut short (`set_targets`, `probe_now`, `close`), or for which we lack file descriptors or memory,
    says nothing about the server and is not emitted.
    """

    def __init__(self, emit: Callable[[ProbeResult], None]) -> None:
        self._emit = emit
        self._targets: dict[tuple[str, str], _Target] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    def set_targets(self, targets: Mapping[tuple[str, str], Target]) -> None:
        """Probe exactly these, by (upstream, server key). Unchanged ones keep their rhythm; new ones start at once."""
        before = self._targets
        self._targets = {key: _Target.of(target.server, target.check) for key, target in targets.items()}
        for key in before.keys() - self._targets.keys():
            self._stop(key)
        for key, target in self._targets.items():
            if before.get(key) != target:
                self.probe_now(*key)

    def probe_now(self, upstream: str, server: str) -> None:
        """Drop a probe under way, if any, and probe this target at once."""
        key = (upstream, server)
        self._stop(key)
        if key in self._targets:
            self._tasks[key] = asyncio.get_running_loop().create_task(self._watch(key, self._targets[key]))

    async def close(self) -> None:
        """Cancel everything and wait for it."""
        self.set_targets({})
        await asyncio.gather(*self._ending, return_exceptions=True)
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    def _stop(self, key: tuple[str, str]) -> None:
        if task := self._tasks.pop(key, None):
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _watch(self, key: tuple[str, str], target: _Target) -> None:
        loop = asyncio.get_running_loop()
        check = target.check
        grid = min(max(GRID[0], check.interval * check.jitter), GRID[1])
        part = random.random()  # the second probe comes early, by chance, so that targets of one start spread out
        while True:
            began = loop.time()
            reason = "ok"
            try:
                async with asyncio.timeout(check.timeout):
                    detail = await self._probe(target)
            except Exception as error:  # noqa: BLE001 - whatever a server does to its client is the server's failure
                reason, detail = _reason(error, check)
            if reason == "ours":
                _log.warning("a probe could not be made", upstream=key[0], server=key[1], error=detail)
            else:
                self._emit(ProbeResult(*key, reason == "ok", reason, detail, loop.time() - began))
            due = began + part * check.interval * (1 + random.uniform(-check.jitter, check.jitter))
            await asyncio.sleep(round(due / grid) * grid - loop.time())
            part = 1.0

    async def _probe(self, target: _Target) -> str:
        if target.check.type == "https" or (target.check.type == "http" and target.check.body):
            return await self._probe_with_client(target)
        return await _probe_with_socket(target)

    async def _probe_with_client(self, target: _Target) -> str:
        check = target.check
        async with self._session(target).get(
            target.url,
            headers={"Host": target.host, "User-Agent": "headgate"},
            skip_auto_headers=("Accept-Encoding",),
            allow_redirects=False,
            ssl=_context(check) if check.type == "https" else True,
            server_hostname=check.server_name or URL(f"https://{target.host}").host,
        ) as response:
            body = b""
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) >= BODY_LIMIT:
                    break
            detail = _judged(response.status, check)
        if check.body and check.body.encode() not in body[:BODY_LIMIT]:
            raise _Fault("body", f'"{check.body}" is not in the body')
        return detail

    def _session(self, target: _Target) -> aiohttp.ClientSession:
        path = target.ip if target.ip.startswith("unix:") else ""
        if path not in self._sessions:
            connector: aiohttp.BaseConnector = (
                aiohttp.UnixConnector(path.removeprefix("unix:"), force_close=True, limit=0)
                if path
                else aiohttp.TCPConnector(force_close=True, limit=0)
            )
            self._sessions[path] = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=None)
            )
        return self._sessions[path]


class _Fault(Exception):
    """The server answered, but not as it should; `args` are the reason and a phrase."""


class _Target(NamedTuple):
    """What makes one probe differ from another. A weight, for one, does not."""

    ip: str
    port: int
    host: str
    check: Check

    @classmethod
    def of(cls, server: Server, check: Check) -> _Target:
        host = check.host or ("localhost" if server.ip.startswith("unix:") else server.address)
        return cls(server.ip, check.port or server.port, host, check)

    @property
    def url(self) -> URL:
        authority = "localhost" if self.ip.startswith("unix:") else f"[{self.ip}]" if ":" in self.ip else self.ip
        port = f":{self.port}" if self.port else ""
        return URL(f"{self.check.type}://{authority}{port}{self.check.path}", encoded=True)


async def _probe_with_socket(target: _Target) -> str:
    """A tcp check, or an http check that is judged by its status alone; in bare socket calls, which is the cheapest."""
    loop = asyncio.get_running_loop()
    unix = target.ip.startswith("unix:")
    family = socket.AF_UNIX if unix else socket.AF_INET6 if ":" in target.ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        await loop.sock_connect(sock, target.ip.removeprefix("unix:") if unix else (target.ip, target.port))
        if not unix and sock.getsockname() == sock.getpeername():
            # On loopback the kernel may pick the very port that we call, and nobody but us has answered.
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        if target.check.type == "tcp":
            return "connected"
        request = f"GET {target.check.path} HTTP/1.1\r\nHost: {target.host}\r\nUser-Agent: headgate\r\n"
        await loop.sock_sendall(sock, f"{request}Accept: */*\r\nConnection: close\r\n\r\n".encode())
        return _judged(await _status(sock), target.check)


async def _status(sock: socket.socket) -> int:
    """The status of the answer, read as far as BODY_LIMIT, so that the server can end it undisturbed."""
    loop = asyncio.get_running_loop()
    answer = b""
    while True:
        head, gap, body = answer.partition(b"\r\n\r\n")
        if not b"HTTP/1.".startswith(answer[:7]):
            raise _Fault("error", f"the answer is not HTTP: {_phrase(answer)}")
        ends_with_connection = False
        if gap:
            line = re.match(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: |\r|$)", head)
            if not line:
                raise _Fault("error", f"the answer is not HTTP: {_phrase(head)}")
            status = int(line[1])
            if status < 200:
                answer = body
                continue
            length = re.search(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*(?:\r|$)", head, re.IGNORECASE)
            chunked = re.search(rb"\r\ntransfer-encoding:[^\r]*chunked", head, re.IGNORECASE)
            ends_with_connection = not (length or chunked)
            if (
                status in (204, 304)
                or len(body) >= BODY_LIMIT
                or (chunked and (body == b"0\r\n\r\n" or body.endswith(b"\r\n0\r\n\r\n")))
                or (length and not chunked and len(body) >= int(length[1]))
            ):
                return status
        elif len(answer) > BODY_LIMIT:
            raise _Fault("error", f"the head of the answer is longer than {BODY_LIMIT} bytes")
        received = await loop.sock_recv(sock, BODY_LIMIT)
        if not received:
            if ends_with_connection:
                return status
            raise _Fault("reset", f"the connection was closed {'within the' if answer else 'without an'} answer")
        answer += received


def _judged(status: int, check: Check) -> str:
    if not any(low <= status <= high for low, high in check.statuses):
        raise _Fault("status", f"status {status}")
    return f"status {status}"


def _reason(error: Exception, check: Check) -> tuple[str, str]:
    """What an exception means: a word of events.ProbeResult, or `ours` where it is no fault of the server; a phrase."""
    match error:
        case _Fault(args=(reason, phrase)):
            return str(reason), str(phrase)
        case TimeoutError():
            return "timeout", f"no answer within {check.timeout:g} s"
        case ssl.SSLError() | aiohttp.ClientSSLError():
            return "tls", _phrase(str(error))
        case aiohttp.ServerDisconnectedError():
            return "reset", "the connection was closed without an answer"
        case aiohttp.ClientPayloadError():
            return "reset", "the connection was closed within the answer"
        case OSError(errno=int(number)):
            return _REASONS.get(number, "error"), os.strerror(number).lower()
        case aiohttp.ClientResponseError():
            return "error", f"the answer is not HTTP: {_phrase(error.message)}"
    return "error", _phrase(f"{type(error).__name__}: {error}")


def _phrase(text: str | bytes) -> str:
    """The beginning of something foreign, fit for one line of a log."""
    readable = text.decode("latin-1") if isinstance(text, bytes) else text
    return "".join(c if c.isprintable() else "." for c in " ".join(readable.split()))[:120]


def _context(check: Check) -> ssl.SSLContext:
    # With its time in the key a renewed file is read again.
    return _new_context(check.ca_file, os.stat(check.ca_file).st_mtime_ns if check.ca_file else 0, check.verify)


@lru_cache(maxsize=64)
def _new_context(ca_file: str | None, _changed: int, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
