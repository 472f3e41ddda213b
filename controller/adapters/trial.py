"""A new gunicorn master on trial: its workers must pass the server's check while the old one's accept beside them.

Both accept on the same socket, and the kernel gives a connection to either. So each probe goes over a connection of
which /proc says that a worker of the new master has accepted it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection

from controller.adapters import gunicorn, procfs
from controller.adapters.pidfd import is_alive
from controller.adapters.probe import Endpoint, ask, connect, reason_of
from controller.core.model import Master, Server
from controller.ports import ProcessError, Trial

_PAUSE = 0.25  # seconds between two probes
_POLL = 0.02  # seconds; nobody is told when another process accepts
_HELD = 64  # connections to old workers that are kept open at once


async def passed(server: Server, old: Master, new: Master, trial: Trial) -> None:
    """Return when the workers of `new` have passed the check often enough in a row; ProcessError where they do not in
    time, or `new` ends.

    A check that is answered by neither master says nothing about them, and counts as passed.
    """
    endpoint = Endpoint.of(server, trial.check)
    clock = asyncio.get_running_loop().time
    deadline = clock() + trial.limit
    passes, why = 0, "none of them was seen to accept a connection"
    while True:
        if not is_alive((new.pid, new.created)):
            raise ProcessError(f"the new master {new.pid} has ended", "see its log")
        held: list[socket.socket] = []
        try:
            async with asyncio.timeout_at(deadline):
                if (mine := await _reach(endpoint, old, new, held)) is None:
                    return
                async with asyncio.timeout(trial.check.timeout):
                    await ask(endpoint._replace(connection=mine))
            passes += 1
        except Exception as error:  # noqa: BLE001 - whatever a server does to its client is the server's failure
            passes = 0
            if clock() < deadline:
                why = reason_of(error, trial.check)[1]
        finally:
            for sock in held:
                sock.close()
        if passes >= trial.rise:
            return
        if clock() >= deadline:
            message = f"the workers of the new master {new.pid} do not pass the check within {trial.limit:g} s: {why}"
            raise ProcessError(message, "see its log; rollout.up_timeout in headgate.toml says how long it may take")
        await asyncio.sleep(_PAUSE)


async def _reach(endpoint: Endpoint, old: Master, new: Master, held: list[socket.socket]) -> socket.socket | None:
    """A connection that a worker of `new` has accepted; None where neither master accepts it.

    Those that old workers accept stay open in `held` meanwhile: a sync worker has one at a time.
    """
    while True:
        before = await asyncio.to_thread(_connections, endpoint, new.pid)
        held.append(sock := await connect(endpoint))
        while True:
            inode = await asyncio.to_thread(_accepted, endpoint, sock, new.pid, before)
            if inode != 0:
                break
            await asyncio.sleep(_POLL)
        mine = await asyncio.to_thread(_whose, inode, old, new) if inode else None
        if mine:
            return sock
        if mine is False:
            return None
        if not inode or len(held) > _HELD:
            held.pop().close()
            await asyncio.sleep(_POLL)


def _connections(endpoint: Endpoint, pid: int) -> list[int]:
    return procfs.connections(endpoint.path, pid) if endpoint.path else []


def _accepted(endpoint: Endpoint, sock: socket.socket, pid: int, before: Collection[int]) -> int | None:
    """The inode of the server's end of this connection, 0 while nobody has accepted it, None where it is not known.

    Connections to a unix socket have no addresses: ours is the one that has come since `before`, if just one has.
    """
    if not endpoint.path:
        return procfs.server_end(sock.getsockname(), sock.getpeername(), pid)
    now = procfs.connections(endpoint.path, pid)
    if 0 in now:
        return 0
    fresh = [inode for inode in now if inode not in before]
    return fresh[0] if len(fresh) == 1 and 0 not in before else None


def _whose(inode: int, old: Master, new: Master) -> bool | None:
    """Whether a worker of the new master holds this socket; None where one of the old master's does, or nobody."""
    processes = procfs.table()
    if procfs.holders({inode}, {pid for pid, _ in gunicorn.workers(new.pid, processes)}):
        return True
    olds = {pid for pid, _ in old.workers} | {pid for pid in processes if procfs.within(pid, old.pid, processes)}
    return None if procfs.holders({inode}, olds) or not procfs.holders({inode}) else False
