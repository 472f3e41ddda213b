"""https checks against real TLS servers: names, authorities, client certificates, and files that are renewed."""

import asyncio
import shutil
import ssl
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from structlog.testing import capture_logs

from controller.core.model import Server
from controller.ports import Target
from tests.adapters.probed import FAST, KEY, PATIENT, Probing, Web, at, make_certificate, tls_server

HTTPS = replace(PATIENT, type="https", server_name="app.example")


async def test_an_https_check_verifies_name_and_authority(probing: Probing, site: Web, certificate: Path) -> None:
    tls = tls_server(certificate)
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


@pytest.fixture
def edge(tmp_path: Path) -> Path:
    """The certificate that we show."""
    return make_certificate(tmp_path / "edge.pem", "edge.example")


def split(pem: Path) -> tuple[str, str]:
    """Key and certificate of a file that has both."""
    text = pem.read_text()
    begin = text.index("-----BEGIN CERTIFICATE")
    return text[:begin], text[begin:]


class Strict(ThreadingHTTPServer):
    """An HTTPS server that demands a certificate and says, by an alert, what it thinks of it.

    It speaks TLS 1.2, where that is said within the handshake. In 1.3 it comes after it, and the server's end of the
    connection, which is a reset, may overtake it.
    """

    daemon_threads = True

    def __init__(self, certificate: Path, clients: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Well)
        tls = tls_server(certificate, clients)
        tls.maximum_version = ssl.TLSVersion.TLSv1_2
        self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: object, address: object) -> None:
        """Nothing is printed of a handshake that failed, as it should."""


class _Well(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def strict(certificate: Path, edge: Path) -> Iterator[Server]:
    with Strict(certificate, edge) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield at(server.server_address[1])
        server.shutdown()
        thread.join()


async def test_a_server_that_demands_a_certificate_gets_ours(
    probing: Probing, site: Web, strict: Server, certificate: Path, edge: Path, tmp_path: Path
) -> None:
    known = replace(HTTPS, ca_file=str(certificate))
    assert (await probing.once(strict, replace(known, client_cert=str(edge)))).ok

    for name, text in zip(("key", "cert"), split(edge), strict=True):
        await asyncio.to_thread((tmp_path / name).write_text, text)
    cert, key = f"{tmp_path}/cert", f"{tmp_path}/key"
    assert (await probing.once(strict, replace(known, client_cert=cert, client_key=key))).ok

    for shown in (None, str(certificate)):
        result = await probing.once(strict, replace(known, client_cert=shown))
        assert (result.ok, result.reason) == (False, "tls")
        result = await probing.once(await site.tcp(tls_server(certificate, edge)), replace(known, client_cert=shown))
        assert (result.ok, result.reason in ("tls", "reset")) == (False, True)


async def test_renewed_files_are_read_again(
    probing: Probing, strict: Server, certificate: Path, edge: Path, tmp_path: Path
) -> None:
    shown, trusted = tmp_path / "shown.pem", tmp_path / "trusted.pem"
    for path in (shown, trusted):
        await asyncio.to_thread(make_certificate, path, "old.example")
    check = replace(FAST, type="https", server_name="app.example", ca_file=str(trusted), client_cert=str(shown))

    probing.prober.set_targets({KEY: Target(strict, check)})
    assert "CERTIFICATE_VERIFY_FAILED" in (await probing.until(1))[0].detail
    shutil.copy(certificate, trusted)
    await probing.when(lambda: "VERIFY_FAILED" not in probing.results[-1].detail)
    assert (probing.results[-1].ok, probing.results[-1].reason) == (False, "tls")  # the server knows another client
    shutil.copy(edge, shown)
    await probing.when(lambda: probing.results[-1].ok)


async def test_files_that_cannot_be_used_are_our_trouble_and_said_once(
    probing: Probing, site: Web, certificate: Path, edge: Path, tmp_path: Path
) -> None:
    server = await site.tcp(tls_server(certificate))
    mine = tmp_path / "mine.pem"
    check = replace(FAST, type="https", ca_file=str(mine), client_cert=str(edge), server_name="app.example")
    with capture_logs() as lines:
        probing.prober.set_targets(
            {KEY: Target(server, check), ("app", "other"): Target(server, replace(FAST, type="tcp"))}
        )
        await probing.until(5)
        shutil.copy(certificate, mine)
        await probing.when(lambda: any(result.server == "one" for result in probing.results))
    assert [result.reason for result in probing.results if result.server == "one"] == ["ok"]
    bad, good = lines
    assert bad["log_level"] == "warning"
    assert bad["error"] == f"{mine}, {edge}: No such file or directory; correct the files for TLS"
    assert good["log_level"] == "info"
