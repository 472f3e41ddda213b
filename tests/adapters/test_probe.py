"""HttpProber against real servers: well-behaved ones by aiohttp.web, the others by bare sockets."""

import asyncio
import os
import resource
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from aiohttp import web

from controller.adapters.probe import GRID, HttpProber
from controller.core.events import ProbeResult
from controller.core.model import Server
from controller.ports import Check, Target

FAST = Check(interval=0.1, timeout=5)
PATIENT = Check(interval=60, timeout=5)
KEY = ("app", "one")
LONG_BODY = "x" * 200_000

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Probing:
    """A prober and the results that it has emitted."""

    def __init__(self) -> None:
        self.results: list[ProbeResult] = []
        self.began: list[float] = []
        self._news = asyncio.Event()
        self.prober = HttpProber(self._emit)

    def _emit(self, result: ProbeResult) -> None:
        self.results.append(result)
        self.began.append(asyncio.get_running_loop().time() - result.seconds)
        self._news.set()

    async def until(self, count: int) -> list[ProbeResult]:
        async with asyncio.timeout(10):
            while len(self.results) < count:
                self._news.clear()
                await self._news.wait()
        return self.results

    async def once(self, server: Server, check: Check) -> ProbeResult:
        """The first result for this server and check."""
        self.results.clear()
        self.prober.set_targets({KEY: Target(server, check)})
        return (await self.until(1))[0]


@pytest.fixture
async def probing() -> AsyncIterator[Probing]:
    probing = Probing()
    yield probing
    await probing.prober.close()


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
                return web.Response(text="all is well")
            case "/long":
                return web.Response(text=LONG_BODY + "end")
            case "/moved":
                return web.Response(status=302, headers={"Location": "/healthz"})
            case "/empty":
                return web.Response(status=204)
            case "/chunks":
                response = web.StreamResponse()
                response.enable_chunked_encoding()
                await response.prepare(request)
                for part in (b"all is ", b"well"):
                    await response.write(part)
                return response
            case "/endless":
                response = web.StreamResponse()
                await response.prepare(request)
                while True:
                    await response.write(b"data: x\n\n")
                    await asyncio.sleep(0.01)
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


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Web]:
    there = Web(tmp_path)
    await there.runner.setup()
    yield there
    await there.runner.cleanup()


@pytest.fixture
async def raw() -> AsyncIterator[Callable[[Handler], Awaitable[Server]]]:
    """Starts a server that does as the given handler does."""
    servers: list[asyncio.Server] = []

    async def start(handler: Handler) -> Server:
        servers.append(await asyncio.start_server(handler, "127.0.0.1", 0))
        return at(servers[-1].sockets[0].getsockname()[1])

    yield start
    for server in servers:
        server.close()


def answering(text: str) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text.encode())
        writer.close()

    return handle


@pytest.mark.parametrize(
    ("path", "reason", "detail"),
    [
        ("/healthz", "ok", "status 200"),
        ("/chunks", "ok", "status 200"),
        ("/long", "ok", "status 200"),
        ("/empty", "ok", "status 204"),
        ("/moved", "ok", "status 302"),
        ("/ill", "status", "status 503"),
    ],
)
async def test_an_http_check_judges_the_status(
    probing: Probing, site: Web, path: str, reason: str, detail: str
) -> None:
    result = await probing.once(await site.tcp(), replace(PATIENT, path=path))
    assert (result.upstream, result.server, result.ok) == (*KEY, reason == "ok")
    assert (result.reason, result.detail) == (reason, detail)
    assert 0 < result.seconds < PATIENT.timeout


@pytest.mark.parametrize("body", [None, "302"])
async def test_a_redirect_is_judged_and_not_followed(probing: Probing, site: Web, body: str | None) -> None:
    check = replace(PATIENT, path="/moved", statuses=((200, 299),), body=body)
    result = await probing.once(await site.tcp(), check)
    assert (result.reason, result.detail) == ("status", "status 302")
    assert [request.path for request in site.site.requests] == ["/moved"]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/healthz", "is well", "ok"),
        ("/chunks", "is well", "ok"),
        ("/healthz", "is lost", "body"),
        ("/ill", "is lost", "status"),
        ("/long", "end", "body"),
    ],
)
async def test_a_body_check_looks_into_the_first_64_kib(
    probing: Probing, site: Web, path: str, body: str, reason: str
) -> None:
    result = await probing.once(await site.tcp(), replace(PATIENT, path=path, body=body))
    assert result.reason == reason


