"""A real HTTP server for those who call others: it remembers what it was asked, and behaves as the test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

Behave = Callable[[int, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Told:
    """One request as it came."""

    line: str
    headers: dict[str, str]
    body: str


@dataclass
class Peer:
    """Somebody who is called, and every request that was read whole."""

    port: int = 0
    told: list[Told] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def lines(self) -> list[str]:
        return [told.line for told in self.told]


@contextlib.asynccontextmanager
async def peer(behave: Behave) -> AsyncIterator[Peer]:
    """Serve; `behave` gets the number of the request, from 1 on, and the writer."""
    known = Peer()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        known.told.append(Told(first.removesuffix(" HTTP/1.1"), headers, body.decode()))
        with contextlib.suppress(ConnectionError):
            await behave(len(known.told), writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    known.port = server.sockets[0].getsockname()[1]
    try:
        yield known
    finally:
        server.close()


def answers(*texts: bytes) -> Behave:
    """These answers in turn, then the last one again and again."""

    async def behave(number: int, writer: asyncio.StreamWriter) -> None:
        writer.write(texts[min(number, len(texts)) - 1])
        await writer.drain()

    return behave


async def hangs(_: int, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def trickles(_: int, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: x\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


def status(code: int, more: str = "") -> bytes:
    return f"HTTP/1.1 {code} x\r\nContent-Length: 0\r\n{more}\r\n".encode()
