"""The `server` lines of a scale-out and a scale-in: added and taken out while the daemon runs.

How bytes change stands in conf/edit.py, how files are written in writer.py. nginx is not reloaded here: the data plane
brings it what follows.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from controller.adapters.nginx.files import DiskReader
from controller.adapters.nginx.writer import Changed, ConfWriter
from controller.conf.diff import FileEdit
from controller.conf.draft import EditRefused, Reason
from controller.conf.edit import AddServer, Edit, RemoveServer, plan
from controller.conf.index import Index
from controller.conf.parse import ConfSyntaxError
from controller.ports import ConfigError

ATTEMPTS = 3
"""How often an edit is planned anew because somebody edited the same file meanwhile."""


class NginxMembers:
    """Fulfils ports.Members for the configuration at `conf`."""

    def __init__(self, conf: str, writer: ConfWriter) -> None:
        self._conf = conf
        self._writer = writer
        self._index: Index | None = None
        self._lock = asyncio.Lock()  # edits of our own do not get in each other's way

    async def check(self, upstream: str, adding: Sequence[str], removing: Sequence[str], weight: int) -> None:
        """See that these lines could be added and taken out, by this user as well; ConfigError. Writes nothing."""
        wishes: list[Edit] = [_added(upstream, address, weight) for address in adding]
        wishes += [RemoveServer(upstream, address) for address in removing]
        try:
            await asyncio.to_thread(lambda: _see_rights(self._planned(wishes)))
        except EditRefused as error:
            raise ConfigError(str(error), "docs/editing.md explains") from error

    async def add(self, upstream: str, address: str, weight: int) -> str:
        """Have the line stand there, and say what was done; ConfigError, CheckFailed, WriteFailed."""
        return await self._have(_added(upstream, address, weight), Reason.EXISTS, "it stands there already")

    async def remove(self, upstream: str, address: str) -> str:
        """Have no such line stand there, and say what was done; ConfigError, CheckFailed, WriteFailed."""
        return await self._have(RemoveServer(upstream, address), Reason.NO_SERVER, "it is gone already")

    async def _have(self, wish: AddServer | RemoveServer, so: Reason, already: str) -> str:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self._lock:
                    files = await asyncio.to_thread(self._planned, [wish])
                    await self._writer.apply(files)
                    break
            except EditRefused as error:
                if error.reason is so:
                    return already
                raise ConfigError(str(error), "docs/editing.md explains") from error
            except Changed:
                if attempt == ATTEMPTS:
                    raise
        how = "added to" if isinstance(wish, AddServer) else "taken out of"
        return f"{how} {', '.join(file.path for file in files)}"

    def _planned(self, wishes: Sequence[Edit]) -> tuple[FileEdit, ...]:
        try:
            self._index = Index(self._conf, DiskReader(), self._index)
        except ConfSyntaxError as error:
            raise ConfigError(str(error), "correct it and see what `nginx -t` says") from error
        return plan(self._index, wishes)


def _see_rights(files: Iterable[FileEdit]) -> None:
    for file in files:
        path = Path(file.path).resolve()
        for place in (path, path.parent):  # a file is replaced, which is a matter of its directory
            if not os.access(place, os.W_OK):
                remedy = "run it as a user that may; where its unit keeps it out, `systemctl edit headgate` and add "
                raise ConfigError(f"the daemon may not write {place}", f"{remedy}ReadWritePaths={path.parent}")


def _added(upstream: str, address: str, weight: int) -> AddServer:
    return AddServer(upstream, address, {"weight": str(weight)} if weight != 1 else {})
