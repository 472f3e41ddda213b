"""The Lua data plane as the daemon sees it: include, snapshot, control socket (docs/data-plane.md). No decisions."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import structlog

from controller.adapters.clock import SystemClock
from controller.adapters.whole import put, read
from controller.ports import Counters, Parameter, PeerCounters, PeerEjected, PlaneRefused, PlaneStatus, PlaneUnreachable

DEFAULT_LUA = "/usr/share/headgate/lua"
DEFAULT_SOCKET = "/run/headgate/nginx.sock"
DEFAULT_SNAPSHOT = "/var/lib/headgate/table.json"

log = structlog.get_logger("headgate")

_MAX_SOCKET_PATH = 107  # sun_path of unix(7), without its closing zero


def render_include(template: str, *, lua: str, socket: str, snapshot: str) -> str:
    """Return the text of nginx/headgate.conf with other places; each path is absolute.

    Raises ValueError, naming the path, where nginx or Lua could not take it.
    """
    values = {DEFAULT_LUA: lua, DEFAULT_SOCKET: socket, DEFAULT_SNAPSHOT: snapshot}
    for path in values.values():
        if not path.startswith("/") or any(ord(character) < 32 for character in path):
            raise ValueError(f"{path!r}: give an absolute path without control characters")
    if ";" in lua or "?" in lua:
        raise ValueError(f"{lua!r}: Lua's search path cannot express ';' and '?'; choose another directory")
    if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
        raise ValueError(f"{socket!r}: a unix socket's path has at most {_MAX_SOCKET_PATH} bytes; choose a shorter one")
    for default, path in values.items():
        if default not in template:
            raise ValueError(f"the template does not mention {default}")
        # nginx's and Lua's double quotes share these two escapes, and every value stands within double quotes.
        template = template.replace(default, path.replace("\\", "\\\\").replace('"', '\\"'))
    return template


class LuaPlane:
    """A client of the control socket at `socket`, and the writer of the snapshot at `snapshot`.

    `timeout` is in seconds, for each call.
    """

    def __init__(self, socket: Path, snapshot: Path, timeout: float = 5.0) -> None:
        self._clock = SystemClock()
        self._socket = socket
        self._snapshot = snapshot
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None
        self._written: bytes | None = None
        self._given: Mapping[str, object] = {}
        self._given_text = b""
        self._publishing = asyncio.Lock()

    async def status(self) -> PlaneStatus:
        """Return what runs. Raises PlaneUnreachable, PlaneRefused."""
        return _status(await self._call("GET", "/v1/status"))

    async def publish(self, table: Mapping[str, object]) -> PlaneStatus:
        """Write the snapshot, then put `table` in force on every worker.

        A table that nginx refuses does not stay in the snapshot; if nginx does not answer it does, for its next start.
        A snapshot that cannot be written is logged, and does not keep the table from nginx.
        Raises PlaneUnreachable, PlaneRefused.
        """
        text = self._text(table)
        async with self._publishing:
            former = self._written or await asyncio.to_thread(read, self._snapshot)
            await self._write(text)
            try:
                return _status(await self._call("PUT", "/v1/table", text))
            except PlaneRefused:
                await self._write(former)
                raise

    def _text(self, table: Mapping[str, object]) -> bytes:
        """With the moment by the clock that nginx reckons with: ramps of a snapshot go on, though nobody writes it."""
        if self._given != table:  # a table that is given again stays the very same, for nginx has it perhaps
            moment = {"boot_id": self._clock.boot(), "monotonic_ms": round(self._clock.now() * 1000)}
            text = json.dumps({**table, "written": moment}, separators=(",", ":"), allow_nan=False)
            self._given, self._given_text = table, text.encode()
        return self._given_text

    async def _write(self, snapshot: bytes | None) -> None:
        try:
            await asyncio.to_thread(put, self._snapshot, snapshot)
        except OSError as error:
            log.warning("the snapshot for nginx's next start cannot be written", error=str(error))
        else:
            self._written = snapshot

    async def counters(self, upstream: str | None = None) -> Counters:
        """Return the counters of all upstreams, or of one. Raises PlaneUnreachable, PlaneRefused."""
        answer = await self._call("GET", "/v1/counters", upstream=upstream)
        upstreams = {
            name: {key: _peer(counted) for key, counted in servers.items()}
            for name, servers in answer["upstreams"].items()
        }
        return Counters(answer["boot"], answer["revision"], upstreams, dict(answer["native"]))

    async def remembered(self) -> Mapping[str, Any] | None:
        """The table in the snapshot; None where there is none that can be read."""
        try:
            content = await asyncio.to_thread(read, self._snapshot)
            table = json.loads(content or b"null")
        except (OSError, ValueError) as error:
            log.warning("the snapshot cannot be read", error=str(error))
            return None
        return table if isinstance(table, dict) else None

    async def mean(self, meant: Mapping[Parameter, str | None]) -> None:
        """Nothing to remember: this plane writes no parameters."""

    async def load(self) -> None:
        """Nothing to do: nginx balances by the table."""

    async def close(self) -> None:
        """Close the client's side; nginx goes on with its table."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> LuaPlane:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(
        self, method: str, path: str, body: bytes | None = None, upstream: str | None = None
    ) -> dict[str, Any]:
        if self._session is None:
            # A connection for each call: a kept one may lead to a worker that a reload is ending.
            connector = aiohttp.UnixConnector(path=str(self._socket), force_close=True)
            timeout = aiohttp.ClientTimeout(total=self._timeout)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        try:
            self._restrict()
            query = {} if upstream is None else {"upstream": upstream}
            async with self._session.request(method, f"http://nginx{path}", data=body, params=query) as response:
                answer = await response.json(content_type=None)
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise PlaneUnreachable(
                f"nginx does not answer on {self._socket}: {error or type(error).__name__}",
                "see that nginx runs, includes headgate.conf, and that this user may open the socket",
            ) from error
        if not isinstance(answer, dict) or "boot" not in answer:
            raise PlaneUnreachable(
                f"{self._socket} does not answer as Headgate's data plane", "name the socket of headgate.conf"
            )
        if status != 200:
            wrong = answer["error"]
            raise PlaneRefused(wrong["code"], wrong["message"], wrong["remedy"], answer.get("revision"))
        return answer

    def _restrict(self) -> None:
        """Take the socket, which nginx makes for everybody, away from others.

        Where that is not permitted, the directory protects it.
        """
        mode = self._socket.stat().st_mode & 0o777
        if mode & 0o007:
            try:
                self._socket.chmod(0o660)
            except PermissionError:
                return


def _status(answer: Mapping[str, Any]) -> PlaneStatus:
    return PlaneStatus(answer["boot"], answer["revision"], tuple(answer["workers"]))


def _peer(counted: Mapping[str, Any]) -> PeerCounters:
    warm, ejected = counted["warm_up"], counted["ejected"]
    return PeerCounters(
        in_flight=int(counted["in_flight"]),
        requests=int(counted["requests"]),
        failures=int(counted["failures"]),
        warm_epoch=None if warm is None else int(warm["epoch"]),
        warm_elapsed=0.0 if warm is None else warm["elapsed_ms"] / 1000,
        warm_started=warm is not None and warm["started"],
        warm_picked=warm is not None and warm["picked"],
        answered=int(counted["answered"]),
        errors=int(counted["errors"]),
        timeouts=int(counted["timeouts"]),
        seconds=float(counted["seconds"]),
        ejected=ejected and PeerEjected(ejected["reason"], ejected["remaining_ms"] / 1000, int(ejected["times"])),
        refused_marks=int(counted["refused_marks"]),
    )
