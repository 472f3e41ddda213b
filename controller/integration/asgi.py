"""The shutdown flag for ASGI applications, whatever their framework and server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from controller.integration import shutdown
from controller.integration.mark import BODY, ITSELF, MARK, Policy

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HEADS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})
_DENIAL = "websocket.http.response"


class Offline:
    """Middleware, outermost of all: `Offline(app)` or `app.add_middleware(Offline)`.

    Until the flag is set it changes nothing. Afterwards responses carry the mark, and the HTTP/1.1 connections of
    requests without a body end with them; whether new requests are refused says mark.Policy, whose fields are the
    options here. A WebSocket's handshake is a GET; open ones and streams go on until they end or the server ends them.
    """

    def __init__(self, app: App, *, address: str = ITSELF, refuse: bool = True, non_idempotent: bool = False) -> None:
        self.app = app
        self._policy = Policy(address, refuse, non_idempotent)
        self._mark = (MARK.lower().encode(), address.encode("latin-1"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, pass on, or pass on and mark."""
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if shutdown.begun() and self._policy.refuses(scope.get("method", "GET")):
            await (self._refuse if kind == "http" else self._deny)(scope, receive, send)
            return

        async def marking(message: Message) -> None:
            if message["type"] in _HEADS and shutdown.begun():
                close = message["type"] == "http.response.start" and not _has_body(scope)
                message = {**message, "headers": self._marked(scope, message, close)}
            await send(message)

        await self.app(scope, receive, marking)

    def _marked(self, scope: Scope, message: Message, close: bool) -> list[tuple[bytes, bytes]]:
        headers = [*message.get("headers", ()), self._mark]
        if close and scope.get("http_version", "1.1").startswith("1"):
            headers = [header for header in headers if header[0].lower() != b"connection"]
            headers.append((b"connection", b"close"))
        return headers

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
            continue
        await self._answer("http.response", scope, send)

    async def _deny(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        if _DENIAL in scope.get("extensions", {}):
            await self._answer(_DENIAL, scope, send)
        else:
            await send({"type": "websocket.close", "code": 1012})  # the server makes 403 of it

    async def _answer(self, prefix: str, scope: Scope, send: Send) -> None:
        start: Message = {
            "type": f"{prefix}.start",
            "status": 503,
            "headers": [
                (b"content-type", b"text/plain"),
                (b"content-length", str(len(BODY)).encode()),
                (b"retry-after", b"1"),
            ],
        }
        await send({**start, "headers": self._marked(scope, start, close=prefix == "http.response")})
        await send({"type": f"{prefix}.body", "body": BODY})


def _has_body(scope: Scope) -> bool:
    """Whether one may still arrive: closing on it makes the kernel reset the connection, which can cost the answer."""
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
