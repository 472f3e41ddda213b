"""Servers that misbehave: each fault has one word, whatever the kind of check, and costs bounded time and memory."""

import asyncio
import re
import socket
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, SettingsFrame

from controller.core.model import Server
from controller.ports import Check
from tests.adapters.probed import PATIENT, Handler, Probing, Raw, answering, at, free_port, reset, tls_server

KINDS = {
    "http": PATIENT,
    "header": replace(PATIENT, header="X-Role"),
    "body": replace(PATIENT, body="well"),
    "https": replace(PATIENT, type="https", verify=False),
    "grpc": replace(PATIENT, type="grpc"),
    "grpcs": replace(PATIENT, type="grpcs", verify=False),
    "agent": replace(PATIENT, type="agent", send="state\n"),
}
STREAM = (
    HeadersFrame(1, b"\x88", flags=["END_HEADERS"]).serialize()  # 0x88: ":status: 200" of the static table
    + DataFrame(1, b"x" * 16000).serialize()
)
SETTINGS = SettingsFrame(0).serialize()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Place:
    """Where a handler serves, over TLS where the kind of check wants it."""

    def __init__(self, raw: Raw, kind: str, certificate: Path) -> None:
        self._raw, self._tls = raw, tls_server(certificate) if kind in ("https", "grpcs") else None

    async def start(self, handler: Handler) -> Server:
        return await self._raw.start(handler, self._tls)


@pytest.fixture
async def place(raw: Raw, kind: str, certificate: Path) -> AsyncIterator[Place]:
    return Place(raw, kind, certificate)


async def test_a_port_where_nobody_listens_refuses(probing: Probing, kind: str) -> None:
    result = await probing.once(at(free_port()), KINDS[kind])
    assert (result.ok, result.reason, result.detail) == (False, "refused", "connection refused")


async def test_a_unix_socket_that_is_not_there_refuses(probing: Probing, kind: str, tmp_path: Path) -> None:
    server = Server("unix:x", "unix:x", f"unix:{tmp_path}/gone", 0)
    assert (await probing.once(server, KINDS[kind])).reason == "refused"


async def test_a_server_that_accepts_and_says_nothing_times_out(probing: Probing, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = await probing.once(at(listener.getsockname()[1]), replace(KINDS[kind], timeout=0.2))
    assert (result.reason, result.detail) == ("timeout", "no answer within 0.2 s")
    assert result.seconds >= 0.2


async def test_a_server_that_says_a_byte_now_and_then_times_out(probing: Probing, kind: str, place: Place) -> None:
    text = SETTINGS * 100 if kind.startswith("grpc") else b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 900

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in text:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0.02)

    result = await probing.once(await place.start(dribble), replace(KINDS[kind], timeout=0.3))
    assert result.reason == "timeout"


async def test_a_reset_is_told_from_a_refusal(probing: Probing, kind: str, place: Place) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reset(writer)

    assert (await probing.once(await place.start(refuse), KINDS[kind])).reason == "reset"


async def test_a_connection_closed_without_an_answer_is_a_reset(probing: Probing, kind: str, place: Place) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    result = await probing.once(await place.start(close), KINDS[kind])
    assert result.reason == "reset"


@pytest.mark.parametrize("kind", ["https", "grpcs"])
async def test_a_connection_closed_within_the_handshake_is_a_reset(probing: Probing, raw: Raw, kind: str) -> None:
    result = await probing.once(await raw.start(answering(b"")), KINDS[kind])
    assert result.reason == "reset"


async def test_a_connection_closed_within_the_answer_is_a_reset(probing: Probing, kind: str, place: Place) -> None:
    if kind == "agent":
        return  # there the end of the connection is the end of the line
    answer = STREAM if kind.startswith("grpc") else b"HTTP/1.1 200 OK\r\nX-Role: a\r\nContent-Length: 9\r\n\r\nx"
    result = await probing.once(await place.start(answering(SETTINGS * kind.startswith("grpc") + answer)), KINDS[kind])
    assert (result.reason, result.detail) == ("reset", "the connection was closed within the answer")


@pytest.mark.parametrize(
    "garbage",
    [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"\0\x1b[31m\xff\xfe\r\n\r\n" * 9, b"<html>HTTP/0.9 has no head</html>\n"],
)
async def test_garbage_is_an_error_with_a_phrase_of_one_printable_line(
    probing: Probing, kind: str, place: Place, garbage: bytes
) -> None:
    result = await probing.once(await place.start(answering(garbage)), KINDS[kind])
    assert result.reason == "error"
    assert re.match("the answer is not HTTP(/2)?: .|the agent says no word that is known: .", result.detail)
    assert result.detail.isprintable()
    assert len(result.detail) < 200


