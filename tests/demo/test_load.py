"""The load generator against real servers that misbehave: each failure is counted, and as what it is."""

import asyncio
import hashlib
import json
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from controller.demo.load import FAILURES, KINDS, Load, Options, Tally, interleave

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
FAST = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Served-By: a\r\n\r\nfast\n"


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away, as it may
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return await reader.readexactly(length[0]) if length else b""


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def says(answer: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer)
        await writer.drain()

    return handle


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await request(reader)
    reset(writer)


async def resets_in_the_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await request(reader)
    writer.write(FAST[:-2])
    await writer.drain()
    await request_or_end(reader)
    reset(writer)


async def request_or_end(reader: asyncio.StreamReader) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.1)


async def answers_once_then_closes_on_the_next(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await request(reader)
    writer.write(FAST)
    await request(reader)


async def loses_a_byte(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = (await request(reader))[:-1]
    checksum = hashlib.sha256(body).hexdigest()
    writer.write(f"HTTP/1.1 200 OK\r\nX-Checksum: {checksum}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()


async def echoes_without_reading_right(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = await request(reader)
    writer.write(f"HTTP/1.1 200 OK\r\nX-Checksum: 0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()


def chunked(*parts: bytes, last: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Served-By: a\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + (b"0\r\n\r\n" if last else b"")


async def run(url: str, kind: str = "fast", one_shot: float = 1.0, **options: object) -> Load:
    given = {"clients": 1, "count": 1, "timeout": 5.0, **options}
    load = Load(Options(url, mix={kind: 1.0}, one_shot=one_shot, **given))
    async with asyncio.timeout(30):
        await load.run()
    return load


@pytest.mark.parametrize(
    ("failure", "handler", "kind"),
    [
        ("reset", resets, "fast"),
        ("reset", resets_in_the_body, "fast"),
        ("closed", says(b""), "fast"),
        ("timeout", silent, "fast"),
        ("malformed", says(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "fast"),
        ("malformed", says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"), "fast"),
        ("malformed", says(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"), "fast"),
        ("client_error", says(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), "fast"),
        ("server_error", says(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"), "fast"),
        ("unexpected", says(b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\n\r\n"), "fast"),
        ("truncated", says(b"HTTP/1.1 200 OK\r\nContent-Le"), "fast"),
        ("truncated", says(FAST[:-1]), "fast"),
        ("truncated", says(chunked(b"slow\n", last=False)), "slow"),
        ("wrong_body", says(FAST), "slow"),
        ("wrong_body", says(b"HTTP/1.1 200 OK\r\n\r\nfas"), "fast"),
        ("wrong_body", loses_a_byte, "echo"),
        ("wrong_body", echoes_without_reading_right, "echo"),
        ("incomplete_stream", says(chunked(b"data: 0\n\n", b"data: 1\n\n")), "stream"),
        ("incomplete_stream", says(chunked(b"data: 0\n\n", b"data: 2\n\n", b"data: done\n\n")), "stream"),
        ("incomplete_stream", says(chunked(b"data: 0\n\n", b"data: done\n\n", last=False)), "stream"),
        ("incomplete_stream", says(chunked()), "stream"),
    ],
)
async def test_each_failure_is_counted_as_what_it_is(failure: str, handler: Handler, kind: str) -> None:
    async with serving(handler) as url:
        load = await run(url, kind, timeout=0.5)
    assert dict(load.tally.failures) == {failure: 1}, load.tally.examples
    assert load.tally.requests == 1
    assert load.tally.in_flight == 0


async def test_a_refused_connection_is_counted_as_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        load = await run(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert dict(load.tally.failures) == {"refused": 1}


async def test_an_address_without_a_way_is_counted_as_unreachable() -> None:
    load = await run("http://255.255.255.255:80")
    assert dict(load.tally.failures) == {"unreachable": 1}


async def test_a_request_on_a_kept_connection_that_is_closed_unanswered_is_a_failure_of_its_own_kind() -> None:
    async with serving(answers_once_then_closes_on_the_next) as url:
        load = await run(url, one_shot=0.0, count=2)
    assert dict(load.tally.failures) == {"closed_reused": 1}
    assert load.tally.opened == 1


async def test_a_kept_connection_that_was_closed_between_requests_is_no_failure() -> None:
    async with serving(says(FAST)) as url:  # closes after each answer, and does not say so
        load = Load(Options(url, clients=1, one_shot=0.0, rate=20.0, count=6))
        await load.run()
    assert not load.tally.failures, load.tally.examples
    assert load.tally.opened == 6
    assert load.tally.retired >= 4


async def test_a_connection_that_the_server_announces_to_close_is_not_used_again() -> None:
    async with serving(says(FAST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))) as url:
        load = await run(url, one_shot=0.0, count=3)
    assert not load.tally.failures
    assert (load.tally.opened, load.tally.retired) == (3, 0)


async def test_keep_alive_clients_use_one_connection_and_one_shot_clients_one_for_each_request() -> None:
    async def polite(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request(reader)
            writer.write(FAST)

    async with serving(polite) as url:
        kept = await run(url, one_shot=0.0, count=10)
        alone = await run(url, one_shot=1.0, count=10)
    assert (kept.tally.opened, alone.tally.opened) == (1, 10)
    assert kept.tally.summary()["servers"] == {"a": 10}


async def test_stop_finishes_what_was_begun_and_begins_nothing_more() -> None:
    begun, may_answer = asyncio.Event(), asyncio.Event()

    async def patient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        begun.set()
        await may_answer.wait()
        writer.write(FAST)
        await writer.drain()

    async with serving(patient) as url:
        load = Load(Options(url, clients=1, one_shot=1.0))
        running = asyncio.create_task(load.run())
        await asyncio.wait_for(begun.wait(), 10)
        load.stop()
        may_answer.set()
        await asyncio.wait_for(running, 10)
    assert (load.tally.requests, load.tally.failures.total()) == (1, 0)


def test_kinds_come_in_their_shares_and_evenly() -> None:
    kinds = interleave({"fast": 8, "slow": 2})
    sent = [next(kinds) for _ in range(100)]
    assert sent.count("slow") == 20
    gaps = [i for i, kind in enumerate(sent) if kind == "slow"]
    assert {after - before for before, after in pairwise(gaps)} == {5}


def test_ticks_hold_what_came_since_the_last_one_and_the_summary_holds_everything() -> None:
    times = iter([100.0, 101.0, 102.0, 103.0])
    tally = Tally(wall=lambda: next(times))
    tally.ok("fast", "a", 0.010)
    tally.ok("stream", "a", 5.0)
    first = tally.tick()
    tally.ok("fast", "b", 0.030)
    second = tally.tick()
    assert (first["from"], first["to"], first["servers"]) == (100.0, 101.0, {"a": 1})
    assert (second["from"], second["to"], second["servers"], second["requests"]) == (101.0, 102.0, {"b": 1}, 3)
    summary = tally.summary()
    assert summary["seconds"] == 3.0
    assert summary["kinds"]["fast"] == {"requests": 2, "failures": {}, "p50": 0.030, "p99": 0.030, "max": 0.030}
    assert set(summary["kinds"]) == set(KINDS)


async def test_the_command_prints_ticks_and_a_summary_and_tells_failure_by_its_exit_status() -> None:
    async with serving(says(FAST)) as url:
        command = ["-m", "controller.demo.load", url, "--rate", "100", "--count", "30", "--interval", "0.1"]
        good = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=-1)
        lines = [json.loads(line) for line in (await good.communicate())[0].splitlines()]
        bad = await asyncio.create_subprocess_exec(sys.executable, *command, "--mix", "slow=1", stdout=-1)
        wrong = json.loads((await bad.communicate())[0].splitlines()[-1])["summary"]
    assert sum(line["servers"].get("a", 0) for line in lines[:-1]) == 30
    assert (lines[-1]["summary"]["requests"], lines[-1]["summary"]["failed"], good.returncode) == (30, 0, 0)
    assert (wrong["failures"], bad.returncode) == ({"wrong_body": 30}, 1)
    assert len(wrong["examples"]) == 20


def test_every_kind_of_failure_is_explained_in_the_documentation(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "docs/demo.md").read_text()
    assert [kind for kind in FAILURES if f"`{kind}`" not in text] == []
