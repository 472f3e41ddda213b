"""What a gunicorn master does on HUP, USR2, TTIN and TTOU, asked for and watched from outside until it is done.

Recognising masters and workers stands in gunicorn.py; finding, stopping and starting them in process.py.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from controller.adapters import gunicorn, procfs
from controller.adapters.pidfd import Identity, is_alive, send
from controller.core.model import Master, Server
from controller.ports import ProcessError

_POLL = 0.1  # seconds; nobody is told when another process forks
_STILL = 1.0  # seconds without another worker, after which no more are expected
_LOG = "see its log"
_T = TypeVar("_T")


async def reload(master: Master) -> Master:
    """HUP; the master with the workers that it had then. ProcessError where it has ended."""
    before = await asyncio.to_thread(_workers, master)
    _signal(master, signal.SIGHUP)
    return replace(master, workers=before)


async def renewed(master: Master, timeout: float) -> Master:
    """Wait until all workers of `master` have ended and others accept requests; the master with those.

    ProcessError where the master ends (it does when a worker cannot load the application), or after `timeout` seconds.
    """
    watch = _Watch(len(master.workers))

    def look() -> Master | None:
        now = _workers(master)
        if any(is_alive(old) for old in master.workers) or not watch.accept(now):
            return None
        return replace(master, workers=now)

    return await _until(look, timeout, f"the workers of pid {master.pid} were not replaced")


async def scale(master: Master, workers: int, timeout: float) -> Master:
    """TTIN or TTOU, one at a time, until so many workers accept requests; the master with them. ProcessError.

    Each TTOU ends a worker with its requests; each signal and what follows may take `timeout` seconds.
    """
    while True:
        before = await asyncio.to_thread(_workers, master)
        if len(before) == workers:
            text = f"not all of the {workers} workers of pid {master.pid} accept requests"
            return await _until(lambda: _accepting(master, workers), timeout, text)
        _signal(master, signal.SIGTTIN if len(before) < workers else signal.SIGTTOU)

        def moved(count: int = len(before)) -> bool:
            return len(_workers(master)) != count

        await _until(moved, timeout, f"pid {master.pid} still has {len(before)} workers")


async def upgrade(server: Server, master: Master, timeout: float) -> Master:
    """USR2, unless a new master is there already; the new one once it listens and its workers accept requests.

    ProcessError where it ends before, or after `timeout` seconds. The old one goes on in any case.
    """
    seen: list[Identity] = []
    watch = _Watch(len(master.workers))
    before, spent = await asyncio.to_thread(lambda: (_workers(master), procfs.spent_by_ended_children(master.pid)))

    def ended_unseen() -> bool:
        """Whether a child that was no worker has ended between two looks."""
        return all(map(is_alive, before)) and procfs.spent_by_ended_children(master.pid) > spent

    def look() -> Master | None:
        processes = procfs.table()
        if not is_alive((master.pid, master.created), master.executable):
            raise _gone(master)
        pid = gunicorn.successor(master.pid, processes)
        if pid is None:
            if seen or ended_unseen():
                name = f"the new master {seen[0][0]}" if seen else "the new master"
                message = f"{name} ended before its workers accepted requests; the old one goes on"
                raise ProcessError(message, _LOG)
            return None
        seen[:] = [(pid, processes[pid].created)]
        if not gunicorn.is_master(pid, processes):
            return None
        new = Master(pid, processes[pid].created, master.executable, gunicorn.workers(pid, processes))
        listeners = procfs.listening(server, pid)
        listens = pid in gunicorn.masters(procfs.holders(listeners), processes)
        return new if listens and watch.accept(new.workers) else None

    def there() -> bool:
        processes = procfs.table()
        pid = gunicorn.successor(master.pid, processes)
        return pid is not None and gunicorn.is_master(pid, processes)

    if not await asyncio.to_thread(there):
        if await asyncio.to_thread(gunicorn.hides_http, master.pid):
            message = f"pid {master.pid} was started as `python -m gunicorn`: a new master would not find Python's http"
            raise ProcessError(message, "start it as `gunicorn`, or with PYTHONSAFEPATH=1 in its environment")
        _signal(master, signal.SIGUSR2)
    return await _until(look, timeout, f"pid {master.pid} has made no new master that serves {server.address}")


async def successor(master: Master) -> Master | None:
    """The new master beside this one, as far as it has come."""

    def look() -> Master | None:
        processes = procfs.table()
        pid = gunicorn.successor(master.pid, processes)
        if pid is None:
            return None
        return Master(pid, processes[pid].created, procfs.executable(pid), gunicorn.workers(pid, processes))

    return await asyncio.to_thread(look)


async def _until(look: Callable[[], _T | None], timeout: float, why: str) -> _T:
    """What `look` finds, in a thread; ProcessError after `timeout` seconds."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    while not (found := await asyncio.to_thread(look)):
        if clock() >= deadline:
            raise ProcessError(f"{why} within {timeout:g} s", _LOG)
        await asyncio.sleep(_POLL)
    return found


def _workers(master: Master) -> tuple[Identity, ...]:
    """Its workers now; ProcessError where it has ended."""
    if not is_alive((master.pid, master.created), master.executable):
        raise _gone(master)
    return gunicorn.workers(master.pid, procfs.table())


class _Watch:
    """Whether all workers of a master accept requests: as many as were there before, or no more for a while."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._seen: tuple[Identity, ...] = ()
        self._since = 0.0

    def accept(self, workers: tuple[Identity, ...]) -> bool:
        """Whether these are all."""
        if not workers or not all(gunicorn.booted(pid) for pid, _ in workers):
            return False
        if workers != self._seen:
            self._seen, self._since = workers, time.monotonic()
        return len(workers) >= self._expected or time.monotonic() - self._since >= _STILL


def _accepting(master: Master, count: int) -> Master | None:
    workers = _workers(master)
    return replace(master, workers=workers) if _Watch(count).accept(workers) else None


def _signal(master: Master, number: signal.Signals) -> None:
    if not send((master.pid, master.created), number, master.executable):
        raise _gone(master)


def _gone(master: Master) -> ProcessError:
    return ProcessError(f"the master {master.pid} has ended", _LOG)
