"""Signals and waits that reach one process and never another that got its pid later."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable

from controller.adapters import procfs
from controller.ports import ProcessError

Identity = tuple[int, float]
"""(pid, created) as in `controller.core.model.Master`; `created` is in seconds since boot."""


def is_alive(identity: Identity, executable: str | None = None) -> bool:
    """Whether this very process lives, still running `executable` where one is given; PermissionError."""
    process = procfs.read(identity[0])
    if process is None or process.created != identity[1]:
        return False
    return executable is None or procfs.executable(identity[0]) == executable


def send(identity: Identity, number: signal.Signals, executable: str | None = None) -> bool:
    """Signal this very process; False where it is gone. ProcessError where that is not allowed."""
    try:
        descriptor = os.pidfd_open(identity[0])
    except ProcessLookupError:
        return False
    try:
        # The descriptor is fixed to one process from here on, so what is verified now is what the signal reaches.
        if not is_alive(identity, executable):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        message = f"pid {identity[0]} may not be sent {number.name} ({error})"
        remedy = "run the daemon as the same user, or give it CAP_KILL and CAP_SYS_PTRACE"
        raise ProcessError(message, remedy) from error
    finally:
        os.close(descriptor)
    return True


async def wait_gone(identities: Iterable[Identity], timeout: float) -> bool:
    """Whether all of them had ended (zombies have) within `timeout` seconds."""
    waits = [asyncio.ensure_future(_end(identity)) for identity in identities]
    if not waits:
        return True
    try:
        _, pending = await asyncio.wait(waits, timeout=timeout)
        return not pending
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _end(identity: Identity) -> None:
    try:
        descriptor = os.pidfd_open(identity[0])
    except ProcessLookupError:
        return
    try:
        if is_alive(identity):
            await readable(descriptor)
    finally:
        os.close(descriptor)


async def readable(descriptor: int) -> None:
    """Wait until the process of a pidfd has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
