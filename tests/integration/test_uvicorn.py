"""uvicorn without gunicorn: TERM sets the flag before uvicorn's own handler runs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.gunicorn import Gunicorns, eventually, free_port

APP = """
from controller.integration import shutdown
from controller.integration.asgi import Offline
from tests.support import apps

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        assert (await receive())["type"] == "lifespan.startup"
        shutdown.begin_on_term()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    else:
        await apps.asgi(scope, receive, send)

app = Offline(app)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Gunicorns]:
    programs = Gunicorns(tmp_path)
    yield programs
    programs.close()


async def test_a_response_that_begins_after_term_is_marked_and_uvicorn_ends_as_ever(programs: Gunicorns) -> None:
    (programs.directory / "leaving.py").write_text(APP)
    port = free_port()
    uvicorn = programs.run(sys.executable, "-m", "uvicorn", "leaving:app", "--port", str(port), "--lifespan", "on")
    await eventually(lambda: "Uvicorn running" in programs.printed(), "uvicorn")
    async with aiohttp.ClientSession() as session:
        slow = asyncio.create_task(session.get(f"http://127.0.0.1:{port}/slow?1"))
        await programs.inside("/slow")
        uvicorn.terminate()
        answer = await slow
        assert (answer.status, await answer.text()) == (200, "done")
        assert answer.headers["X-Headgate-Offline"] == "1"
    await asyncio.to_thread(uvicorn.wait, 10)
    assert "Application shutdown complete" in programs.printed()
