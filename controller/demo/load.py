"""The load generator: a careful HTTP/1.1 client that hides nothing. `python -m controller.demo.load --help`.

No request is ever sent twice, so whatever goes wrong on the way is counted, each kind by itself (FAILURES). Careful
means only this: a kept connection that its peer has closed meanwhile is seen before a request is put on it.
Output is JSON lines: a tick after each interval (Tally.tick), at last a summary (Tally.summary).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import random
import select
import signal
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

FAILURES: Mapping[str, str] = {
    "refused": "no connection: refused",
    "unreachable": "no connection: any other reason",
    "reset": "connection reset before the response was complete",
    "closed": "closed on a fresh connection before any byte of the response",
    "closed_reused": "closed on a kept connection after the request was sent, before any byte of the response",
    "timeout": "not complete in time",
    "malformed": "not HTTP",
    "client_error": "status 4xx",
    "server_error": "status 5xx",
    "unexpected": "any other status than 200",
    "truncated": "closed in the middle of the response",
    "wrong_body": "body or checksum differ from what was asked for",
    "incomplete_stream": "event stream with a gap, or without its last event `done`",
}
KINDS = ("fast", "echo", "slow", "stream")
SHORT = frozenset({"fast", "echo"})
BODY_SIZES = (200, 4_000, 40_000)
# A kept connection that was idle for longer is not used again, as every client with care for the server's timer does.
IDLE_LIMIT = 20.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to send. Either `rate` (requests a second, open loop) or `clients` (closed loop) drives it.

    `mix` gives each kind its share of the requests, `one_shot` is the share (0..1) of requests that go over a
    connection of their own; `timeout` and `seconds` are seconds; `in_flight` bounds the open loop.
    """

    url: str
    rate: float | None = None
    clients: int = 0
    seconds: float = math.inf
    count: float = math.inf
    mix: Mapping[str, float] = field(default_factory=lambda: {"fast": 1.0})
    one_shot: float = 0.5
    timeout: float = 30.0
    interval: float = 1.0
    in_flight: int = 500
    seed: int = 1


class Failed(Exception):
    """A request that was not answered as it must be; `kind` is a key of FAILURES."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class Tally:
    """Counts and latencies. Only requests that a server answers at once make the shares by server."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._since = wall()
        self._begun = self._since
        self.requests = 0
        self.in_flight = 0
        self.opened = 0
        self.retired = 0
        self.failures: Counter[str] = Counter()
        self.examples: list[str] = []
        self._kinds = {kind: (Counter[str](), array("d")) for kind in KINDS}
        self._servers: Counter[str] = Counter()
        self._tick: Counter[str] = Counter()

    def ok(self, kind: str, server: str, seconds: float) -> None:
        """Count a right answer."""
        self.requests += 1
        self._kinds[kind][1].append(seconds)
        if kind in SHORT:
            self._tick[server] += 1
            self._servers[server] += 1

    def failed(self, kind: str, failure: Failed, one_shot: bool) -> None:
        """Count a failure, and keep the first few as examples."""
        self.requests += 1
        self.failures[failure.kind] += 1
        self._kinds[kind][0][failure.kind] += 1
        if len(self.examples) < 20:
            how = "one-shot" if one_shot else "keep-alive"
            self.examples.append(f"{self._wall():.3f} {kind} ({how}): {failure}")

    def tick(self) -> dict[str, Any]:
        """What happened since the last tick: `from` and `to` are wall-clock seconds, `servers` answers by server."""
        since, self._since = self._since, self._wall()
        servers, self._tick = dict(self._tick), Counter()
        return {
            "from": since,
            "to": self._since,
            "servers": servers,
            "requests": self.requests,
            "failures": dict(self.failures),
            "in_flight": self.in_flight,
        }

    def summary(self) -> dict[str, Any]:
        """Everything since the start; latencies are seconds, of right answers only."""
        kinds = {
            kind: {
                "requests": len(latencies) + failures.total(),
                "failures": dict(failures),
                **({} if not latencies else _percentiles(latencies)),
            }
            for kind, (failures, latencies) in self._kinds.items()
        }
        return {
            "seconds": self._wall() - self._begun,
            "requests": self.requests,
            "failed": self.failures.total(),
            "failures": dict(self.failures),
            "examples": self.examples,
            "kinds": kinds,
            "servers": dict(self._servers),
            "connections": {"opened": self.opened, "retired": self.retired},
        }


def _percentiles(latencies: array[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    rank = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99)]
    return {"p50": rank[0], "p99": rank[1], "max": ordered[-1]}


