"""The applications that real gunicorn masters serve in tests; they need nothing but the standard library.

`/` answers at once; `/slow?S` answers after S seconds; `/hang` never does. What arrives is told through the file named
by HEADGATE_TEST_SEEN, one path a line, so that a test can wait until a request is inside.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

_FOR_EVER = 3600.0


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Fast, slow and hanging routes for sync and gthread workers."""
    time.sleep(_seconds(environ["PATH_INFO"], environ.get("QUERY_STRING", "")))
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
    return [b"done"]


async def asgi(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    """The same routes for uvicorn workers."""
    if scope["type"] != "http":
        return
    await asyncio.sleep(_seconds(scope["path"], scope["query_string"].decode()))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"done"})


def _seconds(path: str, query: str) -> float:
    if seen := os.environ.get("HEADGATE_TEST_SEEN"):
        with open(seen, "a") as file:
            file.write(path + "\n")
    return {"/slow": float(query or 1), "/hang": _FOR_EVER}.get(path, 0.0)