@pytest.mark.parametrize("kind", ["http", "body"])
@pytest.mark.parametrize("answer", ["HTTP/1.1 abc\r\n\r\n", "HTTP/1.1\r\n\r\n", "HTTP/2 200\r\n\r\n"])
async def test_a_status_line_that_is_none_is_an_error(probing: Probing, raw: Raw, kind: str, answer: str) -> None:
    assert (await probing.once(await raw.start(answering(answer)), KINDS[kind])).reason == "error"


@pytest.mark.parametrize("kind", ["https", "grpcs"])
@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 9999])
async def test_what_is_not_tls_fails_by_tls(probing: Probing, raw: Raw, kind: str, garbage: bytes) -> None:
    assert (await probing.once(await raw.start(answering(garbage)), KINDS[kind])).reason == "tls"


@pytest.mark.parametrize("kind", ["grpc", "grpcs"])
async def test_a_grpc_check_of_an_http_server_says_so(probing: Probing, kind: str, place: Place) -> None:
    result = await probing.once(await place.start(answering("HTTP/1.1 400 Bad Request\r\n\r\n")), KINDS[kind])
    assert (result.reason, result.detail) == ("error", "the answer is not HTTP/2: HTTP/1.1 400 Bad Request")


class Flood:
    """Sends a beginning and then parts, ten megabytes or without end, as fast as they are taken."""

    def __init__(self, start: bytes, part: bytes, most: float = float("inf")) -> None:
        self.start, self.part, self.most = start, part, most
        self.sent = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.start)
        while self.sent < self.most:
            writer.write(self.part)
            self.sent += len(self.part)
            await writer.drain()
        writer.close()


BIG = 10_000_000
FLOODS = {
    "body without end": (b"HTTP/1.1 200 OK\r\nX-Role: a\r\n\r\n", b"x" * 10000, None),
    "10 MB": (f"HTTP/1.1 200 OK\r\nX-Role: a\r\nContent-Length: {BIG}\r\n\r\n".encode(), b"x" * 10000, BIG),
    "chunks without end": (
        b"HTTP/1.1 200 OK\r\nX-Role: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"a\r\nxxxxxxxxxx\r\n" * 500,
        None,
    ),
    "headers without end": (b"HTTP/1.1 200 OK\r\n", b"X-More: and more\r\n" * 500, None),
    "a header without end": (b"HTTP/1.1 200 OK\r\nX-More: ", b"x" * 10000, None),
    "interim answers without end": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 400, None),
}
OUTCOMES = {
    **dict.fromkeys((("10 MB", each) for each in ("http", "header", "https")), "ok"),
    **dict.fromkeys((("body without end", each) for each in ("http", "header", "https")), "ok"),
    **dict.fromkeys((("chunks without end", each) for each in ("http", "header", "https")), "ok"),
    **dict.fromkeys(((each, "body") for each in ("10 MB", "body without end", "chunks without end")), "body"),
}


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("kind", ["http", "header", "body", "https"])
async def test_an_answer_that_does_not_end_costs_bounded_memory_and_time(
    probing: Probing, kind: str, place: Place, flood: str
) -> None:
    start, part, most = FLOODS[flood]
    outcome = OUTCOMES.get((flood, kind), "error")
    await _see_bounded(probing, place, Flood(start, part, most or float("inf")), KINDS[kind], outcome)


@pytest.mark.parametrize("kind", ["agent"])
async def test_a_line_that_does_not_end_is_an_error(probing: Probing, kind: str, place: Place) -> None:
    await _see_bounded(probing, place, Flood(b"up ", b"x" * 10000), KINDS[kind], "error")


@pytest.mark.parametrize("kind", ["grpc", "grpcs"])
@pytest.mark.parametrize(
    ("start", "part"),
    [
        (STREAM, DataFrame(1, b"x" * 16000).serialize()),
        (
            HeadersFrame(1, b"\x88").serialize(),
            ContinuationFrame(1, b"\x40\x01a\x7f\x80\x7d" + b"x" * 16000).serialize(),
        ),
        (b"", SETTINGS * 1000),
    ],
    ids=["data", "headers", "settings"],
)
async def test_http2_that_does_not_end_is_an_error(
    probing: Probing, kind: str, place: Place, start: bytes, part: bytes
) -> None:
    await _see_bounded(probing, place, Flood(SETTINGS + start, part), KINDS[kind], "error")


async def _see_bounded(probing: Probing, place: Place, flood: Flood, check: Check, outcome: str) -> None:
    server = await place.start(flood)
    tracemalloc.start()
    try:
        result = await probing.once(server, check)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.reason == outcome, result
    assert peak < 3_000_000