class Connection:
    """One TCP connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._used = False
        self._idle_since = 0.0
        self._poll = select.poll()
        self._poll.register(writer.get_extra_info("socket").fileno(), select.POLLIN | select.POLLRDHUP)

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect; Failed."""
        try:
            return cls(*await asyncio.open_connection(host, port))
        except ConnectionRefusedError as error:
            raise Failed("refused") from error
        except OSError as error:
            raise Failed("unreachable", str(error)) from error

    def idle(self) -> None:
        """Note that it lies idle from now on."""
        self._idle_since = time.monotonic()

    def usable(self) -> bool:
        """Whether a request may be put on it. Asks the kernel, since the event loop may not have looked yet."""
        fresh = time.monotonic() - self._idle_since < IDLE_LIMIT
        return fresh and not self._reader.at_eof() and not self._poll.poll(0)

    def close(self) -> None:
        """Close it at once."""
        self._writer.transport.abort()

    async def exchange(self, request: bytes) -> tuple[int, dict[bytes, bytes], bytes, bool]:
        """Send a request and read its response: status, headers by lower-case name, body, and whether it is kept.

        Failed with `closed`, `closed_reused`, `reset`, `truncated` or `malformed`; for a body that was cut `Cut`, which
        is Failed too and knows the part that came.
        """
        reused, self._used = self._used, True
        body = bytearray()
        head = False
        try:
            self._writer.write(request)
            await self._writer.drain()
            block = await self._reader.readuntil(b"\r\n\r\n")
            head = True
            status, headers = _head(block)
            kept = await self._body(headers, body)
        except asyncio.IncompleteReadError as error:
            if head:
                raise Cut("truncated", bytes(body)) from error
            if error.partial:
                raise Failed("truncated", "in the head") from error
            raise Failed("closed_reused" if reused else "closed") from error
        except OSError as error:
            raise Cut("reset", bytes(body)) if head else Failed("reset", type(error).__name__) from error
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise Failed("malformed", str(error)) from error
        return status, headers, bytes(body), kept

    async def _body(self, headers: dict[bytes, bytes], body: bytearray) -> bool:
        kept = b"close" not in headers.get(b"connection", b"").lower()
        if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            while size := int((await self._reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                body += await self._reader.readexactly(size)
                if await self._reader.readexactly(2) != b"\r\n":
                    raise ValueError("chunk without its end")
            while await self._reader.readuntil(b"\r\n") != b"\r\n":
                continue
            return kept
        if (length := headers.get(b"content-length")) is not None:
            body += await self._reader.readexactly(int(length))
            return kept
        while part := await self._reader.read(65536):
            body += part
        return False


class Cut(Failed):
    """The connection ended within the body."""

    def __init__(self, kind: str, body: bytes) -> None:
        super().__init__(kind, f"{len(body)} bytes of the body had come")
        self.body = body


def _head(block: bytes) -> tuple[int, dict[bytes, bytes]]:
    line, *fields = block[:-4].split(b"\r\n")
    version, _, rest = line.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise ValueError(f"status line {line[:60]!r}")
    headers = {}
    for field_line in fields:
        name, _, value = field_line.partition(b":")
        headers[name.lower()] = value.strip()
    return int(rest[:3]), headers


def check(kind: str, sent: bytes, headers: Mapping[bytes, bytes], body: bytes) -> None:
    """Compare an answer with what the application must say to `kind`; Failed."""
    if kind == "stream":
        events = body.decode(errors="replace").split("\n\n")
        expected = [f"data: {number}" for number in range(len(events) - 2)]
        if events[:-2] != expected or events[-2:] != ["data: done", ""]:
            raise Failed("incomplete_stream", f"{len(events) - 1} events, the last one {events[-2:]!r}")
    elif kind == "echo":
        if body != sent:
            raise Failed("wrong_body", f"{len(sent)} bytes sent, {len(body)} others came back")
        if headers.get(b"x-checksum") != hashlib.sha256(sent).hexdigest().encode():
            raise Failed("wrong_body", "the server had read something else")
    elif body != f"{kind}\n".encode():
        raise Failed("wrong_body", repr(body[:60]))


def interleave(mix: Mapping[str, float]) -> Iterator[str]:
    """Yield kinds for ever, each as evenly as its share allows, so that long requests do not bunch."""
    total = sum(mix.values())
    due = dict.fromkeys(mix, 0.0)
    while True:
        for kind, share in mix.items():
            due[kind] += share
        chosen = max(due, key=due.__getitem__)
        due[chosen] -= total
        yield chosen


class Load:
    """One run of the generator. `stop` makes it finish what it has begun and end."""

    def __init__(self, options: Options, tally: Tally | None = None) -> None:
        self.options = options
        self.tally = tally or Tally()
        target = urlsplit(options.url)
        self._host, self._port = target.hostname or "127.0.0.1", target.port or 80
        self._authority = target.netloc
        self._random = random.Random(options.seed)
        self._kinds = interleave(options.mix)
        self._pool: list[Connection] = []
        self._stopping = asyncio.Event()
        self._left = options.count

    def stop(self) -> None:
        """Begin no more requests."""
        self._stopping.set()

    async def run(self) -> None:
        """Send until the time, the count or `stop` ends it; returns when every request that was begun has ended."""
        timer = None
        if math.isfinite(self.options.seconds):
            timer = asyncio.get_running_loop().call_later(self.options.seconds, self.stop)
        try:
            if self.options.rate is not None:
                await self._open_loop(self.options.rate)
            else:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.options.clients):
                        group.create_task(self._closed_loop())
        finally:
            if timer is not None:
                timer.cancel()
            for connection in self._pool:
                connection.close()

    def _may_go_on(self) -> bool:
        if self._stopping.is_set() or self._left < 1:
            return False
        self._left -= 1
        return True

    async def _closed_loop(self) -> None:
        while self._may_go_on():
            await self._request(next(self._kinds))

    async def _open_loop(self, rate: float) -> None:
        loop = asyncio.get_running_loop()
        slots = asyncio.Semaphore(self.options.in_flight)
        due = loop.time()
        async with asyncio.TaskGroup() as group:
            while self._may_go_on():
                await slots.acquire()
                group.create_task(self._request(next(self._kinds))).add_done_callback(lambda _: slots.release())
                due += 1 / rate
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)

    async def _request(self, kind: str) -> None:
        one_shot = self._random.random() < self.options.one_shot
        body = self._random.randbytes(self._random.choice(BODY_SIZES)) if kind == "echo" else b""
        begun = time.monotonic()
        self.tally.in_flight += 1
        try:
            async with asyncio.timeout(self.options.timeout):
                server = await self._exchange(kind, body, one_shot)
        except Failed as failure:
            self.tally.failed(kind, failure, one_shot)
        except TimeoutError:
            self.tally.failed(kind, Failed("timeout"), one_shot)
        else:
            self.tally.ok(kind, server, time.monotonic() - begun)
        finally:
            self.tally.in_flight -= 1

    async def _exchange(self, kind: str, body: bytes, one_shot: bool) -> str:
        connection = None if one_shot else self._kept()
        if connection is None:
            connection = await Connection.open(self._host, self._port)
            self.tally.opened += 1
        kept = False
        try:
            status, headers, answer, kept = await connection.exchange(self._encode(kind, body, one_shot))
            if status != 200:
                family = {4: "client_error", 5: "server_error"}.get(status // 100, "unexpected")
                raise Failed(family, str(status))
            check(kind, body, headers, answer)
        except Cut as cut:
            if kind == "stream":
                raise Failed("incomplete_stream", str(cut)) from cut
            raise
        finally:
            if kept and not one_shot:
                connection.idle()
                self._pool.append(connection)
            else:
                connection.close()
        return headers.get(b"x-served-by", b"?").decode()

    def _kept(self) -> Connection | None:
        while self._pool:
            connection = self._pool.pop()
            if connection.usable():
                return connection
            self.tally.retired += 1
            connection.close()
        return None

    def _encode(self, kind: str, body: bytes, one_shot: bool) -> bytes:
        method = "POST" if kind == "echo" else "GET"
        lines = [f"{method} /{kind} HTTP/1.1", f"Host: {self._authority}"]
        if one_shot:
            lines.append("Connection: close")
        if method == "POST":
            lines += ["Content-Type: application/octet-stream", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + body


def _emit(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)


async def _main(options: Options) -> int:
    load = Load(options)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, load.stop)

    async def ticks() -> None:
        while True:
            await asyncio.sleep(options.interval)
            _emit(load.tally.tick())

    ticking = asyncio.create_task(ticks())
    try:
        await load.run()
    finally:
        ticking.cancel()
    _emit(load.tally.tick())
    _emit({"summary": load.tally.summary()})
    return 0 if not load.tally.failures else 1


def _mix(text: str) -> dict[str, float]:
    mix = {kind: float(share) for kind, _, share in (part.partition("=") for part in text.split(","))}
    if unknown := set(mix) - set(KINDS):
        raise argparse.ArgumentTypeError(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return mix


def main() -> int:
    """Parse the command line and run; the exit status is 0 when nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m controller.demo.load", description="Send a mix of requests.")
    add = parser.add_argument
    add("url", help="http://host:port of the demo's application, or of an nginx before it")
    drive = parser.add_mutually_exclusive_group(required=True)
    drive.add_argument("--rate", type=float, help="requests a second (open loop)")
    drive.add_argument("--clients", type=int, default=0, help="clients, each with one request at a time (closed loop)")
    add("--seconds", type=float, default=math.inf, help="begin no request after this time")
    add("--count", type=float, default=math.inf, help="begin no more than this many requests")
    add("--mix", type=_mix, default={"fast": 1.0}, help="shares, for example fast=90,echo=9,slow=0.5,stream=0.5")
    add("--one-shot", type=float, default=0.5, help="share of requests with a connection of their own (0..1)")
    add("--timeout", type=float, default=30.0, help="seconds for one request, connecting included")
    add("--interval", type=float, default=1.0, help="seconds between two ticks")
    add("--in-flight", type=int, default=500, help="bound of the open loop")
    add("--seed", type=int, default=1)
    return asyncio.run(_main(Options(**vars(parser.parse_args()))))


if __name__ == "__main__":
    sys.exit(main())
