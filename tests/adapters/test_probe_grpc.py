"""grpc and grpcs checks against a real gRPC server with the standard health service."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import RequestReceived

from controller.core.model import Server
from tests.adapters.probed import PATIENT, Handler, Probing, Raw, at, make_certificate

GRPC = replace(PATIENT, type="grpc")
LONG_NAME = "a" * 300
STATES = health_pb2.HealthCheckResponse.ServingStatus


class Backend:
    """A gRPC server; `asked` are the services that it was asked for, with the caller's metadata."""

    def __init__(self, healthy: bool = True) -> None:
        self.server = grpc.server(ThreadPoolExecutor(2))
        self.health = health.HealthServicer()
        if healthy:
            health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)

    def listen(self, credentials: grpc.ServerCredentials | None = None, address: str = "127.0.0.1:0") -> Server:
        if credentials:
            port = self.server.add_secure_port(address, credentials)
        else:
            port = self.server.add_insecure_port(address)
        self.server.start()
        return at(port)


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    backend = Backend()
    yield backend
    await asyncio.to_thread(backend.server.stop(0).wait)


@pytest.mark.parametrize(
    ("service", "state", "reason", "detail"),
    [
        ("", STATES.SERVING, "ok", "SERVING"),
        ("shop.Cart", STATES.SERVING, "ok", "SERVING"),
        (LONG_NAME, STATES.SERVING, "ok", "SERVING"),
        ("shop.Cart", STATES.NOT_SERVING, "status", "NOT_SERVING"),
        ("shop.Cart", STATES.UNKNOWN, "status", "UNKNOWN"),
        ("shop.Cart", STATES.SERVICE_UNKNOWN, "status", "SERVICE_UNKNOWN"),
        ("shop.Cart", None, "status", "gRPC status NOT_FOUND"),
    ],
)
async def test_only_a_service_that_is_serving_is_well(
    probing: Probing, backend: Backend, service: str, state: STATES | None, reason: str, detail: str
) -> None:
    if state is not None:
        backend.health.set(service, state)
    result = await probing.once(backend.listen(), replace(GRPC, service=service))
    assert (result.ok, result.reason, result.detail) == (reason == "ok", reason, detail)


async def test_a_server_without_the_health_service_is_told_apart(probing: Probing) -> None:
    backend = Backend(healthy=False)
    result = await probing.once(backend.listen(), GRPC)
    assert (result.reason, result.detail) == ("status", "gRPC status UNIMPLEMENTED: Method not found!")
    await asyncio.to_thread(backend.server.stop(0).wait)


async def test_a_unix_socket_is_asked_too(probing: Probing, backend: Backend, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/grpc.sock"
    backend.listen(address=address)
    assert (await probing.once(Server(address, address, address, 0), GRPC)).detail == "SERVING"


async def test_an_http_check_of_a_grpc_server_says_what_is_wrong(probing: Probing, backend: Backend) -> None:
    result = await probing.once(backend.listen(), PATIENT)
    assert (result.ok, result.reason) == (False, "error")
    assert result.detail.startswith("the answer is not HTTP: ")


async def test_grpcs_verifies_the_server_and_shows_a_certificate(
    probing: Probing, backend: Backend, certificate: Path, tmp_path: Path
) -> None:
    client = await asyncio.to_thread(make_certificate, tmp_path / "client.pem", "edge.example")
    mine, theirs = await asyncio.gather(*(asyncio.to_thread(path.read_bytes) for path in (certificate, client)))
    server = backend.listen(
        grpc.ssl_server_credentials([(mine, mine)], root_certificates=theirs, require_client_auth=True)
    )
    known = replace(GRPC, type="grpcs", ca_file=str(certificate), server_name="app.example", client_cert=str(client))
    assert (await probing.once(server, known)).detail == "SERVING"
    for check in (replace(known, server_name="other.example"), replace(known, ca_file=None)):
        assert (await probing.once(server, check)).reason == "tls"
    for check in (replace(known, client_cert=None), replace(known, client_cert=str(certificate)), GRPC):
        assert (await probing.once(server, check)).reason == "reset"  # it closes without a word


def call(*answer: tuple[str, object]) -> Handler:
    """An HTTP/2 server that answers the first request with these calls of h2."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = H2Connection(H2Configuration(client_side=False))
        http.initiate_connection()
        events: list[object] = []
        while not any(isinstance(event, RequestReceived) for event in events):
            events = list(http.receive_data(await reader.read(65536)))
        for method, arguments in answer:
            getattr(http, method)(**arguments)
        writer.write(http.data_to_send())
        await writer.drain()
        await reader.read()

    return handle


def headers(end: bool = False, **fields: str) -> tuple[str, object]:
    named = [(name.replace("_", "-").replace("-status-", ":status"), value) for name, value in fields.items()]
    return "send_headers", {"stream_id": 1, "headers": named, "end_stream": end}


def data(text: bytes, end: bool = False) -> tuple[str, object]:
    return "send_data", {"stream_id": 1, "data": text, "end_stream": end}


OK = headers(_status_="200", content_type="application/grpc")
DONE = headers(end=True, grpc_status="0")


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        ([OK, data(b"\0\0\0\0\2\x08\1"), DONE], "ok", "SERVING"),
        ([OK, data(b"\0\0\0\0\0"), DONE], "status", "UNKNOWN"),
        ([OK, data(b"\0\0\0\0\2\x08\x09"), DONE], "status", "9"),
        ([headers(_status_="502", end=True)], "status", "HTTP status 502"),
        (
            [headers(_status_="200", grpc_status="14", grpc_message="no%20one", end=True)],
            "status",
            "gRPC status UNAVAILABLE: no one",
        ),
        ([headers(_status_="200", grpc_status="99", end=True)], "status", "gRPC status 99"),
        ([OK, data(b"<html>", end=True)], "error", "the answer is not gRPC: it has no grpc-status"),
        ([OK, data(b"<html>"), DONE], "error", "the answer is not a message of gRPC: 3c68746d6c3e"),
        ([OK, DONE], "error", "the answer is not a message of gRPC: "),
        ([OK, data(b"\1\0\0\0\2\x08\1"), DONE], "error", "the answer is not a message of gRPC: 01000000020801"),
        ([OK, data(b"\0\0\0\0\2\x12\1"), DONE], "error", "the answer is not a HealthCheckResponse: 1201"),
        (
            [("reset_stream", {"stream_id": 1, "error_code": ErrorCodes.REFUSED_STREAM})],
            "reset",
            "the call was reset: REFUSED_STREAM",
        ),
        (
            [("close_connection", {"error_code": ErrorCodes.ENHANCE_YOUR_CALM})],
            "reset",
            "the server is going away: ENHANCE_YOUR_CALM",
        ),
    ],
)
async def test_each_answer_has_its_meaning(
    probing: Probing, raw: Raw, answer: list[tuple[str, object]], reason: str, detail: str
) -> None:
    result = await probing.once(await raw.start(call(*answer)), GRPC)
    assert (result.reason, result.detail) == (reason, detail)
