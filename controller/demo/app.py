"""The demo's FastAPI application. WSGI twin: wsgi.py."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse

from controller.integration.asgi import Offline

SERVER = os.environ.get("APP_SERVER", "unnamed")
EVENT_INTERVAL = 0.25

Seconds = Annotated[float, Query(ge=0, le=60)]


class Named:
    """ASGI middleware that puts `X-Served-By: <APP_SERVER>` on every response, so that a client can count shares."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the call on, with the header added."""

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-served-by", SERVER.encode()))
            await send(message)

        await self.app(scope, receive, named)


app = FastAPI(title="Headgate demo", docs_url=None, redoc_url=None, openapi_url=None)
app.add_middleware(Named)
# nginx reads the mark in a response, so nobody needs to be refused (docs/application.md).
app.add_middleware(Offline, refuse=False)


@app.get("/fast")
async def fast() -> Response:
    """Answer at once."""
    return Response("fast\n", media_type="text/plain")


@app.get("/slow")
async def slow(seconds: Seconds = 3.0) -> Response:
    """Answer after some seconds."""
    await asyncio.sleep(seconds)
    return Response("slow\n", media_type="text/plain")


@app.post("/echo")
async def echo(request: Request) -> Response:
    """Give the body back, with its SHA-256 in `X-Checksum`."""
    body = await request.body()
    checksum = hashlib.sha256(body).hexdigest()
    return Response(body, media_type="application/octet-stream", headers={"X-Checksum": checksum})


@app.get("/stream")
async def stream(seconds: Seconds = 5.0) -> StreamingResponse:
    """Send an event each 250 ms, numbered from 0, and `done` as the last one."""

    async def events() -> AsyncIterator[str]:
        for number in range(round(seconds / EVENT_INTERVAL)):
            yield f"data: {number}\n\n"
            await asyncio.sleep(EVENT_INTERVAL)
        yield "data: done\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.get("/healthz")
async def healthz() -> Response:
    """What Headgate's probes ask for."""
    return Response("ok\n", media_type="text/plain")


@app.get("/who")
async def who() -> dict[str, Any]:
    """Say which server and which worker process this is."""
    return {"server": SERVER, "pid": os.getpid()}
