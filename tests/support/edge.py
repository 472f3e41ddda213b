"""A real nginx over backends that count, under either data plane. No test stands here."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from controller.adapters.clock import SystemClock
from controller.adapters.nginx.lua import LuaPlane
from controller.adapters.nginx.reload import ReloadPlane
from controller.adapters.nginx.verify import Reloader, version_include
from controller.adapters.nginx.writer import ConfWriter
from controller.core.quantise import Pace
from controller.ports import DataPlane
from tests.lua.house import Backend, backends, eventually, proxy, table
from tests.support.nginx import Nginx, free_port

FAST = Pace(interval=0.2)


class Edge:
    """nginx with upstream `app` over some backends, its data plane, and a client whose every request is one-shot."""

    def __init__(self, nginx: Nginx, port: int, backends: list[Backend]) -> None:
        self.nginx, self.port, self.backends = nginx, port, backends
        self.plane: DataPlane
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        self.revision = 0

    async def publish(self, servers: Iterable[Mapping[str, Any]], **options: Any) -> None:
        self.revision += 1
        await self.plane.publish(table(self.revision, servers, **options))

    async def get(self, path: str = "/") -> tuple[int, str]:
        async with self.session.get(f"http://127.0.0.1:{self.port}{path}") as response:
            return response.status, await response.text()

    async def shares(self, requests: int) -> Counter[int]:
        """Which port answered how often."""
        seen: Counter[int] = Counter()
        for _ in range(requests):
            status, text = await self.get()
            assert status == 200
            seen[int(text)] += 1
        return seen

    async def in_flight(self, backend: Backend) -> int:
        return (await self.plane.counters("app")).upstreams["app"][backend.key].in_flight

    async def empty(self, backend: Backend) -> None:
        """Wait until nothing is in flight there."""

        async def idle() -> bool:
            return await self.in_flight(backend) == 0

        await eventually(idle, f"nothing in flight at {backend.key}")

    def reloads(self) -> int:
        """How often nginx has read its configuration again."""
        return self.nginx.error_log.read_text().count(", reconfiguring")


class ReloadEdge(Edge):
    """An edge on the reload data plane, with its parts, and the bytes that its author wrote."""

    def __init__(self, nginx: Nginx, port: int, backends: list[Backend]) -> None:
        super().__init__(nginx, port, backends)
        self.conf = nginx.prefix / "nginx.conf"
        self.state = nginx.prefix / "reload.json"
        self.version_file = nginx.prefix / "version.conf"
        self.version_socket = nginx.prefix / "run" / "version.sock"
        self.planes: list[ReloadPlane] = []

    def reloader(self, kind: Callable[..., Reloader] = Reloader, **options: Any) -> Reloader:
        return kind(self.conf, self.version_socket, self.version_file, **options)

    def made(
        self, writer: Callable[..., ConfWriter] = ConfWriter, reloader: Reloader | None = None, **options: Any
    ) -> ReloadPlane:
        """A plane over this edge, as a daemon that starts makes one."""
        reloader = reloader or self.reloader()
        writing = writer(self.nginx.prefix / "journal", reloader.check)
        options = {"pace": FAST} | options
        plane = ReloadPlane(self.conf, self.state, writing, reloader, SystemClock(), **options)
        self.planes.append(plane)
        return plane


@contextlib.asynccontextmanager
async def lua_edge(count: int = 2) -> AsyncIterator[Edge]:
    """On the Lua data plane."""
    async with backends(count) as running:
        port = free_port()
        with Nginx(proxy(port, [backend.port for backend in running])) as nginx:
            edge = Edge(nginx, port, running)
            edge.plane = LuaPlane(nginx.socket, nginx.snapshot)
            try:
                yield edge
            finally:
                await edge.session.close()
                await edge.plane.close()


@contextlib.asynccontextmanager
async def reload_edge(
    count: int = 2, lines: Callable[[list[Backend]], str] | None = None, **options: Any
) -> AsyncIterator[ReloadEdge]:
    """On the reload data plane. `lines` writes the upstream's block otherwise; `options` are for the plane."""
    async with backends(count) as running:
        port = free_port()
        edge = ReloadEdge(Nginx("", plane=False), port, running)
        edge.version_file.write_bytes(version_include(edge.version_socket, "0"))
        block = lines(running) if lines else "\n".join(f"        server {each.key};" for each in running)
        edge.nginx.http = plain(port, block, edge.version_file)
        edge.nginx.write()
        try:
            with edge.nginx:
                edge.plane = edge.made(**options)
                try:
                    yield edge
                finally:
                    await edge.session.close()
                    for plane in edge.planes:
                        await plane.close()
        finally:
            edge.nginx.close()


def plain(port: int, block: str, version_file: Path) -> str:
    """http{} text: upstream `app` with this block, a server that proxies to it, and the version include."""
    return f"""
    include "{version_file}";
    map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
    upstream app {{
{block}
        keepalive 16;
    }}
    server {{
        listen 127.0.0.1:{port};
        proxy_http_version 1.1;
        proxy_set_header Connection $connection_upgrade;
        proxy_set_header Upgrade $http_upgrade;
        location / {{ proxy_pass http://app; }}
    }}"""
