"""A configuration on disk that a Watcher and NginxFiles follow as in the daemon, and how to change it."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from controller.adapters.nginx.files import DiskReader, NginxFiles
from controller.adapters.watch import Watcher
from controller.core.policy import Policy
from controller.ports import ConfigError

HOUR = 3600.0


def upstream(name: str, *ports: int) -> str:
    servers = " ".join(f"server 127.0.0.1:{port};" for port in ports)
    return f'upstream {name} {{ {servers} balancer_by_lua_block {{ require("headgate").balance("{name}") }} }}\n'


def replace(path: Path, content: str) -> None:
    """What a careful writer does: a temporary file beside it, and a rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    temporary.rename(path)


def relink(link: Path, target: str) -> None:
    """Swap a symbolic link in one step."""
    temporary = link.with_name(f"{link.name}.tmp")
    temporary.symlink_to(target)
    temporary.rename(link)


def kernel_watches() -> dict[int, int]:
    """The mask of each inode that this process watches, as the kernel says."""
    found = {}
    for file in Path("/proc/self/fdinfo").iterdir():
        try:
            lines = file.read_text().splitlines()
        except FileNotFoundError:
            continue  # a descriptor that was closed meanwhile
        for line in lines:
            if line.startswith("inotify "):
                values = dict(pair.split(":", 1) for pair in line.split()[1:] if ":" in pair)
                found[int(values["ino"], 16)] = int(values["mask"], 16)
    return found


async def until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


class House:
    """A configuration that includes sites/*.conf, read again at each change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "nginx.conf"
        self.sites = folder / "sites"
        self.app = self.sites / "app.conf"
        self.toml = folder / "etc" / "headgate.toml"
        self.sites.mkdir()
        self.toml.parent.mkdir()
        self.toml.write_text("")
        self.app.write_text(upstream("app", 81))
        self.include("sites/*.conf")
        self.told: list[set[str]] = []
        self.error = ""
        self.ports: dict[str, list[int]] = {}

    def include(self, *patterns: str) -> None:
        self.conf.write_text("events {}\nhttp {\n" + "".join(f"include {each};\n" for each in patterns) + "}\n")

    @asynccontextmanager
    async def watched(self, quiet: float = 0.05, patience: float = 2.0) -> AsyncIterator[Watcher]:
        always = {str(self.toml): DiskReader().digest(str(self.toml))}
        self.watcher = Watcher(self.changed, always, quiet=quiet, patience=patience, rescan=HOUR)
        self.files = NginxFiles(str(self.conf), lambda name: Policy(), on_read=self.watcher.follow)
        self.reading: set[asyncio.Task[None]] = set()
        await self.read()
        self.watcher.start()
        await self.watching(self.toml.parent)
        try:
            yield self.watcher
        finally:
            await self.watcher.close()
            await asyncio.gather(*self.reading)

    def short(self, path: str | Path) -> str:
        return os.path.relpath(path, self.folder)

    def changed(self, paths: frozenset[str]) -> None:
        self.told.append({self.short(path) for path in paths})
        task = asyncio.ensure_future(self.read())
        self.reading.add(task)

    async def read(self) -> None:
        try:
            config = await self.files.read()
        except ConfigError as error:
            self.error = error.message
        else:
            self.error = ""
            self.ports = {each.name: [server.port for server in each.servers] for each in config.upstreams}

    async def watching(self, *directories: Path) -> None:
        await until(
            lambda: kernel_watches().keys() >= {each.stat().st_ino for each in directories}, f"watching {directories}"
        )

    async def reads(self, **ports: list[int]) -> None:
        await until(lambda: self.ports == ports and not self.error, f"{ports}, not {self.ports} {self.error}")

    async def says_nothing_but(self, marker: Path, content: str) -> None:
        """A change that must be told comes after those that must not be."""
        replace(marker, content)
        await until(lambda: self.told, "the marker")
        assert self.told == [{self.short(marker)}]
