"""grpc and grpcs checks: grpc.health.v1.Health/Check, over HTTP/2 in the clear (with prior knowledge) or over TLS.

The protocol: https://github.com/grpc/grpc/blob/master/doc/health-checking.md. Its two messages have one field each,
so they are written and read here; HTTP/2 itself is h2's.
"""

from __future__ import annotations

import re
from enum import IntEnum
from urllib.parse import unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError

from controller.adapters.probe.common import ANSWER_LIMIT, Endpoint, Fault, closed, open_stream, phrase

_SETTINGS = b"\4"  # the type of the frame with which a server begins; types stand in the fourth byte
_Health = IntEnum("_Health", "UNKNOWN SERVING NOT_SERVING SERVICE_UNKNOWN", start=0)
_Code = IntEnum(
    "_Code",
    "OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED "
    "RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS "
    "UNAUTHENTICATED",
    start=0,
)


async def probe(endpoint: Endpoint) -> str:
    """Ask for the health of `check.service`; an empty name is the server as a whole."""
    async with open_stream(endpoint) as (reader, writer):
        call = _Call(endpoint)
        writer.write(call.to_send())
        while not call.ended:
            call.receive(await reader.read(ANSWER_LIMIT))
            writer.write(call.to_send())
        writer.write(call.goodbye())
    return call.verdict()


class _Call:
    """One call on one HTTP/2 connection: bytes in, bytes out."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.ended = False
        self._headers: dict[bytes, bytes] = {}
        self._message = b""
        self._received = 0
        self._begun = b""
        self._http = H2Connection(H2Configuration(header_encoding=None))
        self._http.initiate_connection()
        self._http.send_headers(
            1,
            [
                (":method", "POST"),
                (":scheme", "https" if endpoint.check.type == "grpcs" else "http"),
                (":path", "/grpc.health.v1.Health/Check"),
                (":authority", endpoint.host),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("grpc-timeout", f"{max(1, round(endpoint.check.timeout * 1000))}m"),
                ("user-agent", "headgate"),
            ],
        )
        self._http.send_data(1, _request(endpoint.check.service), end_stream=True)

    def to_send(self) -> bytes:
        return self._http.data_to_send()

    def goodbye(self) -> bytes:
        self._http.close_connection()
        return self._http.data_to_send()

    def receive(self, received: bytes) -> None:
        if not received:
            raise closed(bool(self._begun))
        self._received += len(received)
        self._begun = (self._begun + received)[:64]
        if self._begun[3:4] not in (b"", _SETTINGS):
            raise Fault("error", f"the answer is not HTTP/2: {phrase(self._begun)}")
        if self._received > ANSWER_LIMIT:
            raise Fault("error", f"the answer is longer than {ANSWER_LIMIT} bytes")
        try:
            for event in self._http.receive_data(received):
                self._take(event)
        except ProtocolError as error:
            raise Fault("error", f"the answer is not HTTP/2: {phrase(str(error))}") from error

    def _take(self, event: Event) -> None:
        match event:
            case ResponseReceived(headers=headers) | TrailersReceived(headers=headers):
                self._headers.update(headers)
            case DataReceived(data=data):
                self._message += data
            case StreamEnded():
                self.ended = True
            case StreamReset(error_code=code) if not self.ended:
                raise Fault("reset", f"the call was reset: {_name(ErrorCodes, code)}")
            case ConnectionTerminated(error_code=code) if not self.ended:
                raise Fault("reset", f"the server is going away: {_name(ErrorCodes, code)}")

    def verdict(self) -> str:
        status = phrase(self._headers.get(b":status", b""))
        if status != "200":
            raise Fault("status", f"HTTP status {status}")
        code = self._headers.get(b"grpc-status", b"")
        if not re.fullmatch(rb"[0-9]{1,9}", code):
            raise Fault("error", "the answer is not gRPC: it has no grpc-status")
        if int(code):
            said = phrase(unquote(self._headers.get(b"grpc-message", b"").decode("latin-1")))
            raise Fault("status", f"gRPC status {_name(_Code, int(code))}{said and f': {said}'}")
        state = _state(self._message)
        if state != _Health.SERVING:
            raise Fault("status", _name(_Health, state))
        return "SERVING"


def _name(kind: type[IntEnum], number: int | None) -> str:
    return kind(number).name if number in list(kind) else str(number)


def _request(service: str) -> bytes:
    """HealthCheckRequest in a frame of gRPC: the service is field 1."""
    name = service.encode()
    message = b"\x0a" + _varint(len(name)) + name if name else b""
    return b"\0" + len(message).to_bytes(4, "big") + message


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes((*parts, number))


def _state(frame: bytes) -> int:
    """The status, field 1 of HealthCheckResponse; zero is not written."""
    message = frame[5:]
    if len(frame) < 5 or frame[0] or len(message) != int.from_bytes(frame[1:5], "big"):
        raise Fault("error", f"the answer is not a message of gRPC: {phrase(frame.hex())}")
    if not message:
        return 0
    if len(message) < 2 or message[0] != 8 or message[1] > 127:
        raise Fault("error", f"the answer is not a HealthCheckResponse: {phrase(message.hex())}")
    return message[1]
