"""What all kinds of probes share: where they go, how they connect, and what becomes of a failure."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

from controller.core.model import Server
from controller.ports import Check

ANSWER_LIMIT = 65536
"""Bytes of an answer's head, and of its body, that are read; what comes after them is not looked at."""

_REASONS = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM), "ours"),
    errno.ECONNREFUSED: "refused",
    errno.ENOENT: "refused",  # no such unix socket
    errno.ENOTCONN: "refused",  # a unix socket whose backlog is full
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
}


class Fault(Exception):
    """A probe did not find what it should; `args` are the reason, as `reason_of` gives it, and a phrase."""


class Endpoint(NamedTuple):
    """What makes one probe differ from another. A weight, for one, does not.

    `connection` is one that has been made already, and that the probe goes over.
    """

    ip: str
    port: int
    host: str
    check: Check
    connection: socket.socket | None = None

    @classmethod
    def of(cls, server: Server, check: Check) -> Endpoint:
        """Where this check of this server goes, and as whom it addresses it."""
        host = check.host or ("localhost" if server.ip.startswith("unix:") else server.address)
        return cls(server.ip, check.port or server.port, host, check)

    @property
    def path(self) -> str:
        """The path of the unix socket, empty where it is none."""
        return self.ip.removeprefix("unix:") if self.ip.startswith("unix:") else ""


async def connect(endpoint: Endpoint) -> socket.socket:
    """A connection, non-blocking; the caller closes it."""
    if endpoint.connection:
        return endpoint.connection
    path = endpoint.path
    family = socket.AF_UNIX if path else socket.AF_INET6 if ":" in endpoint.ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await _connected(sock, path or (endpoint.ip, endpoint.port))
    except BaseException:
        sock.close()
        raise
    if not path and sock.getsockname() == sock.getpeername():
        # On loopback the kernel may pick the very port that we call, and nobody but us has answered.
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


async def _connected(sock: socket.socket, address: str | tuple[str, int]) -> None:
    """Connect. On this machine the handshake is over when connect() says that it goes on: who looks spares the loop a
    turn, which costs a third of a probe."""
    try:
        sock.connect(address)
    except BlockingIOError:
        try:
            sock.getpeername()
        except OSError:
            await asyncio.get_running_loop().sock_connect(sock, address)


@asynccontextmanager
async def open_stream(endpoint: Endpoint) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection as a stream, over TLS where the type of the check says so."""
    check = endpoint.check
    tls = _tls_context(check) if check.type in ("https", "grpcs") else None
    name = (check.server_name or urlsplit(f"//{endpoint.host}").hostname) if tls else None
    reader, writer = await asyncio.open_connection(
        sock=await connect(endpoint), ssl=tls, server_hostname=name, limit=ANSWER_LIMIT
    )
    try:
        yield reader, writer
    finally:
        writer.close()  # says goodbye, which may never be answered
        writer.transport.abort()


def closed(begun: bool) -> Fault:
    """The connection was closed before there was a whole answer."""
    return Fault("reset", f"the connection was closed {'within the' if begun else 'without an'} answer")


def reason_of(error: Exception, check: Check) -> tuple[str, str]:
    """What an exception means: a word of events.ProbeResult, or `ours` where it is no fault of the server; a phrase."""
    match error:
        case Fault(args=(reason, said)):
            return str(reason), str(said)
        case TimeoutError():
            return "timeout", f"no answer within {check.timeout:g} s"
        case ssl.SSLError():
            return "tls", phrase(str(error))
        case OSError(errno=int(number)):
            return _REASONS.get(number, "error"), os.strerror(number).lower()
        case ConnectionError():  # asyncio's own, when TLS ends in the middle
            return "reset", "the connection was closed without an answer"
    return "error", phrase(f"{type(error).__name__}: {error}")


def phrase(text: str | bytes, most: int = 120) -> str:
    """The beginning of something foreign, fit for one line of a log."""
    readable = text.decode("latin-1") if isinstance(text, bytes) else text
    return "".join(c if c.isprintable() else "." for c in " ".join(readable.split()))[:most]


def _tls_context(check: Check) -> ssl.SSLContext:
    """How this check speaks TLS. Files that were renewed are read again."""
    files = [file for file in (check.ca_file, check.client_cert, check.client_key) if file]
    try:
        seen = tuple((stat.st_mtime_ns, stat.st_ino) for stat in map(os.stat, files))
        protocol = "h2" if check.type == "grpcs" else "http/1.1"
        return _new_context(check.ca_file, check.client_cert, check.client_key, check.verify, protocol, seen)
    except OSError as error:
        # Ours, not the server's. Certificate and key do not fit for a moment while both are being replaced.
        phrased = phrase(error.strerror or str(error))
        raise Fault("ours", f"{', '.join(files)}: {phrased}; correct the files for TLS") from error


@lru_cache(maxsize=64)
def _new_context(
    ca_file: str | None, cert: str | None, key: str | None, verify: bool, protocol: str, _seen: tuple[object, ...]
) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    if cert:
        context.load_cert_chain(cert, key, password="")  # without one OpenSSL would ask the terminal
    context.set_alpn_protocols([protocol])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
