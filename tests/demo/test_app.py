"""The demo's two applications under real gunicorn workers: they must be the same application."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from controller.demo.load import check
from controller.demo.stage import WORKERS, free_ports, tail


@dataclass
class Running:
    url: str
    process: subprocess.Popen[bytes]


@pytest.fixture(params=sorted(WORKERS))
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    log = tmp_path / "log"
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--no-control-socket"]
    command += ["--graceful-timeout", "9", "--error-logfile", str(log), *WORKERS[request.param]]
    process = subprocess.Popen(command, env={**os.environ, "APP_SERVER": "the name"}, cwd=tmp_path)
    try:
        yield Running(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(20)
        print(tail(log))


async def up(session: aiohttp.ClientSession, app: Running) -> None:
    async with asyncio.timeout(30):
        while app.process.poll() is None:
            try:
                async with session.get(f"{app.url}/healthz") as answer:
                    assert await answer.text() == "ok\n"
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.05)
    raise AssertionError("gunicorn has ended")


async def test_every_worker_class_answers_alike_and_lets_a_stream_end_after_term(app: Running) -> None:
    async with aiohttp.ClientSession() as session:
        await up(session, app)
        for kind, path in (("fast", "/fast"), ("slow", "/slow?seconds=0.1"), ("stream", "/stream?seconds=0.5")):
            async with session.get(app.url + path) as answer:
                assert (answer.status, answer.headers["X-Served-By"]) == (200, "the name")
                check(kind, b"", {}, await answer.read())
        body = os.urandom(40_000)
        async with session.post(f"{app.url}/echo", data=body) as answer:
            assert await answer.read() == body
            assert answer.headers["X-Checksum"] == hashlib.sha256(body).hexdigest()
        async with session.get(f"{app.url}/who") as answer:
            who = await answer.json()
            assert who["server"] == "the name"
            assert who["pid"] not in (app.process.pid, os.getpid())
        async with session.get(f"{app.url}/nothing") as answer:
            assert answer.status == 404

        async with session.get(f"{app.url}/stream?seconds=3") as answer:
            first = await answer.content.readuntil(b"\n\n")
            app.process.send_signal(signal.SIGTERM)
            check("stream", b"", {}, first + await answer.read())
        assert await asyncio.to_thread(app.process.wait, 10) == 0