@pytest.mark.parametrize("body", [None, "well"])
async def test_the_request_names_host_and_agent(probing: Probing, site: Web, body: str | None) -> None:
    server = await site.tcp()
    await probing.once(server, replace(PATIENT, path="/healthz?deep=1", body=body))
    await probing.once(server, replace(PATIENT, host="app.example", body=body))
    first, second = site.site.requests
    assert (first.headers["Host"], first.path_qs) == (server.address, "/healthz?deep=1")
    assert (second.headers["Host"], second.headers["User-Agent"]) == ("app.example", "headgate")


@pytest.mark.parametrize("body", [None, "well"])
async def test_unix_sockets_and_ipv6_are_probed(probing: Probing, site: Web, body: str | None) -> None:
    check = replace(PATIENT, body=body)
    assert (await probing.once(await site.unix(), check)).reason == "ok"
    assert (await probing.once(await site.tcp(host="::1"), check)).reason == "ok"


async def test_a_tcp_check_connects_and_no_more(probing: Probing, site: Web) -> None:
    check = replace(PATIENT, type="tcp")
    for server in (await site.tcp(), await site.unix()):
        result = await probing.once(server, check)
        assert (result.reason, result.detail) == ("ok", "connected")
    assert site.site.requests == []
    assert (await probing.once(at(free_port()), check)).reason == "refused"


async def test_a_check_may_have_a_port_of_its_own(probing: Probing, site: Web) -> None:
    other = await site.tcp()
    assert (await probing.once(at(free_port()), replace(PATIENT, port=other.port))).reason == "ok"


