"""Both middlewares by themselves: what they change, and that they change nothing before the flag."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from controller.integration import asgi, wsgi
from controller.integration.mark import BODY

Flag = Callable[[], None]
MARK = (b"x-headgate-offline", b"1")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Gives its body back, or greets; `scope["during"]` is called before the answer begins."""
    scope.get("during", lambda: None)()
    if scope["type"] == "http":
        message = await receive()
        headers = [(b"x-own", b"1"), (b"Connection", b"keep-alive")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": message["body"]})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
    else:
        await send({"type": f"{scope['type']}.startup.complete"})


async def call(app: Any, scope: dict[str, Any], *arriving: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What was sent, and what was left to be received."""
    sent: list[Any] = []
    left = list(arriving or [{"type": "http.request", "body": b"hello"}])

    async def receive() -> Any:
        return left.pop(0) if left else await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        sent.append(message)

    async with asyncio.timeout(5):
        await app(scope, receive, send)
    return sent, left


def http(method: str = "GET", version: str = "1.1", **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": method, "http_version": version, "headers": [], **more}


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan"])
async def test_before_the_flag_asgi_messages_go_through_as_they_are(flag: Flag, kind: str) -> None:
    scope = http() | {"type": kind}
    assert await call(asgi.Offline(app), scope) == await call(app, scope)


async def test_a_response_that_begins_after_the_flag_is_marked_and_ends_its_connection(flag: Flag) -> None:
    (start, body), _ = await call(asgi.Offline(app), http(during=flag))
    assert start["headers"] == [(b"x-own", b"1"), MARK, (b"connection", b"close")]
    assert body["body"] == b"hello"


@pytest.mark.parametrize("name", [b"content-length", b"transfer-encoding"])
async def test_a_connection_on_which_a_body_may_still_arrive_is_left_open(flag: Flag, name: bytes) -> None:
    scope = http("POST", headers=[(b"host", b"x"), (name, b"5")], during=flag)
    (start, _), _ = await call(asgi.Offline(app), scope)
    assert start["headers"] == [(b"x-own", b"1"), (b"Connection", b"keep-alive"), MARK]


async def test_http_2_has_no_connection_header(flag: Flag) -> None:
    (start, _), _ = await call(asgi.Offline(app, address="127.0.0.1:8001"), http(version="2", during=flag))
    assert (b"x-headgate-offline", b"127.0.0.1:8001") in start["headers"]
    assert (b"connection", b"close") not in start["headers"]


async def test_a_request_that_begins_after_the_flag_is_refused_once_its_body_is_read(flag: Flag) -> None:
    flag()
    parts = [{"type": "http.request", "body": b"x" * 9, "more_body": more} for more in (True, True, False)]
    (start, body), left = await call(asgi.Offline(app), http("PUT"), *parts)
    assert left == []
    assert start["status"] == 503
    assert {MARK, (b"retry-after", b"1"), (b"connection", b"close")} < set(start["headers"])
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_not_waited_for(flag: Flag) -> None:
    flag()
    parts = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]
    (start, _), _ = await call(asgi.Offline(app), http("PUT"), *parts)
    assert start["status"] == 503


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, {"GET", "HEAD", "PUT", "DELETE"}),
        ({"non_idempotent": True}, {"GET", "HEAD", "PUT", "DELETE", "POST", "PATCH", "LOCK"}),
        ({"refuse": False}, set()),
        ({"refuse": False, "non_idempotent": True}, set()),
    ],
)
async def test_what_nginx_would_not_send_again_is_answered_unless_told_otherwise(
    flag: Flag, options: dict[str, bool], refused: set[str]
) -> None:
    flag()
    for method in ("GET", "HEAD", "PUT", "DELETE", "POST", "PATCH", "LOCK"):
        (start, _), _ = await call(asgi.Offline(app, **options), http(method))
        assert (start["status"], MARK in start["headers"]) == (503 if method in refused else 200, True)
        assert call_wsgi(wsgi.Offline(hello, **options), method)[0][:3] == str(start["status"])


async def test_a_new_websocket_is_denied_as_a_get_is_where_the_server_can_say_so(flag: Flag) -> None:
    flag()
    scope = {"type": "websocket", "http_version": "1.1", "extensions": {"websocket.http.response": {}}}
    (start, body), _ = await call(asgi.Offline(app), scope, {"type": "websocket.connect"})
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 503)
    assert MARK in start["headers"]
    assert body == {"type": "websocket.http.response.body", "body": BODY}
    sent, _ = await call(asgi.Offline(app), {"type": "websocket"}, {"type": "websocket.connect"})
    assert sent == [{"type": "websocket.close", "code": 1012}]


async def test_a_websocket_that_is_accepted_after_the_flag_is_marked(flag: Flag) -> None:
    scope = {"type": "websocket", "http_version": "1.1", "during": flag}
    sent, _ = await call(asgi.Offline(app), scope, {"type": "websocket.connect"})
    assert sent == [{"type": "websocket.accept", "headers": [MARK]}]


def hello(environ: Any, start_response: Any) -> list[bytes]:
    environ.get("test.during", lambda: None)()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"] * (environ["REQUEST_METHOD"] != "HEAD")


def call_wsgi(app: Any, method: str = "GET", /, **environ: Any) -> tuple[str, dict[str, str], bytes]:
    """Status, headers and body, judged by the standard library's validator."""
    begun: list[Any] = []
    environ |= {"REQUEST_METHOD": method, "QUERY_STRING": ""}
    setup_testing_defaults(environ)

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
        begun.append((status, dict(headers)))
        return lambda _: None

    answer: Any = validator(app)(environ, start_response)
    body = b"".join(answer)
    answer.close()
    ((status, headers),) = begun
    return status, headers, body


def test_before_the_flag_wsgi_answers_are_what_they_are(flag: Flag) -> None:
    assert call_wsgi(wsgi.Offline(hello)) == call_wsgi(hello)


def test_a_wsgi_response_that_begins_after_the_flag_is_marked(flag: Flag) -> None:
    status, headers, body = call_wsgi(wsgi.Offline(hello, address="127.0.0.1:8001"), **{"test.during": flag})
    assert (status, body) == ("200 OK", b"hello")
    assert headers == {"Content-Type": "text/plain", "X-Headgate-Offline": "127.0.0.1:8001"}


@pytest.mark.parametrize("length", ["3", None])
def test_a_wsgi_request_after_the_flag_is_refused_once_its_body_is_read(flag: Flag, length: str | None) -> None:
    flag()
    arriving = io.BytesIO(b"abcdef")
    more = {"CONTENT_LENGTH": length} if length else {"wsgi.input_terminated": True}
    status, headers, body = call_wsgi(wsgi.Offline(hello), "PUT", **{"wsgi.input": arriving, **more})
    assert status == "503 Service Unavailable"
    assert (headers["X-Headgate-Offline"], headers["Retry-After"]) == ("1", "1")
    assert int(headers["Content-Length"]) == len(body)
    assert arriving.read() == (b"def" if length else b"")


def test_an_error_after_the_response_began_reaches_the_server_s_start_response(flag: Flag) -> None:
    seen: list[Any] = []

    def failing(environ: Any, start_response: Any) -> list[bytes]:
        start_response("500 Oops", [], ("the", "error", None))
        return []

    wsgi.Offline(failing)({"REQUEST_METHOD": "GET"}, lambda *arguments: seen.append(arguments))  # type: ignore[arg-type,return-value]
    assert seen == [("500 Oops", [], ("the", "error", None))]
