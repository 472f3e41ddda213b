"""The WSGI twin of app.py, for gunicorn's sync and gthread workers: the same routes, answers and headers."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from controller.integration.wsgi import Offline

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

SERVER = os.environ.get("APP_SERVER", "unnamed")
EVENT_INTERVAL = 0.25


def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer one request."""
    status, media, headers, body = "200 OK", "text/plain; charset=utf-8", [("X-Served-By", SERVER)], b""
    match environ["REQUEST_METHOD"], environ["PATH_INFO"]:
        case "GET", "/fast":
            body = b"fast\n"
        case "GET", "/slow":
            time.sleep(_seconds(environ, 3.0))
            body = b"slow\n"
        case "POST", "/echo":
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            media = "application/octet-stream"
            headers.append(("X-Checksum", hashlib.sha256(body).hexdigest()))
        case "GET", "/stream":
            start_response(status, [("Content-Type", "text/event-stream"), *headers])
            return _events(_seconds(environ, 5.0))
        case "GET", "/healthz":
            body = b"ok\n"
        case "GET", "/who":
            media, body = "application/json", json.dumps({"server": SERVER, "pid": os.getpid()}).encode()
        case _:
            status, body = "404 Not Found", b"not found\n"
    start_response(status, [("Content-Type", media), ("Content-Length", str(len(body))), *headers])
    return [body]


# nginx reads the mark in a response, so nobody needs to be refused (docs/application.md).
app = Offline(answer, refuse=False)


def _seconds(environ: WSGIEnvironment, default: float) -> float:
    return min(60.0, max(0.0, float(parse_qs(environ["QUERY_STRING"]).get("seconds", [default])[0])))


def _events(seconds: float) -> Iterator[bytes]:
    for number in range(round(seconds / EVENT_INTERVAL)):
        yield f"data: {number}\n\n".encode()
        time.sleep(EVENT_INTERVAL)
    yield b"data: done\n\n"
