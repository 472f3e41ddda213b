"""What the tests of the data plane share: backends that count by themselves, tables, load. No test stands here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import aiohttp
from aiohttp import web

from controller.adapters.nginx.lua import Counters, LuaPlane, PeerCounters
from tests.support.nginx import Nginx, free_port

STICKY = {"cookie": "route", "path": "/", "secure": False, "http_only": True, "same_site": "Lax", "max_age": 0}
"""What a table says of sessions."""


class Backend:
    """An HTTP server that counts what reaches it.

    `/hold` answers when released, `/stream` sends a first byte and ends when released, `/fail` answers 503, `/broken`
    closes the connection, `/accel` redirects internally to /static, `/websocket` echoes, all else answers the port.
    `fault` makes it behave as on that path whatever is asked for, a held request when it is released; `headers` are
    added to its plain answers.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.key = f"127.0.0.1:{self.port}"
        self.requests = 0
        self.holding = 0
        self.fault: str | None = None
        self.headers: dict[str, str] = {}
        self.release = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def start(self) -> Backend:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        return self

    async def stop(self) -> None:
        self.release.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        path = self.fault or request.path
        if path == "/websocket":
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            async for message in socket:
                await socket.send_str(f"{self.port} {message.data}")
            return socket
        if path in ("/hold", "/stream"):
            self.holding += 1
            try:
                if path == "/stream":
                    response = web.StreamResponse()
                    await response.prepare(request)
                    await response.write(b"first ")
                    await self.release.wait()
                    await response.write(b"last")
                    return response
                await self.release.wait()
                path = self.fault or path
            finally:
                self.holding -= 1
        if path == "/broken":
            assert request.transport is not None
            request.transport.abort()
        if path == "/accel":
            return web.Response(headers={"X-Accel-Redirect": "/static"})
        return web.Response(status=503 if path == "/fail" else 200, text=str(self.port), headers=self.headers)


@contextlib.asynccontextmanager
async def backends(count: int) -> AsyncIterator[list[Backend]]:
    """Some running backends."""
    running = [await Backend().start() for _ in range(count)]
    try:
        yield running
    finally:
        for backend in running:
            await backend.stop()


def server(port: int, **fields: Any) -> dict[str, Any]:
    """A table's entry for a server on loopback: up, weight 1."""
    entry = {"key": f"127.0.0.1:{port}", "ip": "127.0.0.1", "port": port, "weight": 1.0, "state": "up"}
    return entry | {"backup": False, "max_conns": 0} | fields


def warm_up(**fields: Any) -> dict[str, Any]:
    """A warm-up over 120 s that runs from the put."""
    ramp = {"epoch": 1, "elapsed_ms": 0, "duration_ms": 120000, "curve": 1.0, "floor": 0.1}
    return ramp | {"starts": "healthy", "held": False} | fields


def table(
    revision: int, servers: Iterable[Mapping[str, Any]], fail_open: bool = False, name: str = "app", **method: Any
) -> dict[str, Any]:
    """A table with one upstream. `method`: the method and what belongs to it, where it is not round robin."""
    method = {"method": "round_robin"} | method
    return {
        "format": 1,
        "revision": revision,
        "upstreams": {name: {**method, "fail_open": fail_open, "servers": list(servers)}},
    }


def proxy(port: int, servers: Iterable[int], extra: str = "", options: str = "", location: str = "") -> str:
    """http{} text: upstream `app` with the hook over these ports, and a server that proxies to it."""
    lines = " ".join(f"server 127.0.0.1:{each} max_fails=0;" for each in servers)
    return f"""
    map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
    upstream app {{ {lines} balancer_by_lua_block {{ require("headgate").balance("app") }} keepalive 16; }}
    server {{
        listen 127.0.0.1:{port};
        proxy_http_version 1.1;
        proxy_set_header Connection $connection_upgrade;
        proxy_set_header Upgrade $http_upgrade;
        {options}
        location / {{ {location} proxy_pass http://app; }}
        {extra}
    }}"""


async def eventually(condition: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
    """Await until `condition()`, a plain or an async function, gives something true; return it."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for: {what}")
        await asyncio.sleep(0.002)


class Edge:
    """nginx with upstream `app` over some backends, a client for it, and its control socket."""

    def __init__(self, nginx: Nginx, port: int, backends: list[Backend]) -> None:
        self.nginx, self.port, self.backends = nginx, port, backends
        self.plane = LuaPlane(nginx.socket, nginx.snapshot)
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self.revision = 0

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def publish(self, servers: Iterable[Mapping[str, Any]], **options: Any) -> None:
        self.revision += 1
        await self.plane.publish(table(self.revision, servers, **options))

    async def get(self, path: str = "/") -> tuple[int, str]:
        async with self.session.get(self.base + path) as response:
            return response.status, await response.text()

    async def shares(self, requests: int, one_shot: bool = False) -> Counter[int]:
        """Which port answered how often. `one_shot`: a connection for each request, so that every worker takes part."""
        seen: Counter[int] = Counter()
        for _ in range(requests):
            headers = {"Connection": "close"} if one_shot else {}
            async with self.session.get(self.base + "/", headers=headers) as response:
                assert response.status == 200
                seen[int(await response.text())] += 1
        return seen

    async def counters(self) -> Counters:
        return await self.plane.counters()

    async def none_native(self) -> bool:
        """Whether no request is in flight at a server that nginx does not know."""
        return (await self.counters()).native == {"app": 0}

    async def peer(self, backend: Backend) -> PeerCounters:
        return (await self.plane.counters("app")).upstreams["app"][backend.key]

    async def said(self, backend: Backend) -> dict[str, Any]:
        """A server's counters as nginx says them."""
        answer = await self.plane._call("GET", "/v1/counters", upstream="app")
        return dict(answer["upstreams"]["app"][backend.key])

    async def ejected(self, backend: Backend) -> dict[str, Any] | None:
        """Why and how long a server is ejected, or None."""
        found: dict[str, Any] | None = (await self.said(backend))["ejected"]
        return found

    async def settled(self, backend: Backend) -> PeerCounters:
        """The counters of a backend once nothing is in flight there."""

        async def idle() -> PeerCounters | None:
            counted = await self.peer(backend)
            return counted if counted.in_flight == 0 else None

        counted: PeerCounters = await eventually(idle, f"nothing in flight at {backend.key}")
        return counted

    async def close(self) -> None:
        await self.session.close()
        await self.plane.close()


@contextlib.asynccontextmanager
async def edge(count: int = 2, *, workers: int = 2, **parts: Any) -> AsyncIterator[Edge]:
    """A running edge. `extra`, `options` and `location` are for proxy(), all other keywords for Nginx."""
    texts = {name: parts.pop(name) for name in ("extra", "options", "location") if name in parts}
    async with backends(count) as running:
        port = free_port()
        with Nginx(proxy(port, [backend.port for backend in running], **texts), workers=workers, **parts) as nginx:
            made = Edge(nginx, port, running)
            try:
                yield made
            finally:
                await made.close()