@pytest.mark.parametrize("body", [None, "x"])
class TestFaults:
    """The same words from both ways of probing."""

    async def test_a_port_where_nobody_listens_refuses(self, probing: Probing, body: str | None) -> None:
        result = await probing.once(at(free_port()), replace(PATIENT, body=body))
        assert (result.ok, result.reason, result.detail) == (False, "refused", "connection refused")

    async def test_a_unix_socket_that_is_not_there_refuses(
        self, probing: Probing, tmp_path: Path, body: str | None
    ) -> None:
        server = Server("unix:x", "unix:x", f"unix:{tmp_path}/gone", 0)
        assert (await probing.once(server, replace(PATIENT, body=body))).reason == "refused"

    async def test_a_server_that_hangs_times_out(self, probing: Probing, body: str | None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            result = await probing.once(at(listener.getsockname()[1]), replace(PATIENT, timeout=0.2, body=body))
        assert (result.reason, result.detail) == ("timeout", "no answer within 0.2 s")
        assert result.seconds >= 0.2

    async def test_an_endless_stream_is_cut_by_the_timeout(self, probing: Probing, site: Web, body: str | None) -> None:
        check = replace(PATIENT, path="/endless", timeout=0.2, body=body)
        assert (await probing.once(await site.tcp(), check)).reason == "timeout"

    async def test_a_reset_is_told_from_a_refusal(
        self, probing: Probing, raw: Callable[[Handler], Awaitable[Server]], body: str | None
    ) -> None:
        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()

        assert (await probing.once(await raw(reset), replace(PATIENT, body=body))).reason == "reset"

    @pytest.mark.parametrize("answer", ["", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"])
    async def test_a_connection_closed_too_early_is_a_reset(
        self, probing: Probing, raw: Callable[[Handler], Awaitable[Server]], answer: str, body: str | None
    ) -> None:
        result = await probing.once(await raw(answering(answer)), replace(PATIENT, body=body))
        assert result.reason == "reset"
        assert ("within the answer" if answer else "without an answer") in result.detail

    @pytest.mark.parametrize("answer", ["SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP/1.1 abc\r\n\r\n", "\0\x1b[31m\r\n\r\n"])
    async def test_garbage_is_an_error_with_a_phrase_of_one_printable_line(
        self, probing: Probing, raw: Callable[[Handler], Awaitable[Server]], answer: str, body: str | None
    ) -> None:
        result = await probing.once(await raw(answering(answer)), replace(PATIENT, body=body))
        assert result.reason == "error"
        assert result.detail.startswith("the answer is not HTTP: ")
        assert result.detail.isprintable()

    async def test_an_interim_answer_is_passed_over(
        self, probing: Probing, raw: Callable[[Handler], Awaitable[Server]], body: str | None
    ) -> None:
        answer = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n\r\nx"
        assert (await probing.once(await raw(answering(answer)), replace(PATIENT, body=body))).detail == "status 200"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for app.example, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "app.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=app.example -addext"
    made = subprocess.run(
        [*command.split(), "subjectAltName=DNS:app.example", "-keyout", "-", "-out", "-"],
        check=True,
        capture_output=True,
    )
    path.write_bytes(made.stdout)
    return path


async def test_an_https_check_verifies_name_and_authority(probing: Probing, site: Web, certificate: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    names: list[str | None] = []
    tls.sni_callback = lambda _, name, __: names.append(name)
    server = await site.tcp(tls)
    https = replace(PATIENT, type="https")
    known = replace(https, ca_file=str(certificate))

    for check in (replace(known, server_name="app.example"), replace(known, host="app.example:8443", body="well")):
        result = await probing.once(server, check)
        assert (result.reason, result.detail) == ("ok", "status 200"), result
        assert names[-1] == "app.example"
    for check in (known, replace(known, server_name="other.example"), replace(https, server_name="app.example")):
        result = await probing.once(server, check)
        assert (result.ok, result.reason) == (False, "tls")
    assert (await probing.once(server, replace(https, verify=False))).ok
    assert (await probing.once(await site.tcp(), https)).reason == "tls"


async def test_probes_follow_each_other_at_the_interval(probing: Probing, site: Web) -> None:
    probing.prober.set_targets({KEY: Target(await site.tcp(), replace(FAST, interval=0.4, jitter=0.0))})
    assert all(result.ok for result in await probing.until(4))
    second, third, fourth = probing.began[1:4]  # the second one comes early
    assert min(third - second, fourth - third) >= 0.4 - GRID[0]


async def test_a_server_that_changes_in_weight_only_keeps_its_rhythm(probing: Probing, site: Web) -> None:
    server = await site.tcp()
    await probing.once(server, PATIENT)
    probing.prober.set_targets({KEY: Target(replace(server, weight=9, down=True), PATIENT)})
    probing.prober.set_targets(
        {KEY: Target(server, PATIENT), ("app", "two"): Target(server, PATIENT)},
    )
    await probing.until(2)
    assert [result.server for result in probing.results] == ["one", "two"]
    probing.prober.set_targets({KEY: Target(server, replace(PATIENT, path="/ill"))})
    assert (await probing.until(3))[2].reason == "status"


async def test_a_probe_under_way_that_is_dropped_says_nothing(
    probing: Probing, raw: Callable[[Handler], Awaitable[Server]]
) -> None:
    asked: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.put_nowait(writer)

    probing.prober.set_targets({KEY: Target(await raw(hold), PATIENT)})
    first = await asked.get()
    probing.prober.probe_now(*KEY)
    second = await asked.get()
    first.close()
    second.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert [result.reason for result in await probing.until(1)] == ["ok"]
    second.close()
    probing.prober.probe_now(*KEY)
    third = await asked.get()
    await probing.prober.close()
    third.close()
    assert len(probing.results) == 1


async def test_probing_what_is_no_target_does_nothing(probing: Probing) -> None:
    probing.prober.probe_now("app", "nobody")
    await probing.prober.close()
    assert probing.results == []


async def test_want_of_file_descriptors_is_not_the_servers_fault(
    probing: Probing, site: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await site.tcp()
    logged: asyncio.Queue[str] = asyncio.Queue()
    log = Mock(warning=lambda event, **values: logged.put_nowait(values["error"]))
    monkeypatch.setattr("controller.adapters.probe._log", log)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_free = os.dup(0)
    os.close(next_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, limits[1]))
        probing.prober.set_targets({KEY: Target(server, FAST)})
        async with asyncio.timeout(5):
            assert await logged.get() == "too many open files"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (await probing.until(1))[0].ok
