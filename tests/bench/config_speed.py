"""Reading a 3 MB configuration of 10,000 server blocks, as one file and as 1,000: at start, and after an edit.

python -m tests.bench.config_speed
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from controller.adapters.nginx.files import NginxFiles
from controller.adapters.watch import QUIET, Watcher
from controller.client import Client
from controller.core.policy import Policy
from controller.demo.stage import until
from controller.errors import HeadgateError

BLOCKS = 10_000
UPSTREAM = (
    "upstream app {{ server 127.0.0.1:{}; server 127.0.0.1:8002;"
    ' balancer_by_lua_block {{ require("headgate").balance("app") }} }}\n'
)
SITE = """server {{
    listen 127.0.0.1:{};
    server_name site{}.example.org www.site{}.example.org;
    root /srv/www/site{};  # its files
    access_log "/var/log/nginx/site{}.log" combined;
    location / {{ proxy_pass http://app; proxy_set_header Host $host; }}
    location ~ \\.php$ {{ return 404; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds; `parsed` counts files. `daemon`: from its start until its API shows the upstream; `memory` is its MB.

    `edit`: from an edit of one file until it is taken up, less the wait for quiet (watch.QUIET). `again`: reading all
    files when nothing changed.
    """

    files: int
    size: int
    first: float
    again: float
    edit: float
    parsed: int
    daemon: float
    memory: float


def generate(folder: Path, files: int) -> int:
    """Write nginx.conf and the sites, BLOCKS in all, into so many files; how many bytes it is."""
    (folder / "sites").mkdir(parents=True)
    (folder / "nginx.conf").write_text("events {}\nhttp { include upstream.conf; include sites/*.conf; }\n")
    (folder / "upstream.conf").write_text(UPSTREAM.format(8001))
    share = BLOCKS // files
    for file in range(files):
        sites = (SITE.format(10_000 + n, *[n] * 4) for n in range(file * share, (file + 1) * share))
        (folder / "sites" / f"{file:04}.conf").write_text("".join(sites))
    return sum(each.stat().st_size for each in folder.rglob("*.conf"))


async def _read(folder: Path) -> tuple[float, float, float, int]:
    """Seconds of the first reading, of one more, and of an edit's way; files that the edit made us parse."""
    told = asyncio.Event()
    watcher = Watcher(lambda paths: told.set())
    files = NginxFiles(str(folder / "nginx.conf"), lambda name: Policy(), on_read=watcher.follow)
    began = time.perf_counter()
    await files.read()
    first = time.perf_counter() - began
    began = time.perf_counter()
    await files.read()
    again = time.perf_counter() - began
    watcher.start()
    parsed = files.parsed
    await asyncio.to_thread((folder / "upstream.conf").write_text, UPSTREAM.format(9001))
    began = time.perf_counter()
    async with asyncio.timeout(60):
        await told.wait()
    config = await files.read()
    edit = time.perf_counter() - began - QUIET
    await watcher.close()
    assert config.upstreams[0].servers[0].port == 9001
    return first, again, edit, files.parsed - parsed


def _daemon(folder: Path) -> tuple[float, float]:
    """Seconds until the daemon shows what it read, and its memory in MB."""
    socket, log, settings = folder / "api.sock", folder / "headgate.log", folder / "headgate.toml"
    settings.write_text(
        f"[nginx]\nconf = {json.dumps(str(folder / 'nginx.conf'))}\ncontrol = {json.dumps(str(folder / 'none.sock'))}\n"
        f"snapshot = {json.dumps(str(folder / 'table.json'))}\n[api]\nsocket = {json.dumps(str(socket))}\n"
        f'listen = ""\n[store]\nurl = "sqlite:///{folder}/state.db"\n'
    )
    command = [sys.executable, "-m", "controller", "--config", str(settings), "run"]
    began = time.perf_counter()
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as daemon:
        try:
            until(lambda: _shows(socket), "the upstream", 60, log)
            return time.perf_counter() - began, psutil.Process(daemon.pid).memory_info().rss / 1e6
        finally:
            daemon.terminate()


def _shows(socket: Path) -> bool:
    try:
        return bool(Client(str(socket)).status()["upstreams"])
    except HeadgateError:
        return False


def measure(files: int) -> Figures:
    """Generate a tree of so many files, and read it."""
    with tempfile.TemporaryDirectory(prefix="headgate-") as name:
        folder = Path(name)
        size = generate(folder, files)
        first, again, edit, parsed = asyncio.run(_read(folder))
        return Figures(files, size, first, again, edit, parsed, *_daemon(folder))


if __name__ == "__main__":
    for count in (1, 1000):
        print(measure(count))
