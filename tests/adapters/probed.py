"""What is probed: servers that behave and servers that do not; and a prober that remembers what it emitted."""

import asyncio
import socket
import ssl
import struct
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from controller.adapters.probe import NetProber
from controller.core.events import AgentSaid, ProbeResult
from controller.core.model import Server
from controller.ports import Check, Target

FAST = Check(interval=0.1, timeout=5)
PATIENT = Check(interval=60, timeout=5)
KEY = ("app", "one")
LONG_BODY = "x" * 200_000

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Probing:
    """A prober, the results and the agents' words that it has emitted."""

    def __init__(self) -> None:
        self.results: list[ProbeResult] = []
        self.began: list[float] = []
        self.said: list[str] = []
        self._news = asyncio.Event()
        self.prober = NetProber(self._emit)

    def _emit(self, event: ProbeResult | AgentSaid) -> None:
        if isinstance(event, AgentSaid):
            assert (event.upstream, event.server) == KEY
            self.said.append(event.words)
        else:
            self.results.append(event)
            self.began.append(asyncio.get_running_loop().time() - event.seconds)
        self._news.set()

    async def when(self, come: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not come():
                self._news.clear()
                await self._news.wait()

    async def until(self, count: int) -> list[ProbeResult]:
        await self.when(lambda: len(self.results) >= count)
        return self.results

    async def once(self, server: Server, check: Check) -> ProbeResult:
        """The first result for this server and check."""
        self.results.clear()
        self.prober.set_targets({})
        self.prober.set_targets({KEY: Target(server, check)})
        return (await self.until(1))[0]


def at(port: int) -> Server:
    return Server(f"127.0.0.1:{port}", f"127.0.0.1:{port}", "127.0.0.1", port)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Site:
    """A real web application, and what it was asked."""

    def __init__(self) -> None:
        self.requests: list[web.BaseRequest] = []

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        match request.path:
            case "/healthz":
                return web.Response(text="all is well", headers={"X-Role": "primary, warm"})
            case "/long":
                return web.Response(text=LONG_BODY + "end")
            case "/moved":
                return web.Response(status=302, headers={"Location": "/healthz"})
            case "/empty":
                return web.Response(status=204)
            case "/gzip":
                response = web.Response(text="all is well")
                response.enable_compression(web.ContentCoding.gzip)
                return response
            case "/chunks":
                response = web.StreamResponse()
                response.enable_chunked_encoding()
                await response.prepare(request)
                for part in (b"all is ", b"well"):
                    await response.write(part)
                return response
        return web.Response(status=503, text="all is lost")


class Web:
    """Where a Site listens: TCP, TLS and a unix socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = Site()
        self.runner = web.ServerRunner(web.Server(self.site.handle), shutdown_timeout=0)

    async def tcp(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Server:
        where = web.TCPSite(self.runner, host, 0, ssl_context=tls)
        await where.start()
        port = where._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return Server(shown, shown, host, port)

    async def unix(self) -> Server:
        await web.UnixSite(self.runner, str(self.folder / "app.sock")).start()
        address = f"unix:{self.folder}/app.sock"
        return Server(address, address, address, 0)


class Raw:
    """Servers that do what a handler does, and no more."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, handler: Handler, tls: ssl.SSLContext | None = None) -> Server:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await handler(reader, writer)
            except (OSError, asyncio.IncompleteReadError):
                writer.transport.abort()  # the prober has gone

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(handle(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._servers.append(await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls))
        return at(self._servers[-1].sockets[0].getsockname()[1])

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def answering(answer: str | bytes) -> Handler:
    """Reads a little, answers and closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer.encode() if isinstance(answer, str) else answer)
        writer.close()

    return handle


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def make_certificate(path: Path, name: str) -> Path:
    """A self-signed certificate for this name, with its key in the same file, put in the place of what was there."""
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN={name}"
    made = subprocess.run(
        [*command.split(), "-addext", f"subjectAltName=DNS:{name}", "-keyout", "-", "-out", "-"],
        check=True,
        capture_output=True,
    )
    fresh = path.with_suffix(".new")
    fresh.write_bytes(made.stdout)
    fresh.replace(path)
    return path


def tls_server(certificate: Path, clients: Path | None = None) -> ssl.SSLContext:
    """TLS with this certificate, which demands one of `clients` where that is given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    if clients:
        context.load_verify_locations(clients)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
