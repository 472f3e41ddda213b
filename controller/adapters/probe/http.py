"""http and https checks.

A plain http check that needs no body goes over a bare socket and reads no more of HTTP than it has to, for a thousand
of them a second must cost little; https, or a body to look into, goes through h11.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Iterable

import h11

from controller.adapters.probe.common import ANSWER_LIMIT, Endpoint, Fault, closed, connect, open_stream, phrase
from controller.ports import Check

_INTERIM_LIMIT = 64  # answers with a status below 200


async def probe(endpoint: Endpoint) -> str:
    """An http check by status and header, in bare socket calls, which is the cheapest."""
    request = f"GET {endpoint.check.path} HTTP/1.1\r\nHost: {endpoint.host}\r\nUser-Agent: headgate\r\n"
    with await connect(endpoint) as sock:
        await asyncio.get_running_loop().sock_sendall(
            sock, f"{request}Accept: */*\r\nConnection: close\r\n\r\n".encode()
        )
        status, head = await _answer(sock)
    return _judged(
        status, lambda name: re.findall(rb"\r\n%s:([^\r]*)" % re.escape(name), head, re.IGNORECASE), endpoint.check
    )


async def probe_body(endpoint: Endpoint) -> str:
    """An http or https check by status, header and body."""
    check = endpoint.check
    answer, body = await _exchange(endpoint)
    detail = _judged(
        answer.status_code, lambda name: [value for key, value in answer.headers if key == name.lower()], check
    )
    if check.body and check.body.encode() not in body:
        coding = next(
            (f", which is {phrase(value)}" for key, value in answer.headers if key == b"content-encoding"), ""
        )
        raise Fault("body", f'"{check.body}" is not in the body{coding}')
    return detail


async def _answer(sock: socket.socket) -> tuple[int, bytes]:
    """Status and head of the answer, which is read to its end or ANSWER_LIMIT, so that the server ends undisturbed."""
    loop = asyncio.get_running_loop()
    answer, interim = b"", 0
    while True:
        head, gap, body = answer.partition(b"\r\n\r\n")
        _see_http(answer)
        if interim + len(head) > ANSWER_LIMIT:
            raise Fault("error", f"the head of the answer is longer than {ANSWER_LIMIT} bytes")
        ends_with_connection = False
        if gap:
            line = re.match(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: |\r|$)", head)
            if not line:
                raise Fault("error", f"the answer is not HTTP: {phrase(head)}")
            status = int(line[1])
            if status < 200:
                answer, interim = body, interim + len(head)
                continue
            length = re.search(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*(?:\r|$)", head, re.IGNORECASE)
            chunked = re.search(rb"\r\ntransfer-encoding:[^\r]*chunked", head, re.IGNORECASE)
            ends_with_connection = not (length or chunked)
            if (
                status in (204, 304)
                or len(body) >= ANSWER_LIMIT
                or (chunked and (body == b"0\r\n\r\n" or body.endswith(b"\r\n0\r\n\r\n")))
                or (length and not chunked and len(body) >= int(length[1]))
            ):
                return status, head
        received = await loop.sock_recv(sock, ANSWER_LIMIT)
        if not received:
            if ends_with_connection:
                return status, head
            raise closed(bool(answer))
        answer += received


async def _exchange(endpoint: Endpoint) -> tuple[h11.Response, bytes]:
    """The answer, and as much of its body as ANSWER_LIMIT allows."""
    headers = [("Host", endpoint.host), ("User-Agent", "headgate"), ("Accept", "*/*"), ("Connection", "close")]
    headers.append(("Accept-Encoding", "identity"))  # a body that is compressed all the same is not unpacked
    http = h11.Connection(h11.CLIENT, ANSWER_LIMIT)
    asked = http.send(h11.Request(method="GET", target=endpoint.check.path, headers=headers))
    async with open_stream(endpoint) as (reader, writer):
        writer.write((asked or b"") + (http.send(h11.EndOfMessage()) or b""))
        for _ in range(_INTERIM_LIMIT):
            answer = await _event(http, reader)
            if isinstance(answer, h11.Response):
                break
        else:
            raise Fault("error", f"there are more than {_INTERIM_LIMIT} interim answers")
        body = bytearray()
        while len(body) < ANSWER_LIMIT and isinstance(part := await _event(http, reader), h11.Data):
            body += part.data
    return answer, bytes(body[:ANSWER_LIMIT])


async def _event(http: h11.Connection, reader: asyncio.StreamReader) -> object:
    """The next thing that the server says."""
    received, begun = b"-", False
    try:
        while (event := http.next_event()) is h11.NEED_DATA:
            received = await reader.read(ANSWER_LIMIT)
            partial, _ = http.trailing_data
            begun = bool(partial) or http.their_state is not h11.SEND_RESPONSE
            if http.their_state is h11.SEND_RESPONSE:
                _see_http(partial + received)
            http.receive_data(received)
    except h11.RemoteProtocolError as error:
        if not received:
            raise closed(begun) from error
        if error.error_status_hint == 431:
            raise Fault("error", f"the head of the answer is longer than {ANSWER_LIMIT} bytes") from error
        raise Fault("error", f"the answer is not HTTP: {phrase(str(error))}") from error
    return event


def _see_http(beginning: bytes) -> None:
    if not b"HTTP/1.".startswith(beginning[:7]):
        raise Fault("error", f"the answer is not HTTP: {phrase(beginning)}")


def _judged(status: int, values: Callable[[bytes], Iterable[bytes]], check: Check) -> str:
    """The phrase for an answer with this status, and with these values of a header by its name; Fault."""
    if not any(low <= status <= high for low, high in check.statuses):
        raise Fault("status", f"status {status}")
    if check.header:
        name, _, part = check.header.partition(":")
        there = list(values(name.encode()))
        if not there:
            raise Fault("header", f"there is no header {name}")
        if not any(part.strip().encode() in value for value in there):
            raise Fault("header", f'"{part.strip()}" is not in {name}: {phrase(there[0])}')
    return f"status {status}"
