"""This edge host as a whole: the mark that it is offline, and who is still connected to its nginx."""

from __future__ import annotations

import asyncio
from pathlib import Path

from controller.adapters.nginx import check, sockets
from controller.adapters.whole import put, read
from controller.ports import PlaneUnreachable, StoreError


class EdgeHost:
    """Fulfils ports.Edge. `mark` is a file that exists while the host is offline; `conf` is nginx's configuration.

    It is a file of its own, so that `headgate check` finds it while no daemon runs, and a lost store leaves it.
    """

    def __init__(self, mark: Path, conf: str) -> None:
        self._mark = mark
        self._conf = conf

    async def offline(self) -> bool:
        """Whether the mark is there; StoreError."""
        try:
            return await asyncio.to_thread(read, self._mark) is not None
        except OSError as error:
            raise StoreError(
                f"{self._mark} cannot be read: {error.strerror}", "make its directory readable for who runs headgate"
            ) from error

    async def set_offline(self, offline: bool) -> None:
        """Put the mark, or take it away; StoreError."""
        try:
            await asyncio.to_thread(put, self._mark, b"" if offline else None)
        except OSError as error:
            raise StoreError(
                f"{self._mark} cannot be written: {error.strerror}", "make its directory writable for who runs headgate"
            ) from error

    async def clients(self) -> int:
        """TCP connections to the ports that nginx listens on, none where no nginx runs; PlaneUnreachable."""
        return await asyncio.to_thread(self._clients)

    def _clients(self) -> int:
        try:
            master = check.find(self._conf).master
        except check.NginxMissing as error:
            raise PlaneUnreachable(error.message, error.remedy) from error
        return 0 if master is None else sockets.from_clients(master)
